"""The reference engine: a plain transformers forward pass.

B batch, T tokens, N targets, K top-k, C candidates, H hidden size, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch

from actors.dataloader.hidden_states import bits_of
from actors.engines.base import TeacherSpec, likeliest_asked, require_top_k, scores_from_likeliest
from actors.engines.teacher_head import require_head_of
from actors.models import load_model, output_head
from actors.records import Example, TeacherScores, with_candidates

MAX_LOGITS = 1 << 27  # of one forward pass, [B, T, V]: 512 MiB in float32


class TransformersEngine:
    """Scores rows with ``AutoModelForCausalLM``; log-probabilities are computed in float32 whatever the weights are."""

    def __init__(self, spec: TeacherSpec) -> None:
        self._device = torch.device("cuda" if spec.engine.gpu else "cpu")
        self._model = load_model(spec.model, getattr(torch, spec.engine.dtype))
        self._model.eval().to(self._device)
        self.vocab_size: int = self._model.get_output_embeddings().weight.shape[0]
        require_top_k(spec.top_k, self.vocab_size, spec.ids_below)
        if spec.wire == "hidden":
            require_head_of(self._model)
        self._spec = spec
        self.way = f"transformers, {spec.engine.dtype}"

    def score(self, examples: Sequence[Example]) -> list[TeacherScores]:
        """Return the scores of each example, in their order."""
        scores: dict[int, TeacherScores] = {}
        for batch in self._batches(examples):
            scores |= zip(batch, self._score_batch([examples[index] for index in batch]), strict=True)
        return [scores[index] for index in range(len(examples))]

    def close(self) -> None:
        """Give the memory back."""
        del self._model
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def _batches(self, examples: Sequence[Example]) -> Iterator[list[int]]:
        """Cut the examples, longest first so that little is padded, into passes of at most ``MAX_LOGITS``."""
        batch: list[int] = []
        for index in sorted(range(len(examples)), key=lambda index: -len(examples[index].token_ids)):
            longest = len(examples[batch[0] if batch else index].token_ids)
            if batch and (len(batch) + 1) * longest * self.vocab_size > MAX_LOGITS:
                yield batch
                batch = []
            batch.append(index)
        if batch:
            yield batch

    @torch.inference_mode()
    def _score_batch(self, examples: Sequence[Example]) -> Iterator[TeacherScores]:
        width = max(len(example.token_ids) for example in examples)
        token_ids = torch.zeros(len(examples), width, dtype=torch.long)  # [B, T], padded on the right
        attention_mask = torch.zeros_like(token_ids)
        for row, example in enumerate(examples):
            token_ids[row, : len(example.token_ids)] = torch.from_numpy(example.token_ids.astype(np.int64))
            attention_mask[row, : len(example.token_ids)] = 1
        decode = self._model.get_decoder() if self._spec.wire == "hidden" else self._model
        outputs = decode(input_ids=token_ids.to(self._device), attention_mask=attention_mask.to(self._device), use_cache=False)
        for row, example in enumerate(examples):
            before_target = torch.from_numpy(example.target_positions - 1).to(self._device)
            hidden = None
            if self._spec.wire == "hidden":
                hidden = outputs.last_hidden_state[row, before_target]  # [N, H]
                logits = output_head(self._model).logits(hidden)
            else:
                logits = outputs.logits[row, before_target]
            logprobs = logits.float().log_softmax(dim=-1)  # [N, V]
            targets = torch.from_numpy(example.targets.astype(np.int64)).to(self._device)
            target_logprob = logprobs.gather(1, targets[:, None])[:, 0]
            top = logprobs.topk(likeliest_asked(self._spec, self.vocab_size), dim=-1)
            scores = scores_from_likeliest(
                example, target_logprob.cpu().numpy(), top.indices.cpu().numpy(), top.values.cpu().numpy(), self._spec
            )
            assert scores is not None, "enough of the likeliest were asked for"
            if example.candidates is not None:
                wanted = torch.from_numpy(example.candidates.astype(np.int64)).clamp(min=0).to(self._device)  # [N, C]
                scores = with_candidates(example, scores, logprobs.gather(1, wanted).cpu().numpy())
            yield scores if hidden is None else replace(scores, hidden=bits_of(hidden))
