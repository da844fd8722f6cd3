"""Benchmarks: each prints a table, then a line for each bar, and exits with 1 if a bar is missed."""
