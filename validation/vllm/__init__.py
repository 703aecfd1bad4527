"""Runs vLLM exports: a launcher for vLLM's OpenAI server, and the validation of an export inside the engine."""
