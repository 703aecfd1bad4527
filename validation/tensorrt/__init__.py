"""Validation of exported graphs and engines for TensorRT."""
