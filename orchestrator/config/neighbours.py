"""What a run may say whose teacher is a table of similar tokens. Imports no torch."""

from actors.config.models import EngineConfig, EvaluateConfig, SimilarTokens
from actors.config.rollouts import RolloutsConfig
from losses.config import AtkdLoss, LossConfig


def require_neighbours_teach(
    similar: SimilarTokens, engine: EngineConfig, loss: LossConfig, rollouts: RolloutsConfig | None, evaluate: EvaluateConfig
) -> None:
    """Raise if sections ask a table of similar tokens for what only a model that predicts has.

    Raises:
        ValueError: naming the key, the value and one that would do.
    """
    if engine.kind != "transformers":
        raise ValueError(
            f"teacher.engine.kind {engine.kind} serves predictions, and teacher.similar_tokens takes embeddings alone; "
            "teacher.engine.kind=transformers would do"
        )
    if evaluate.teacher != "scores":
        raise ValueError(
            f"evaluate.teacher {evaluate.teacher} measures a model that does not teach where teacher.similar_tokens does; "
            "evaluate.teacher=scores would do"
        )
    if rollouts is not None:
        raise ValueError(
            "rollouts has a teacher judge what the student writes, and teacher.similar_tokens calls every token right; "
            "rollouts=null would do, or teacher.similar_tokens=null"
        )
    if isinstance(loss, AtkdLoss) and loss.split != "random":
        raise ValueError(
            "loss.kind atkd splits tokens by the teacher's uncertainty, and with teacher.similar_tokens that is "
            f"{similar.smoothing:g} everywhere; loss.kind=coupled would do"
        )
