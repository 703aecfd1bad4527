"""Serves exported artifacts over HTTP: vision models in this process, language models in vLLM's processes."""
