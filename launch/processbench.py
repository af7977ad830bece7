"""`sapo processbench`: how well a verifier, of this project or another, finds the first wrong step."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click
from rich.table import Table

from launch.checks import Checkpoint, Existing
from launch.progress import ConsoleReporter
from launch.tables import table_console
from sapo_ray.cache import local_checkpoint
from sapo_ray.config import RunConfig
from sapo_ray.config_loader import load_config
from sapo_ray.errors import SapoError
from sapo_ray.processbench import Case, choose_threshold, first_error_report, read_cases
from sapo_ray.progress import Reporter
from sapo_ray.tasks import make_task

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from sapo_ray.encoding import Encoded
    from sapo_ray.prm_formats import PrmFormat

_PRM = Checkpoint("ForTokenClassification", "ForCausalLM", "ForProcessRewardModel")
_NAMED = 5
"""Records left out that a warning names; `--json` names them all."""


@dataclass(frozen=True, slots=True)
class Split:
    """A file's records as a PRM reads them, without those it has too few positions for, whose ids are `left_out`."""

    path: str
    cases: list[Case]
    encoded: list[Encoded]
    left_out: list[str]

    @property
    def labels(self) -> list[int]:
        return [case.label for case in self.cases]


@click.command()
@click.argument("config", type=click.Path(dir_okay=False))
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--verifier", required=True, type=_PRM, help="Checkpoint directory of a PRM.")
@click.option(
    "--test", "tests", required=True, multiple=True, type=Existing(), help="Records; may be given repeatedly."
)
@click.option("--tune", type=Existing(), help="Records on which the threshold with the best F1 is chosen.")
@click.option("--threshold", type=float, help="A threshold instead of --tune: lower scores are errors.")
@click.option("--json", "as_json", is_flag=True, help="Print the figures as one line of JSON.")
def processbench(
    config: str,
    overrides: Sequence[str],
    verifier: str,
    tests: Sequence[str],
    tune: str | None,
    threshold: float | None,
    as_json: bool,
) -> None:
    """Score the F1 of ProcessBench on records of solutions with their first wrong steps (JSON, JSON Lines or Parquet).

    The verifier is one of this project, or a public PRM in the format of Math-Shepherd or Qwen2.5-Math-PRM. Of CONFIG
    `task` says how this project's verifier is asked, `verifier` with which dtype, in batches of how many tokens, and
    whether on a GPU.

    \b
    Example:
      sapo processbench configs/gsm8k/qwen2.5-coder-0.5b-cpu.yaml \\
        --verifier runs/gsm8k-qwen2.5-coder-0.5b/checkpoints/verifier-1 \\
        --tune data/processbench/gsm8k.json --test data/processbench/math.json
    """
    if (tune is None) == (threshold is None):
        raise SapoError("name --tune or --threshold, one of the two")
    settings = load_config(RunConfig, config, overrides)
    cases = {path: read_cases(path) for path in ([tune] if tune else []) + list(tests)}
    if tune:
        _check_apart(cases, tune, tests)
    import torch
    from transformers.utils.logging import disable_progress_bar

    from sapo_ray.prm_formats import prm_format

    checkpoint, options = local_checkpoint(verifier), settings.verifier
    form, longest = prm_format(checkpoint, make_task(settings.task))
    splits = [encode_split(form, longest, path, rows) for path, rows in cases.items()]
    disable_progress_bar()
    with ConsoleReporter() as reporter:
        for split in splits:
            if split.left_out:
                reporter.warn(_too_long(split, longest))
        reporter.begin("load")
        model = form.load(checkpoint, getattr(torch, options.dtype))
        model.to("cuda" if options.gpus_per_worker else "cpu").eval()  # type: ignore[arg-type]
        reporter.end({})
        scores = {split.path: score_split(model, split, options.batch_tokens, reporter) for split in splits}
    chosen = _tuned(splits[0], scores[splits[0].path]) if threshold is None else threshold
    reports = [
        {"split": split.path, "tuned_on": split.path == tune}
        | first_error_report(scores[split.path], split.labels, chosen)
        | {"left_out": split.left_out}
        for split in splits
    ]
    figures = {"verifier": verifier, "format": form.name, "threshold": chosen, "tuned_on": tune, "splits": reports}
    if as_json:
        click.echo(json.dumps(figures))
    else:
        _print(figures)


