"""Sampling by transformers, a response at a time: the reference for others, and for models that vLLM does not know.

T tokens of a prompt, N of a response, C candidates, V vocabulary.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from actors.model_source import ModelSource
from actors.models import load_model
from actors.records import NO_TOKEN
from actors.rollouts.base import Prompt, Response, SamplerSpec, Sampling, most_tokens, seed_of


class TransformersSampler:
    """Draws each token from the whole distribution, in float64."""

    def __init__(self, spec: SamplerSpec) -> None:
        self._spec = spec
        self._device = "cuda" if spec.engine.gpu else "cpu"
        self.load(spec.model)

    def load(self, model: ModelSource) -> None:
        """Write by other weights from now on."""
        self._model = load_model(model, getattr(torch, self._spec.engine.dtype)).to(self._device).eval()

    @torch.inference_mode()
    def logprobs(self, token_ids: np.ndarray) -> np.ndarray:
        """Return the log-probability of each token of a text but the first, float32 [T-1]."""
        ids = torch.from_numpy(token_ids.astype(np.int64)).to(self._device)
        predicted = self._model(input_ids=ids[None], use_cache=False).logits[0, :-1].double().log_softmax(dim=-1)
        return predicted.gather(1, ids[1:, None])[:, 0].float().cpu().numpy()

    def sample(self, prompts: Sequence[Prompt]) -> list[Response]:
        """Return a response to each prompt, in their order."""
        return [self._respond(prompt) for prompt in prompts]

    def close(self) -> None:
        """Forget the model."""
        del self._model

    @torch.inference_mode()
    def _respond(self, prompt: Prompt) -> Response:
        generator = np.random.default_rng(seed_of(self._spec.sampling, prompt))
        token_ids: list[int] = []
        candidates: list[Tensor] = []
        logprobs, cache = [], None
        unread = torch.from_numpy(prompt.token_ids.astype(np.int64))[None]
        most = most_tokens(self._spec.sampling, prompt)
        while len(token_ids) < most and not (token_ids and token_ids[-1] in self._spec.ends):
            outputs = self._model(input_ids=unread.to(self._model.device), past_key_values=cache, use_cache=True)
            cache = outputs.past_key_values
            predicted = outputs.logits[0, -1].double().log_softmax(dim=-1).cpu()  # [V]
            named = predicted[: self._spec.ids_below]
            token = draw(named, self._spec.sampling, generator)
            token_ids.append(token)
            logprobs.append(float(predicted[token]))
            candidates.append(most_likely(named, self._spec.candidates))
            unread = torch.tensor([[token]])
        noted = torch.stack(candidates).numpy().astype(np.int32) if self._spec.candidates else None
        ended = token_ids[-1] in self._spec.ends
        return Response(np.array(token_ids, np.int32), np.array(logprobs, np.float32), ended, noted)


def most_likely(logprobs: Tensor, count: int) -> Tensor:
    """Return the most likely of the tokens [V], int64 [count], most likely first; ``NO_TOKEN`` where there are fewer."""
    found = logprobs.topk(min(count, len(logprobs))).indices
    return torch.cat([found, found.new_full((count - len(found),), NO_TOKEN)])


def draw(logprobs: Tensor, sampling: Sampling, generator: np.random.Generator) -> int:
    """Draw a token by log-probabilities, float64 [V]."""
    if sampling.temperature == 0:
        return int(logprobs.argmax())
    masses, order = (logprobs / sampling.temperature).softmax(dim=0).sort(descending=True, stable=True)
    before = masses.cumsum(dim=0) - masses
    kept = masses[before < sampling.top_p]  # the first always is
    place = torch.searchsorted(kept.cumsum(dim=0), generator.random() * float(kept.sum()), right=True)
    return int(order[min(int(place), len(kept) - 1)])
