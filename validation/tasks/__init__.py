"""Scores of a language export on tasks (multiple-choice questions), with the EleutherAI harness and our own engines."""
