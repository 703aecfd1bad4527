"""Running an exported artifact: the engine's environment, launcher and validation."""
