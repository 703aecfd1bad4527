"""Forms of a float model that compute the same and round better; see `stage.condition`."""
