"""Passes over a graph: small named rewrites, each in place and returning what it changed. A target runs those it needs.

Modules:
    products   rewrites Gemm and patch embeddings as MatMul, names nodes, removes machine-specific metadata
    quantize   replaces weights by codes, and quantizes activations
    exact      puts float64 around integer matrix multiplications
    editing    helpers that the passes share
"""
