"""Step-wise encoding: the tokens of a prefix are a prefix of the tokens, also where a tokenizer merges characters."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from sapo_ray.encoding import encode
from sapo_ray.models import character_tokenizer
from sapo_ray.tasks.chain import VOCABULARY


def _merging() -> PreTrainedTokenizerBase:
    """A byte-level BPE that merges across line ends, and begins every text with a token of its own, as Llama's does."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet)
    bpe.train_from_iterator(["1+1=2\n2+1=3\n3+3=6\n" * 20], trainer)
    bpe.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>")


MERGING = _merging()
CHARACTERS = character_tokenizer(VOCABULARY, 512)
STEPS = st.lists(st.text(alphabet="123+=\n", min_size=1, max_size=12), max_size=5)


def test_the_example_tokenizer_does_merge_across_steps() -> None:
    assert len(MERGING.encode("1+1=2\n2+1=3\n")) < len(encode(MERGING, "1+1=2\n", ["2+1=3\n"]).ids)
    assert MERGING.encode("1")[0] == MERGING.bos_token_id


@given(prompt=st.text(alphabet="123+=\n", min_size=1), steps=STEPS, tokenizer=st.sampled_from([MERGING, CHARACTERS]))
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
