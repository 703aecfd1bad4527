"""Run vLLM exports: the launcher of the OpenAI server, and the validation of an export in the engine itself."""
