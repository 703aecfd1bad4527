"""ONNX graphs of vision models: trace, passes, parity and lint, shared by the ONNX and TensorRT targets."""
