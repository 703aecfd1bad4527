"""Pages of the documentation site that are written from the code: commands, settings, manifests, gates, errors."""
