"""A slow reading of the divergences, one token at a time, in Python's own floats. Shares no code with ``losses/``.

A distribution is a list of log-probabilities, one a class: the target first, then the tokens that are kept, and last, where
there is one, the bucket of all other tokens. p is the teacher, q the student. Sources: the papers named beside each.
"""

import math
from collections.abc import Callable, Sequence

from tests.reference import formulas
from tests.reference.formulas import Logits

Logs = Sequence[float]


def read(logits: Logits, target: int, kept: Sequence[int] | None = None, tail: str = "bucket") -> list[float]:
    """Log-probabilities of target, kept tokens (all others unless said) and bucket; or all mass off the target on the kept."""
    logs = formulas.log_softmax(logits)
    others = [token for token in range(len(logs)) if token != target]
    kept = others if kept is None else kept
    named = [logs[token] for token in kept]
    if tail == "renormalize":
        off_target = formulas.log_of_sum([logs[token] for token in others])
        return [logs[target], *(log + off_target - formulas.log_of_sum(named) for log in named)]
    dropped = [logs[token] for token in others if token not in kept]
    return [logs[target], *named, *([formulas.log_of_sum(dropped)] if dropped else [])]


def mixture(first: Logs, second: Logs, first_weight: float) -> list[float]:
    """log(w p + (1 - w) q)."""
    pairs = zip(first, second, strict=True)
    return [formulas.log_of_sum([math.log(first_weight) + p, math.log(1 - first_weight) + q]) for p, q in pairs]


def forward_kl(p: Logs, q: Logs, tokens: int) -> float:
    """arXiv 1503.02531."""
    return formulas.divergence(p, q)


def reverse_kl(p: Logs, q: Logs, tokens: int) -> float:
    """arXiv 2306.08543."""
    return formulas.divergence(q, p)


def jensen_shannon(p: Logs, q: Logs, tokens: int, teacher_weight: float) -> float:
    """arXiv 2306.13649."""
    m = mixture(p, q, teacher_weight)
    return teacher_weight * formulas.divergence(p, m) + (1 - teacher_weight) * formulas.divergence(q, m)


def skew_forward_kl(p: Logs, q: Logs, tokens: int, teacher_share: float) -> float:
    """arXiv 2402.03898."""
    return formulas.divergence(p, mixture(p, q, teacher_share))


def skew_reverse_kl(p: Logs, q: Logs, tokens: int, student_share: float) -> float:
    """arXiv 2402.03898."""
    return formulas.divergence(q, mixture(q, p, student_share))


def head(p: Logs, tokens: int, mass: float) -> set[int]:
    """The smallest set of classes of one token each that holds ``mass``; all classes, with the bucket, if these do not."""
    held = 0.0
    chosen: set[int] = set()
    for column in sorted(range(tokens), key=lambda column: -p[column]):
        if held >= mass:
            return chosen
        chosen.add(column)
        held += math.exp(p[column])
    return chosen if held >= mass else set(range(len(p)))


def adaptive_kl(p: Logs, q: Logs, tokens: int, head_mass: float) -> float:
    """arXiv 2404.02657."""
    gaps = [abs(math.exp(a) - math.exp(b)) for a, b in zip(p, q, strict=True)]
    everywhere = math.fsum(gaps)
    in_head = math.fsum(gaps[column] for column in head(p, tokens, head_mass))
    share = in_head / everywhere if everywhere > 0 else 0.5
    return share * formulas.divergence(p, q) + (1 - share) * formulas.divergence(q, p)


def total_variation(p: Logs, q: Logs, tokens: int) -> float:
    """arXiv 2307.15190."""
    return math.fsum(abs(math.exp(a) - math.exp(b)) for a, b in zip(p, q, strict=True)) / 2


def alpha_beta(p: Logs, q: Logs, tokens: int, teacher_power: float, student_power: float) -> float:
    """arXiv 2505.04560."""
    a, b = teacher_power, student_power
    summands = []
    for log_p, log_q in zip(p, q, strict=True):
        prob_p, prob_q = math.exp(log_p), math.exp(log_q)
        summands.append(prob_p**a * prob_q**b - a / (a + b) * prob_p ** (a + b) - b / (a + b) * prob_q ** (a + b))
    return -math.fsum(summands) / (a * b)


def top1_cross_entropy(p: Logs, q: Logs, tokens: int) -> float:
    """After arXiv 1606.07947."""
    return -q[max(range(tokens), key=lambda column: p[column])]


def interpolated_target(p: Logs, q: Logs, tokens: int, t: float) -> float:
    """arXiv 2501.16937."""
    mixed = [(1 - t) * log_q + t * log_p for log_p, log_q in zip(p, q, strict=True)]
    normalizer = formulas.log_of_sum(mixed)
    return formulas.divergence([log - normalizer for log in mixed], q)


def sampled_reverse_kl(p: Logs, q: Logs, tokens: int, most_nats: float = math.inf) -> float:
    """The reward of arXiv 2306.08543, eq. 3, with its sign turned; the target comes first."""
    return max(-most_nats, min(q[0] - p[0], most_nats))


def at_temperature(logs: Logs, temperature: float) -> list[float]:
    """The soft-max of the logits that these log-probabilities are, at a temperature."""
    scaled = [log / temperature for log in logs]
    return [log - formulas.log_of_sum(scaled) for log in scaled]


def tempered_kl(p: Logs, q: Logs, tokens: int, temperature: float) -> float:
    """arXiv 1503.02531, with its factor T²."""
    return temperature**2 * formulas.divergence(at_temperature(p, temperature), at_temperature(q, temperature))


def student_tempered_kl(p: Logs, q: Logs, tokens: int, temperature: float) -> float:
    """arXiv 2404.09886, less the entropy of p."""
    return temperature**2 * formulas.divergence(p, at_temperature(q, temperature))


DIVERGENCES: dict[str, Callable[..., float]] = {
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "jensen_shannon": jensen_shannon,
    "skew_forward_kl": skew_forward_kl,
    "skew_reverse_kl": skew_reverse_kl,
    "adaptive_kl": adaptive_kl,
    "total_variation": total_variation,
    "alpha_beta": alpha_beta,
    "top1_cross_entropy": top1_cross_entropy,
    "interpolated_target": interpolated_target,
    "tempered_kl": tempered_kl,
    "student_tempered_kl": student_tempered_kl,
    "sampled_reverse_kl": sampled_reverse_kl,
}
"""(p, q, how many of the classes are one token each, knobs) -> nats."""


def value(
    kind: str, teacher: Logits, student: Logits, target: int, kept: Sequence[int] | None = None, tail: str = "bucket",
    **knobs: float,
) -> float:  # fmt: skip
    """What a token costs; ``knobs`` by the names of the config, and ``t`` of the interpolated target."""
    tokens = len(teacher) if kept is None else 1 + len(kept)
    return DIVERGENCES[kind](read(teacher, target, kept, tail), read(student, target, kept, tail), tokens, **knobs)


def hellinger(p: Logs, q: Logs) -> float:
    return math.sqrt(math.fsum((math.exp(a / 2) - math.exp(b / 2)) ** 2 for a, b in zip(p, q, strict=True)) / 2)


def entropy(logits: Logits) -> float:
    """In nats; a token of no mass adds nothing."""
    return -math.fsum(math.exp(log) * log for log in formulas.log_softmax(logits) if log > -math.inf)