def encode_split(form: PrmFormat, longest: int, path: str, cases: Sequence[Case]) -> Split:
    """A file's records as tokens. Raises SapoError for one that the format cannot hold."""
    split = Split(path, [], [], [])
    for case in cases:
        try:
            encoded = form.encode(case.problem, case.steps)
        except SapoError as error:
            raise SapoError(f"{path}, {case.id}: {error}") from error
        if len(encoded.ids) > longest:
            split.left_out.append(case.id)
        else:
            split.cases.append(case)
            split.encoded.append(encoded)
    return split


def score_split(model: PreTrainedModel, split: Split, batch_tokens: int, reporter: Reporter) -> list[list[float]]:
    """The step scores of every record. Raises SapoError for one that is no number."""
    from sapo_ray.scoring import score_by_length

    scores: list[list[float]] = [[] for _ in split.cases]
    reporter.begin(f"score {split.path}")
    for done, (i, found) in enumerate(score_by_length(model, split.encoded, batch_tokens), 1):
        if not all(map(math.isfinite, found)):
            raise SapoError(f"{split.path}, {split.cases[i].id}: a score is no number; try another verifier.dtype")
        scores[i] = found
        reporter.update(done, len(scores), "")
    reporter.end({})
    return scores


def _check_apart(cases: Mapping[str, Sequence[Case]], tune: str, tests: Sequence[str]) -> None:
    """Raises SapoError where a solution that chooses the threshold would test it, too."""
    chosen_on = {(case.problem, case.steps) for case in cases[tune]}
    for path in tests:
        shared = sum((case.problem, case.steps) in chosen_on for case in cases[path])
        if shared:
            raise SapoError(
                f"{shared} of {len(cases[path])} records of --test {path} are in --tune {tune}, too; test on others "
                "(the figures of --tune itself are given, and marked, anyway)"
            )


def _tuned(split: Split, scores: Sequence[Sequence[float]]) -> float:
    try:
        return choose_threshold(scores, split.labels)
    except SapoError as error:
        raise SapoError(f"--tune {split.path}: {error}") from error


def _too_long(split: Split, longest: int) -> str:
    named, more = ", ".join(split.left_out[:_NAMED]), len(split.left_out) - _NAMED
    return (
        f"{len(split.left_out)} of {len(split.left_out) + len(split.cases)} records of {split.path} exceed the "
        f"{longest:,} positions of the model and are left out: {named}" + (f" and {more} more" if more > 0 else "")
    )


def _print(figures: Mapping[str, Any]) -> None:
    chosen = f", chosen on {figures['tuned_on']}" if figures["tuned_on"] else ""
    click.echo(f"{figures['verifier']} ({figures['format']}), threshold {figures['threshold']:.4g}{chosen}")
    table = Table("records")
    table.add_column("F1 %", justify="right")
    for kind in ("wrong", "right"):
        for name in (f"{kind} solutions %", "95% interval", "n"):
            table.add_column(name, justify="right")
    table.add_column("left out", justify="right")
    for row in figures["splits"]:
        cells = [row["split"] + (" (threshold chosen on it)" if row["tuned_on"] else ""), _percent(row["f1"])]
        for kind in ("wrong", "right"):
            interval = "-".join(map(_percent, row[f"{kind}_ci95"] or [None]))
            cells += [_percent(row[f"{kind}_accuracy"]), interval, str(row[kind])]
        table.add_row(*cells, str(len(row["left_out"])))
    table_console().print(table)


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.1f}"
