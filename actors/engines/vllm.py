"""vLLM as a scoring engine.

L tokens of a prompt, N targets, K top-k, M most likely tokens: K+1, and some to spare for those not named; C candidates, H hidden
size.

Prompt log-probabilities are asked for M tokens: vLLM computes an array [L-1, 1+M] with the prompt's own next token in
column 0 and the M most likely ones after it; row i speaks of token i+1. Two patches of its insides (``vllm_patches``) make that
cheap. Where the installed version does not take one, or a probe comes out differently, the public way is gone: ``flat_logprobs``
(0.15 and later) is read, and all rows are computed. Candidates and hidden states need both patches.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import vllm
from vllm import LLM, SamplingParams
from vllm.platforms import current_platform
from vllm.v1.engine.exceptions import EngineDeadError

from actors.dataloader.hidden_states import bits_of
from actors.engines.base import EngineDied, TeacherSpec, likeliest_asked, require_top_k, scores_from_likeliest
from actors.engines.teacher_head import read_head
from actors.engines.vllm_arguments import engine_arguments
from actors.engines.vllm_limits import require_build_for
from actors.engines.vllm_patches import PromptArrays, TargetRows, WantedRows, keep_arrays
from actors.records import NO_TOKEN, Example, TeacherScores, with_candidates

TOKENS_PER_STEP = 8192
SPARE = 8  # tokens asked for beyond K+1 where some tokens are not to be named; a row that needs more is asked again
PROBE_TOKENS = 5
MOST_COLUMNS = 1 << 24  # that a request may ask for with candidates or hidden states, whatever vocabulary and hidden size are
PROBE_TOLERANCES = {"float32": 1e-3, "bfloat16": 0.2, "float16": 0.05}  # nats; products of other shapes round differently


class VllmEngine:
    """Scores rows through the prompt log-probabilities of one in-process vLLM engine.

    ``engine_environment`` must be in the environment before this module is imported.
    """

    def __init__(self, spec: TeacherSpec) -> None:
        engine = spec.engine
        require_build_for(engine.gpu, current_platform.device_type)
        self._llm = LLM(
            max_model_len=spec.longest_row + 1,  # vLLM always generates one token
            max_num_batched_tokens=max(TOKENS_PER_STEP, spec.longest_row + 1),
            max_logprobs=most_logprobs(spec),
            worker_extension_cls=f"{TargetRows.__module__}.{TargetRows.__qualname__}",
            enable_prefix_caching=False,  # log-probabilities of cached positions are never computed
            **engine_arguments(engine, spec.model),
        )
        self.vocab_size: int = self._llm.llm_engine.model_config.get_vocab_size()
        require_top_k(spec.top_k, self.vocab_size, spec.ids_below)
        self._spec = spec
        self._likeliest = likeliest_asked(spec, self.vocab_size, SPARE)
        self._hidden_size: int = self._llm.llm_engine.model_config.get_hidden_size() if spec.wire == "hidden" else 0
        self._tolerance = PROBE_TOLERANCES[engine.dtype]
        self.reads_arrays = False
        """Whether results come as the engine's arrays; otherwise through the public flat_logprobs."""
        self.reads_arrays = keep_arrays() and self._probe_arrays(min(PROBE_TOKENS, spec.longest_row))
        self.skips_prompts = False
        """Whether only the rows that predict targets are multiplied by the output head."""
        self.skips_prompts = self.reads_arrays and self._take_target_rows() and self._probe_rows(spec.longest_row)
        if spec.wire != "top_k" and not self._tells_more():
            raise ValueError(
                f"rollouts.wire is {spec.wire}, but vLLM {vllm.__version__} is of an unknown form, which tells no more than its "
                "most likely tokens; rollouts.wire=top_k, or teacher.engine.kind=transformers, would do"
            )
        name = f"vLLM {vllm.__version__}, {engine.dtype}"
        self.way = f"{name}; only rows that predict targets go through the output head" if self.skips_prompts else (
            f"slow: {name} is of an unknown form, so that all rows of prompts go through the output head"
            + ("" if self.reads_arrays else ", and results come as Python objects")
        )  # fmt: skip

    def score(self, examples: Sequence[Example]) -> list[TeacherScores]:
        """Return the scores of each example, in their order."""
        scores = self._score(examples, self._likeliest)
        if short := [index for index, found in enumerate(scores) if found is None]:
            again = self._score([examples[index] for index in short], likeliest_asked(self._spec, self.vocab_size))
            for index, found in zip(short, again, strict=True):
                scores[index] = found
        return [found for found in scores if found is not None]

    def close(self) -> None:
        """Shut the engine down and give its memory back."""
        self._llm.llm_engine.engine_core.shutdown()

    def _score(self, examples: Sequence[Example], likeliest: int) -> list[TeacherScores | None]:
        """Return the scores of each example from so many most likely tokens; None where these are too few."""
        results = self._prompt_arrays(
            [example.token_ids.tolist() for example in examples],
            [self._wanted(example) for example in examples] if self.skips_prompts else None,
            likeliest,
        )
        return [self._scores(example, arrays, likeliest) for example, arrays in zip(examples, results, strict=True)]

    def _scores(self, example: Example, arrays: PromptArrays, likeliest: int) -> TeacherScores | None:
        token_ids, logprobs = arrays.token_ids, arrays.logprobs
        if not self.skips_prompts:
            rows = example.target_positions - 1
            token_ids, logprobs = token_ids[rows], logprobs[rows]  # [N, 1+M]
        if not np.array_equal(token_ids[:, 0], example.targets):
            raise RuntimeError(
                f"row {example.row}: vLLM {vllm.__version__} returned log-probabilities of other tokens than the prompt's; "
                "use a version from 0.15 to 0.32, or teacher.engine.kind transformers"
            )
        best = slice(1, 1 + likeliest)
        scores = scores_from_likeliest(example, logprobs[:, 0], token_ids[:, best], logprobs[:, best], self._spec)
        further = logprobs[:, best.stop :]
        if scores is not None and self._spec.wire == "hidden":
            return replace(scores, hidden=bits_of(torch.from_numpy(further)))
        return scores if scores is None or example.candidates is None else with_candidates(example, scores, further)

    def _prompt_arrays(
        self, prompts: Sequence[list[int]], wanted: Sequence[WantedRows] | None = None, likeliest: int | None = None
    ) -> list[PromptArrays]:
        likeliest = likeliest or self._likeliest
        parameters = [
            SamplingParams(
                max_tokens=1,
                temperature=0.0,
                detokenize=False,
                prompt_logprobs=likeliest + (0 if wanted is None else wanted[index].extra_columns),
                flat_logprobs=not self.reads_arrays,
                extra_args=None if wanted is None else wanted[index].arguments(),
            )
            for index in range(len(prompts))
        ]
        try:
            outputs = self._llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], parameters, use_tqdm=False)
        except EngineDeadError as error:
            raise EngineDied(f"the vLLM engine died: {error}") from error
        return [self._read(output.prompt_logprobs, likeliest + 1) for output in outputs]

    def _read(self, result: Any, width: int) -> PromptArrays:
        if self.reads_arrays:
            chunks = result[1:]  # entry 0 stands for the first token, which nothing predicts
            return PromptArrays(
                np.concatenate([chunk.token_ids for chunk in chunks]), np.concatenate([chunk.logprobs for chunk in chunks])
            )
        return PromptArrays(
            np.asarray(result.token_ids).reshape(-1, width), np.asarray(result.logprobs, dtype=np.float32).reshape(-1, width)
        )

    def _wanted(self, example: Example) -> WantedRows:
        """Return what is wanted of a row; where it has fewer than C candidates, token 0 stands for those that are missing."""
        candidates = None if example.candidates is None else np.where(example.candidates == NO_TOKEN, 0, example.candidates)
        return WantedRows((example.target_positions - 1).tolist(), candidates, self._hidden_size)

    def _take_target_rows(self) -> bool:
        return all(self._llm.collective_rpc("take_target_rows"))

    def _probe_rows(self, longest_row: int) -> bool:
        """Whether the rows asked for come alone and are those of the whole prompt, for rows of several lengths at once."""
        lengths = [length for length in (2, 3, PROBE_TOKENS, 2 * PROBE_TOKENS) if length <= longest_row]
        if not lengths:
            return False
        prompts = [[(token + length) % self.vocab_size for token in range(length)] for length in lengths]
        rows = [list(range(length // 2 - 1, length - 1)) for length in lengths]
        return all(
            some.token_ids.shape == (len(wanted), self._likeliest + 1)
            and np.array_equal(some.token_ids[:, 0], whole.token_ids[wanted, 0])
            and np.allclose(some.logprobs, whole.logprobs[wanted], atol=self._tolerance)
            for some, whole, wanted in zip(
                self._prompt_arrays(prompts, [WantedRows(some) for some in rows]), self._prompt_arrays(prompts), rows, strict=True
            )
        )

    def _tells_more(self) -> bool:
        """Whether what the wire asks for besides the most likely tokens comes, and is right."""
        if not self.skips_prompts:
            return False
        longest = self._spec.longest_row
        return self._probe_hidden(longest) if self._spec.wire == "hidden" else self._probe_candidates(longest)

    def _probe_candidates(self, longest_row: int) -> bool:
        """Whether given tokens get their own log-probabilities: the most likely ones those that they have, in another order."""
        prompt = [token % self.vocab_size for token in range(min(2 * PROBE_TOKENS, longest_row))]
        rows = list(range(len(prompt) // 2 - 1, len(prompt) - 1))
        (whole,) = self._prompt_arrays([prompt])
        others = whole.token_ids[rows, 1:][:, ::-1]
        (some,) = self._prompt_arrays([prompt], [WantedRows(rows, others)])
        given = slice(1 + self._likeliest, None)
        return (
            some.token_ids.shape == (len(rows), 1 + 2 * self._likeliest)
            and np.array_equal(some.token_ids[:, given], others)
            and np.allclose(some.logprobs[:, given], whole.logprobs[rows, 1:][:, ::-1], atol=self._tolerance)
        )

    def _probe_hidden(self, longest_row: int) -> bool:
        """Whether the teacher's head makes of the hidden states what the engine says of the tokens."""
        prompt = [token % self.vocab_size for token in range(min(2 * PROBE_TOKENS, longest_row))]
        rows = list(range(len(prompt) - 1))
        (some,) = self._prompt_arrays([prompt], [WantedRows(rows, hidden_size=self._hidden_size)])
        said, states = some.logprobs[:, : 1 + self._likeliest], torch.from_numpy(some.logprobs[:, 1 + self._likeliest :])
        if states.shape != (len(rows), self._hidden_size):
            return False
        head = read_head(self._spec.model, getattr(torch, self._spec.engine.dtype))
        logprobs = head.logits(states.to(head.weight.dtype)).float().log_softmax(dim=1)
        ids = torch.from_numpy(some.token_ids[:, : 1 + self._likeliest].astype(np.int64))
        return np.allclose(logprobs.gather(1, ids).numpy(), said, atol=self._tolerance)

    def _probe_arrays(self, tokens: int) -> bool:
        """Whether arrays come as expected: the shape is right and the values are those of ``flat_logprobs``."""
        if tokens < 2:
            return False
        prompt = [token % self.vocab_size for token in range(tokens)]
        (flat,) = self._prompt_arrays([prompt])
        result = self._llm.generate(
            [{"prompt_token_ids": prompt}],
            SamplingParams(max_tokens=1, temperature=0.0, detokenize=False, prompt_logprobs=self._likeliest),
            use_tqdm=False,
        )[0].prompt_logprobs
        return (
            len(result) == 2
            and isinstance(result[1], PromptArrays)
            and result[1].token_ids.shape == (tokens - 1, self._likeliest + 1)
            and np.array_equal(result[1].token_ids[:, 0], flat.token_ids[:, 0])
            and np.allclose(result[1].logprobs, flat.logprobs, atol=self._tolerance)
        )


def most_logprobs(spec: TeacherSpec) -> int:
    """Return how many columns of log-probabilities a request may ask for; -1 for as many as there are tokens."""
    if spec.wire != "top_k":
        return MOST_COLUMNS
    return spec.top_k + 1 if spec.ids_below is None else -1
