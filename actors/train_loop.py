"""The training loop: one for every objective. Runs alike on each rank of an initialised torch process group.

A fault that every rank sees is a `JobError`: the job has failed, the workers live on. A `SapoError` is one that a rank
has seen alone, such as a full disk: the job has failed, too, and the workers are of no more use. Anything else (a rank
that dies, a collective that breaks) is left to whoever started the workers.
"""

from __future__ import annotations

import ctypes
import gc
import json
import logging
import math
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.checkpoint_engine import TorchCheckpointEngine
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForTokenClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from sapo_ray.batching import global_batches, micro_batches
from sapo_ray.cache import local_checkpoint, local_copy
from sapo_ray.cost import training_flops
from sapo_ray.errors import told
from sapo_ray.files import Folder, joined, split
from sapo_ray.lease import HeldFolder
from sapo_ray.lora import merge, quantization, with_adapters
from sapo_ray.manifest import DamagedError, Files, records_of, sealed, unsealed
from sapo_ray.models import attention, load_tokenizer
from sapo_ray.objectives import make_objective
from sapo_ray.objectives.base import Example, Head, Objective, collate
from sapo_ray.shards import read_rows
from sapo_ray.training import (
    RESULT_FILE,
    TrainConfig,
    TrainJob,
    TrainResult,
    bare_optimizer,
    deepspeed_config,
    finished,
    is_same_job,
    learning_rate,
)

logger = logging.getLogger(__name__)

_LATEST = "latest.json"
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
T = TypeVar("T")
Report = Callable[[int, list[dict[str, float]]], None]
"""Takes the updates in all, and the metrics of those made since the last report (see `TrainResult`)."""
Stop = Callable[[], bool]
"""Whether this rank knows that the training is to stop. Must not wait: every update asks."""


class JobError(Exception):
    """A job that cannot be done or was told to stop, for a reason that every rank has seen."""


@dataclass(frozen=True)
class Data:
    """The examples a job trains on, and the number of records left out as too long or empty."""

    examples: list[Example]
    too_long: int
    empty: int


@dataclass
class Progress:
    """How far a training is; stored with its mid-training checkpoints."""

    updates: int = 0
    seconds: float = 0.0
    metrics: list[dict[str, float]] = field(default_factory=list)


def train(job: TrainJob, device: torch.device, report: Report, stop: Stop) -> TrainResult:
    """Train, export to `job.out` and return the result; at once where `job.out` already holds this job's.

    `report` is called on rank 0, about once a second, and before every mid-training checkpoint: a training that goes on
    from there has reported what came before. Where `stop` says so on any rank, all stop after the same update, with a
    mid-training checkpoint. Raises JobError on every rank for a job that cannot be done or was told to stop, SapoError
    on one that cannot write its part of a mid-training checkpoint.
    """
    stored = _together(lambda: finished(job))
    if stored is not None:
        return stored
    training = Training(job, device)
    try:
        return training.run(report, stop)
    finally:
        training.engine.destroy()
        del training
        gc.collect()
        give_back()


def give_back() -> None:
    """Hand freed memory back to the system. The C library keeps what it may need again, which is most of a training's:
    engines and verifiers that work next on this node would have to do without it."""
    with suppress(AttributeError):  # a C library other than GNU's has no such call
        ctypes.CDLL(None).malloc_trim(0)


