"""Dry runs: estimates of a fine-tuning run from its shapes, and quantization with few images in a separate process."""
