"""Export to ONNX: a quantized vision model in, a graph out whose numbers are the artifact's, bit for bit.

What is listed here is loaded when it is first used: serving takes `exporters.graph.runtime` alone, in images that hold
neither torch nor onnx.
"""
