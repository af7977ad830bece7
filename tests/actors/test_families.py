"""Qwen2, Llama (SmolLM) and Gemma 2, tiny and random: trained, made a verifier of, scored, exported, sampled from."""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForTokenClassification,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
)

from sapo_ray.data import LABELS, TRAJECTORIES
from sapo_ray.encoding import Chat, Encoded, encode
from sapo_ray.models import save_model
from sapo_ray.requests import EngineConfig
from sapo_ray.scoring import load_verifier, score
from sapo_ray.training import TrainConfig, TrainJob, TrainResult
from tests.families import FAMILIES, TEXTS, Family, tiny_model, tiny_tokenizer

pytestmark = pytest.mark.engine

STEPS = [[line + "\n" for line in text.splitlines()] for text in TEXTS]
CONFIG = TrainConfig(
    epochs=4, batch_size=3, max_tokens=128, micro_batch_tokens=256, learning_rate=1e-3, max_grad_norm=0.0, zero_stage=0
)
ENGINE = EngineConfig(max_model_len=128, max_num_seqs=4, max_num_batched_tokens=128, kv_cache_gib=0.125)


@dataclass(frozen=True)
class Asking:
    """A task as far as training needs one."""

    def prompt(self, question: str) -> Chat:
        return Chat(question)


@pytest.fixture(params=FAMILIES.values(), ids=FAMILIES)
def init(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A checkpoint of a family. Gemma's attention is capped so low that it shows."""
    family: Family = request.param
    tokenizer = tiny_tokenizer(family)
    capped = {"attn_logit_softcapping": 0.5, "query_pre_attn_scalar": 1} if family.name == "gemma2" else {}
    model = tiny_model(family, tokenizer, **capped)
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, 9]
    save_model(model, tmp_path / "init")
    model.generation_config.save_pretrained(tmp_path / "init")
    tokenizer.save_pretrained(tmp_path / "init")
    return tmp_path / "init"


def train(init: Path, objective: str, learning_rate: float) -> TrainResult:
    from actors.train_loop import train

    schema, data = LABELS if objective == "prm" else TRAJECTORIES, init.with_name(f"{objective}.parquet")
    records = [
        {
            "trajectory_id": str(number),
            "question_id": str(number),
            "question": "Why?",
            "steps": steps,
            "truncated": False,
            "step_labels": [int(j == 0) for j in range(len(steps))],
        }
        for number, steps in enumerate(STEPS)
    ]
    pq.write_table(pa.Table.from_pylist(records, schema=schema), data)
    job = TrainJob(
        objective=objective,
        init=str(init),
        data=(str(data),),
        out=str(init.with_name(objective)),
        task=Asking(),
        config=replace(CONFIG, learning_rate=learning_rate),
        seed=0,
    )
    return train(job, torch.device("cpu"), lambda *_: None, lambda: False)


def encoded(checkpoint: Path) -> list[Encoded]:
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    return [encode(tokenizer, Chat("Why?"), steps, finished=True) for steps in STEPS]


@torch.inference_mode()
def mean_nll(checkpoint: Path) -> float:
    """Of the tokens after the prompts, by transformers' own loss, one solution at a time."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint, attn_implementation="eager")
    total, count = 0.0, 0
    for row in encoded(checkpoint):
        ids, targets = torch.tensor([row.ids]), len(row.ids) - row.prompt_length
        labels = torch.tensor([[-100] * row.prompt_length + row.ids[row.prompt_length :]])
        total += float(model(input_ids=ids, labels=labels).loss) * targets
        count += targets
    return total / count


@pytest.mark.usefixtures("process_group")
def test_a_reasoner_of_any_family_learns_and_is_loaded_again(init: Path) -> None:
    result = train(init, "sft", 1e-3)
    losses = [metrics["loss"] for metrics in result.metrics]
    assert losses[0] == pytest.approx(mean_nll(init), abs=1e-5)
    assert mean_nll(Path(result.checkpoint)) < losses[-1] < losses[0]
    ends = [GenerationConfig.from_pretrained(path).eos_token_id for path in (init, result.checkpoint)]
    assert ends[0] == ends[1]
    assert [row.ids for row in encoded(Path(result.checkpoint))] == [row.ids for row in encoded(init)]


@pytest.mark.usefixtures("process_group")
def test_a_verifier_keeps_the_reasoner_s_weights_under_a_new_head(init: Path) -> None:
    reasoner = AutoModelForCausalLM.from_pretrained(init).model.state_dict()
    result = train(init, "prm", 1e-9)
    verifier = load_verifier(result.checkpoint)
    kept = getattr(verifier, verifier.base_model_prefix).state_dict()
    assert kept.keys() == reasoner.keys()
    assert all(torch.allclose(kept[name], reasoner[name], atol=1e-6) for name in kept)
    rows = encoded(init)
    for scores, row in zip(score(verifier, rows, 4096), rows, strict=True):
        assert scores == pytest.approx(plain_scores(result.checkpoint, row), abs=1e-5)


@torch.inference_mode()
def plain_scores(checkpoint: str, row: Encoded) -> list[float]:
    """One prefix at a time, without a batch."""
    model: PreTrainedModel = AutoModelForTokenClassification.from_pretrained(checkpoint, attn_implementation="eager")
    prefixes = [row.ids[: end + 1] for end in row.step_ends]
    return [float(torch.sigmoid(model.eval()(torch.tensor([ids])).logits[0, -1, 0])) for ids in prefixes]


@pytest.mark.slow
def test_vllm_writes_what_transformers_writes_after_its_start_and_after_a_reload(
    init: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from actors.reasoner import environment

    prompts = [row.until(0).ids for row in encoded(init)]
    model = AutoModelForCausalLM.from_pretrained(init, attn_implementation="eager", dtype=torch.float32)
    expected = [written_by_transformers(model, prompts)]
    with torch.no_grad():
        for weights in model.parameters():
            weights.copy_(weights.roll(1, 0))
    other = init.with_name("other")
    other.mkdir()
    save_model(model, other)
    expected.append(written_by_transformers(model, prompts))
    assert expected[0] != expected[1]
    for name, value in environment(ENGINE).items():
        monkeypatch.setenv(name, value)
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:  # whose end is the engine's
        assert process.submit(written_by_vllm, [str(init), str(other)], prompts).result() == expected


def written_by_transformers(model: PreTrainedModel, prompts: list[list[int]]) -> list[list[int]]:
    """Greedy tokens, one prompt at a time."""
    made = [model.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=12)[0] for ids in prompts]
    return [tokens[len(ids) :].tolist() for tokens, ids in zip(made, prompts, strict=True)]


def written_by_vllm(checkpoints: list[str], prompts: list[list[int]]) -> list[list[list[int]]]:
    """Greedy tokens of an engine as rollout workers have it, started with the first checkpoint; it loads the others."""
    from vllm import LLM, SamplingParams
    from vllm.inputs import tokens_input

    from actors.reasoner import engine_args

    engine = LLM(**engine_args(ENGINE, checkpoints[0]))
    sampling = SamplingParams(temperature=0.0, max_tokens=12)
    found = []
    for number, checkpoint in enumerate(checkpoints):
        if number:
            engine.collective_rpc("load_checkpoint", args=(checkpoint,))
            engine.reset_prefix_cache()
        outputs = engine.generate([tokens_input(ids) for ids in prompts], sampling, use_tqdm=False)
        found.append([list(output.outputs[0].token_ids) for output in outputs])
    return found
