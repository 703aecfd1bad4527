"""Low-bit vision transformers: ranges, a trainable student, its distillation, and the stage that joins them."""
