"""Configuration schema of a run, a search and a comparison, and how files become one; no decisions, and no torch or Ray."""
