"""Export to ONNX: a quantized vision model in, a graph out whose numbers are the artifact's, bit for bit.

Nothing is imported here, so that help and schema read the target without torch.
"""
