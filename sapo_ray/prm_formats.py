"""How process reward models (PRMs) are asked: verifiers of this project, and the formats of two public families.

A format says how a problem and its steps are written, and where the scores stand: at one token a step, where the model
has one logit (sigmoid) or two, for wrong and right (softmax). `sapo_ray.scoring` does the rest. None of them runs code
that comes with a checkpoint.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen2Config,
    Qwen2ForTokenClassification,
)

from sapo_ray.encoding import Encoded, encode
from sapo_ray.errors import SapoError
from sapo_ray.models import load_tokenizer
from sapo_ray.scoring import load_verifier
from sapo_ray.tasks.base import Task


class PrmFormat(Protocol):
    """One format, with a checkpoint's tokenizer."""

    name: str

    def encode(self, problem: str, steps: Sequence[str]) -> Encoded:
        """A problem and its steps as tokens; `step_ends` are the tokens where the scores stand.

        Raises SapoError for a text that the format cannot hold.
        """

    def load(self, checkpoint: str, dtype: torch.dtype) -> PreTrainedModel:
        """The model in the directory `checkpoint`, whose `logits` are [rows, length, 1 or 2]."""


def prm_format(checkpoint: str, task: Task) -> tuple[PrmFormat, int]:
    """The format of the PRM in the directory `checkpoint`, by its architecture, and the tokens it has positions for.

    Raises SapoError for an architecture of no format, or a tokenizer without the tokens that the format needs.
    """
    config = AutoConfig.from_pretrained(checkpoint, trust_remote_code=False)
    tokenizer = load_tokenizer(checkpoint)
    kind = (config.architectures or ["no architecture"])[0]
    try:
        if kind.endswith("ForTokenClassification"):
            return SapoFormat(tokenizer, task), config.max_position_embeddings
        if kind == "Qwen2ForProcessRewardModel":
            return QwenMathFormat(tokenizer), config.max_position_embeddings
        if kind.endswith("ForCausalLM"):
            return MathShepherdFormat(tokenizer), config.max_position_embeddings
    except SapoError as error:
        raise SapoError(f"{checkpoint} holds {kind}, but {error}") from error
    raise SapoError(
        f"{checkpoint} holds {kind}; a PRM is a …ForTokenClassification with one label (a verifier of this project), a "
        "Qwen2ForProcessRewardModel (Qwen2.5-Math-PRM) or a …ForCausalLM (Math-Shepherd)"
    )


class SapoFormat:
    """A verifier of this project: the task's prompt, the steps, a score at each one's last token.

    A step ends as the task's steps do, with a newline or a blank line, which is added where it is missing; not to the
    last, after which a solution ends.
    """

    name = "sapo"

    def __init__(self, tokenizer: PreTrainedTokenizerBase, task: Task) -> None:
        self._tokenizer, self._task = tokenizer, task
        self._end = "\n" if len(task.split("1\n1")) == 2 else "\n\n"

    def encode(self, problem: str, steps: Sequence[str]) -> Encoded:
        alphabet = self._task.alphabet
        if alphabet is not None and (other := sorted({*problem, *"".join(steps)} - {*alphabet})):
            raise SapoError(f"the task's models cannot read {other[0]!r}: they know the characters of the task alone")
        ended = [step if step.endswith("\n") else step + self._end for step in steps[:-1]]
        return encode(self._tokenizer, self._task.prompt(problem), [*ended, *steps[-1:]])

    def load(self, checkpoint: str, dtype: torch.dtype) -> PreTrainedModel:
        return load_verifier(checkpoint, dtype)


