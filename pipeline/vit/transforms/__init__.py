"""Equivalent transforms: they change a float model's weights but not its outputs, to reduce quantization errors."""
