"""FALQON (arXiv 2510.24061): FP8 fine-tuning whose adapter lives inside the FP8 weights.

`layer.py` is the method's heart: one FP8 GEMM yields both the output and the adapter's activations. Around it:
`initialise.py` (the adapter's A), `rules.py` and `flush.py` (how the update enters the codes, after steps and at the
end), `convert.py` (any causal LM). All rounding is in `fp8pipe.numerics`.
"""
