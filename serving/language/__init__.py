"""Serves a language export: a thin HTTP proxy in front of vLLM, which runs as a supervised process."""
