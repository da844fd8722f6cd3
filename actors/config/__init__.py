"""Configuration schema of models, engines, training, evaluation, workers and tracking; no torch and no Ray."""
