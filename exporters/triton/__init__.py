"""Model repositories for the Triton Inference Server."""