class Training:
    """One job on this rank: its data, its model, its DeepSpeed engine."""

    def __init__(self, job: TrainJob, device: torch.device) -> None:
        self.job, self.device, self.begun = job, device, time.monotonic()
        home, self.name = split(job.out)
        self.home = Folder(home) if job.driver is None else HeldFolder(home, job.driver, Folder(joined(home, "..")))
        self.partial = job.partial
        self.adapts = job.config.lora is not None  # and all weights but the adapters and a new head are frozen
        self.objective: Objective = _together(lambda: make_objective(job.objective, job.params))
        self.init: str = _together(lambda: local_checkpoint(job.init))
        self.tokenizer: PreTrainedTokenizerBase = _together(lambda: load_tokenizer(self.init))
        self.data = _together(lambda: read_examples(job, self.objective, self.tokenizer))
        self.shapes = [example.shape for example in self.data.examples]
        model = _together(lambda: load_model(job, self.init, self.objective.head))
        self.token_flops = training_flops(model.num_parameters(), model.num_parameters(only_trainable=True))
        self.weights = torch.tensor(list(self.objective.weights.values()), device=device)
        self.engine = _engine(model, job.config)
        self.progress = self._restore()
        self.saved_at = time.monotonic()

    def run(self, report: Report, stop: Stop) -> TrainResult:
        """Every update that is left, then the export."""
        config, progress, resumed_from = self.job.config, self.progress, self.progress.updates
        self.begun -= progress.seconds
        epochs = (global_batches(self.shapes, config.batch_size, self.job.seed, e) for e in range(config.epochs))
        batches = [batch for epoch in epochs for batch in epoch][: config.max_updates]
        logger.info("%d updates on %d examples, from update %d", len(batches), len(self.shapes), resumed_from)
        reported_at, reported = -math.inf, resumed_from
        while progress.updates < len(batches):
            lr = learning_rate(config, progress.updates, len(batches))
            metrics, stops, is_due = self.update(batches[progress.updates], lr, stop(), self._is_due())
            progress.metrics.append(metrics)
            progress.updates += 1
            progress.seconds = time.monotonic() - self.begun
            by_count = config.checkpoint_every > 0 and progress.updates % config.checkpoint_every == 0
            ends = progress.updates == len(batches)
            saves = stops or by_count or (is_due and not ends)
            if dist.get_rank() == 0 and (saves or ends or progress.seconds > reported_at + 1):
                report(len(batches), progress.metrics[reported:])
                reported_at, reported = progress.seconds, progress.updates
            if saves:
                self._save()
            if stops:
                raise JobError(f"told to stop; {progress.updates} of {len(batches)} updates are saved")
        return self._export(resumed_from)

    def _is_due(self) -> bool:
        """Whether it is time for a mid-training checkpoint: by rank 0's clock, as those of the ranks differ."""
        seconds = 60 * self.job.config.checkpoint_minutes
        return dist.get_rank() == 0 and 0 < seconds <= time.monotonic() - self.saved_at

    def update(self, batch: Sequence[int], lr: float, stop: bool, is_due: bool) -> tuple[dict[str, float], bool, bool]:
        """One optimizer step on a global batch; its metrics (see TrainResult), whether any rank's `stop` is set, and
        whether any rank's `is_due` is."""
        # What LoRA's dropout leaves out is the same in a training that was interrupted.
        torch.manual_seed(random.Random(f"{self.job.seed}:{self.progress.updates}:{dist.get_rank()}").getrandbits(63))
        limit = self.job.config.micro_batch_tokens
        examples = [self.data.examples[i] for i in batch]
        counts = [max(1, sum(example.counts[term] for example in examples)) for term in self.objective.weights]
        divisors = torch.tensor(counts, device=self.device)
        # Of the terms, of the ranks that are to stop, and of those for which a checkpoint is due.
        sums = torch.zeros(len(counts) + 2, device=self.device)
        sums[-2], sums[-1] = stop, is_due
        steps = micro_batches(batch, self.shapes, limit, dist.get_world_size())[dist.get_rank()]
        for number, step in enumerate(steps):
            self.engine.set_gradient_accumulation_boundary(number == len(steps) - 1)
            # A rank without examples goes through the motions with weight 0: ZeRO communicates in every pass.
            means = self._sums(step or batch[:1]) / divisors * bool(step)
            self.engine.backward(means @ self.weights * dist.get_world_size())  # DeepSpeed averages over the ranks
            sums[:-2] += means.detach()
        dist.all_reduce(sums)
        terms = sums[:-2]
        loss = self._finite("loss", float(terms @ self.weights), examples)
        for group in self.engine.optimizer.param_groups:
            group["lr"] = lr
        grad_norm = self._finite("gradient norm", _step(self.engine, self.job.config), examples)
        metrics = {
            "update": self.progress.updates + 1,
            "loss": loss,
            **dict(zip(self.objective.weights, terms.tolist(), strict=True)),
            "lr": lr,
            "grad_norm": grad_norm,
            "tokens": sum(example.tokens for example in examples),
        }
        return metrics, bool(sums[-2]), bool(sums[-1])

    def _sums(self, step: Sequence[int]) -> Tensor:
        """The sums of all loss terms over a micro-batch, in the order of the objective's weights."""
        # Padding is never looked at, and not every family has a token for it.
        batch = collate([self.data.examples[i] for i in step], self.tokenizer.pad_token_id or 0).to(self.device)
        sums = self.objective.terms(self.engine, batch)
        return torch.stack([sums[term] for term in self.objective.weights])

    def _finite(self, what: str, value: float, examples: Sequence[Example]) -> float:
        if not math.isfinite(value):
            ids = ", ".join(example.id for example in examples)
            raise JobError(
                f"{self.job.out}: the {what} of update {self.progress.updates + 1} is {value}; its batch: {ids}"
            )
        return value

    def _save(self) -> None:
        """A mid-training checkpoint. Every rank puts its own files into place, then `latest.json` is replaced: so an
        interrupted save is never seen."""
        tag, rank = f"update-{self.progress.updates}", dist.get_rank()
        with ExitStack() as stack:
            directory = _together(lambda: stack.enter_context(self.home.staging(f"{self.partial}/rank-{rank}")))
            save = {"tag": tag, "save_latest": False, "exclude_frozen_parameters": self.adapts}
            self.engine.save_checkpoint(str(directory), **save)
            mine = _together(lambda: self._put_state(directory / tag))
        everyone: list[Files] = [{} for _ in range(dist.get_world_size())]
        dist.all_gather_object(everyone, mine)
        _together(lambda: self._put_latest(tag, {name: record for part in everyone for name, record in part.items()}))
        self.saved_at = time.monotonic()

    def _put_state(self, directory: Path) -> Files:
        files = records_of(directory)
        self.home.add(directory, files, f"{self.partial}/{directory.name}")
        return files

    def _put_latest(self, tag: str, files: Files) -> None:
        """Rank 0's part of a mid-training checkpoint: from now on it is the one to go on from, and others go."""
        if dist.get_rank() != 0:
            return
        latest = {
            "tag": tag,
            "job": self.job.fingerprint(),
            "workers": dist.get_world_size(),
            "progress": asdict(self.progress),
            "files": files,
        }
        name = f"{self.partial}/{_LATEST}"
        self.home.write(name, sealed(self.home.locate(name), latest))
        tags = {name.split("/")[1] for name in self.home.sizes(self.partial) if name.count("/") > 1}
        for old in tags - {tag}:
            self.home.clear(f"{self.partial}/{old}")

    def _restore(self) -> Progress:
        """Load the last mid-training checkpoint, if there is one of this job."""
        found = _together(self._latest)
        if found is None:
            _together(lambda: self.home.clear(self.partial) if dist.get_rank() == 0 else None)
            return Progress()
        path, latest = found
        # It holds no frozen weights: they are those of `init`.
        loaded, _ = self.engine.load_checkpoint(str(path.parent), tag=path.name, load_module_strict=not self.adapts)
        if loaded is None:
            raise RuntimeError(f"{self.home.locate(self.partial)}: DeepSpeed could not load {latest['tag']}")
        return Progress(**latest["progress"])

    def _latest(self) -> tuple[Path, dict[str, Any]] | None:
        """The files of the last mid-training checkpoint as a directory of this node, and what `latest.json` says."""
        name = f"{self.partial}/{_LATEST}"
        if not self.home.has(name):
            return None
        with self._remedy():
            latest = unsealed(self.home.locate(name), self.home.read(name))
        if not is_same_job(latest["job"], self.job.fingerprint(), self.home.locate(name)):
            return None
        if latest["workers"] != dist.get_world_size():
            logger.warning("%s was written by %d workers; the training begins anew", name, latest["workers"])
            return None
        with self._remedy():
            return local_copy(Folder(self.home.locate(f"{self.partial}/{latest['tag']}")), latest["files"]), latest

    @contextmanager
    def _remedy(self) -> Iterator[None]:
        """Adds to a DamagedError what can be done about a mid-training checkpoint."""
        try:
            yield
        except DamagedError as error:
            partial = self.home.locate(self.partial)
            raise DamagedError(f"{error}; remove {partial} to begin this training anew") from error

    def _export(self, resumed_from: int) -> TrainResult:
        """Write the checkpoint, whole or not at all: into a directory of this node, which is then put into place.

        Its files are in the result of rank 0, which is the one that counts.
        """
        state = None
        if self.job.config.zero_stage == 3:
            state = self.engine._zero3_consolidated_16bit_state_dict(exclude_frozen_parameters=self.adapts)
        tokens = int(sum(metrics["tokens"] for metrics in self.progress.metrics))
        result = TrainResult(
            checkpoint=self.job.out,
            updates=self.progress.updates,
            examples=len(self.data.examples),
            too_long=self.data.too_long,
            empty=self.data.empty,
            tokens=tokens,
            flops=self.token_flops * tokens,
            seconds=time.monotonic() - self.begun,
            resumed_from=resumed_from,
            metrics=self.progress.metrics,
            files={},
        )
        return _together(lambda: self._put(result, state)) or result

    def _put(self, result: TrainResult, state: Any) -> TrainResult | None:
        """Rank 0's part of the export."""
        if dist.get_rank() != 0:
            return None
        with self.home.staging(self.name) as directory:
            if self.adapts:
                self._merged(state or dict(self.engine.module.named_parameters())).save_pretrained(directory)
            else:
                self.engine.module.save_pretrained(directory, state_dict=state)
            self.tokenizer.save_pretrained(directory)
            result = replace(result, files=records_of(directory))
            (directory / RESULT_FILE).write_text(json.dumps({"job": self.job.fingerprint(), "result": asdict(result)}))
            self.home.put(directory, self.name, last=RESULT_FILE)
        self.home.clear(self.partial)
        return result

    def _merged(self, trained: Mapping[str, Tensor]) -> PreTrainedModel:
        """The trained adapters merged into the weights of `init`, as they are before any quantization."""
        model = load_model(self.job, self.init, self.objective.head, quantized=False)
        return merge(model, trained, _DTYPES[self.job.config.dtype])


