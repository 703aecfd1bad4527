"""A stage run small, to learn what it takes large: its own code, its own widths, little of what merely repeats.

What repeats is layers for a language model, images for a vision model. Memory, size and time of each phase are affine
in their number, so two rehearsals of each phase tell it for any number; no constant is made by hand.
"""
