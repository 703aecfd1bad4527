"""Exports a quantized vision transformer as an ONNX graph with the artifact's codes and scales, bit for bit.

This file imports nothing, so that `--help` and `fp8pipe schema` can load `target.py` without torch.
"""
