"""Vision transformers: where they come from, what they are made of, and how every attention is reached."""
