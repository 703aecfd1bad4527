"""Export to TensorRT: strongly typed Q/DQ graphs with an artifact's own codes, engines, and checks of both."""
