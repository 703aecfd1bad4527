"""Calibration images for vision transformers, real or synthetic."""
