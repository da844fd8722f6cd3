"""Ranges to search, and nothing else."""
