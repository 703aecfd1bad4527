"""The vision server: images in, classes, values or features out, computed by an exported graph."""
