"""Running an engine to prove that it holds the artifact."""
