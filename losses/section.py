"""The base of every section of the configuration. Imports no torch."""

from pydantic import BaseModel, ConfigDict

LARGEST_SEED = 2**32 - 1
"""What every random generator in use takes; Optuna's takes no more."""


class Section(BaseModel):
    """A frozen section of the configuration: unknown keys are errors, the docstring under a field is its help text."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)
