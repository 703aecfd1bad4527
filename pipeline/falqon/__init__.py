"""FALQON (arXiv 2510.24061): FP8 fine-tuning whose adapter lives inside the FP8 weights.

`layer.py` is the core of the method: one FP8 GEMM computes both the output and the adapter's activations. Around it:
`initialise.py` (the adapter's A), `rules.py` and `flush.py` (how the update is merged into the codes, after steps and
at the end), `convert.py` (conversion of any causal LM). All rounding is in `fp8pipe.numerics`.
"""
