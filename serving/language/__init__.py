"""Serve a language export: vLLM under supervision, behind a thin front of our own."""
