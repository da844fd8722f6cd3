"""Jinja templates over the fields of a row."""

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from jinja2 import StrictUndefined, TemplateError, TemplateRuntimeError, TemplateSyntaxError, meta
from jinja2.sandbox import SandboxedEnvironment

from orchestrator.data.row_values import fields_of


class FieldTemplate:
    """A template over a row's fields. A field that is null may be tested, ``{% if input %}``, but not printed."""

    def __init__(self, text: str, key: str) -> None:
        """Args: the template, and the key it stands under.

        Raises:
            ValueError: if it is no Jinja template.
        """
        environment = SandboxedEnvironment(undefined=StrictUndefined, keep_trailing_newline=True, finalize=_refuse_null)
        try:
            self._template = environment.from_string(text)
            self.fields = frozenset(meta.find_undeclared_variables(environment.parse(text)))
            """The fields of a row that it reads."""
        except TemplateSyntaxError as error:
            raise ValueError(f"{key} is no Jinja template: line {error.lineno}: {error.message}") from error
        self._key = key

    def fill(self, row: Mapping[str, Any]) -> str:
        """Return the text for a row.

        Raises:
            ValueError: if the template cannot be filled in.
        """
        try:
            return self._template.render(row)
        except (TemplateError, TypeError, ValueError, ArithmeticError) as error:
            raise ValueError(f"{self._key} cannot be filled in: {error}; {fields_of(row)}") from error


@lru_cache
def field_template(text: str, key: str) -> FieldTemplate:
    """Return a template, compiled once."""
    return FieldTemplate(text, key)


def _refuse_null(value: Any) -> Any:
    if value is None:
        raise TemplateRuntimeError("it prints a field that is null")
    return value
