"""How the finished student is stored, and where it is put for others."""

from typing import Annotated, Literal

from pydantic import field_validator

from actors.config.places import in_object_storage, resolved
from losses.section import MayChange, Section


class ExportConfig(Section):
    """The student's folder, as it is given to others."""

    dtype: Literal["as_loaded", "float32", "bfloat16", "float16"] = "as_loaded"
    """Type of the stored weights; ``as_loaded`` is that of the model the student began as. Evaluation loads what is stored."""

    onnx: Annotated[bool, MayChange()] = False
    """Write a classifier as ``model.onnx`` beside its weights, for programs without torch. Needs ``pip install '.[onnx]'``."""

    publish: Annotated[str | None, MayChange()] = None
    """Address in object storage (``s3://bucket/folder``) where the student's folder, the report, the table and the configuration
    are put at the end, below the run's name; null for nowhere."""

    @field_validator("publish")
    @classmethod
    def _an_address(cls, publish: str | None) -> str | None:
        if publish is None:
            return None
        if not in_object_storage(publish):
            raise ValueError(f"{publish!r} is no address in object storage; s3://bucket/folder would do")
        return resolved(publish)
