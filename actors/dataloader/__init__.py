"""Which rows a step takes, and their tensors; no model and no loss."""
