"""Bases in low precision: which format a checkpoint is in, and its tensors as the floats that it stands for."""
