"""The basis of all HTTP services: API keys, limits, logs, metrics, error responses and graceful shutdown."""
