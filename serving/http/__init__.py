"""What every HTTP service here is built on: API keys, limits, logs, metrics, errors and graceful shutdown."""
