"""Engines that score rows, one foreign library a file; no pool and no store."""
