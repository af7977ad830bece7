"""Whether a config's token limits leave room for its problems: seen before anything is started."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from sapo_ray.config import RunConfig
from sapo_ray.data import Question
from sapo_ray.encoding import encode_prompt
from sapo_ray.errors import SapoError
from sapo_ray.tasks.base import SPLITS, Split, Task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def check_engine_length(config: RunConfig, task: Task, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises SapoError where a question and its longest solution exceed the engine's `max_model_len`."""
    _require(config, "engine.max_model_len", _Lengths(task, tokenizer).prompt(SPLITS))


def check_run_lengths(config: RunConfig, task: Task, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises SapoError where a stage of a run would meet a sequence longer than its limit allows.

    A training that leaves long examples out (`too_long: drop`) has no limit of this kind.
    """
    lengths = _Lengths(task, tokenizer)
    _require(config, "engine.max_model_len", lengths.prompt(SPLITS))
    if config.model.path is None and config.engine.max_model_len > config.model.max_length:
        raise SapoError(
            f"engine.max_model_len is {config.engine.max_model_len}; it must be at most model.max_length = "
            f"{config.model.max_length}"
        )
    worked = lengths.worked()
    for name in ("sft", *(["prm"] if config.verify else []), *(["align"] if config.rounds else [])):
        training = getattr(config, name)
        if training.too_long == "drop":
            continue
        if training.max_tokens < worked:
            raise SapoError(
                f"{name}.max_tokens is {training.max_tokens}; it must be at least {worked}, the length of the longest "
                f"worked solution with its question (or set {name}.too_long to drop)"
            )
        if name != "sft":
            _require(config, f"{name}.max_tokens", lengths.prompt(("worked", "pool")))


class _Lengths:
    """The longest of a task's texts, in tokens."""

    def __init__(self, task: Task, tokenizer: PreTrainedTokenizerBase) -> None:
        self._task, self._tokenizer = task, tokenizer

    def prompt(self, splits: Iterable[Split]) -> tuple[int, str]:
        """And whose it is: a question's id."""
        questions = [question for split in splits for question in self._task.questions(split)]
        return max(zip(self._prompts(questions), (question.id for question in questions), strict=True), default=(0, ""))

    def worked(self) -> int:
        """With its question and the end of the sequence. Steps are encoded one by one, as in training."""
        questions = self._task.questions("worked")
        steps = [step for q in questions for step in q.solution or ()]
        encoded = self._tokenizer(steps, add_special_tokens=False, verbose=False)["input_ids"] if steps else []
        lengths = iter(map(len, encoded))
        solutions = [sum(next(lengths) for _ in q.solution or ()) for q in questions]
        return max((p + s + 1 for p, s in zip(self._prompts(questions), solutions, strict=True)), default=0)

    def _prompts(self, questions: Sequence[Question]) -> list[int]:
        return [len(encode_prompt(self._tokenizer, self._task.prompt(q.text))) for q in questions]


def _require(config: RunConfig, key: str, longest: tuple[int, str]) -> None:
    prompt, question = longest
    section, _, name = key.partition(".")
    limit, needed = getattr(getattr(config, section), name), prompt + config.sampling.max_tokens + 1
    if limit < needed:
        raise SapoError(
            f"{key} is {limit}; it must be at least {needed}: {prompt} of the longest question, {question}, "
            f"sampling.max_tokens = {config.sampling.max_tokens} of a solution, and its end"
        )
