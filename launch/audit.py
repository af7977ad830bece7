"""`sapo audit`: does everything a run says follow from what it stored?"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import nullcontext

import click

from launch.checks import Existing
from sapo_ray.audit import audit as audit_labels
from sapo_ray.audit import audit_answers, audit_pairs, audit_predictions
from sapo_ray.config import RunConfig
from sapo_ray.config_loader import load_config
from sapo_ray.data import LabelledTrajectory
from sapo_ray.errors import SapoError
from sapo_ray.labelers import fixed_start_score, make_labeler
from sapo_ray.models import Calibration
from sapo_ray.sandbox import Sandbox
from sapo_ray.shards import Kind
from sapo_ray.store import RunDirectory, checkpoint_name, labelled_of, pair_of, rollout_of, trajectory_of
from sapo_ray.tasks import make_task
from sapo_ray.tasks.base import Split, Task


@click.command()
@click.argument("run_dir", metavar="RUN", type=Existing(file_okay=False))
@click.option("--no-programs", is_flag=True, help="Take the verdicts on programs as they are: nothing is run.")
@click.option("--json", "as_json", is_flag=True, help="Print one line of JSON.")
@click.pass_context
def audit(ctx: click.Context, run_dir: str, no_programs: bool, as_json: bool) -> None:
    """Re-derive every label of RUN from its stored rollouts, every predicted first error from its scores, every answer
    from its steps and every pair from its solutions and their scores; look for anything stored twice or missing.
    Programs are run again, and once more where the verdict is another.

    Exits with 1 if something does not follow.

    \b
    Example:
      sapo audit runs/local
    """
    store = RunDirectory(run_dir)
    if not store.folder.has("config.yaml"):
        raise SapoError(f"{run_dir} is no run: it has no config.yaml")
    config = load_config(RunConfig, store.folder.locate("config.yaml"))
    task, checked = make_task(config.task), Counter[str]()
    with Sandbox(config.sandbox) if config.runs_programs and not no_programs else nullcontext() as sandbox:
        problems = list(_audit_run(store, config, task, checked, sandbox))
    if as_json:
        click.echo(json.dumps({"checked": dict(checked), "problems": problems}))
    else:
        for problem in problems:
            click.echo(problem)
        counts = ", ".join(f"{count:,} {kind}" for kind, count in checked.items())
        click.echo(f"{len(problems)} problems in {counts or 'nothing: no round has been sampled'}")
    ctx.exit(int(bool(problems)))


def _audit_run(
    store: RunDirectory, config: RunConfig, task: Task, checked: Counter[str], sandbox: Sandbox | None
) -> Iterator[str]:
    if store.done("round-0/validation"):
        samples = _audit_samples(store, task, 0, "validation", "validation", checked, sandbox=sandbox)
        yield from (f"validation: {problem}" for problem in samples)
    for number in range(config.rounds + 1):
        if store.done(f"round-{number}/sample"):
            found = audit_round(store, config, task, number, checked, sandbox)
            yield from (f"round {number}: {problem}" for problem in found)
        if store.done(f"round-{number}/pairs"):
            yield from (f"round {number}: {problem}" for problem in _audit_pairs(store, config, number, checked))


def audit_round(
    store: RunDirectory,
    config: RunConfig,
    task: Task,
    number: int,
    checked: Counter[str],
    sandbox: Sandbox | None = None,
) -> Iterator[str]:
    """What does not follow in one round, a line each; counts in `checked` what was looked at."""
    notes = store.stages()[f"round-{number}/sample"]
    made = notes["trajectories"]["sampled"]
    yield from _audit_samples(store, task, number, "trajectories", "pool", checked, made, sandbox)
    yield from _repeated(store, number, "labels", checked, notes["labels"])
    yield from _repeated(store, number, "rollouts", checked)
    labelled = [labelled_of(row) for row in store.read(number, "labels")]
    rollouts = [rollout_of(row) for row in store.read(number, "rollouts")]
    known = {rollout.id for rollout in rollouts}
    for row in labelled:
        lost = [name for estimate in row.estimates for name in estimate.rollout_ids if name not in known]
        yield from (f"{row.trajectory.id}: its rollout {name} is not stored" for name in lost)
    yield from audit_labels(labelled, rollouts, config.labeling)
    if number and labelled:
        yield from _audit_predictions(store, config, number, labelled)


def _repeated(
    store: RunDirectory, number: int, kind: Kind, checked: Counter[str], made: int | None = None
) -> Iterator[str]:
    """Is each row stored once, and are they as many as were made, where that is known?"""
    key = "rollout_id" if kind == "rollouts" else "trajectory_id"
    ids = Counter(row[key] for row in store.read(number, kind))
    checked[kind] += ids.total()
    if made is not None and ids.total() != made:
        yield f"{kind}: {ids.total()} rows are stored, but {made} were made"
    yield from (f"{kind}: {name} is stored {count} times" for name, count in ids.items() if count > 1)


def _audit_samples(
    store: RunDirectory,
    task: Task,
    number: int,
    kind: Kind,
    split: Split,
    checked: Counter[str],
    made: int | None = None,
    sandbox: Sandbox | None = None,
) -> Iterator[str]:
    """Are the samples of questions of this split, each stored once, and are their answers what their steps come to?"""
    yield from _repeated(store, number, kind, checked, made)
    yield from audit_answers(map(trajectory_of, store.read(number, kind)), task.questions(split), task, sandbox)


def _audit_pairs(store: RunDirectory, config: RunConfig, number: int, checked: Counter[str]) -> Iterator[str]:
    """Are the pairs as many as were made, and do they follow from D_i and the scores stored with them?"""
    pairs, notes = list(map(pair_of, store.read(number, "pairs"))), store.stages()[f"round-{number}/pairs"]
    checked["pairs"] += len(pairs)
    if len(pairs) != (made := notes["pairs"] + notes["unpaired"]):
        yield f"pairs: {len(pairs)} rows are stored, but {made} were made"
    yield from audit_pairs(pairs, store.trajectories_until(number), config.verify, config.pairs)


def _audit_predictions(
    store: RunDirectory, config: RunConfig, number: int, labelled: Sequence[LabelledTrajectory]
) -> Iterator[str]:
    """Do the predictions follow from the scores and the start score of V_{i-1}? Round 0 has none."""
    verifier = checkpoint_name("verifier", number - 1)
    calibration = Calibration.load(store.folder.locate(verifier))
    if calibration is None and config.labeling.uses_scores and fixed_start_score(config.labeling) is None:
        yield f"{verifier} has no calibration.json, without which no prediction can be derived again"
        return
    start = 1.0 if calibration is None else calibration.start
    yield from audit_predictions(labelled, make_labeler(config.labeling, start, config.seed))
