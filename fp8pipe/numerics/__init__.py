"""Low-precision number formats with their scales and rounding, and the device-specific operations of FP8 training."""
