"""Operations by arithmetic, held against those that torch counts as it runs."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from actors.monitors.flops import blocks_flops, head_flops, learning_flops, mean_context
from actors.monitors.gpu import trained_model
from tests.worlds import VOCAB, tiny_llama

TOKENS, HIDDEN, LAYERS = 16, 64, 3


def counted(folder: Path, tied: bool, backward: bool) -> tuple[float, AutoModelForCausalLM]:
    """The operations that torch counts for one row, for each of its tokens, without what attention computes of later tokens."""
    written = tiny_llama(folder, seed=1, hidden_size=HIDDEN, layers=LAYERS, tied=tied)
    model = AutoModelForCausalLM.from_pretrained(written, attn_implementation="eager")  # whose products torch counts
    counter = FlopCounterMode(display=False)
    with counter:
        logits = model(torch.arange(TOKENS)[None] % VOCAB).logits
        if backward:
            logits.sum().backward()
    masked = LAYERS * 4 * HIDDEN * TOKENS / 2 * (3 if backward else 1)
    return counter.get_total_flops() / TOKENS - masked, model


@pytest.mark.parametrize("tied", [True, False])
def test_a_forward_pass_takes_what_torch_counts(tmp_path: Path, tied: bool) -> None:
    found, model = counted(tmp_path / "model", tied, backward=False)
    shape = trained_model(model)
    assert blocks_flops(shape, TOKENS) + head_flops(shape) == pytest.approx(found, rel=0.005)


def test_learning_takes_three_times_as_much(tmp_path: Path) -> None:
    found, model = counted(tmp_path / "model", tied=False, backward=True)
    assert learning_flops(trained_model(model), TOKENS, target_share=1.0) == pytest.approx(found, rel=0.005)


def test_what_is_frozen_needs_no_gradient_of_its_own(tmp_path: Path) -> None:
    _, model = counted(tmp_path / "model", tied=False, backward=False)
    whole = learning_flops(trained_model(model), TOKENS, 1.0)
    model.requires_grad_(False)
    frozen = trained_model(model)
    assert frozen.trained == 0 and not frozen.trains_head
    assert learning_flops(frozen, TOKENS, 1.0) == pytest.approx(whole * 2 / 3)


def test_a_head_on_few_targets_takes_little(tmp_path: Path) -> None:
    _, model = counted(tmp_path / "model", tied=False, backward=False)
    shape = trained_model(model)
    less = learning_flops(shape, TOKENS, 1.0) - learning_flops(shape, TOKENS, 0.25)
    assert less == pytest.approx(3 * 0.75 * 2 * VOCAB * HIDDEN)


def test_tokens_of_long_rows_look_at_more() -> None:
    assert mean_context(np.array([4, 4])) == 4
    assert mean_context(np.array([1, 9])) == pytest.approx((1 * 1 + 9 * 9) / 10)
