"""Vision transformers: loading them, analysing their structure, intercepting their attention, quantized models."""
