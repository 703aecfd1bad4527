"""Dry runs: a real stage with real layer widths, but with few layers, images or steps, in a separate process."""
