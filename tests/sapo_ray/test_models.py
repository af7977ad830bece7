"""The random start and its tokenizer, as transformers loads them; what a verifier stores; counting weights."""

from __future__ import annotations

import json
import shutil
import string
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma2Config,
    LlamaConfig,
    PreTrainedTokenizerBase,
    Qwen2Config,
    TokenizersBackend,
)

from sapo_ray.errors import SapoError
from sapo_ray.models import Calibration, ModelConfig, attention, base_tokenizer, parameter_count, save_random_reasoner
from sapo_ray.plan.shape import model_shape
from sapo_ray.tasks.chain import VOCABULARY

CONFIG = ModelConfig(hidden_size=64, layers=2, heads=2, intermediate_size=24, max_length=64)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "base"
    save_random_reasoner(CONFIG, VOCABULARY, seed=1, path=path)
    return path


@pytest.fixture(scope="module")
def tokenizer(checkpoint: Path) -> PreTrainedTokenizerBase:
    loaded: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(checkpoint)
    return loaded


@given(text=st.text(alphabet=VOCABULARY))
def test_the_saved_tokenizer_gives_every_text_back(tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    ids = tokenizer.encode(text)
    assert len(ids) == len(text)
    assert tokenizer.decode(ids) == text
    assert ids == tokenizer.encode(text, add_special_tokens=False)


def test_special_tokens_stand_first(tokenizer: PreTrainedTokenizerBase) -> None:
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (0, 1)
    assert tokenizer.encode(VOCABULARY) == list(range(2, 2 + len(VOCABULARY)))
    assert len(tokenizer) == 2 + len(VOCABULARY)
    assert tokenizer.decode([*tokenizer.encode("1+1=2\n"), 1, 0], skip_special_tokens=True) == "1+1=2\n"
    assert tokenizer.model_max_length == CONFIG.max_length


def test_the_model_is_an_fp32_qwen2_whose_weights_are_counted(checkpoint: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    assert model.config.model_type == "qwen2"
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert parameter_count(checkpoint) == sum(p.numel() for p in model.parameters())
    assert (model.config.eos_token_id, model.config.pad_token_id) == (1, 0)
    assert (model.generation_config.eos_token_id, model.generation_config.pad_token_id) == (1, 0)


def test_weights_follow_from_the_seed_and_leave_the_random_state_alone(checkpoint: Path, tmp_path: Path) -> None:
    before = torch.random.get_rng_state()
    save_random_reasoner(CONFIG, VOCABULARY, seed=1, path=tmp_path / "same")
    save_random_reasoner(CONFIG, VOCABULARY, seed=2, path=tmp_path / "other")
    assert torch.equal(torch.random.get_rng_state(), before)
    weights = (checkpoint / "model.safetensors").read_bytes()
    assert (tmp_path / "same" / "model.safetensors").read_bytes() == weights
    assert (tmp_path / "other" / "model.safetensors").read_bytes() != weights
    assert {p.name for p in tmp_path.iterdir()} == {"same", "other"}


def test_attention_is_what_is_asked_for_unless_it_would_leave_out_a_cap() -> None:
    plain, capped = Qwen2Config(), Gemma2Config(attn_logit_softcapping=50.0)
    assert [attention(plain, asked) for asked in (None, "eager", "sdpa")] == [None, "eager", "sdpa"]
    assert [attention(capped, asked) for asked in (None, "flash_attention_2")] == ["eager", "flash_attention_2"]
    with pytest.raises(SapoError, match=r"model\.attention is sdpa, .* as gemma2 does; leave it null or name another"):
        attention(capped, "sdpa")


def test_calibration_is_stored_with_its_checkpoint(tmp_path: Path) -> None:
    assert Calibration.load(str(tmp_path)) is None
    for calibration in (Calibration(0.75, 0.5), Calibration(None, 0.25)):
        (tmp_path / "calibration.json").write_text(calibration.text())
        assert Calibration.load(str(tmp_path)) == calibration


def test_a_directory_without_weights_has_none_to_count(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="holds no safetensors weights"):
        parameter_count(tmp_path)


@pytest.mark.parametrize(
    ("keys", "named"),
    [({"layers": 0}, "layers is 0"), ({"hidden_size": 96, "heads": 2}, "hidden_size is 96; .* 64")],
)
def test_impossible_configs_are_named(keys: dict[str, int], named: str) -> None:
    with pytest.raises(ValueError, match=f"^{named}"):
        ModelConfig(**keys)  # type: ignore[arg-type]


def test_what_ends_a_text_must_be_known_and_end_generation(tmp_path: Path) -> None:
    save_random_reasoner(CONFIG, VOCABULARY, 1, tmp_path)
    config, stated = ModelConfig(path=str(tmp_path)), tmp_path / "generation_config.json"
    for ends in ("1", "[7, 1]"):
        stated.write_text(f'{{"eos_token_id": {ends}}}')
        assert base_tokenizer(config, VOCABULARY).eos_token_id == 1
    for ends in ("7", "[7, 8]", "null"):
        stated.write_text(f'{{"eos_token_id": {ends}}}')
        with pytest.raises(
            SapoError, match=rf"^{tmp_path}: its tokenizer ends texts with <eos> \(1\), but generation "
        ):
            base_tokenizer(config, VOCABULARY)
    stated.write_text("{")
    with pytest.raises(SapoError, match=rf"^{tmp_path}: its generation_config.json cannot be read: "):
        base_tokenizer(config, VOCABULARY)
    endless = spaced_tokenizer("never")
    endless.eos_token = None
    with pytest.raises(SapoError, match=rf"^{tmp_path}/x: its tokenizer has no end-of-sequence token"):
        saved_and_loaded(endless, tmp_path / "x")


@pytest.mark.parametrize(("prepend", "usable"), [("never", True), ("first", False), ("always", False)])
def test_a_tokenizer_that_puts_a_space_before_every_text_is_refused(tmp_path: Path, prepend: str, usable: bool) -> None:
    if usable:
        saved_and_loaded(spaced_tokenizer(prepend), tmp_path)
        return
    with pytest.raises(SapoError, match=rf"^{tmp_path}: its tokenizer, given the steps .* makes .*n #### 2' of them; "):
        saved_and_loaded(spaced_tokenizer(prepend), tmp_path)


def spaced_tokenizer(prepend: str) -> PreTrainedTokenizerBase:
    """Like sentencepiece's: it writes spaces as ▁, and may put one before a text."""
    backend = Tokenizer(models.BPE(unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prepend)
    backend.decoder = decoders.Metaspace(prepend_scheme=prepend)
    backend.train_from_iterator(list(string.printable), trainers.BpeTrainer(special_tokens=["<unk>", "</s>"]))
    return TokenizersBackend(tokenizer_object=backend, eos_token="</s>")


def saved_and_loaded(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    tokenizer.save_pretrained(folder)
    LlamaConfig().save_pretrained(folder)
    base_tokenizer(ModelConfig(path=str(folder)), None)


def test_code_beside_a_checkpoint_is_never_run_nor_asked_about(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a family that transformers knows, its own code is used; of another, the checkpoint is refused."""
    monkeypatch.setattr("builtins.input", lambda _: "y")
    code = f"open({str(tmp_path / 'ran')!r}, 'w')\nfrom transformers import Qwen2Config as C, Qwen2Tokenizer as T\n"
    for kind in ("qwen2", "made-up"):
        path = tmp_path / kind
        shutil.copytree(checkpoint, path)
        (path / "code.py").write_text(code)
        for name, key, value in (
            ("config", "AutoConfig", "code.C"),
            ("tokenizer_config", "AutoTokenizer", ["code.T", None]),
        ):
            stored = json.loads((path / f"{name}.json").read_text())
            stored |= {"auto_map": {key: value}} | ({"model_type": kind} if name == "config" else {})
            (path / f"{name}.json").write_text(json.dumps(stored))
    known, unknown = (ModelConfig(path=str(tmp_path / kind)) for kind in ("qwen2", "made-up"))
    tokenizer = base_tokenizer(known, VOCABULARY)
    assert model_shape(known, tokenizer).architecture == "Qwen2ForCausalLM"
    with pytest.raises(SapoError, match=r"made-up cannot be loaded .*; code that comes with a checkpoint is never run"):
        base_tokenizer(unknown, VOCABULARY)
    assert not (tmp_path / "ran").exists()
