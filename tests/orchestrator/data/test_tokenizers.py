"""Tokenizers: trained, loaded and compared."""

import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, ByT5Tokenizer, PreTrainedTokenizerFast

from orchestrator.data.tokenizers import load_tokenizer, require_same_tokens, tokenizer_hash, train_tokenizer

TEXTS = [
    f"The largest of {n}, {n * 7 % 100} and {n * 31 % 100} is hard to see, said {name}. {more}"
    for n in range(10)
    for name, more in (
        ("Ann", "Nobody counts faster than the children of the village."),
        ("Béla", "Whatever comes before breakfast should be written down."),
        ("Chidi", "Seven houses stand along the river, each with a garden."),
    )
]


@cache
def trained(vocab_size: int = 320) -> PreTrainedTokenizerFast:
    return train_tokenizer(TEXTS, vocab_size)


def test_the_vocabulary_has_the_size_asked_for() -> None:
    assert len(trained(300)) == 300
    assert sorted(trained(320).get_vocab().values()) == list(range(320))


def test_special_tokens_come_first() -> None:
    assert trained().convert_ids_to_tokens(list(range(5))) == ["<|pad|>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>"]
    assert (trained().pad_token, trained().eos_token) == ("<|pad|>", "<|end|>")


@given(st.text())
@settings(deadline=None)
def test_any_text_survives_encoding_and_decoding(text: str) -> None:
    assert trained().decode(trained().encode(text)) == text


@pytest.mark.parametrize(
    "text", ["", " ", "a  b\n\n\tc ", "naïve 東京 👩‍👩‍👧 \u202e \x00", "I 'm , no . n't", "<|end|> <|user|>x"]
)
def test_awkward_text_survives_too(text: str) -> None:
    assert trained().decode(trained().encode(text)) == text


def test_each_digit_is_a_token() -> None:
    assert trained().tokenize("30 and 305")[-3:] == ["3", "0", "5"]
    assert not any(len(token) > 1 and any(sign.isdigit() for sign in token) for token in trained().get_vocab())


def test_frequent_words_are_one_token() -> None:
    assert len(trained(320).tokenize(" largest")) == 1


def test_the_same_texts_give_the_same_tokenizer_in_another_process() -> None:
    program = (
        f"from orchestrator.data.tokenizers import *\ntokenizer = train_tokenizer({TEXTS!r}, 320)\n"
        "print(tokenizer_hash(tokenizer), tokenizer('largest, said Ann')['input_ids'])"
    )
    printed = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == f"{tokenizer_hash(trained())} {trained()('largest, said Ann')['input_ids']}"


def test_a_saved_tokenizer_comes_back_the_same(tmp_path: Path) -> None:
    trained().save_pretrained(tmp_path)
    for again in (AutoTokenizer.from_pretrained(tmp_path), load_tokenizer(str(tmp_path))):
        text = " ".join(TEXTS[:3]) + " <|end|> é 👍  \n"
        assert again(text)["input_ids"] == trained()(text)["input_ids"]
        assert again.decode(again.encode(text)) == text
        assert again.chat_template == trained().chat_template
        assert tokenizer_hash(again) == tokenizer_hash(trained())
        require_same_tokens(trained(), again)


def test_the_chat_template_marks_roles_and_ends_of_turns() -> None:
    messages = [{"role": "system", "content": "S"}, {"role": "user", "content": "U"}, {"role": "assistant", "content": "A"}]
    rendered = trained().apply_chat_template(messages, tokenize=False)
    assert rendered == "<|system|>S<|end|><|user|>U<|end|><|assistant|>A<|end|>"
    prompt = trained().apply_chat_template(messages[:2], tokenize=False, add_generation_prompt=True)
    assert prompt == "<|system|>S<|end|><|user|>U<|end|><|assistant|>"


def test_a_vocabulary_out_of_reach_is_refused_with_the_one_that_would_do() -> None:
    with pytest.raises(
        ValueError, match=r"tokenizer\.vocab_size 5000 cannot be reached: .*; tokenizer\.vocab_size=(\d+) would do"
    ) as caught:
        train_tokenizer(TEXTS, 5000)
    reached = int(str(caught.value).split("tokenizer.vocab_size=")[1].split()[0])
    assert len(train_tokenizer(TEXTS, reached)) == reached


def test_too_little_text_asks_for_more_rows() -> None:
    with pytest.raises(ValueError, match=r"the 1 training texts give only \d+ tokens; more training rows would do"):
        train_tokenizer(["a word"], 300)


def test_a_tokenizer_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"the tokenizer of '.*none' \(revision None\) cannot be loaded: (.|\n)*save_pretrained"):
        load_tokenizer(str(tmp_path / "none"))


def test_a_tokenizer_without_offsets_is_refused(tmp_path: Path) -> None:
    ByT5Tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"is a ByT5Tokenizer, .* one with a tokenizer\.json would do"):
        load_tokenizer(str(tmp_path))


def changed(old: str, new: str) -> PreTrainedTokenizerFast:
    """The trained tokenizer with another end-of-sequence token or with one token more."""
    tokenizer = train_tokenizer(TEXTS, 320)
    if old:
        tokenizer.eos_token = new
    else:
        tokenizer.add_tokens([new])
    return tokenizer


def test_the_hash_speaks_of_tokens_and_of_special_ids() -> None:
    hashes = {
        tokenizer_hash(tokenizer) for tokenizer in (trained(), trained(300), changed("<|end|>", "<|user|>"), changed("", "@@"))
    }
    assert len(hashes) == 4
    assert all(len(hash) == 32 for hash in hashes)


def test_a_token_more_on_one_side_is_refused() -> None:
    message = (
        r"1 tokens of 321 \(teacher\) and 320 \(student\) differ; (.|\n)*'@@' is 320 for the teacher, absent for the student"
    )
    with pytest.raises(ValueError, match=message):
        require_same_tokens(changed("", "@@"), trained())


def test_maps_of_equal_size_that_differ_are_refused_with_the_first_differences() -> None:
    other = train_tokenizer([text.replace("largest", "smallest") for text in TEXTS], 320)
    assert len(other) == len(trained())
    ours, theirs = trained().get_vocab(), other.get_vocab()
    differing = {token for token in ours.keys() | theirs.keys() if ours.get(token) != theirs.get(token)}
    first = min(differing, key=lambda token: (min(ours.get(token, 999), theirs.get(token, 999)), token))
    with pytest.raises(ValueError) as caught:
        require_same_tokens(trained(), other)
    lines = str(caught.value).splitlines()
    assert f"{len(differing)} tokens" in lines[0]
    ids = [str(ids.get(first, "absent")) for ids in (ours, theirs)]
    assert lines[1] == f"  {first!r} is {ids[0]} for the teacher, {ids[1]} for the student"
    assert len(lines) == 7 and lines[-1] == f"  and {len(differing) - 5} more"
