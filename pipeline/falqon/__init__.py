"""FALQON (arXiv 2510.24061): FP8 fine-tuning with the LoRA adapter stored in the same matrix as the FP8 weights.

`layer.py` is the core of the method: one FP8 GEMM computes both the output and the adapter's activations. The other
modules initialise the adapter's A (`initialise.py`), merge the update into the FP8 codes, after steps and at the end of
training (`rules.py`, `flush.py`), and convert any causal LM (`convert.py`). All rounding is in `fp8pipe.numerics`.
"""
