"""The engines by the names that a user may type."""

from actors.engines.base import TeacherEngine, TeacherSpec
from actors.engines.label_words import LabelWordsEngine
from actors.engines.similar_tokens import SimilarTokensEngine


def build_engine(spec: TeacherSpec) -> TeacherEngine:
    """Load the teacher into the engine its config names.

    Raises:
        ValueError: if K is not below the teacher's vocabulary size.
    """
    if spec.model.classes:
        return _build_classifier(spec)
    if spec.similar_tokens is not None:
        return SimilarTokensEngine(spec)
    build = {"vllm": _build_vllm, "transformers": _build_transformers}[spec.engine.kind]
    return LabelWordsEngine(spec, build) if spec.label_words else build(spec)


def _build_vllm(spec: TeacherSpec) -> TeacherEngine:
    from actors.engines.vllm import VllmEngine  # here, so that only replicas that serve with vLLM need it installed

    return VllmEngine(spec)


def _build_classifier(spec: TeacherSpec) -> TeacherEngine:
    from actors.engines.classifier import ClassifierEngine

    return ClassifierEngine(spec)


def _build_transformers(spec: TeacherSpec) -> TeacherEngine:
    from actors.engines.transformers import TransformersEngine

    return TransformersEngine(spec)
