"""Validation of exported graphs in ONNX Runtime."""
