"""Checks of a run on a few rows, before a teacher's hours are spent: measured, and concluded in words."""
