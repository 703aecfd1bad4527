"""Runs exports in inference engines, to prove that the engines compute what the exported artifact does."""
