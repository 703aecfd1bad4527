"""Language models: locating them, analysing their structure, and preparing training text."""
