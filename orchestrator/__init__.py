"""Orchestrator: decides and keeps the books. Runs on the driver."""

__version__ = "0.1.0"
