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
from launch.resources import check_memory, offered_nodes
from launch.session import ray_session
from launch.show import print_summary
from sapo_ray.config import RunConfig
from sapo_ray.config_loader import changeable_keys, load_config, to_yaml
from sapo_ray.errors import SapoError
from sapo_ray.lease import Lease
from sapo_ray.limits import check_run_lengths
from sapo_ray.models import base_tokenizer
from sapo_ray.store import RunDirectory
from sapo_ray.tasks import make_task
from sapo_ray.tracking import check_installed


@click.command()
@click.argument("config", type=click.Path(dir_okay=False))
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--redo", metavar="STAGE", help="Forget this finished stage and all after it, such as round-1/sample.")
@click.option("--json", "as_json", is_flag=True, help="Print the summary as one line of JSON.")
def run(config: str, overrides: Sequence[str], redo: str | None, as_json: bool) -> None:
    """Run SAPO as CONFIG says: SFT, the first verifier, and rounds of self-evolution.

    A run directory that is not finished is gone on with, from where it stopped.

    \b
    Example:
      sapo run configs/local.yaml seed=1 run_dir=runs/local-seed-1
    """
    summary = complete(config, overrides, redo).summary()
    if as_json:
        click.echo(json.dumps(summary))
    else:
        print_summary(summary)


def complete(config: str, overrides: Sequence[str], redo: str | None = None) -> RunDirectory:
    """Run what a config file and overrides say to its end, or go on with it there; the run's directory.

    The stage `redo` and all that finished after it are done again. Raises SapoError, before anything is written or
    started, for what cannot be run.
    """
    settings = load_config(RunConfig, config, overrides)
    if job_environment() is not None:
        check_outlives_job("run_dir", settings.run_dir)
    settings.run_dir = settings.run_dir or str(Path("runs", Path(config).stem))
    try:
        store = RunDirectory(settings.run_dir)
    except SapoError as error:
        raise SapoError(f"run_dir: {error}") from error
    _refuse_other_config(settings, store)
    check_installed(settings)
    check_writable("run_dir", store.location)
    task = make_task(settings.task)
    tokenizer = base_tokenizer(settings.model, task.alphabet)
    check_run_lengths(settings, task, tokenizer)
    if redo:
        store.check_finished(redo)
    lease = Lease(store.folder)
    lease.check()
    store = RunDirectory(store.location, lease.driver)
    from actors.run import Run
    from actors.sapo import sapo

    with ray_session(settings):
        check_memory(settings, tokenizer, offered_nodes())
        store.create()
        with lease, ConsoleReporter() as reporter:
            _refuse_other_config(settings, store)  # another driver may have begun it since
            if redo:
                store.forget(redo)
            for what in (*task.remarks(), *store.check()):
                reporter.warn(what)
            store.folder.write("config.yaml", to_yaml(settings))
            with Run(settings, store, reporter) as stages:
                sapo(stages)
    return store


def _refuse_other_config(settings: RunConfig, store: RunDirectory) -> None:
    """A run directory holds one run: what was begun under other settings is not gone on with under these.

    Keys that say how fast and where a run works may differ (`changeable`), `run_dir` itself among them: a run can be
    moved, and its path be written in several ways.
    """
    if not store.folder.has("config.yaml"):
        return
    begun = load_config(RunConfig, store.folder.locate("config.yaml"))
    before, now = _flat(asdict(begun)), _flat(asdict(settings))
    keys = (before | now).keys() - changeable_keys(RunConfig)
    different = sorted(key for key in keys if before.get(key) != now.get(key))
    if different:
        raise SapoError(
            f"{store.location} was begun with other values of {', '.join(different)}; "
            "choose another run_dir, or remove it to start anew"
        )


def _flat(values: dict[str, object], prefix: str = "") -> dict[str, object]:
    flat: dict[str, object] = {}
    for key, value in values.items():
        flat.update(_flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value})
    return flat
