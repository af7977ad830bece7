"""Tasks whose questions come from data sets: reading records, splits without overlap, prompts and steps.

What an answer is and when it is right is for the tasks that derive from these (see `mathematics.py`).
"""

from __future__ import annotations

import random
import re
from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

from sapo_ray.data import Question
from sapo_ray.encoding import Chat, Prompt
from sapo_ray.errors import SapoError
from sapo_ray.steps import StepUnit, split_steps
from sapo_ray.tasks.base import Split, Task
from sapo_ray.tasks.prompts import PromptConfig, fill, read_template, written
from sapo_ray.tasks.sources import SourceConfig, read_source

Record = Mapping[str, Any]

_MARGIN = re.compile(r"\A(?:\s*\n)?|\s+\Z")
"""What a text of a record loses: empty lines before it, and all space after it. Its first line, which may be Python,
stays indented."""
_LISTED = 5
"""Records that do not fit of which a message says where they are and why."""


@dataclass(kw_only=True)
class DataConfig:
    train_data: SourceConfig = field(default_factory=SourceConfig)
    """What `worked`, `validation` and `pool` are drawn from, in an order by `seed`; without `test_data` `test`, too."""
    test_data: SourceConfig | None = None
    """What `test` is taken from, in its own order."""
    ood_data: SourceConfig | None = None
    """What `ood` is taken from, in its own order: other questions than those trained on. Null leaves `ood` empty."""
    worked: int = 500
    """Questions whose worked solutions supervised fine-tuning sees."""
    pool: int | None = None
    """Questions of which only the answer is used; the rounds sample from these. Null takes all that are left."""
    validation: int = 200
    """Questions used to choose thresholds and to measure self-verification."""
    test: int | None = None
    """Test questions; null takes all of `test_data`."""
    ood: int | None = None
    """Test questions of another kind; null takes all of `ood_data`."""
    seed: int = 0
    """Seed of the order in which `train_data` is divided, apart from the run's seed."""
    on_bad: Literal["fail", "skip"] = "fail"
    """A record that does not fit ends the command (`fail`), with where it stands and why, or is left out (`skip`) and
    counted."""
    steps: StepUnit = "line"
    """What a step of a solution is: a line, a paragraph, a sentence, or a statement of Python."""
    prompt: PromptConfig = field(default_factory=PromptConfig)
    """What the reasoner is shown."""

    def __post_init__(self) -> None:
        for key in ("train_data", "test_data", "ood_data"):
            source = getattr(self, key)
            if source is not None and source.path is None and source.hub is None:
                raise ValueError(f"{key}.path is null and {key}.hub, too; name the data in one of them")
        for key in ("worked", "pool", "validation", "test", "ood"):
            value = getattr(self, key)
            if value is not None and value < 0:
                raise ValueError(f"{key} is {value}; it must not be negative")
        if self.test is None and self.test_data is None:
            raise ValueError("test is null; without test_data it must say how many questions of train_data to take")


