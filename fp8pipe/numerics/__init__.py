"""Number formats: grids, scales and rounding, and the device-specific operations of FP8 training."""
