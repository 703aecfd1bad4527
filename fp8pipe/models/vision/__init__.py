"""Vision transformers: loading them, reading their structure, and intercepting their attention."""