class DataTask(Task):
    """All of a task but what its answers are."""

    def __init__(self, config: DataConfig) -> None:
        self.config = config
        self._template = read_template(config.prompt.template)

    @abstractmethod
    def variables(self) -> dict[str, object]:
        """What a prompt's template is given beside `question` and `examples`."""

    @abstractmethod
    def gold(self, source: SourceConfig, record: Record) -> str:
        """The gold answer of a record. Raises SapoError where it has none."""

    @abstractmethod
    def learned(self, solution: str, gold: str) -> str:
        """A worked solution as it is learned. Raises SapoError for one that does not come to the gold answer."""

    def questions(self, split: Split) -> Sequence[Question]:
        return self._divided[0][split]

    def remarks(self) -> Sequence[str]:
        return self._divided[2]

    def prompt(self, question: str) -> Prompt:
        values = {"question": question, "examples": self._examples, **self.variables()}
        text = fill(self._template, f"task.prompt.template {self.config.prompt.template}", values)
        return Chat(text) if self.config.prompt.chat else text

    def split(self, text: str) -> tuple[str, ...]:
        return split_steps(text, self.config.steps)

    def __getstate__(self) -> dict[str, Any]:
        """A training takes the task along for its prompts: the template and the examples, not the questions."""
        return {"config": self.config, "_template": self._template, "_examples": self._examples}

    @cached_property
    def _examples(self) -> list[dict[str, str]]:
        if not self.config.prompt.shots:
            return []
        return [{"question": q.text, "solution": "".join(q.solution or ())} for q in self._divided[1]]

    @cached_property
    def _divided(self) -> tuple[dict[Split, list[Question]], list[Question], list[str]]:
        """The questions of every split, the examples, and what there is to remark on them."""
        c, remarks = self.config, list[str]()
        train = self._read("train", c.train_data, remarks)
        test = self._read("test", c.test_data, remarks) if c.test_data else []
        ood = self._read("ood", c.ood_data, remarks) if c.ood_data else []
        seen = {_content(question) for question in test}
        ood = _unseen("task.ood_data", ood, seen, remarks)
        train = _unseen("task.train_data", train, seen | {_content(question) for question in ood}, remarks)
        random.Random(c.seed).shuffle(train)
        cut = _Cut(train)
        shots = cut.worked("prompt.shots", c.prompt.shots)
        tested = test[: c.test] if c.test_data else cut.any("test", c.test)
        validation, worked = cut.any("validation", c.validation), cut.worked("worked", c.worked)
        splits: dict[Split, list[Question]] = {
            "worked": worked,
            "validation": [replace(question, solution=None) for question in validation],
            "pool": [replace(question, solution=None) for question in cut.any("pool", c.pool)],
            "test": [replace(question, solution=None) for question in tested],
            "ood": [replace(question, solution=None) for question in ood[: c.ood]],
        }
        for key, data in (("test", test), ("ood", ood)):
            asked = getattr(c, key) or 0
            if getattr(c, f"{key}_data") and asked > len(data):
                raise SapoError(f"task.{key} is {asked}, but task.{key}_data has only {len(data)} questions")
        return splits, shots, remarks

    def _read(self, name: str, source: SourceConfig, remarks: list[str]) -> list[Question]:
        """The questions of one source; raises SapoError for records that do not fit, or remarks on them."""
        questions, bad = list[Question](), list[str]()
        for number, (place, record) in enumerate(read_source(source), 1):
            try:
                if isinstance(record, str):
                    raise SapoError(record)
                if source.where is None or _holds(source.where, record):
                    questions.append(self._question(f"{name}-{number}", source, record))
            except SapoError as error:
                bad.append(f"{place}: {error}")
        if bad:
            rest = f"; and {len(bad) - _LISTED} more (`sapo --debug … task.on_bad=fail` lists all)"
            more = rest if len(bad) > _LISTED else ""
            message = f"{len(bad)} of {number} records of task.{name}_data do not fit: {'; '.join(bad[:_LISTED])}{more}"
            if self.config.on_bad == "fail":
                refusal = SapoError(f"{message} (task.on_bad: skip leaves such out)")
                refusal.add_note("\n".join(bad))  # which only a traceback shows
                raise refusal
            remarks.append(f"{message}; left out")
        if not questions:
            condition = f" for which task.{name}_data.where holds" if source.where else ""
            raise SapoError(f"task.{name}_data has no questions{condition}")
        return questions

    def _question(self, name: str, source: SourceConfig, record: Record) -> Question:
        question, gold = field_of(source, "question", record), self.gold(source, record)
        if source.solution is None:
            return Question(name, question, gold)
        text = field_of(source, "solution", record)
        text = re.sub(source.strip, "", text) if source.strip else text
        return Question(name, question, gold, self.split(self.learned(text, gold)))


class _Cut:
    """Questions from which one split after another is taken, each from the front."""

    def __init__(self, questions: list[Question]) -> None:
        self._left = questions

    def any(self, key: str, count: int | None) -> list[Question]:
        """The next `count` questions; all that are left if None."""
        return self._take(key, count, self._left, "")

    def worked(self, key: str, count: int) -> list[Question]:
        """The last `count` questions with a worked solution: what is taken from the front stays when it changes."""
        solved = [question for question in reversed(self._left) if question.solution is not None]
        return self._take(key, count, solved, " with a worked solution")

    def _take(self, key: str, count: int | None, among: Sequence[Question], what: str) -> list[Question]:
        if count is not None and count > len(among):
            raise SapoError(f"task.{key} is {count}, but task.train_data has only {len(among)} more questions{what}")
        taken = list(among[:count])
        ids = {question.id for question in taken}
        self._left = [question for question in self._left if question.id not in ids]
        return taken


def _unseen(key: str, questions: Iterable[Question], seen: set[str], remarks: list[str]) -> list[Question]:
    """The questions whose content is not among `seen`, each content once; the others are remarked on."""
    found: dict[str, Question] = {}
    total = 0
    for total, question in enumerate(questions, 1):  # noqa: B007
        if (content := _content(question)) not in seen:
            found.setdefault(content, question)
    if len(found) < total:
        remarks.append(f"{total - len(found)} questions of {key} repeat another or one that tests; left out")
    return list(found.values())


def _content(question: Question) -> str:
    return " ".join(question.text.split()).casefold()


def _holds(condition: str, record: Record) -> bool:
    """What a source's `where` says of a record. Raises SapoError where it says neither yes nor no."""
    text = fill(condition, "where", record).strip()
    if text not in ("True", "False"):
        raise SapoError(f"where comes to {text!r}; it must come to True or False")
    return text == "True"


def field_of(source: SourceConfig, key: str, record: Record) -> str:
    """The text of a record that the source's `key` names. Raises SapoError where it has none."""
    wanted = getattr(source, key)
    if "{{" in wanted:
        text = fill(wanted, key, record)
    elif wanted not in record:
        raise SapoError(f"there is no {wanted!r}; {key} must name one of {', '.join(map(str, record))}")
    elif not isinstance(record[wanted], str | int | float):
        raise SapoError(f"{wanted!r} is {type(record[wanted]).__name__}, no text or number")
    else:
        text = str(written(record[wanted]))
    text = _MARGIN.sub("", text)
    if not text:
        raise SapoError(f"{key} is empty")
    return text
