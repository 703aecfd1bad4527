"""Low-bit vision transformers: calibrated ranges, a trainable student, its distillation, and the stage."""
