"""The optimizer: methods differ in the size of their gradients, so compare them at rates tuned for each.

The rate covers full fine-tuning of large models (1e-5), adapters (1e-4) and tiny models from scratch (1e-2). For your own model
this is too wide; a space of your own may say less.
"""

from tune_spaces.space import read_space

SPACE = read_space(
    {
        "train.optimizer.learning_rate": {"low": 1e-5, "high": 1e-2, "log": True},
        "train.optimizer.warmup_ratio": {"low": 0.0, "high": 0.1, "step": 0.02},
        "train.optimizer.weight_decay": [0.0, 0.01, 0.1],
        "train.batch_rows": [16, 32, 64, 128],
    }
)
