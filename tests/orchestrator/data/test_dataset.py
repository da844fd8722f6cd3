"""Data as models see it: split, masks, borders, counts and files."""

from functools import cache
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from actors.records import example_key
from orchestrator.config.data import TASK_KINDS, DataConfig
from orchestrator.config.formats import ChatFormat, InstructionFormat
from orchestrator.data.mixture import NumberedRow, numbered
from orchestrator.data.synthetic import make_rows
from orchestrator.data.templates import render_rows, texts_to_learn
from orchestrator.data.tokenization import TokenizedRows, token_extents, tokenize
from orchestrator.data.tokenizers import train_tokenizer

END = 1
PLAIN = InstructionFormat(kind="instruction", prompt="{{ prompt }}")


@cache
def trained() -> PreTrainedTokenizerFast:
    rows = numbered(make_rows(100, TASK_KINDS, 0))
    return train_tokenizer(texts_to_learn(rows, DataConfig()), 400)


def pieces(
    *tokens: str, bos: bool = False, eos: bool = True, trim_offsets: bool = False, merges: tuple[tuple[str, str], ...] = ()
) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer with these tokens behind the special ones, joined by these merges."""
    vocabulary = {token: index for index, token in enumerate(["<s>", "<|end|>", *tokens])}
    tokenizer = Tokenizer(models.BPE(vocabulary, list(merges)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    steps: list[Any] = [processors.ByteLevel(trim_offsets=trim_offsets)]
    if bos:
        steps.append(processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)]))
    tokenizer.post_processor = processors.Sequence(steps)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", **({"eos_token": "<|end|>"} if eos else {}))


def tokenize_one(
    prompt: str, response: str, tokenizer: PreTrainedTokenizerFast, **settings: Any
) -> tuple[list[str], list[str], TokenizedRows]:
    """All tokens of one instruction row, those that are targets, and the counts."""
    data = DataConfig(format=PLAIN, **settings)
    rendered = render_rows([NumberedRow(5, {"prompt": prompt, "response": response})], data).rows
    rows = tokenize(rendered, tokenizer, data)
    if not rows.examples:
        return [], [], rows
    (example,) = rows.examples
    assert example.row == 5 and example.key == example_key(example.token_ids, example.loss_mask)
    assert example.token_ids.dtype == np.int32 and example.loss_mask.dtype == bool
    tokens, targets = (tokenizer.convert_ids_to_tokens(ids.tolist()) for ids in (example.token_ids, example.targets))
    return tokens, targets, rows


def test_response_and_end_are_targets() -> None:
    tokens, targets, rows = tokenize_one("ab", "ba", pieces("a", "b"))
    assert tokens == ["a", "b", "b", "a", "<|end|>"]
    assert targets == ["b", "a", "<|end|>"]
    assert rows.merged_at_border == 0


def test_a_token_across_the_border_is_a_target_and_its_row_is_counted() -> None:
    tokens, targets, rows = tokenize_one("ab", "ba", pieces("a", "b", "bb", merges=(("b", "b"),)))
    assert tokens == ["a", "bb", "a", "<|end|>"]
    assert targets == ["bb", "a", "<|end|>"]
    assert rows.merged_at_border == 1


@pytest.mark.parametrize("trim_offsets", [False, True])
def test_spaces_belong_to_the_side_they_stand_on(trim_offsets: bool) -> None:
    apart = pieces("a", "b", "Ġ", trim_offsets=trim_offsets)
    tokens, targets, rows = tokenize_one("a ", "  b", apart)
    assert tokens == ["a", "Ġ", "Ġ", "Ġ", "b", "<|end|>"]
    assert targets == ["Ġ", "Ġ", "b", "<|end|>"]
    assert rows.merged_at_border == 0
    joined = pieces("a", "b", "Ġ", "Ġb", trim_offsets=trim_offsets, merges=(("Ġ", "b"),))
    tokens, targets, rows = tokenize_one("a ", "b", joined)
    assert tokens == ["a", "Ġb", "<|end|>"]
    assert targets == ["Ġb", "<|end|>"]
    assert rows.merged_at_border == 1


def test_a_token_the_tokenizer_begins_with_is_no_target() -> None:
    tokens, targets, _ = tokenize_one("", "ab", pieces("a", "b", bos=True))
    assert tokens == ["<s>", "a", "b", "<|end|>"]
    assert targets == ["a", "b", "<|end|>"]


def test_nothing_predicts_the_first_token() -> None:
    tokens, targets, _ = tokenize_one("", "ab", pieces("a", "b"))
    assert tokens == ["a", "b", "<|end|>"]
    assert targets == ["b", "<|end|>"]


def test_a_first_token_across_the_border_is_no_target_either() -> None:
    tokens, targets, rows = tokenize_one("b", "ba", pieces("a", "b", "bb", merges=(("b", "b"),)))
    assert tokens == ["bb", "a", "<|end|>"]
    assert targets == ["a", "<|end|>"]
    assert rows.merged_at_border == 1


def test_an_end_that_is_there_is_not_doubled() -> None:
    tokens, targets, _ = tokenize_one("a", "b<|end|>", pieces("a", "b"))
    assert tokens == ["a", "b", "<|end|>"]
    assert targets == ["b", "<|end|>"]


def test_an_end_the_tokenizer_adds_is_a_target() -> None:
    tokenizer = pieces("a", "b")
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A <|end|>", special_tokens=[("<s>", 0), ("<|end|>", END)]
    )
    tokens, targets, _ = tokenize_one("a", "b", tokenizer)
    assert tokens == ["<s>", "a", "b", "<|end|>"]
    assert targets == ["b", "<|end|>"]


def test_a_tokenizer_without_an_end_is_refused_for_instructions() -> None:
    with pytest.raises(ValueError, match=r"no end-of-sequence token \(eos_token\); data\.format\.kind=chat would do"):
        tokenize_one("a", "b", pieces("a", "b", eos=False))


@given(st.text(), st.text(min_size=1).filter(lambda text: bool(text.strip())))
@settings(deadline=None)
def test_targets_spell_the_response_and_the_end(prompt: str, response: str) -> None:
    tokenizer = trained()
    prompt = f"<|user|>{prompt}"  # so that the first token, which is never a target, holds nothing of the response
    rendered = render_rows([NumberedRow(0, {"prompt": prompt, "response": response})], DataConfig(format=PLAIN)).rows
    rows = tokenize(rendered, tokenizer, DataConfig(format=PLAIN))
    (example,) = rows.examples
    assert tokenizer.decode(example.token_ids) == f"{prompt}{response}<|end|>"
    spelled = tokenizer.decode(example.targets)
    if rows.merged_at_border:
        assert spelled.endswith(f"{response}<|end|>") and len(spelled) > len(response) + len("<|end|>")
    else:
        assert spelled == f"{response}<|end|>"


def test_text_of_every_script_is_masked_by_character() -> None:
    rendered = render_rows([NumberedRow(0, {"prompt": "東京\n", "response": "👩‍👩‍👧 é\u0301"})], DataConfig(format=PLAIN)).rows
    (example,) = tokenize(rendered, trained(), DataConfig(format=PLAIN)).examples
    assert trained().decode(example.targets) == "👩‍👩‍👧 é\u0301<|end|>"


def test_a_conversation_has_the_assistants_turns_as_targets() -> None:
    talk = [
        {"role": "user", "content": "What is 1 plus 2?"},
        {"role": "assistant", "content": "3"},
        {"role": "user", "content": "And 4?"},
        {"role": "assistant", "content": "It is 4, naïvely."},
    ]
    data = DataConfig(format=ChatFormat(kind="chat"))
    rendered = render_rows([NumberedRow(0, {"messages": talk})], data, trained()).rows
    (example,) = tokenize(rendered, trained(), data).examples
    assert trained().decode(example.targets) == "3<|end|>It is 4, naïvely.<|end|>"
    assert trained().decode(example.token_ids) == rendered[0].text
    assert example.token_ids.tolist().count(END) == 4


def test_a_conversation_gets_no_special_tokens_beyond_its_template() -> None:
    tokenizer = pieces("a", "b", bos=True)
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    data = DataConfig(format=ChatFormat(kind="chat", template=template))
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    (example,) = tokenize(render_rows([NumberedRow(0, {"messages": talk})], data, tokenizer).rows, tokenizer, data).examples
    assert tokenizer.convert_ids_to_tokens(example.token_ids.tolist()) == ["a", "b"]


def test_extents_join_up_and_added_tokens_have_none() -> None:
    offsets = [(0, 0), (0, 1), (2, 2), (3, 5), (4, 5), (0, 0)]
    assert token_extents(offsets, [1, 0, 0, 0, 0, 1]).tolist() == [[0, 0], [0, 1], [1, 2], [2, 5], [4, 5], [0, 0]]
    assert token_extents([], []).shape == (0, 2)


def test_rows_too_long_are_dropped_or_cut_and_counted() -> None:
    tokenizer = pieces("a", "b")
    assert len(tokenize_one("aa", "b", tokenizer, max_tokens=4)[0]) == 4
    tokens, _, rows = tokenize_one("aaa", "b", tokenizer, max_tokens=4)
    assert (tokens, rows.dropped_long, rows.truncated, rows.longest, rows.longest_read) == ([], 1, 0, 0, 5)
    tokens, targets, rows = tokenize_one("aaa", "bb", tokenizer, max_tokens=4, too_long="truncate")
    assert (tokens, targets) == (["a", "a", "a", "b"], ["b"])
    assert (rows.dropped_long, rows.truncated, rows.without_target, rows.longest, rows.longest_read) == (0, 1, 0, 4, 6)


def test_a_row_cut_before_its_first_target_is_dropped_and_counted() -> None:
    tokens, _, rows = tokenize_one("aaaa", "b", pieces("a", "b"), max_tokens=4, too_long="truncate")
    assert (tokens, rows.kept, rows.truncated, rows.without_target) == ([], [], 0, 1)
