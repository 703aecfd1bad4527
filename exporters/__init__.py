"""Exporters turn artifacts into checkpoints and graphs for engines; they read artifacts, never a live model."""
