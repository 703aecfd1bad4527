"""The vision server: pictures in, classes or features out, over an exported graph."""
