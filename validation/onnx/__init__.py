"""ONNX Runtime: validation of exported graphs."""
