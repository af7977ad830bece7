"""GGUF files and models of the hub as checkpoints: the same logits and tokens, and nothing left of what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, dequantize, quantize
from safetensors import safe_open
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from sapo_ray.encoding import Chat, encode, encode_prompt
from sapo_ray.errors import SapoError
from sapo_ray.importing import Imported, import_model
from sapo_ray.models import parameter_count, save_model
from tests.families import FAMILIES, TEXTS, Family, tiny_model, tiny_tokenizer
from tests.gguf_files import gguf_tensors, write_gguf

QWEN = FAMILIES["qwen2"]
IDS = torch.arange(5, 45)[None]
Q4_0, Q8_0 = GGMLQuantizationType.Q4_0, GGMLQuantizationType.Q8_0


@pytest.fixture(scope="module")
def qwen() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    tokenizer = tiny_tokenizer(QWEN)
    return tiny_model(QWEN, tokenizer), tokenizer


@torch.inference_mode()
def logits(checkpoint: Path | PreTrainedModel) -> torch.Tensor:
    model = checkpoint if isinstance(checkpoint, PreTrainedModel) else AutoModelForCausalLM.from_pretrained(checkpoint)
    found: torch.Tensor = model(IDS).logits
    return found


def stored(checkpoint: Path) -> set[str]:
    with safe_open(checkpoint / "model.safetensors", "pt") as file:
        return set(file.keys())


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_a_gguf_file_becomes_the_model_and_the_tokenizer_it_was_made_from(family: Family, tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer(family)
    model = tiny_model(family, tokenizer)
    source = write_gguf(tmp_path / "tiny.gguf", family, model, tokenizer)
    (tmp_path / "tokenizer.json").write_text("another model's")
    made = import_model(str(source), tmp_path / "made")
    assert torch.equal(logits(tmp_path / "made"), logits(model))
    assert ("lm_head.weight" in stored(tmp_path / "made")) is not family.tied
    loaded = AutoTokenizer.from_pretrained(tmp_path / "made")
    for text in TEXTS:
        ids = loaded.encode(text)
        assert ids == tokenizer.encode(text)
        assert loaded.decode(ids, skip_special_tokens=True) == text
    assert encode_prompt(loaded, Chat("1 + 1?")) == encode_prompt(tokenizer, Chat("1 + 1?"))
    turn = "<end_of_turn>" if family.name == "gemma2" else "<|im_end|>"
    assert encode(loaded, Chat("1 + 1?"), ["2"], finished=True).ids[-1] == tokenizer.convert_tokens_to_ids(turn)
    size = sum(file.stat().st_size for file in (tmp_path / "made").iterdir())
    assert made == Imported(
        directory=str(tmp_path / "made"),
        architecture=type(model).__name__,
        parameters=model.num_parameters(),
        dtype="float32",
        size=size,
        ends_with=turn,
        chat=True,
    )
    assert "_model_name_or_path" not in (tmp_path / "made" / "config.json").read_text()


@pytest.mark.parametrize("dtype", [None, "float32", "float16"])
def test_quantized_weights_are_unpacked_and_rounded_once(
    qwen: tuple[PreTrainedModel, PreTrainedTokenizerBase], tmp_path: Path, dtype: str | None
) -> None:
    model, tokenizer = qwen
    types = {name: Q8_0 for name, array in gguf_tensors(QWEN, model).items() if array.ndim == 2}
    source = write_gguf(tmp_path / "tiny.gguf", QWEN, model, tokenizer, types=types)
    made = import_model(str(source), tmp_path / "made", dtype)
    wanted = getattr(torch, dtype or "bfloat16")
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "made", dtype="auto").state_dict()
    for name, weights in model.state_dict().items():
        exact = weights.numpy()
        if exact.ndim == 2:
            exact = dequantize(quantize(exact, Q8_0), Q8_0)
        assert torch.equal(found[name], torch.from_numpy(exact).to(wanted)), name
    assert made.dtype == (dtype or "bfloat16")


def test_floats_keep_their_type(qwen: tuple[PreTrainedModel, PreTrainedTokenizerBase], tmp_path: Path) -> None:
    for name in ("F16", "BF16"):
        kind = GGMLQuantizationType[name]
        types = {tensor: kind for tensor, array in gguf_tensors(QWEN, qwen[0]).items() if array.ndim == 2}
        source = write_gguf(tmp_path / f"{name}.gguf", QWEN, *qwen, types=types)
        assert import_model(str(source), tmp_path / name).dtype == {"F16": "float16", "BF16": "bfloat16"}[name]


@pytest.mark.parametrize(("input_type", "output_type"), [(Q4_0, Q8_0), (Q8_0, Q4_0)])
def test_embeddings_that_were_stored_twice_are_shared_again(
    tmp_path: Path, input_type: GGMLQuantizationType, output_type: GGMLQuantizationType
) -> None:
    """And the finer of the two copies is the one that is kept."""
    tokenizer = tiny_tokenizer(QWEN)
    model = tiny_model(QWEN, tokenizer, tie_word_embeddings=True)
    tensors = gguf_tensors(QWEN, model)
    assert np.array_equal(tensors["output.weight"], tensors["token_embd.weight"])
    types = {"token_embd.weight": input_type, "output.weight": output_type}
    source = write_gguf(tmp_path / "tiny.gguf", QWEN, model, tokenizer, tensors=tensors, types=types)
    made = import_model(str(source), tmp_path / "made", "float32")
    assert "lm_head.weight" not in stored(tmp_path / "made")
    assert made.parameters == model.num_parameters()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "made")
    assert loaded.config.tie_word_embeddings
    finer = dequantize(quantize(tensors["token_embd.weight"], Q8_0), Q8_0)
    for embeddings in (loaded.get_input_embeddings(), loaded.get_output_embeddings()):
        assert torch.equal(embeddings.weight, torch.from_numpy(finer))


def test_what_ends_a_turn_ends_a_text_whatever_the_file_says(
    qwen: tuple[PreTrainedModel, PreTrainedTokenizerBase], tmp_path: Path
) -> None:
    model, tokenizer = qwen
    end, turn = tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_end|>"])
    source = write_gguf(tmp_path / "chat.gguf", QWEN, *qwen, tokenizer__ggml__eos_token_id=end)
    assert import_model(str(source), tmp_path / "chat").ends_with == "<|im_end|>"
    assert GenerationConfig.from_pretrained(tmp_path / "chat").eos_token_id == [turn, end]
    plain: dict[str, Any] = {"tokenizer__ggml__eos_token_id": end, "tokenizer__chat_template": None}
    source = write_gguf(tmp_path / "plain.gguf", QWEN, model, tokenizer, **plain)
    made = import_model(str(source), tmp_path / "plain")
    assert (made.ends_with, made.chat) == ("<|endoftext|>", False)
    assert GenerationConfig.from_pretrained(tmp_path / "plain").eos_token_id == end


REFUSALS: dict[str, tuple[dict[str, Any], str]] = {
    "architecture": ({"architecture": "rwkv6"}, "of architecture rwkv6, which transformers cannot read"),
    "part": ({"split__count": 3, "split__no": 1}, "is part 2 of 3; join them with llama-gguf-split --merge"),
    "tokenizer": ({"tokenizer__ggml__tokens": None}, "has no tokenizer, or none with an end-of-sequence token"),
    "end": ({"tokenizer__ggml__eos_token_id": None}, "has no tokenizer, or none with an end-of-sequence token"),
    "cut": ({"tokenizer__ggml__pre": "default"}, "tokenizer.ggml.pre is default; how it cuts texts into words"),
    "old": ({"tokenizer__ggml__pre": None}, "tokenizer.ggml.pre is None; how it cuts texts into words"),
    "template": ({"tokenizer__chat_template": "{{ oops("}, "cannot be loaded by transformers: TemplateSyntaxError: "),
    "more": ({"add": "rope_freqs.weight"}, "holds 105,680 weights, of which a Qwen2ForCausalLM takes 105,664: "),
    "less": ({"leave_out": "blk.1.ffn_up.weight"}, "lacks weights of a Qwen2ForCausalLM, such as model.layers.1.mlp."),
}


@pytest.mark.parametrize(("changes", "message"), REFUSALS.values(), ids=REFUSALS)
def test_a_file_that_is_not_all_of_a_model_leaves_nothing(
    qwen: tuple[PreTrainedModel, PreTrainedTokenizerBase], tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    changes, tensors = dict(changes), gguf_tensors(QWEN, qwen[0])
    if "add" in changes:
        tensors[changes.pop("add")] = np.ones(16)
    if "leave_out" in changes:
        del tensors[changes.pop("leave_out")]
    source = write_gguf(tmp_path / "tiny.gguf", QWEN, *qwen, tensors=tensors, **changes)
    refused(str(source), tmp_path / "made", message)


@pytest.mark.parametrize("length", [0, 3, 100, 5000, -1000])
def test_a_file_that_is_cut_short_leaves_nothing(
    qwen: tuple[PreTrainedModel, PreTrainedTokenizerBase], tmp_path: Path, length: int
) -> None:
    source = write_gguf(tmp_path / "tiny.gguf", QWEN, *qwen)
    source.write_bytes(source.read_bytes()[:length])
    refused(str(source), tmp_path / "made", "is no GGUF file" if length in (0, 3) else "is damaged or cut short")


def refused(source: str, target: Path, message: str, **options: Any) -> None:
    before = sorted(target.parent.rglob("*"))
    with pytest.raises(SapoError) as caught:
        import_model(source, target, **options)
    line = str(caught.value)
    assert source in line
    assert message in line
    assert "\n" not in line
    assert sorted(target.parent.rglob("*")) == before


def test_places_and_sources_that_do_not_fit_are_named(
    qwen: tuple[PreTrainedModel, PreTrainedTokenizerBase], tmp_path: Path
) -> None:
    source = str(write_gguf(tmp_path / "tiny.gguf", QWEN, *qwen))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "config.json").touch()
    (tmp_path / "mine.tmp").mkdir()
    for target, message in {
        tmp_path / "full": "full exists and is not an empty directory; choose another, or remove it",
        tmp_path / "tiny.gguf": "tiny.gguf exists and is not an empty directory",
        tmp_path / "mine": "mine.tmp is where the import works, and exists; remove it, if it is left of one",
        tmp_path / "no" / "made": f"{tmp_path}/no is no directory to make made in; make it first",
    }.items():
        with pytest.raises(SapoError, match=message):
            import_model(source, target)
    refused(str(tmp_path / "full"), tmp_path / "made", "is a directory; a checkpoint directory needs no import")
    refused(source, tmp_path / "made", "--revision is main, but", revision="main")
    refused("/nowhere/none.gguf", tmp_path / "made", "/nowhere/none.gguf: no such file")
    (tmp_path / "empty").mkdir()
    assert import_model(source, tmp_path / "empty").parameters == qwen[0].num_parameters()


@pytest.fixture
def hub(qwen: tuple[PreTrainedModel, PreTrainedTokenizerBase], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cached snapshot of the model `tiny/qwen`, with code and pickled weights beside what a checkpoint has."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "hub" / "models--tiny--qwen"
    snapshot = repository / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    for name in ("main", "v2"):
        (repository / "refs" / name).write_text(commit)
    save_model(qwen[0].to(torch.bfloat16), snapshot)
    qwen[0].generation_config.save_pretrained(snapshot)
    qwen[0].float()
    qwen[1].save_pretrained(snapshot)
    for other in ("modeling_qwen.py", "pytorch_model.bin", "original/consolidated.safetensors", "README.md"):
        (snapshot / other).parent.mkdir(exist_ok=True)
        (snapshot / other).write_text("raise SystemExit('this must not be read')")
    return snapshot


def test_a_model_of_the_hub_is_copied_as_it_is_without_code_or_pickles(hub: Path, tmp_path: Path) -> None:
    made = import_model("tiny/qwen", tmp_path / "made", revision="v2")
    names = {file.name for file in (tmp_path / "made").iterdir()}
    assert names == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
    }
    for name in names:
        assert (tmp_path / "made" / name).read_bytes() == (hub / name).read_bytes()
        assert not (tmp_path / "made" / name).is_symlink()
    assert (made.dtype, made.ends_with, made.chat) == ("bfloat16", "<|im_end|>", True)
    assert made.parameters == parameter_count(tmp_path / "made")


def test_a_model_of_the_hub_in_another_type(hub: Path, tmp_path: Path) -> None:
    assert import_model("tiny/qwen", tmp_path / "made", "float32").dtype == "float32"
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "made", dtype="auto")
    assert loaded.dtype == torch.float32
    assert torch.equal(logits(loaded), logits(AutoModelForCausalLM.from_pretrained(hub, dtype=torch.float32)))
    generation = (tmp_path / "made" / "generation_config.json").read_bytes()
    assert generation == (hub / "generation_config.json").read_bytes()


def test_weights_in_parts_are_copied_with_their_index(hub: Path, tmp_path: Path) -> None:
    weights = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (hub / "model.safetensors.index.json").write_text(json.dumps(weights))
    (hub / "model.safetensors").rename(hub / "model-00001-of-00002.safetensors")
    refused("tiny/qwen", tmp_path / "made", "has no model-00002-of-00002.safetensors: its weights are not, or not all")
    shutil.copyfile(hub / "model-00001-of-00002.safetensors", hub / "model-00002-of-00002.safetensors")
    import_model("tiny/qwen", tmp_path / "made")
    assert {file.name for file in (tmp_path / "made").iterdir()} > {*weights["weight_map"].values()}


def changed(file: Path, **keys: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | keys))


HUB_REFUSALS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "pickles": (lambda hub: (hub / "model.safetensors").unlink(), "has no model.safetensors: its weights are not"),
    "config": (lambda hub: (hub / "config.json").unlink(), "is no model for transformers: it has no config.json"),
    "code": (
        lambda hub: changed(hub / "config.json", model_type="mine", auto_map={"AutoConfig": "modeling_qwen.Mine"}),
        "cannot be used by transformers: ",
    ),
    "head": (
        lambda hub: changed(hub / "config.json", architectures=["Qwen2Model"]),
        "holds Qwen2Model; a …ForCausalLM is needed",
    ),
    "quantized": (
        lambda hub: changed(hub / "config.json", quantization_config={"quant_method": "awq"}),
        "is quantized, so that it cannot be trained",
    ),
    "end": (
        lambda hub: changed(hub / "generation_config.json", eos_token_id=7),
        "its tokenizer ends texts with <|im_end|> (2), but generation ends at 7",
    ),
    "tokenizer": (lambda hub: (hub / "tokenizer.json").unlink(), "has no tokenizer (none of tokenizer.json, "),
}


@pytest.mark.parametrize(("change", "message"), HUB_REFUSALS.values(), ids=HUB_REFUSALS)
def test_a_model_of_the_hub_that_cannot_be_used_leaves_nothing(
    hub: Path, tmp_path: Path, change: Callable[[Path], Any], message: str
) -> None:
    change(hub)
    refused("tiny/qwen", tmp_path / "made", message)


@pytest.mark.parametrize("name", ["tiny/other", "no such file", "tiny/qwen/too/long"])
def test_what_is_neither_a_file_nor_on_the_hub_is_named(hub: Path, tmp_path: Path, name: str) -> None:
    refused(name, tmp_path / "made", "is neither a file nor a model that can be had from the hub or its cache: ")
