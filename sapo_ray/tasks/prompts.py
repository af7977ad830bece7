"""Prompts from templates, which are files: shipped with the project or a user's own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from sapo_ray.errors import SapoError
from sapo_ray.files import Folder, absolute, split

if TYPE_CHECKING:
    from jinja2 import Environment, Template

_SHIPPED = Path(__file__).parents[1] / "prompts"


@dataclass(kw_only=True)
class PromptConfig:
    template: str = "plain"
    """A Jinja template: one of those in sapo_ray/prompts (`plain`, `instruct`, `code`, `bare`), or the path or URI of a
    file. It is given `question`, `examples`, each of which has a `question` and a `solution`, and, of the kind math,
    `convention`."""
    shots: int = 0
    """Worked questions that stand in the prompt as examples. They are in no split."""
    chat: bool = False
    """Put the text into the chat template of the model's tokenizer, as what the user says."""

    def __post_init__(self) -> None:
        if self.shots < 0:
            raise ValueError(f"shots is {self.shots}; it must not be negative")


def read_template(name: str) -> str:
    """The text of a template, shipped or a file. Raises SapoError where there is none, or one that is not Jinja."""
    shipped = _SHIPPED / f"{name}.jinja"
    if shipped.is_file():
        text = shipped.read_text(encoding="utf-8")
    else:
        folder, file = split(absolute(name))
        try:
            text = Folder(folder).read(file).decode()
        except (OSError, ValueError) as error:
            known = ", ".join(sorted(path.stem for path in _SHIPPED.glob("*.jinja")))
            raise SapoError(f"task.prompt.template {name} is no file that can be read, nor one of {known}") from error
    _compiled(text, f"task.prompt.template {name}")
    return text


def fill(text: str, what: str, values: Mapping[str, object]) -> str:
    """A Jinja template's text with values filled in; whole floats such as 51.0 are written as integers.

    Templates run in a sandbox: they can compute, but neither read files nor reach Python. Raises SapoError, which
    begins with `what`, for a template that cannot be filled.
    """
    from jinja2 import TemplateError

    try:
        return _compiled(text, what).render(values)
    except (TemplateError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise SapoError(f"{what}: {error}") from error


@cache
def _compiled(text: str, what: str) -> Template:
    from jinja2 import TemplateSyntaxError

    try:
        return _environment().from_string(text)
    except TemplateSyntaxError as error:
        raise SapoError(f"{what}, line {error.lineno}: {error.message}") from error


@cache
def _environment() -> Environment:
    from jinja2 import StrictUndefined
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    return ImmutableSandboxedEnvironment(
        undefined=StrictUndefined, keep_trailing_newline=True, autoescape=False, finalize=written
    )


def written(value: object) -> object:
    """What is written for a value of a record: 51 for 51.0, and 0.3 for what 0.1 + 0.2 comes to."""
    if not isinstance(value, float):
        return value
    return int(value) if value.is_integer() else float(f"{value:.15g}")
