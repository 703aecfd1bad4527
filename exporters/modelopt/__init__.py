"""Checkpoints in the layout of NVIDIA ModelOpt, which TensorRT-LLM and vLLM read."""
