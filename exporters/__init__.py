"""Artifact in, engine-ready checkpoint out; an exporter reads an artifact, never a live model."""