def read_examples(job: TrainJob, objective: Objective, tokenizer: PreTrainedTokenizerBase) -> Data:
    """All records of the job's Parquet files as examples, sorted by id: the files' order does not matter.

    Raises ValueError for a record that cannot be used, FileNotFoundError or ValueError where there is none.
    """
    examples, too_long, empty = [], 0, 0
    for path in job.data:
        for record in read_rows(path, objective.columns):
            example = _example(record, path, job, objective, tokenizer)
            fits = example.shape.tokens <= job.config.max_tokens
            if not any(example.counts.values()):
                empty += 1
            elif fits:
                examples.append(example)
            elif job.config.too_long == "drop":
                too_long += 1
            else:
                raise ValueError(
                    f"{path}: {example.id} has {example.shape.tokens} tokens, more than max_tokens = "
                    f"{job.config.max_tokens}; raise it or set too_long: drop"
                )
    if not examples:
        raise ValueError(f"{', '.join(job.data)}: nothing to train on ({too_long} too long, {empty} empty)")
    return Data(sorted(examples, key=lambda example: example.id), too_long, empty)


def _example(
    record: dict[str, Any], path: str, job: TrainJob, objective: Objective, tokenizer: PreTrainedTokenizerBase
) -> Example:
    try:
        return objective.example(record, job.task.prompt, tokenizer)
    except ValueError as error:
        raise ValueError(f"{path}: record {next(iter(record.values()))!r}: {error}") from error


