"""`sapo show`: the tables of a run."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import click
from rich.table import Table

from launch.checks import Existing
from launch.tables import table_console
from sapo_ray.errors import SapoError
from sapo_ray.store import RunDirectory


@click.command()
@click.argument("run_directory", metavar="RUN", type=Existing(file_okay=False))
@click.option("--json", "as_json", is_flag=True, help="Print the summary as one line of JSON.")
def show(run_directory: str, as_json: bool) -> None:
    """Show what the rounds of RUN came to.

    \b
    Example:
      sapo show runs/local
    """
    store = RunDirectory(run_directory)
    try:
        summary = store.summary()
    except FileNotFoundError as error:
        begun = store.folder.has("config.yaml")
        why = "no round of it has ended yet" if begun else "it is no run directory"
        raise SapoError(f"{run_directory} has no summary.json: {why}") from error
    except ValueError as error:
        raise SapoError(f"{run_directory}/summary.json cannot be read: {error}") from error
    if not isinstance(summary, dict) or "rounds" not in summary:
        raise SapoError(f"{run_directory}/summary.json is no summary of a run: it has no rounds")
    if as_json:
        click.echo(json.dumps(summary))
    else:
        print_summary(summary)


def print_summary(summary: Mapping[str, Any]) -> None:
    """Print accuracy, verifier and cost by round to standard output."""
    console = table_console()
    for title, columns in _TABLES.items():
        table = Table(title=title, title_justify="left")
        table.add_column("round", justify="right")
        for name in columns:
            table.add_column(name, justify="right")
        for entry in summary["rounds"]:
            cells = (_cell(entry, path, form) for path, form in columns.values())
            table.add_row(str(entry["round"]), *cells)
        console.print(table)
    for entry in summary["rounds"]:
        for sign in entry["warnings"]:
            click.echo(f"warning: round {entry['round']}: {sign}")


_TABLES: dict[str, dict[str, tuple[str, str]]] = {
    "Reasoner": {
        "test greedy %": ("test.greedy_accuracy", "percent"),
        "95% interval": ("test.ci95", "interval"),
        "n": ("test.n", "count"),
        "ood greedy %": ("ood.greedy_accuracy", "percent"),
        "sampled %": ("test.sampled_accuracy", "percent"),
        "pass@k %": ("test.pass_at_k", "percent"),
        "majority %": ("test.majority_accuracy", "percent"),
        "best-of-N %": ("verifier.best_of_n_accuracy", "percent"),
    },
    "Verifier": {
        "AUROC": ("verifier.auroc", "number"),
        "Brier": ("verifier.brier", "number"),
        "steps right %": ("verifier.step_accuracy", "percent"),
        "first error hit %": ("verifier.first_error_hit_rate", "percent"),
        "random hit %": ("verifier.random_hit_rate", "percent"),
        "self-verification error %": ("verifier.self_verification_error", "percent"),
        "pairs": ("pairs.pairs", "count"),
        "unpaired": ("pairs.unpaired", "count"),
        "unlike outcome %": ("pairs.share_unlike_outcome", "percent"),
        "by chance %": ("pairs.share_unlike_by_chance", "percent"),
    },
    "Cost": {
        "labelled": ("cost.trajectories", "count"),
        "checks": ("cost.checks", "count"),
        "rollouts": ("cost.rollouts", "count"),
        "generated tokens": ("cost.generated_tokens", "count"),
        "prompt tokens": ("cost.prompt_tokens", "count"),
        "cached": ("cost.cached_tokens", "count"),
        "trained tokens": ("cost.trained_tokens", "count"),
        "TFLOP": ("cost.flops", "tera"),
        "seconds": ("cost.seconds", "seconds"),
    },
}


def _cell(entry: Mapping[str, Any], path: str, form: str) -> str:
    value: Any = entry
    for key in path.split("."):
        value = value.get(key) if value is not None else None
    if value is None:
        return "–"
    match form:
        case "percent":
            return f"{100 * value:.1f}"
        case "interval":
            return f"{100 * value[0]:.1f}-{100 * value[1]:.1f}"
        case "number":
            return f"{value:.3f}"
        case "tera":
            return f"{value / 1e12:.2f}"
        case "seconds":
            return f"{sum(value.values()):.0f}"
        case _:
            return f"{value:,}"
