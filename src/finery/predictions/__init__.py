"""Answers to evaluation sets: written in batches, scored, told."""
