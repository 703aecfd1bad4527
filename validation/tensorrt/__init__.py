"""TensorRT: validation of exported graphs and engines."""
