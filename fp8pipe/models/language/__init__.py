"""Language models: where they come from, their structure, and text for them."""
