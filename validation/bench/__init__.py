"""Measures speed and size of an export on this machine (`bench`), and tests its service (`serve-check`).

Validation, in the other packages, proves that an export's results are correct. Both write a record next to the export.
"""
