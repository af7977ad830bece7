"""The training loop in this process, alone in its process group, against a plain loop in torch."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForTokenClassification, AutoTokenizer

from sapo_ray.batching import global_batches
from sapo_ray.cache import local_checkpoint
from sapo_ray.data import LABELS, PAIRS, TRAJECTORIES
from sapo_ray.errors import SapoError
from sapo_ray.lease import LEASE
from sapo_ray.manifest import Files, sealed, unsealed
from sapo_ray.models import ModelConfig, parameter_count, save_random_reasoner
from sapo_ray.objectives import make_objective
from sapo_ray.objectives.base import Example, collate
from sapo_ray.shards import read_rows
from sapo_ray.store import RunDirectory
from sapo_ray.tasks.chain import VOCABULARY, Chain, ChainConfig
from sapo_ray.training import LoraConfig, TrainConfig, TrainJob, TrainResult, learning_rate
from tests.disks import Disk

pytestmark = [pytest.mark.engine, pytest.mark.usefixtures("process_group")]

CPU = torch.device("cpu")
BETA = 0.2
CHAIN = Chain(ChainConfig(worked=22, pool=1, validation=1, test=1, ood=1))
CONFIG = TrainConfig(
    epochs=2, batch_size=8, max_tokens=128, micro_batch_tokens=300, learning_rate=3e-3, max_grad_norm=1.0, zero_stage=0
)
"""22 examples: two batches of 8 and one of 6 an epoch, each of several micro-batches."""
LORA = LoraConfig(rank=4, alpha=8, targets=["q_proj", "v_proj", "up_proj"])


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random reasoner in `init`, and data for every objective."""
    home = tmp_path_factory.mktemp("training")
    save_random_reasoner(
        ModelConfig(hidden_size=32, layers=2, heads=1, intermediate_size=64), VOCABULARY, 0, home / "init"
    )
    records: dict[str, list[dict[str, Any]]] = {"sft": [], "prm": [], "orpo": []}
    for i, question in enumerate(CHAIN.questions("worked")):
        steps = list(question.solution or ())
        common = {"question_id": question.id, "question": question.text}
        trajectory = {**common, "trajectory_id": question.id, "steps": steps, "truncated": False}
        labels = [-1 if j == 2 else int(j < i % 5) for j in range(len(steps))]
        wrong = None if i % 3 == 0 else [*steps[:-1], "1+1=9\n"]
        records["sft"].append(trajectory)
        records["prm"].append({**trajectory, "step_labels": labels})
        records["orpo"].append({**common, "chosen_id": question.id, "chosen": steps, "rejected": wrong})
    for name, schema in (("sft", TRAJECTORIES), ("prm", LABELS), ("orpo", PAIRS)):
        pq.write_table(pa.Table.from_pylist(records[name], schema=schema), home / f"{name}.parquet")
    return home


def job(home: Path, out: Path, objective: str = "sft", **changes: Any) -> TrainJob:
    return TrainJob(
        objective=objective,
        init=str(home / "init"),
        data=(str(home / f"{objective}.parquet"),),
        out=str(out),
        task=CHAIN,
        config=replace(CONFIG, **changes),
        seed=3,
        params={"beta": BETA} if objective == "orpo" else {},
    )


def run(job: TrainJob, report: Any = lambda *_: None, stop: Callable[[], bool] = lambda: False) -> TrainResult:
    from actors.train_loop import train

    return train(job, CPU, report, stop)


def plain_losses(job: TrainJob) -> list[float]:
    """The oracle: each batch in one padded forward pass, its loss written out, torch's AdamW and nothing else."""
    torch.manual_seed(job.seed)
    auto = AutoModelForTokenClassification if job.objective == "prm" else AutoModelForCausalLM
    model = auto.from_pretrained(job.init, dtype=torch.float32, **({"num_labels": 1} if job.objective == "prm" else {}))
    model.eval()
    if lora := job.config.lora:
        head = ["score"] if job.objective == "prm" else None
        model = peft.get_peft_model(
            model,
            peft.LoraConfig(r=lora.rank, lora_alpha=lora.alpha, target_modules=lora.targets, modules_to_save=head),
        )
    decayed = [p for p in model.parameters() if p.ndim > 1 and p.requires_grad]
    rest = [p for p in model.parameters() if p.ndim == 1 and p.requires_grad]
    groups = [{"params": decayed, "weight_decay": job.config.weight_decay}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(job.config.beta1, job.config.beta2))
    objective = make_objective(job.objective, job.params)
    tokenizer = AutoTokenizer.from_pretrained(job.init)
    records = pq.read_table(job.data[0]).to_pylist()
    examples = sorted((objective.example(r, job.task.prompt, tokenizer) for r in records), key=lambda e: e.id)
    shapes = [e.shape for e in examples]
    batches = [b for epoch in range(job.config.epochs) for b in global_batches(shapes, 8, job.seed, epoch)]
    losses = []
    for update, batch in enumerate(batches):
        loss = written_out(
            [examples[i] for i in batch], objective.terms(model, collate([examples[i] for i in batch], 0))
        )
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), job.config.max_grad_norm)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(job.config, update, len(batches))
        optimizer.step()
        losses.append(loss.item())
    return losses


