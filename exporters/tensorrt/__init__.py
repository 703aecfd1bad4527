"""Export to TensorRT: strongly typed Q/DQ graphs from an artifact's own codes, engines, and the truth about both."""
