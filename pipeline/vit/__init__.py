"""Quantization of vision transformers to few bits: calibrated ranges, and distillation of a quantized student."""
