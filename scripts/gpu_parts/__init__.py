"""The parts of `scripts/gpu_session.py`: what is measured on a GPU, one module each."""
