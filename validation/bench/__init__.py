"""Measures an export on this machine: speed and size (`bench`), and whether its service works (`serve-check`).

Validation proves that the numbers are right; this package measures and sends test requests. Both write a record next to
the export.
"""