def written_out(batch: list[Example], terms: dict[str, torch.Tensor]) -> torch.Tensor:
    """The loss of a global batch: means over its labelled tokens or steps, and over its pairs."""
    labelled = sum(label != -100 for example in batch for label in example.rows[0].labels)
    if "mse" in terms:
        return terms["mse"] / labelled
    pairs = sum(len(example.rows) == 2 for example in batch)
    return terms["nll"] / labelled + (BETA * terms["odds_ratio"] / pairs if "odds_ratio" in terms else 0)


class InterruptionError(Exception):
    pass


def interrupt(total: int, updates: list[dict[str, float]]) -> None:
    """A report that ends the training when its first update is saved and its second made."""
    if updates[-1]["update"] > 1:
        raise InterruptionError


def losses(result: TrainResult) -> list[float]:
    return [metrics["loss"] for metrics in result.metrics]


@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
@pytest.mark.parametrize("objective", ["sft", "prm", "orpo"])
def test_the_loss_curve_is_the_plain_loop_s(
    home: Path, tmp_path: Path, objective: str, lora: LoraConfig | None
) -> None:
    """Micro-batches, the smaller last batch and examples without a pair are all weighted right."""
    asked = job(home, tmp_path / "out", objective, lora=lora)
    result = run(asked)
    assert losses(result) == pytest.approx(plain_losses(asked), abs=1e-5)
    assert result.updates == 6
    assert result.examples == 22


@pytest.mark.parametrize(
    ("stage", "dtype"), [(0, "fp32"), (1, "fp32"), (2, "fp32"), (3, "fp32"), (0, "bf16"), (1, "bf16"), (3, "bf16")]
)
def test_an_interrupted_training_goes_on_from_its_checkpoint(
    home: Path, tmp_path: Path, stage: int, dtype: str
) -> None:
    """Its losses are those of an undisturbed one, and in fp32 those of ZeRO 0."""

    asked = job(home, tmp_path / "out", zero_stage=stage, dtype=dtype, checkpoint_every=1)
    with pytest.raises(InterruptionError):
        run(asked, interrupt)
    assert not Path(asked.out).exists()
    result = run(asked)
    undisturbed = run(job(home, tmp_path / "undisturbed", zero_stage=stage, dtype=dtype))
    assert result.resumed_from > 0
    assert losses(result) == pytest.approx(losses(undisturbed), abs=1e-6)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "undisturbed"]
    assert result.flops == 6 * parameter_count(asked.init) * result.tokens
    if dtype == "fp32":
        assert losses(result) == pytest.approx(plain_losses(asked), abs=1e-5)


