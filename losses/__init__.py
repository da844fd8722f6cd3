"""Losses: pure mathematics on tensors. Imports torch, and nothing of Ray, vLLM or transformers."""
