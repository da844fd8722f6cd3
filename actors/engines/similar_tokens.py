"""A teacher that predicts nothing: some of the mass goes to the tokens that are like each target, the rest stays with the target.

Label smoothing that knows which tokens are alike: of a language model only the input embeddings are read. It is the control for
what a teacher's predictions are worth. N targets of a row, K neighbours of a token, V vocabulary, H size of an embedding.
"""

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch.nn.functional import normalize

from actors.engines.base import TeacherSpec, require_top_k
from actors.models import load_model
from actors.records import Example, TeacherScores, tail_logmass

TOKENS_AT_ONCE = 256
"""Of which the similarities to all V are in memory: [256, V] float32 of a vocabulary of 150,000 is 154 MB."""


class SimilarTokensEngine:
    """Scores rows by a table of neighbours, which is computed for each token when it is first a target."""

    def __init__(self, spec: TeacherSpec) -> None:
        """Load the embeddings.

        Raises:
            ValueError: if more neighbours are asked for than there are other tokens.
        """
        assert spec.similar_tokens is not None
        embeddings = load_model(spec.model).get_input_embeddings().weight.detach()
        self._directions = normalize(embeddings.to("cuda" if spec.engine.gpu else "cpu").float(), dim=1)  # [V, H]
        self.vocab_size = len(self._directions)
        require_top_k(spec.top_k, self.vocab_size, spec.ids_below)
        self._spec, self._settings = spec, spec.similar_tokens
        self._neighbours: dict[int, tuple[np.ndarray, np.ndarray]] = {}  # ids and log-probabilities, [K] each
        self.way = f"no model's predictions: {self._settings.smoothing:g} of the mass for {spec.top_k} tokens like each target"

    def score(self, examples: Sequence[Example]) -> list[TeacherScores]:
        """Return the scores of each example, in their order."""
        self._meet(sorted({int(target) for example in examples for target in example.targets} - self._neighbours.keys()))
        return [self._scores_of(example) for example in examples]

    def close(self) -> None:
        """Give the memory back."""
        del self._directions
        if self._spec.engine.gpu:
            torch.cuda.empty_cache()

    @torch.inference_mode()
    def _meet(self, tokens: Sequence[int]) -> None:
        """Find the neighbours of tokens."""
        for some in _cut(tokens, TOKENS_AT_ONCE):
            asked = torch.tensor(some, device=self._directions.device)
            similarities = self._directions[asked] @ self._directions.T  # [tokens, V]
            similarities[torch.arange(len(some)), asked] = -torch.inf
            if self._spec.ids_below is not None:
                similarities[:, self._spec.ids_below :] = -torch.inf
            nearest = similarities.topk(self._spec.top_k, dim=1)
            logprobs = (nearest.values / self._settings.temperature).log_softmax(dim=1) + np.log(self._settings.smoothing)
            for token, ids, values in zip(some, nearest.indices.cpu().numpy(), logprobs.cpu().numpy(), strict=True):
                self._neighbours[token] = ids.astype(np.int32), values.astype(np.float32)

    def _scores_of(self, example: Example) -> TeacherScores:
        known = [self._neighbours[int(target)] for target in example.targets]
        target_logprob = np.full(len(known), np.log1p(-self._settings.smoothing), np.float32)
        topk_logprobs = np.stack([logprobs for _, logprobs in known])
        topk_ids = np.stack([ids for ids, _ in known])
        return TeacherScores(example.key, target_logprob, topk_ids, topk_logprobs, tail_logmass(target_logprob, topk_logprobs))


def _cut(tokens: Sequence[int], most: int) -> Iterable[Sequence[int]]:
    return (tokens[start : start + most] for start in range(0, len(tokens), most))
