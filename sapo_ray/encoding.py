"""From text to tokens, one step at a time.

Every step is encoded on its own, so the tokens of a prefix s_(0:j) are a prefix of the tokens of τ by construction,
whatever the tokenizer would merge across a step's boundary.

A task makes prompts without a tokenizer: a text, or the messages of a chat, which become a text by the chat template
that comes with the tokenizer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sapo_ray.errors import SapoError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class Chat:
    """A prompt as what a user says to a chat model, whose answer is the solution."""

    text: str


Prompt = str | Chat
"""What a solution follows."""


@dataclass(frozen=True, slots=True)
class Encoded:
    """A trajectory as tokens. `step_ends[j]` is the index in `ids` of the last token of step j."""

    ids: list[int]
    prompt_length: int
    step_ends: list[int]

    def until(self, step: int) -> Encoded:
        """The tokens of the prefix that ends with `step`; -1 is the prompt alone."""
        ends = self.step_ends[: step + 1]
        return Encoded(self.ids[: ends[-1] + 1 if ends else self.prompt_length], self.prompt_length, ends)


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> list[int]:
    """The tokens of a prompt, with those that the tokenizer puts before a text, once.

    Raises SapoError for a chat where the tokenizer has no template for one.
    """
    if isinstance(prompt, str):
        return list(tokenizer.encode(prompt, verbose=False))
    if tokenizer.chat_template is None:
        raise SapoError("task.prompt.chat is true, but the model's tokenizer has no chat template; set it to false")
    message = {"role": "user", "content": prompt.text}
    text = tokenizer.apply_chat_template([message], add_generation_prompt=True, tokenize=False)
    return list(tokenizer.encode(text, add_special_tokens=False, verbose=False))  # a template writes them all out


def encode(
    tokenizer: PreTrainedTokenizerBase, prompt: Prompt, steps: Sequence[str], *, finished: bool = False
) -> Encoded:
    """Encode a prompt and the steps after it; `finished` appends the end-of-sequence token.

    Raises ValueError for a prompt or step that has no tokens, SapoError as `encode_prompt` does.
    """
    ids = encode_prompt(tokenizer, prompt)
    prompt_length, step_ends = len(ids), []
    if not ids:
        raise ValueError("an empty prompt has no tokens")
    # One call for all steps: most of what a call costs does not depend on how much there is to encode.
    encoded = tokenizer(list(steps), add_special_tokens=False, verbose=False)["input_ids"] if steps else []
    for number, tokens in enumerate(encoded):
        if not tokens:
            raise ValueError(f"step {number} ({steps[number]!r}) has no tokens")
        ids += tokens
        step_ends.append(len(ids) - 1)
    if finished:
        ids.append(tokenizer.eos_token_id)
    return Encoded(ids, prompt_length, step_ends)
