"""fp8pipe: low-bit models from training to the engine that serves them, proved bit for bit."""

__version__ = "0.1.0"
