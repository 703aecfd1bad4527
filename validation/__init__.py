"""Runs inference engines on exports, to prove that they compute what the artifact says."""
