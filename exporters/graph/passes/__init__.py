"""Small named rewrites of a graph, each in place and returning what it changed; a target runs those it needs, in order.

products (Gemm and patch embeddings as MatMul; names, and nothing of the machine), quantize (codes of weights,
quantizers of activations), exact (float64 around integer products); editing is what they are made of.
"""