@pytest.mark.parametrize(
    ("stage", "dtype"),
    [
        (2, "fp32"),
        (0, "bf16"),
        pytest.param(3, "fp32", marks=pytest.mark.slow),
        pytest.param(0, "fp32", marks=pytest.mark.slow),
        pytest.param(1, "fp32", marks=pytest.mark.slow),
        pytest.param(1, "bf16", marks=pytest.mark.slow),
        pytest.param(3, "bf16", marks=pytest.mark.slow),
    ],
)
def test_interrupted_adapters_become_the_weights_of_undisturbed_ones(
    home: Path, tmp_path: Path, stage: int, dtype: str
) -> None:
    """With dropout, which has to leave out the same. The checkpoints between hold no frozen weights; what comes of them
    is a plain model whose other weights are those that it had."""
    changes = {"lora": replace(LORA, dropout=0.2), "zero_stage": stage, "dtype": dtype}
    asked = job(home, tmp_path / "out", checkpoint_every=1, **changes)
    with pytest.raises(InterruptionError):
        run(asked, interrupt)
    (states,) = (tmp_path / "out.partial" / "update-1").glob("*model_states.pt")
    assert len(torch.load(states, weights_only=False)["module"]) == 2 * 3 * 2  # A and B, of three layers in two blocks
    result, undisturbed = run(asked), run(job(home, tmp_path / "undisturbed", **changes))
    assert result.resumed_from == 1
    assert losses(result) == losses(undisturbed)
    before, trained, same = (
        load_file(Path(of, "model.safetensors")) for of in (asked.init, asked.out, undisturbed.checkpoint)
    )
    torch.testing.assert_close(trained, same, atol=0, rtol=0)
    assert trained.keys() == before.keys()
    assert {weight.dtype for weight in trained.values()} == {torch.float32 if dtype == "fp32" else torch.bfloat16}
    changed = {name for name, weight in trained.items() if not torch.equal(weight, before[name].to(weight.dtype))}
    assert {name.split(".")[-2] for name in changed} == set(LORA.targets or ())
    adapters = 2 * LORA.rank * (32 + 32 + 32 + 32 + 32 + 64)  # two blocks: both sides of q, v and up
    assert result.flops == (4 * parameter_count(asked.init) + 6 * adapters) * result.tokens


def test_a_training_that_is_told_to_stop_saves_what_it_has_learnt(home: Path, tmp_path: Path) -> None:
    from actors.train_loop import JobError

    asked, told = job(home, tmp_path / "out"), iter([False, False, True])
    with pytest.raises(JobError, match="told to stop; 3 of 6 updates are saved"):
        run(asked, stop=lambda: next(told))
    partial = tmp_path / "out.partial"
    shutil.copytree(partial, tmp_path / "kept")
    result = run(asked)
    assert result.resumed_from == 3
    assert losses(result) == pytest.approx(plain_losses(asked), abs=1e-5)

    shutil.rmtree(tmp_path / "out")
    (tmp_path / "kept").rename(partial)
    latest = unsealed("latest.json", (partial / "latest.json").read_bytes())
    (partial / "latest.json").write_text(sealed("latest.json", {**latest, "workers": 2}))
    assert run(asked).resumed_from == 0  # another number of workers begins anew


