"""Orchestrator: decides and keeps records; runs on the driver."""

__version__ = "0.1.0"
