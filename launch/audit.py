"""`sapo audit`: does everything a run says follow from what it stored?"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import nullcontext

import click

from launch.checks import Existing
from sapo_ray.audit import audit as audit_labels
from sapo_ray.audit import audit_answers, audit_pairs, audit_predictions, audit_rollouts
from sapo_ray.config import RunConfig
from sapo_ray.config_loader import load_config
from sapo_ray.data import LabelledTrajectory
from sapo_ray.errors import SapoError
from sapo_ray.labelers import fixed_start_score, make_labeler
from sapo_ray.models import Calibration
from sapo_ray.sampler import original_trajectory
from sapo_ray.sandbox import Sandbox
from sapo_ray.shards import Kind
from sapo_ray.store import RunDirectory, checkpoint_name, labelled_of, pair_of, rollout_of, trajectory_of
from sapo_ray.tasks import make_task
from sapo_ray.tasks.base import Split


@click.command()
@click.argument("run_dir", metavar="RUN", type=Existing(file_okay=False))
@click.option("--no-programs", is_flag=True, help="Take the verdicts on programs as they are: nothing is run.")
@click.option("--json", "as_json", is_flag=True, help="Print one line of JSON.")
@click.pass_context
def audit(ctx: click.Context, run_dir: str, no_programs: bool, as_json: bool) -> None:
    """Re-derive every label of RUN from its stored rollouts, every predicted first error from its scores, every answer
    of a sample or rollout from its steps and every pair from its solutions and their scores; compare the worked
    solutions with the task's; look for anything stored twice or missing. Programs are run again, and once more where
    the verdict is another.

    Exits with 1 if something does not follow.

    \b
    Example:
      sapo audit runs/local
    """
    store = RunDirectory(run_dir)
    if not store.folder.has("config.yaml"):
        raise SapoError(f"{run_dir} is no run: it has no config.yaml")
    config = load_config(RunConfig, store.folder.locate("config.yaml"))
    with Sandbox(config.sandbox) if config.runs_programs and not no_programs else nullcontext() as sandbox:
        found = RunAudit(store, config, sandbox)
        problems = list(found.problems())
    if as_json:
        click.echo(json.dumps({"checked": dict(found.checked), "problems": problems}))
    else:
        for problem in problems:
            click.echo(problem)
        counts = ", ".join(f"{count:,} {kind}" for kind, count in found.checked.items())
        click.echo(f"{len(problems)} problems in {counts or 'nothing: no round has been sampled'}")
    ctx.exit(int(bool(problems)))


class RunAudit:
    """What does not follow in a run, a line each; `checked` counts what was looked at."""

    def __init__(self, store: RunDirectory, config: RunConfig, sandbox: Sandbox | None) -> None:
        """Programs are run again in `sandbox`; without one their verdicts are taken as they are."""
        self._store, self._config, self._sandbox = store, config, sandbox
        self._task = make_task(config.task)
        self.checked = Counter[str]()

    def problems(self) -> Iterator[str]:
        """All that is wrong with the stages that are finished."""
        if self._store.done("round-0/original"):
            yield from self._originals()
        if self._store.done("round-0/validation"):
            yield from (f"validation: {problem}" for problem in self._samples(0, "validation", "validation"))
        for number in range(self._config.rounds + 1):
            if self._store.done(f"round-{number}/sample"):
                yield from (f"round {number}: {problem}" for problem in self._round(number))
            if self._store.done(f"round-{number}/pairs"):
                yield from (f"round {number}: {problem}" for problem in self._pairs(number))

    def _originals(self) -> Iterator[str]:
        """Are they the task's worked solutions, each stored once?"""
        yield from self._repeated(0, "original")
        stored = {t.id: t for t in map(trajectory_of, self._store.read(0, "original"))}
        worked = {t.id: t for t in map(original_trajectory, self._task.questions("worked"))}
        for name in sorted(stored.keys() | worked.keys()):
            if stored.get(name) != worked.get(name):
                yield f"{name}: it is not the worked solution that the task has"

    def _round(self, number: int) -> Iterator[str]:
        notes = self._store.stages()[f"round-{number}/sample"]
        yield from self._samples(number, "trajectories", "pool", notes["trajectories"]["sampled"])
        yield from self._repeated(number, "labels", notes["labels"])
        yield from self._repeated(number, "rollouts")
        labelled = [labelled_of(row) for row in self._store.read(number, "labels")]
        rollouts = [rollout_of(row) for row in self._store.read(number, "rollouts")]
        known = {rollout.id for rollout in rollouts}
        for row in labelled:
            lost = [name for estimate in row.estimates for name in estimate.rollout_ids if name not in known]
            yield from (f"{row.trajectory.id}: its rollout {name} is not stored" for name in lost)
        yield from self._parents(number, labelled)
        yield from audit_rollouts(rollouts, labelled, self._task.questions("pool"), self._task, self._sandbox)
        yield from audit_labels(labelled, rollouts, self._config.labeling)
        if number and labelled:
            yield from self._predictions(number, labelled)

    def _samples(self, number: int, kind: Kind, split: Split, made: int | None = None) -> Iterator[str]:
        """Are the samples of this split, each stored once, and are their answers what their steps come to?"""
        yield from self._repeated(number, kind, made)
        samples = map(trajectory_of, self._store.read(number, kind))
        yield from audit_answers(samples, self._task.questions(split), self._task, self._sandbox)

    def _parents(self, number: int, labelled: Sequence[LabelledTrajectory]) -> Iterator[str]:
        """Are the trajectories in labels, but for expanded ones, those that were sampled, or worked solutions?"""
        kinds: tuple[Kind, ...] = ("trajectories",) if number else ("trajectories", "original")
        known = {t.id: t for kind in kinds for t in map(trajectory_of, self._store.read(number, kind))}
        for row in labelled:
            if row.parent_id is None and known.get(row.trajectory.id) != row.trajectory:
                yield f"{row.trajectory.id}: its row in labels is not that of a trajectory of this round"

    def _repeated(self, number: int, kind: Kind, made: int | None = None) -> Iterator[str]:
        """Is each row stored once, and are they as many as were made, where that is known?"""
        key = "rollout_id" if kind == "rollouts" else "trajectory_id"
        ids = Counter(row[key] for row in self._store.read(number, kind))
        self.checked[kind] += ids.total()
        if made is not None and ids.total() != made:
            yield f"{kind}: {ids.total()} rows are stored, but {made} were made"
        yield from (f"{kind}: {name} is stored {count} times" for name, count in ids.items() if count > 1)

    def _pairs(self, number: int) -> Iterator[str]:
        """Are the pairs as many as were made, and do they follow from D_i and the scores stored with them?"""
        notes = self._store.stages()[f"round-{number}/pairs"]
        pairs = list(map(pair_of, self._store.read(number, "pairs")))
        self.checked["pairs"] += len(pairs)
        if len(pairs) != (made := notes["pairs"] + notes["unpaired"]):
            yield f"pairs: {len(pairs)} rows are stored, but {made} were made"
        yield from audit_pairs(pairs, self._store.trajectories_until(number), self._config.verify, self._config.pairs)

    def _predictions(self, number: int, labelled: Sequence[LabelledTrajectory]) -> Iterator[str]:
        """Do the predictions follow from the scores and the start score of V_{i-1}? Round 0 has none."""
        labeling, verifier = self._config.labeling, checkpoint_name("verifier", number - 1)
        calibration = Calibration.load(self._store.folder.locate(verifier))
        if calibration is None and labeling.uses_scores and fixed_start_score(labeling) is None:
            yield f"{verifier} has no calibration.json, without which no prediction can be derived again"
            return
        start = 1.0 if calibration is None else calibration.start
        yield from audit_predictions(labelled, make_labeler(labeling, start, self._config.seed))
