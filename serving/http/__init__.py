"""The ground of every HTTP service here: keys, limits, logs, metrics, errors and an orderly end."""