class MathShepherdFormat:
    """Math-Shepherd (arXiv 2312.08935): a causal LM that says `+` or `-` where the tag `ки` follows a step.

    The text is `problem step ки⏎step ки`; no `Step 1:` is put before a step that has none.
    """

    name = "math-shepherd"
    tag = "ки"

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._tag = _single_token(tokenizer, self.tag)
        signs = tokenizer.encode("+ -", add_special_tokens=False)  # as in a text, after a space
        if len(signs) != 2:
            raise SapoError("its tokenizer has no tokens for `+` and `-`, which a Math-Shepherd PRM chooses between")
        self._right, self._wrong = signs

    def encode(self, problem: str, steps: Sequence[str]) -> Encoded:
        text = f"{problem} " + "\n".join(f"{step} {self.tag}" for step in steps)
        return _at_tags(self._tokenizer.encode(text, verbose=False), self._tag, self.tag, len(steps))

    def load(self, checkpoint: str, dtype: torch.dtype) -> PreTrainedModel:
        """Of the head, only the rows of the two signs are kept: no other logits are computed."""
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=dtype, trust_remote_code=False)
        head: Any = model.get_output_embeddings()
        signs = nn.Linear(head.in_features, 2, bias=head.bias is not None, dtype=dtype)
        signs.load_state_dict({name: row[[self._wrong, self._right]] for name, row in head.state_dict().items()})
        model.set_output_embeddings(signs)
        return model


class QwenMathFormat:
    """Qwen2.5-Math-PRM (arXiv 2501.07301): a chat whose answer has `<extra_0>` after every step."""

    name = "qwen2.5-math-prm"
    tag = "<extra_0>"
    system = r"Please reason step by step, and put your final answer within \boxed{}."

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._tag = _single_token(tokenizer, self.tag)
        if tokenizer.chat_template is None:
            raise SapoError("its tokenizer has no chat template")

    def encode(self, problem: str, steps: Sequence[str]) -> Encoded:
        answer = "".join(step + self.tag for step in steps)
        turns = (("system", self.system), ("user", problem), ("assistant", answer))
        chat = [{"role": role, "content": content} for role, content in turns]
        text = self._tokenizer.apply_chat_template(chat, tokenize=False)
        ids = self._tokenizer.encode(text, add_special_tokens=False, verbose=False)
        return _at_tags(ids, self._tag, self.tag, len(steps))

    def load(self, checkpoint: str, dtype: torch.dtype) -> PreTrainedModel:
        """Raises SapoError where weights are missing: the head would be random."""
        config = Qwen2Config.from_pretrained(checkpoint, num_labels=2)
        loaded: Any = _QwenMathPrm.from_pretrained(checkpoint, config=config, dtype=dtype, output_loading_info=True)
        model, info = loaded
        if missing := sorted(info["missing_keys"]):
            raise SapoError(f"{checkpoint} holds no weights for {', '.join(missing)}")
        return model  # type: ignore[no-any-return]


class _QwenMathPrm(Qwen2ForTokenClassification):
    """Qwen2 under a head of two layers, as the checkpoint's own code has it."""

    _keys_to_ignore_on_load_unexpected = [r"^lm_head\."]  # noqa: RUF012

    def __init__(self, config: Qwen2Config) -> None:
        super().__init__(config)  # type: ignore[no-untyped-call]
        width = config.hidden_size
        self.score = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 2))  # type: ignore[assignment]


def _single_token(tokenizer: PreTrainedTokenizerBase, tag: str) -> int:
    """The token of a step tag. Raises SapoError where the tokenizer takes it apart or does not know it."""
    ids = tokenizer.encode(tag, add_special_tokens=False)
    if len(ids) != 1 or ids[0] == tokenizer.unk_token_id:
        raise SapoError(f"its tokenizer has no token for the step tag {tag}")
    return ids[0]  # type: ignore[no-any-return]


def _at_tags(ids: list[int], token: int, tag: str, steps: int) -> Encoded:
    """Tokens with the places of the step tags. The prompt is never wanted alone, so its length is not looked for."""
    places = [place for place, id_ in enumerate(ids) if id_ == token]
    if len(places) != steps:
        raise SapoError(f"the step tag {tag} is read {len(places)} times after {steps} steps: a text holds or hides it")
    return Encoded(ids, 0, places)
