"""Images for ViT calibration, real or synthetic, and the ranges measured on them."""
