"""Actors: what holds a device or runs inside Ray, and what crosses between teacher and student."""
