"""Comparisons of this project with its peers: what `benchmarks/benchmark.py` runs."""
