"""A slow reading of the losses, one token at a time, in Python's own floats. Shares no code with ``losses/``.

A token is (teacher logits, student logits, target): lists of V numbers and an id. -inf logits are allowed where the
formula has a finite value there. Source: arXiv 2402.11890, sections 2 and 3.
"""

import math
from collections.abc import Sequence

Logits = Sequence[float]


def log_softmax(logits: Logits) -> list[float]:
    largest = max(logits)
    normalizer = math.log(math.fsum(math.exp(logit - largest) for logit in logits))
    return [logit - largest - normalizer for logit in logits]


def log_of_sum(logs: Sequence[float]) -> float:
    largest = max(logs, default=-math.inf)
    if largest == -math.inf:
        return -math.inf
    return largest + math.log(math.fsum(math.exp(log - largest) for log in logs))


def divergence(p_logs: Sequence[float], q_logs: Sequence[float]) -> float:
    """KL(p || q) over the classes in which p has mass."""
    return math.fsum(math.exp(p) * (p - q) for p, q in zip(p_logs, q_logs, strict=True) if p > -math.inf)


def uncertainty(teacher: Logits, target: int) -> float:
    return math.exp(log_of_sum([log for token, log in enumerate(log_softmax(teacher)) if token != target]))


def two_classes(logits: Logits, target: int) -> list[float]:
    logs = log_softmax(logits)
    return [logs[target], log_of_sum([log for token, log in enumerate(logs) if token != target])]


def target_term(first: Logits, second: Logits, target: int) -> float:
    return divergence(two_classes(first, target), two_classes(second, target))


def other_classes(logits: Logits, target: int, kept: Sequence[int], tail: str) -> list[float]:
    """Log-probabilities of the kept tokens and, for a bucket, of all other non-targets together; summing to one."""
    logs = log_softmax(logits)
    classes = [logs[token] for token in kept]
    dropped = [log for token, log in enumerate(logs) if token != target and token not in kept]
    if tail == "bucket" and dropped:
        classes.append(log_of_sum(dropped))
    total = log_of_sum(classes)
    return [log - total for log in classes]


def diversity_term(first: Logits, second: Logits, target: int, kept: Sequence[int] | None = None, tail: str = "bucket") -> float:
    if kept is None:
        kept = [token for token in range(len(first)) if token != target]
    return divergence(other_classes(first, target, kept, tail), other_classes(second, target, kept, tail))


def full_divergence(first: Logits, second: Logits) -> float:
    """KL over the whole vocabulary, without any decomposition."""
    return divergence(log_softmax(first), log_softmax(second))


def most_likely_others(teacher: Logits, target: int, top_k: int) -> list[int]:
    others = [token for token in range(len(teacher)) if token != target]
    return sorted(others, key=lambda token: -teacher[token])[:top_k]


def easy_tokens(uncertainties: Sequence[float], easy_ratio: float) -> set[int]:
    ranked = sorted(range(len(uncertainties)), key=lambda token: (uncertainties[token], token))
    return set(ranked[: round(easy_ratio * len(ranked))])


def below_lower_median(uncertainties: Sequence[float]) -> set[int]:
    median = sorted(uncertainties)[(len(uncertainties) - 1) // 2]
    return {token for token, value in enumerate(uncertainties) if value < median}


def mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values) if values else 0.0


def step_loss(
    tokens: Sequence[tuple[Logits, Logits, int]],
    kind: str,
    direction: str = "forward_kl",
    easy: set[int] | None = None,
    easy_weight: float = 0.2,
    normalize: str = "groups",
    cross_entropy_weight: float = 0.0,
    top_k: int | None = None,
    tail: str = "bucket",
) -> float:
    """The loss of an optimizer step over all its tokens."""
    targets, diversities, couplings, cross_entropies = [], [], [], []
    for teacher, student, target in tokens:
        first, second = (teacher, student) if direction == "forward_kl" else (student, teacher)
        kept = None if top_k is None else most_likely_others(teacher, target, top_k)
        targets.append(target_term(first, second, target))
        diversities.append(diversity_term(first, second, target, kept, tail))
        couplings.append(uncertainty(first, target))
        cross_entropies.append(-log_softmax(student)[target])
    cross_entropy = cross_entropy_weight * mean(cross_entropies)
    if kind == "coupled":
        return cross_entropy + mean([t + u * d for t, u, d in zip(targets, couplings, diversities, strict=True)])
    if kind == "decoupled":
        return cross_entropy + mean(targets) + mean(diversities)
    if kind == "target_only":
        return cross_entropy + mean(targets)
    if kind == "diversity_only":
        return cross_entropy + mean(diversities)
    if kind == "hard_label":
        return mean(cross_entropies)
    assert kind == "atkd" and easy is not None
    easy_terms = [diversities[token] for token in sorted(easy)]
    hard_terms = [targets[token] + diversities[token] for token in range(len(tokens)) if token not in easy]
    if normalize == "tokens":
        count = len(tokens)
        return cross_entropy + (easy_weight * math.fsum(easy_terms) + (1 - easy_weight) * math.fsum(hard_terms)) / count
    return cross_entropy + easy_weight * mean(easy_terms) + (1 - easy_weight) * mean(hard_terms)
