"""Equivalent transforms, which change a float model's weights but not its outputs, for smaller quantization errors."""
