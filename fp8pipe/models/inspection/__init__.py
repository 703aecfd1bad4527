"""Inspects checkpoints: the format of each layer, its scales and its share of saturated codes.

Neither an inference engine nor a model library is needed. Only headers and raw bytes are read, a chunk at a time, so
that checkpoints larger than memory can be inspected, as well as checkpoints in formats that fp8pipe cannot load.
"""
