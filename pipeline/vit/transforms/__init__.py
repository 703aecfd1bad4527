"""Equivalent transforms: forms of a float model that compute the same and round better; see `apply_transforms`."""
