"""Export to vLLM: an artifact in, a compressed-tensors checkpoint out, compared bit for bit."""
