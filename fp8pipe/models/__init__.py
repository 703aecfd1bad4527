"""Checkpoints and models as they are found: names, files, structure, language and vision."""
