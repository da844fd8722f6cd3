"""Tokenizers: trained on the run's own text, loaded by name, compared token by token."""

import hashlib
import json
from collections.abc import Iterable, Iterator

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

PAD_TOKEN = "<|pad|>"
END_TOKEN = "<|end|>"
ROLE_TOKENS = ("<|user|>", "<|assistant|>", "<|system|>")

CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
"""The chat template of the tokenizers trained here: role, text, end of turn."""

SMALLEST_CONFIGURABLE = 300  # tokenizer.vocab_size cannot ask for less
SHOWN_DIFFERENCES = 5


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer; the same texts give the same tokenizer.

    It knows all 256 bytes, so every text survives encoding and decoding. Each digit is a token of its own, so that numbers
    are read digit by digit. Its special tokens are padding, the end of a sequence or turn, and one for each chat role.

    Args:
        texts: the text to learn from.
        vocab_size: tokens in the vocabulary, the special ones and the 256 bytes included.

    Raises:
        ValueError: naming the size that is reached, if the texts have too few distinct words for ``vocab_size``.
    """
    assert vocab_size >= SMALLEST_CONFIGURABLE, f"{vocab_size} tokens are too few"
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD_TOKEN, END_TOKEN, *ROLE_TOKENS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    seen = 0

    def counted() -> Iterator[str]:
        nonlocal seen
        for seen, text in enumerate(texts, start=1):  # noqa: B007 (it is read behind the loop)
            yield text

    tokenizer.train_from_iterator(counted(), trainer)
    reached = tokenizer.get_vocab_size()
    if reached < vocab_size:
        instead = f"tokenizer.vocab_size={reached}" if reached >= SMALLEST_CONFIGURABLE else "more training rows"
        raise ValueError(
            f"tokenizer.vocab_size {vocab_size} cannot be reached: the {seen} training texts give only {reached} tokens; "
            f"{instead} would do"
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD_TOKEN,
        eos_token=END_TOKEN,
        extra_special_tokens=list(ROLE_TOKENS),
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )


def load_tokenizer(name: str, revision: str | None = None, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model of the hub or of a folder.

    Raises:
        ValueError: if there is none, or if it cannot say which characters a token stands for.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"the tokenizer of {name!r} (revision {revision!r}) cannot be loaded: {error}\n"
            "A model name of the hub would do, or a folder that save_pretrained has written"
        ) from error
    if not tokenizer.is_fast:
        raise ValueError(
            f"the tokenizer of {name!r} is a {type(tokenizer).__name__}, which does not tell where in the text its tokens stand; "
            "the masks need a fast tokenizer: one with a tokenizer.json would do"
        )
    return tokenizer


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """Name a tokenizer by what its ids mean: 32 hex digits over the token-to-id map and the ids of the special tokens."""
    special = {name: tokenizer.convert_tokens_to_ids(str(token)) for name, token in tokenizer.special_tokens_map.items()}
    meaning = json.dumps([tokenizer.get_vocab(), special], sort_keys=True)
    return hashlib.blake2b(meaning.encode(), digest_size=16).hexdigest()


def ids_of(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the number above a tokenizer's largest id; models often have more rows in their heads."""
    return max(tokenizer.get_vocab().values()) + 1


def require_same_tokens(teacher: PreTrainedTokenizerBase, student: PreTrainedTokenizerBase) -> list[str]:
    """Raise if ids mean different tokens to teacher and student; return the tokens that only the student has.

    The token-to-id maps are compared, whatever the widths of the models' embeddings, which are often padded. Rows are cut by
    the teacher's tokenizer, so tokens that only the student has stand in none of them.

    Raises:
        ValueError: with the first tokens that differ and their ids on both sides.
    """
    teacher_ids, student_ids = teacher.get_vocab(), student.get_vocab()
    differing = [token for token in {**teacher_ids, **student_ids} if teacher_ids.get(token) != student_ids.get(token)]
    if set(differing).isdisjoint(teacher_ids) and {student_ids[token] for token in differing}.isdisjoint(teacher_ids.values()):
        return sorted(differing, key=student_ids.__getitem__)
    absent = max(len(teacher_ids), len(student_ids))
    differing.sort(key=lambda token: (min(teacher_ids.get(token, absent), student_ids.get(token, absent)), token))
    lines = [
        f"  {token!r} is {_id_or_absent(teacher_ids, token)} for the teacher, {_id_or_absent(student_ids, token)} for the student"
        for token in differing[:SHOWN_DIFFERENCES]
    ]
    if len(differing) > SHOWN_DIFFERENCES:
        lines.append(f"  and {len(differing) - SHOWN_DIFFERENCES} more")
    raise ValueError(
        f"teacher and student do not speak the same tokens: {len(differing)} tokens of {len(teacher_ids)} (teacher) and "
        f"{len(student_ids)} (student) differ; a student.model of the teacher's family would do\n" + "\n".join(lines)
    )


def _id_or_absent(ids: dict[str, int], token: str) -> str:
    return str(ids[token]) if token in ids else "absent"
