"""What any checkpoint holds: formats by layer, scales, codes at the ends of their grids. No engine, no model library.

Read as bytes and headers, a chunk at a time, so that a checkpoint larger than memory can be looked at, and so can one
in a format that nothing here can load.
"""
