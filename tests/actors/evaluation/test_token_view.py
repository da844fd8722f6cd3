"""A few held-out texts token by token: the text is whole, the rows are spread, and the numbers are those of a slow reading."""

import math

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from actors.evaluation import token_view
from actors.evaluation.token_view import MOST_TOKENS, TOKENS_BEFORE, pieces_of, spread_over_tasks_and_lengths, window_of
from orchestrator.data.tokenizers import train_tokenizer
from tests.actors.evaluation.test_evaluator import slow_kl
from tests.evaluation_world import World, logprobs_at_targets, make_world

TEXTS = ("Put in order:\nlake, bed\n\n  end", "naïve — 日本語 🎉🎉 ok", "مرحبا بك", "a \ufffd b", "", "\t<b>&amp;</b>\r\n")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"))


def of_bytes() -> PreTrainedTokenizerFast:
    return train_tokenizer(["naïve words, put in order: lake, bed and end of it all, one two three"] * 4, 300)


def of_pieces() -> PreTrainedTokenizerFast:
    """As SentencePiece makes them: a mark for each space, the first one dropped, unknown characters as bytes."""
    words = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "▁Put", "▁in", "▁order", ":", "▁ok", "a", "b"]
    model = models.BPE({word: index for index, word in enumerate(words)}, [], unk_token="<unk>", byte_fallback=True)
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("make", [of_bytes, of_pieces])
def test_pieces_are_the_text(make: object, text: str) -> None:
    tokenizer = make()  # type: ignore[operator]
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    pieces = pieces_of(tokenizer, ids, 0, len(ids))
    assert len(pieces) == len(ids)
    assert "".join(pieces) == tokenizer.decode(ids, skip_special_tokens=False) == text


def test_a_character_of_several_tokens_stands_at_its_last() -> None:
    tokenizer = of_bytes()
    ids = tokenizer("x🎉y")["input_ids"]
    assert pieces_of(tokenizer, ids, 0, len(ids)) == ("x", "", "", "", "🎉", "y")
    assert pieces_of(tokenizer, ids, 0, 3) == ("x", "", "\ufffd"), "cut within a character, what is there is shown"


def test_special_tokens_are_shown() -> None:
    tokenizer = of_bytes()
    ids = [*tokenizer("a")["input_ids"], tokenizer.eos_token_id]
    assert pieces_of(tokenizer, ids, 0, 2) == ("a", "<|end|>")


def test_a_piece_in_the_middle_keeps_its_space() -> None:
    tokenizer = of_pieces()
    ids = [tokenizer.convert_tokens_to_ids(token) for token in ("▁Put", "▁in", "▁order", ":")]
    assert pieces_of(tokenizer, ids, 0, 4) == ("Put", " in", " order", ":")
    assert pieces_of(tokenizer, ids, 2, 4) == (" order", ":")


def test_rows_are_of_all_tasks_and_lengths() -> None:
    tasks = ["a", "a", "a", "b", "b", "c", "c", "c"]
    lengths = np.array([5, 50, 9, 7, 70, 3, 30, 90])
    chosen = spread_over_tasks_and_lengths(tasks, lengths, 3)
    assert chosen == [0, 3, 7], "the shortest of a, one of the middle of b, the longest of c"
    six = spread_over_tasks_and_lengths(tasks, lengths, 6)
    assert sorted(tasks[row] for row in six) == ["a", "a", "b", "b", "c", "c"] and len(set(six)) == 6
    assert sorted(spread_over_tasks_and_lengths(tasks, lengths, 99)) == list(range(8))
    assert spread_over_tasks_and_lengths([None] * 5, np.array([4, 2, 9, 3, 1]), 3) == [4, 0, 2], "shortest, middle, longest"
    assert spread_over_tasks_and_lengths([None] * 2, np.array([4, 2]), 1) == [1]


def test_a_long_row_is_cut_to_what_leads_to_its_targets() -> None:
    assert window_of(MOST_TOKENS, 300) == (0, MOST_TOKENS)
    assert window_of(5000, 10) == (0, MOST_TOKENS)
    assert window_of(5000, 2000) == (2000 - TOKENS_BEFORE, 2000 - TOKENS_BEFORE + MOST_TOKENS)
    assert window_of(5000, 4990) == (5000 - MOST_TOKENS, 5000)


@pytest.mark.parametrize("most_tokens", [MOST_TOKENS, 6])
def test_numbers_are_those_of_a_slow_reading(world: World, monkeypatch: pytest.MonkeyPatch, most_tokens: int) -> None:
    monkeypatch.setattr(token_view, "MOST_TOKENS", most_tokens)
    monkeypatch.setattr(token_view, "TOKENS_BEFORE", 2)
    views = world.evaluate("student", 5).views
    assert [view.row for view in views] == [view.row for view in world.evaluate("teacher", 5).views]
    assert len(views) == 6 and {view.task for view in views} == {"t0", "t1"}
    examples = {example.row: example for example in world.examples()}
    for view in views:
        example = examples[view.row]
        whole = [f"w{token}" for token in example.token_ids]
        assert view.before + len(view.pieces) + view.after == len(whole)
        assert len(view.pieces) == min(most_tokens, len(whole)) and view.targets
        assert [piece.strip() for piece in view.pieces] == whole[view.before : view.before + len(view.pieces)]
        teacher = dict(zip(example.target_positions, logprobs_at_targets(world.folder / "teacher", example), strict=True))
        student = dict(zip(example.target_positions, logprobs_at_targets(world.folder / "student", example), strict=True))
        shown = [place + view.before for place in view.targets]
        assert shown == [place for place in teacher if view.before <= place < view.before + len(view.pieces)]
        for index, place in enumerate(shown):
            target = int(example.token_ids[place])
            p, q = teacher[place], student[place]
            assert view.uncertainty[index] == pytest.approx(1 - math.exp(p[target]), abs=1e-5)
            assert view.divergence[index] == pytest.approx(slow_kl(p, q, target, 5), abs=2e-3)
            assert view.probability[index] == pytest.approx(math.exp(q[target]), abs=1e-5)
            assert view.favourite[index] == f"w{q.argmax()}"
            assert view.favourite_probability[index] == pytest.approx(math.exp(q.max()), abs=1e-5)


def test_the_teacher_is_at_no_distance_from_itself(world: World) -> None:
    assert max(max(view.divergence) for view in world.evaluate("teacher", 5).views) < 1e-5


def test_all_targets_of_all_rows_have_the_mean_of_the_whole(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_view, "ROWS_VIEWED", 99)
    evaluation = world.evaluate("student", 5)
    values = [value for view in evaluation.views for value in view.divergence]
    assert len(values) == evaluation.metrics.targets
    assert np.mean(values) == pytest.approx(evaluation.metrics.kl_to_teacher, abs=1e-5)
