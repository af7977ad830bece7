"""`sapo run`: the whole of algorithm 1, from a config to a table."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import click

from launch.checks import check_writable
from launch.job import check_outlives_job, job_environment
from launch.progress import ConsoleReporter
from launch.session import ray_session
from launch.show import print_summary
from sapo_ray.config import RunConfig
from sapo_ray.config_loader import load_config, to_yaml
from sapo_ray.errors import SapoError
from sapo_ray.limits import check_run_lengths
from sapo_ray.models import base_tokenizer
from sapo_ray.store import RunDirectory, write_text
from sapo_ray.tasks import make_task


@click.command()
@click.argument("config", type=click.Path(dir_okay=False))
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--json", "as_json", is_flag=True, help="Print the summary as one line of JSON.")
def run(config: str, overrides: Sequence[str], as_json: bool) -> None:
    """Run SAPO as CONFIG says: SFT, the first verifier, and rounds of self-evolution.

    A run directory that is not finished is gone on with, from its last finished stage.

    \b
    Example:
      sapo run configs/local.yaml seed=1 run_dir=runs/local-seed-1
    """
    summary = complete(config, overrides).summary()
    if as_json:
        click.echo(json.dumps(summary))
    else:
        print_summary(summary)


def complete(config: str, overrides: Sequence[str]) -> RunDirectory:
    """Run what a config file and overrides say to its end, or go on with it there; the run's directory.

    Raises SapoError, before anything is written or started, for what cannot be run.
    """
    settings = load_config(RunConfig, config, overrides)
    if job_environment() is not None:
        check_outlives_job("run_dir", settings.run_dir)
    settings.run_dir = settings.run_dir or str(Path("runs", Path(config).stem))
    store = RunDirectory(settings.run_dir)
    _refuse_other_config(settings, store)
    check_writable("run_dir", store.path)
    task = make_task(settings.task)
    check_run_lengths(settings, task, base_tokenizer(settings.model, task.alphabet))
    from actors.run import Run
    from actors.sapo import sapo

    with ray_session(settings):
        store.create()
        write_text(store.path / "config.yaml", to_yaml(settings))
        with ConsoleReporter() as reporter, Run(settings, store, reporter) as stages:
            sapo(stages)
    return store


def _refuse_other_config(settings: RunConfig, store: RunDirectory) -> None:
    """A run directory holds one run: what was begun under other settings is not gone on with under these.

    `run_dir` itself may differ: a run can be moved, and its path be written in several ways.
    """
    path = store.path / "config.yaml"
    if not path.exists():
        return
    before, now = _flat(asdict(load_config(RunConfig, path))), _flat(asdict(settings))
    different = sorted(key for key in (before | now).keys() - {"run_dir"} if before.get(key) != now.get(key))
    if different:
        raise SapoError(
            f"{store.path} was begun with other values of {', '.join(different)}; "
            "choose another run_dir, or remove it to start anew"
        )


def _flat(values: dict[str, object], prefix: str = "") -> dict[str, object]:
    flat: dict[str, object] = {}
    for key, value in values.items():
        flat.update(_flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value})
    return flat
