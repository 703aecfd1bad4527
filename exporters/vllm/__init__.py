"""Export to vLLM: turns an artifact into a compressed-tensors checkpoint and compares the two bit for bit."""