def load_model(job: TrainJob, init: str, head: Head, *, quantized: bool = True) -> Any:
    """The checkpoint in the directory `init` in fp32, without dropout, and with LoRA's adapters; a verifier's head and
    adapters are drawn from the seed. `quantized`: frozen weights are packed where the config says so."""
    torch.manual_seed(job.seed)
    config = AutoConfig.from_pretrained(init, trust_remote_code=False)
    if head == "token_classification":
        config.num_labels = 1
        config.classifier_dropout = 0.0
    for key in [key for key, value in vars(config).items() if "drop" in key and value]:
        setattr(config, key, 0.0)
    auto = {"causal_lm": AutoModelForCausalLM, "token_classification": AutoModelForTokenClassification}[head]
    lora = job.config.lora
    packing = quantization(lora, head, _DTYPES[job.config.dtype]) if lora and quantized else None
    model: PreTrainedModel = auto.from_pretrained(
        init,
        config=config,
        dtype=torch.float32,
        attn_implementation=attention(config, job.attention),
        quantization_config=packing,
        trust_remote_code=False,
    )
    model.train()  # checkpoints come in evaluation mode, in which transformers leaves gradient checkpointing out
    if job.config.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return with_adapters(model, lora, head) if lora else model


def _engine(model: nn.Module, config: TrainConfig) -> deepspeed.DeepSpeedEngine:
    trained = [p for p in model.parameters() if p.requires_grad]
    matrices = {"params": [p for p in trained if p.ndim >= 2], "weight_decay": config.weight_decay}
    rest = {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0}
    optimizer = torch.optim.AdamW(
        [group for group in (matrices, rest) if group["params"]],  # ZeRO takes no empty ones
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        fused=True,
    )
    # Without this, DeepSpeed compiles its shared-memory all-reduce, an operator for inference, when it starts on CPUs.
    deepspeed.ops.__compatible_ops__ = {}
    engine = deepspeed.initialize(model=model, optimizer=optimizer, config=deepspeed_config(config))[0]
    engine.checkpoint_engine = _StateFiles(engine._config)
    if config.zero_stage == 0:
        # In bf16, DeepSpeed has stepped once on zero gradients, which Adam's bias correction would count.
        optimizer.state.clear()
    return engine


class _StateFiles(TorchCheckpointEngine):
    """Writes DeepSpeed's state. Raises OSError where the disk is full, say: else torch and DeepSpeed keep that back."""

    def save(self, state_dict: Any, path: str) -> None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(path, "wb") as file:
                torch.save(state_dict, file)
        except RuntimeError as error:  # torch's, over a file that it could not finish
            raise error.__context__ or error from None


def _step(engine: deepspeed.DeepSpeedEngine, config: TrainConfig) -> float:
    """Clip, step, and return the gradient's norm before clipping."""
    if bare_optimizer(config):
        norm = torch.nn.utils.clip_grad_norm_(engine.module.parameters(), config.max_grad_norm or math.inf)
        engine.step()
        return float(norm)
    engine.step()
    return float(engine.get_global_grad_norm())


def _together(make: Callable[[], T]) -> T:
    """`make()`; a JobError on all ranks where it fails on any: one that stopped alone would leave the rest waiting."""
    value: Any = None
    error: str | None = None
    try:
        value = make()
    except Exception as exception:
        logger.exception("this rank cannot go on with the job")
        error = told(exception)
    errors: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(errors, error)
    for found in errors:
        if found is not None:
            raise JobError(found)
    return value
