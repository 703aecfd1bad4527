"""Small named rewrites of a graph, each in place and returning what it changed; a target runs those it needs, in order.

products (Gemm and patch embeddings as MatMul, naming, and removal of machine-specific metadata), quantize (codes of
weights, quantizers of activations), exact (float64 around integer matrix multiplications); editing has shared helpers.
"""
