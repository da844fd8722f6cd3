"""Greedy answers of a causal language model to prompts."""

from collections.abc import Sequence

import numpy as np
import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from actors.config.models import EvaluateConfig
from actors.dataloader.collator import PADDING
from actors.evaluation.metrics import batches_by_length


def generate_answers(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[np.ndarray], evaluate: EvaluateConfig,
    ends: tuple[int, ...],
) -> list[str]:  # fmt: skip
    """Return the greedy answers to prompts, in their order, each as far as a token of ``ends``.

    Args:
        model: ready to predict.
        tokenizer: makes texts of tokens.
        prompts: token ids [T] of each.
        evaluate: how long an answer may be, and how many prompts are answered at a time.
        ends: token ids at which an answer ends.
    """
    if not prompts:
        return []
    # A model's own generation settings may sample or penalise repetition; what is not said here must not come from there.
    model.generation_config = GenerationConfig(
        do_sample=False, max_new_tokens=evaluate.max_new_tokens, eos_token_id=list(ends), pad_token_id=PADDING
    )
    answers = [""] * len(prompts)
    for positions in batches_by_length(np.array([len(prompt) for prompt in prompts]), evaluate.batch_rows):
        chosen = [prompts[position] for position in positions]
        width = max(len(prompt) for prompt in chosen)
        token_ids = torch.full((len(chosen), width), PADDING)
        attention_mask = torch.zeros_like(token_ids)
        for index, prompt in enumerate(chosen):
            token_ids[index, width - len(prompt) :] = torch.from_numpy(prompt.astype(np.int64))
            attention_mask[index, width - len(prompt) :] = 1
        generated = model.generate(token_ids.to(model.device), attention_mask=attention_mask.to(model.device))
        for position, tokens in zip(positions, generated[:, width:].tolist(), strict=True):
            length = next((place for place, token in enumerate(tokens) if token in ends), len(tokens))
            answers[position] = tokenizer.decode(tokens[:length], skip_special_tokens=True)
    return answers
