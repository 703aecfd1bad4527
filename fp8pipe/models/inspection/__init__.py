"""Inspects any checkpoint: formats by layer, scales, saturated codes. Needs no engine and no model library.

Files are read as headers and raw bytes, a chunk at a time, so that a checkpoint larger than memory can be inspected, as
can one in a format that nothing here can load.
"""
