"""Low-precision base models: detects a checkpoint's format and decodes its tensors to floating point."""
