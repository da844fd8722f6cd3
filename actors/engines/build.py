"""The engines by the names that a user may type."""

from actors.engines.base import TeacherEngine, TeacherSpec


def build_engine(spec: TeacherSpec) -> TeacherEngine:
    """Load the teacher into the engine its config names.

    Raises:
        ValueError: if K is not below the teacher's vocabulary size.
    """
    return {"vllm": _build_vllm, "transformers": _build_transformers}[spec.engine.kind](spec)


def _build_vllm(spec: TeacherSpec) -> TeacherEngine:
    from actors.engines.vllm import VllmEngine  # here, so that only replicas that serve with vLLM need it installed

    return VllmEngine(spec)


def _build_transformers(spec: TeacherSpec) -> TeacherEngine:
    from actors.engines.transformers import TransformersEngine

    return TransformersEngine(spec)