def test_mid_training_checkpoints_go_by_the_clock(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every update takes a minute; the last of six is cut short."""
    from actors import train_loop

    now, saved = 0.0, []

    def pass_a_minute() -> bool:
        nonlocal now
        now += 60
        return False

    def note(total: int, updates: list[dict[str, float]]) -> None:
        latest = tmp_path / "out.partial" / "latest.json"
        saved.append(json.loads(latest.read_text())["progress"]["updates"] if latest.exists() else 0)
        if updates[-1]["update"] == 6:
            raise InterruptionError

    monkeypatch.setattr(train_loop, "time", SimpleNamespace(monotonic=lambda: now))
    for minutes, expected in ((0.0, [0, 0, 0, 0, 0, 0]), (2.0, [0, 0, 2, 2, 4, 4])):
        saved.clear()
        with pytest.raises(InterruptionError):
            run(job(home, tmp_path / "out", checkpoint_minutes=minutes), note, pass_a_minute)
        assert saved == expected
    assert run(job(home, tmp_path / "out")).resumed_from == 4


def test_a_checkpoint_is_made_where_another_rank_s_clock_asks_for_it(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It says so in the sum over the ranks, of the second update here; this rank's own clock is never asked."""
    from actors import train_loop

    sums_made, begun = count(1), count(1)

    def all_reduce(sums: torch.Tensor) -> None:
        sums[-1] += next(sums_made) == 2

    def interrupt_the_fourth() -> bool:
        if next(begun) == 4:
            raise InterruptionError
        return False

    monkeypatch.setattr(train_loop, "dist", SimpleNamespace(**{**vars(torch.distributed), "all_reduce": all_reduce}))
    with pytest.raises(InterruptionError):
        run(job(home, tmp_path / "out", checkpoint_minutes=0.0), stop=interrupt_the_fourth)
    monkeypatch.undo()
    assert run(job(home, tmp_path / "out")).resumed_from == 2


def test_a_training_whose_run_has_another_driver_by_now_writes_no_more(home: Path, tmp_path: Path) -> None:
    """Neither a mid-training checkpoint nor the export; the other driver's goes on from what was there before."""
    from actors.train_loop import JobError

    lease = {"driver": "one", "host": "far", "pid": 7, "since": 0.0}
    (tmp_path / LEASE).write_text(json.dumps(lease))
    asked = replace(job(home, tmp_path / "checkpoints" / "out", checkpoint_every=2), driver="one")

    def take_over(total: int, updates: list[dict[str, float]]) -> None:
        if updates[-1]["update"] == 4:
            (tmp_path / LEASE).write_text(json.dumps({**lease, "driver": "another"}))

    for every in (2, 0):
        with pytest.raises(JobError, match=rf"{tmp_path} was taken over by another driver: host far, pid 7"):
            run(replace(asked, config=replace(asked.config, checkpoint_every=every)), take_over)
        latest = json.loads((tmp_path / "checkpoints" / "out.partial" / "latest.json").read_text())
        assert latest["tag"] == "update-2"
        assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["out.partial"]
    assert run(replace(asked, driver="another")).resumed_from == 2


def test_a_training_in_an_object_store_goes_on_there(home: Path, tmp_path: Path, s3: str) -> None:
    """What it starts from, its data, its mid-training checkpoints and its export all lie in the store."""
    run_directory = RunDirectory(s3.format("training"))
    folder = run_directory.folder
    with folder.staging("checkpoints/init") as directory:
        shutil.copytree(home / "init", directory, dirs_exist_ok=True)
        run_directory.finish("base", {"files": run_directory.put(directory, "checkpoints/init")})
    run_directory.finish("original", {"files": data(run_directory, home / "sft.parquet")})
    asked = replace(
        job(home, tmp_path / "out", checkpoint_every=1),
        init=folder.locate("checkpoints/init"),
        data=(folder.locate("round-0/original"),),
        out=folder.locate("checkpoints/reasoner-0"),
    )
    with pytest.raises(InterruptionError):
        run(asked, interrupt)
    latest = json.loads(folder.read("checkpoints/reasoner-0.partial/latest.json"))
    assert (latest["tag"], latest["progress"]["updates"]) == ("update-1", 1)
    assert {f"checkpoints/reasoner-0.partial/update-1/{name}" for name in latest["files"]} == {
        name for name in folder.sizes("checkpoints/reasoner-0.partial") if not name.endswith("latest.json")
    }
    result = run(asked)
    assert result.resumed_from == 1
    assert losses(result) == pytest.approx(losses(run(job(home, tmp_path / "undisturbed"))), abs=1e-6)
    assert result.files.keys() == {
        name.removeprefix("checkpoints/reasoner-0/") for name in folder.sizes("checkpoints/reasoner-0")
    } - {"training.json"}
    assert not folder.sizes("checkpoints/reasoner-0.partial")
    assert run(asked) == result
    run_directory.finish("sft", {"files": run_directory.trained("checkpoints/reasoner-0", result.files)})
    assert AutoModelForCausalLM.from_pretrained(local_checkpoint(asked.out)).num_parameters() > 0


def test_a_training_that_meets_a_full_disk_goes_on_once_there_is_space(home: Path, disk: Disk) -> None:
    from actors.train_loop import JobError

    out = f"{disk.path}/out"

    def fill(_: int, updates: list[dict[str, float]]) -> None:
        if updates[-1]["update"] >= 3:
            disk.fill()

    with pytest.raises(SapoError, match=f"{out}.partial/rank-0.tmp cannot be written: No space left on device$"):
        run(job(home, Path(out), checkpoint_every=2), fill)
    assert {path.name for path in Path(f"{out}.partial").iterdir()} == {"update-2", "latest.json"}
    with pytest.raises(JobError, match=f"^{out}.tmp cannot be written: No space left on device$"):
        run(job(home, Path(out), checkpoint_every=0))
    disk.free()
    result = run(job(home, Path(out), checkpoint_every=2))
    assert result.resumed_from == 2
    assert losses(result) == pytest.approx(plain_losses(job(home, Path(out))), abs=1e-5)
    assert [path.name for path in disk.path.iterdir()] == ["out"]


def data(store: RunDirectory, parquet: Path) -> Files:
    with closing(store.writer(0, "original")) as writer:
        writer.extend(read_rows(parquet))
    return writer.files


@pytest.mark.parametrize("damage", ["truncated", "gone"])
def test_a_damaged_mid_training_checkpoint_is_named_and_not_loaded(home: Path, tmp_path: Path, damage: str) -> None:
    from actors.train_loop import JobError

    asked = job(home, tmp_path / "out", checkpoint_every=1)
    with pytest.raises(InterruptionError):
        run(asked, interrupt)
    (state, *_) = (tmp_path / "out.partial").glob("update-*/*")
    if damage == "gone":
        state.unlink()
    else:
        os.truncate(state, 100)
    with pytest.raises(JobError, match=rf"{state} is .*; remove {tmp_path}/out\.partial to begin this training anew"):
        run(asked)
    shutil.rmtree(tmp_path / "out.partial")
    assert run(asked).resumed_from == 0


def test_a_damaged_record_of_a_mid_training_checkpoint_is_named(home: Path, tmp_path: Path) -> None:
    from actors.train_loop import JobError

    asked = job(home, tmp_path / "out", checkpoint_every=1)
    with pytest.raises(InterruptionError):
        run(asked, interrupt)
    record = tmp_path / "out.partial" / "latest.json"
    whole = record.read_text()
    for content in (whole[:-1], "{}", whole.replace("update-1", "update-2", 1)):
        record.write_text(content)
        remedy = f"remove {tmp_path}/out.partial to begin this training anew"
        with pytest.raises(JobError, match=rf"^{record} (is damaged|has no sha256 of itself): .*; {remedy}"):
            run(asked)
    record.write_text(whole)
    assert run(asked).resumed_from == 1


def test_a_checkpoint_of_another_job_is_not_gone_on_from(home: Path, tmp_path: Path) -> None:
    from actors.train_loop import JobError

    out = tmp_path / "out"
    run(job(home, out))
    assert run(job(home, out)).updates == 6
    with pytest.raises(JobError, match=r"out/training.json: learning_rate was 0.003 and is now 0.1"):
        run(job(home, out, learning_rate=0.1))


def test_what_was_made_from_other_content_is_a_leftover(home: Path, tmp_path: Path) -> None:
    """Neither a mid-training checkpoint nor a finished one counts where data or init were made anew meanwhile."""
    asked = replace(job(home, tmp_path / "out", checkpoint_every=1), content=("base", "some data"))
    with pytest.raises(InterruptionError):
        run(asked, interrupt)
    result = run(replace(asked, content=("base", "other data")))
    assert result.resumed_from == 0
    assert run(replace(asked, content=("base", "other data"))) == result
    assert run(asked).seconds != result.seconds
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


@pytest.mark.parametrize("stage", [0, 1])
def test_bf16_trains_on_fp32_master_weights(home: Path, tmp_path: Path, stage: int) -> None:
    """Near 1, where norms begin, bf16 cannot tell 1 from 1 - 1e-3: no single update would move them."""
    changes = {"zero_stage": stage, "learning_rate": 2e-4, "epochs": 20, "weight_decay": 0.0, "schedule": "constant"}
    result = run(job(home, tmp_path / "bf16", dtype="bf16", **changes))
    trained = AutoModelForCausalLM.from_pretrained(result.checkpoint, dtype="auto")
    assert trained.dtype == torch.bfloat16
    assert (trained.model.norm.weight != 1).any()
    full = run(job(home, tmp_path / "fp32", **changes))
    assert losses(result) == pytest.approx(losses(full), abs=5e-3)


@pytest.mark.parametrize("on", [False, True])
def test_gradient_checkpointing_is_at_work_where_it_is_on(home: Path, tmp_path: Path, on: bool) -> None:
    from actors.train_loop import load_model

    asked = job(home, tmp_path / "out", gradient_checkpointing=on)
    model = load_model(asked, asked.init, "causal_lm")
    passes = []
    model.model.layers[0].self_attn.register_forward_pre_hook(lambda *_: passes.append(1))
    model(torch.tensor([[2, 3, 4]])).logits.sum().backward()
    assert len(passes) == (2 if on else 1)  # again in the backward pass


def test_a_model_with_dropout_trains_without_it(home: Path, tmp_path: Path) -> None:
    from actors.train_loop import load_model

    shutil.copytree(home / "init", tmp_path / "init")
    config = json.loads((tmp_path / "init" / "config.json").read_text())
    (tmp_path / "init" / "config.json").write_text(json.dumps({**config, "attention_dropout": 0.5}))
    model = load_model(job(home, tmp_path / "out"), str(tmp_path / "init"), "token_classification")
    logits = [model(torch.tensor([[2, 3, 4, 5, 6, 7]])).logits for _ in range(2)]
    assert torch.equal(*logits)


def test_attention_is_what_the_job_asks_for_and_changes_nothing(home: Path, tmp_path: Path) -> None:
    """A training may go on with another one."""
    from actors.train_loop import load_model

    asked = replace(job(home, tmp_path / "out", checkpoint_every=1, epochs=1), attention="eager")
    assert load_model(asked, asked.init, "causal_lm").config._attn_implementation == "eager"
    with pytest.raises(InterruptionError):
        run(asked, interrupt)
    result = run(replace(asked, attention=None))
    assert result.resumed_from == 1
    assert losses(result) == pytest.approx(losses(run(job(home, tmp_path / "other", epochs=1))), abs=1e-6)


def test_gradient_checkpointing_changes_nothing(home: Path, tmp_path: Path) -> None:
    for stage in (1, 3):
        results = [
            run(job(home, tmp_path / f"{stage}-{on}", zero_stage=stage, epochs=1, gradient_checkpointing=on))
            for on in (False, True)
        ]
        assert losses(results[0]) == pytest.approx(losses(results[1]), abs=1e-6)


@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
def test_a_verifier_is_exported_for_transformers(home: Path, tmp_path: Path, lora: LoraConfig | None) -> None:
    result = run(job(home, tmp_path / "out", "prm", epochs=1, lora=lora))
    model, info = AutoModelForTokenClassification.from_pretrained(result.checkpoint, output_loading_info=True)
    assert not info["missing_keys"]
    assert model.config.num_labels == 1
    assert model.dropout.p == 0


def test_long_examples_stop_the_training_or_are_counted(home: Path, tmp_path: Path) -> None:
    from actors.train_loop import JobError

    with pytest.raises(JobError, match=r"sft.parquet: worked-\d+ has \d+ tokens, more than max_tokens = 60"):
        run(job(home, tmp_path / "out", max_tokens=60))
    result = run(job(home, tmp_path / "out", max_tokens=60, too_long="drop"))
    assert result.too_long > 0
    assert result.examples + result.too_long == 22
    with pytest.raises(JobError, match=r"nothing to train on \(22 too long, 0 empty\)"):
        run(job(home, tmp_path / "none", max_tokens=5, too_long="drop"))


def test_a_row_with_nothing_to_learn_from_is_counted(home: Path, tmp_path: Path) -> None:
    records = pq.read_table(home / "prm.parquet").to_pylist()
    records[0]["step_labels"] = [-1] * len(records[0]["steps"])
    records[1] = {**records[1], "steps": [], "step_labels": []}
    pq.write_table(pa.Table.from_pylist(records, schema=LABELS), tmp_path / "masked.parquet")
    result = run(replace(job(home, tmp_path / "out", "prm", epochs=1), data=(str(tmp_path / "masked.parquet"),)))
    assert (result.examples, result.empty) == (20, 2)


def test_adapters_of_no_layer_are_a_fault_of_the_job(home: Path, tmp_path: Path) -> None:
    from actors.train_loop import JobError

    with pytest.raises(JobError, match=r"lora.targets: query is none of the layers down_proj, gate_proj, "):
        run(job(home, tmp_path / "out", lora=LoraConfig(targets=["query"])))


def test_a_loss_that_is_no_number_names_the_update_and_its_batch(home: Path, tmp_path: Path) -> None:
    from actors.train_loop import JobError

    with pytest.raises(JobError, match=r"out: the (loss|gradient norm) of update \d+ is (nan|inf); its batch: worked-"):
        run(job(home, tmp_path / "out", learning_rate=1e30, max_grad_norm=0.0, warmup_ratio=0.0))
    assert not (tmp_path / "out").exists()


def test_memory_that_was_freed_is_given_back() -> None:
    from actors.train_loop import give_back

    process, blocks = psutil.Process(), [bytes(1000) for _ in range(300_000)]
    some = blocks[::1000]  # so that what is freed lies below what is not
    del blocks
    held = process.memory_info().rss
    give_back()
    assert process.memory_info().rss < held - 100 * 2**20
    assert some
