"""The question that a judge is asked: a Jinja template, filled in with a prompt and two answers."""

from pathlib import Path

from jinja2 import StrictUndefined, TemplateError, TemplateSyntaxError, meta
from jinja2.sandbox import SandboxedEnvironment

from actors.config.judge import JudgeConfig

NEEDED = ("prompt", "answer_a", "answer_b")
"""What a template must show."""

KNOWN = (*NEEDED, "reference")
"""What it may show."""


class QuestionTemplate:
    """Fills in what the judge reads."""

    def __init__(self, text: str, name: str) -> None:
        """Raises: ValueError if the text, which ``name`` says where it stands, is no template, or lacks a placeholder."""
        environment = SandboxedEnvironment(undefined=StrictUndefined, keep_trailing_newline=True)
        try:
            self._template = environment.from_string(text)
            placeholders = meta.find_undeclared_variables(environment.parse(text))
        except TemplateSyntaxError as error:
            raise ValueError(f"{name} is no Jinja template: line {error.lineno}: {error.message}") from error
        if missing := [one for one in NEEDED if one not in placeholders]:
            raise ValueError(
                f"{name} does not show {', '.join(missing)}; it needs {', '.join(f'{{{{ {one} }}}}' for one in NEEDED)}, each "
                "somewhere in it"
            )
        if unknown := sorted(placeholders - set(KNOWN)):
            raise ValueError(f"{name} asks for {', '.join(unknown)}; there are {', '.join(KNOWN)}")
        self._name = name

    def question(self, prompt: str, reference: str, answer_a: str, answer_b: str) -> str:
        """Return the text that the judge reads.

        Raises:
            ValueError: if the template cannot be filled in.
        """
        try:
            return self._template.render(prompt=prompt, reference=reference, answer_a=answer_a, answer_b=answer_b)
        except (TemplateError, TypeError, ValueError, ArithmeticError) as error:
            raise ValueError(f"{self._name} cannot be filled in: {error}") from error


def load_template(settings: JudgeConfig) -> QuestionTemplate:
    """Return the template that the configuration names, or the protocol's own.

    Raises:
        ValueError: if there is no such file, or it is no template that could serve.
    """
    if settings.prompt is None:
        text = (Path(__file__).parent / f"{settings.protocol}.j2").read_text(encoding="utf-8")
        return QuestionTemplate(text, f"the template of evaluate.judge.protocol {settings.protocol}")
    name = f"evaluate.judge.prompt {settings.prompt}"
    try:
        text = Path(settings.prompt).expanduser().read_text(encoding="utf-8")
    except (OSError, RuntimeError, UnicodeDecodeError) as error:
        raise ValueError(f"{name} cannot be read ({error}); null for the protocol's own template would do") from error
    return QuestionTemplate(text, name)
