"""Dry runs: a stage runs in a separate process with the real layer widths, but with few layers, images or steps."""
