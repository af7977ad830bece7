"""Step-wise encoding: the tokens of a prefix are a prefix of the tokens, also where a tokenizer merges characters."""

from __future__ import annotations

import json
from pathlib import Path
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from sapo_ray.encoding import Chat, encode, encode_prompt
from sapo_ray.errors import SapoError
from sapo_ray.models import character_tokenizer
from sapo_ray.steps import StepUnit, split_steps
from sapo_ray.tasks.chain import VOCABULARY
from tests.families import FAMILIES, tiny_tokenizer


def _trained(texts: list[str], size: int, *, use_regex: bool) -> PreTrainedTokenizerBase:
    """A byte-level BPE that begins every text with a token of its own, as Llama's does."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet)
    bpe.train_from_iterator(texts, trainer)
    bpe.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>")


MERGING = _trained(["1+1=2\n2+1=3\n3+3=6\n" * 20], 400, use_regex=False)
"""Merges across line ends, too."""
CHARACTERS = character_tokenizer(VOCABULARY, 512)
FAMILIAR = [tiny_tokenizer(family) for family in FAMILIES.values()]
STEPS = st.lists(st.text(alphabet="123+=\n", min_size=1, max_size=12), max_size=5)


def test_the_example_tokenizer_does_merge_across_steps() -> None:
    assert len(MERGING.encode("1+1=2\n2+1=3\n")) < len(encode(MERGING, "1+1=2\n", ["2+1=3\n"]).ids)
    assert MERGING.encode("1")[0] == MERGING.bos_token_id


@given(
    prompt=st.text(alphabet="123+=\n", min_size=1),
    steps=STEPS,
    tokenizer=st.sampled_from([MERGING, CHARACTERS, *FAMILIAR]),
)
def test_prefixes_of_the_steps_are_prefixes_of_the_tokens(
    prompt: str, steps: list[str], tokenizer: PreTrainedTokenizerBase
) -> None:
    whole = encode(tokenizer, prompt, steps, finished=True)
    assert whole.ids[: whole.prompt_length] == tokenizer.encode(prompt)
    assert whole.ids[-1] == tokenizer.eos_token_id
    for j in range(len(steps)):
        prefix = encode(tokenizer, prompt, steps[: j + 1])
        assert prefix.ids == whole.ids[: whole.step_ends[j] + 1]
        assert whole.until(j) == prefix
        start = prefix.step_ends[j - 1] + 1 if j else whole.prompt_length
        assert tokenizer.decode(prefix.ids[start:]) == steps[j]
    assert whole.until(-1) == encode(tokenizer, prompt, [])
    assert len(whole.ids) == (whole.step_ends[-1] + 1 if steps else whole.prompt_length) + 1


def test_what_has_no_tokens_is_refused() -> None:
    with pytest.raises(ValueError, match=r"step 1 \(''\) has no tokens"):
        encode(CHARACTERS, "1+1\n", ["1+1=2\n", ""])
    with pytest.raises(ValueError, match="empty prompt"):
        encode(CHARACTERS, "", [])


@pytest.mark.parametrize("unit", get_args(StepUnit))
def test_real_solutions_are_encoded_stably_by_a_real_vocabulary(data: Path, unit: StepUnit) -> None:
    """As trained on that text, with GPT-2's word boundaries: prefixes of the steps are prefixes of the tokens."""
    rows = [json.loads(line) for line in (data / "gsm8k/test.jsonl").read_text().splitlines()]
    tokenizer = _trained([row["question"] + "\n" + row["answer"] for row in rows], 2000, use_regex=True)
    for row in rows[:300]:
        steps = split_steps(row["answer"], unit)
        whole = encode(tokenizer, row["question"], steps)
        assert tokenizer.decode(whole.ids[whole.prompt_length :]) == row["answer"]
        for j in range(-1, len(steps)):
            prefix = encode(tokenizer, row["question"], steps[: j + 1])
            assert whole.ids[: len(prefix.ids)] == prefix.ids
            assert whole.until(j) == prefix


def test_a_chat_is_put_into_the_template_and_begins_once() -> None:
    tokenizer = _trained(["1+1=2\n"], 300, use_regex=True)
    tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}</s>{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    ids = encode_prompt(tokenizer, Chat("1+1?"))
    assert tokenizer.decode(ids) == "<s>[user]1+1?</s>[assistant]"
    assert ids.count(tokenizer.bos_token_id) == 1
    assert tokenizer.eos_token_id in ids
    whole = encode(tokenizer, Chat("1+1?"), ["2\n"], finished=True)
    assert whole.ids[: whole.prompt_length] == ids
    assert tokenizer.decode(whole.ids[whole.prompt_length :]) == "2\n</s>"


def test_a_chat_needs_a_template() -> None:
    with pytest.raises(SapoError, match=r"task.prompt.chat is true, but the model's tokenizer has no chat template"):
        encode(CHARACTERS, Chat("1+1?"), [])
