"""`sapo submit`: a run as a job on a Ray cluster that is up and has only the dependencies installed."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import re
import shlex
import signal
import tempfile
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import click

from launch.job import check_outlives_job
from launch.package import pack
from sapo_ray.config import RunConfig
from sapo_ray.config_loader import load_config
from sapo_ray.errors import SapoError
from sapo_ray.limits import check_run_lengths
from sapo_ray.models import base_tokenizer
from sapo_ray.tasks import make_task

if TYPE_CHECKING:
    from ray.job_submission import JobDetails, JobSubmissionClient

STOP_SECONDS = 30
"""How long `ray job stop` lets the job end by itself; Ray's own default is 3 s."""

_ANSWER_SECONDS = 10
_AGENT_SECONDS = 60


@click.command()
@click.argument("config", type=click.Path(dir_okay=False))
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option(
    "--address",
    default="http://127.0.0.1:8265",
    show_default=True,
    envvar=["RAY_API_SERVER_ADDRESS", "RAY_ADDRESS"],
    help="The cluster's job server, which is its dashboard; or RAY_API_SERVER_ADDRESS or RAY_ADDRESS.",
)
@click.option("--no-wait", is_flag=True, help="Return when the job is submitted.")
@click.option("--json", "as_json", is_flag=True, help="Print one line of JSON, and the job's output to stderr.")
@click.pass_context
def submit(
    ctx: click.Context, config: str, overrides: Sequence[str], address: str, no_wait: bool, as_json: bool
) -> None:
    """Run SAPO as CONFIG says as a job on a Ray cluster, and follow it to its end.

    Uploads this project's packages and CONFIG with all that it extends. `run_dir` must be absolute, on storage that
    every node sees. Ctrl-C leaves the job running. Exits with the job's exit status.

    \b
    Example:
      sapo submit configs/local.yaml --address http://127.0.0.1:8265 run_dir=/shared/runs/local
    """
    if any(override.startswith("extends=") for override in overrides):
        raise SapoError("extends cannot be an argument of a job, which has CONFIG's files only; write it into CONFIG")
    settings = load_config(RunConfig, config, overrides)
    check_outlives_job("run_dir", settings.run_dir)
    if settings.model.path is None:  # another model's tokenizer may be where only the cluster sees it
        task = make_task(settings.task)
        check_run_lengths(settings, task, base_tokenizer(settings.model, task.alphabet))
    with tempfile.TemporaryDirectory() as folder:
        package = Path(folder, "sapo.zip")
        command = ["python", "-m", "launch", "run", pack(Path(config), package), *overrides]
        client = connect(address)
        job = _submit(client, shlex.join(command), package)
    server = _without_password(client.get_address())
    how_to_follow = f"to follow it: ray job logs --address {server} --follow {job}"
    click.echo(f"job {job} submitted", err=True)
    click.echo(how_to_follow, err=True)
    click.echo(f"to stop it:   ray job stop --address {server} {job}", err=True)
    result: dict[str, Any] = {"job": job, "address": server, "status": "PENDING", "exit_status": None}
    if not no_wait:
        try:
            details = follow(client, job, lambda text: click.echo(text, nl=False, err=as_json))
        except KeyboardInterrupt:
            click.echo(f"job {job} goes on; {how_to_follow}", err=True)
            raise
        result |= {"status": details.status.value, "exit_status": exit_status(details)}
        if details.status != "SUCCEEDED":
            click.echo(f"error: job {job}: {cause(details)}", err=True)
    if as_json:
        click.echo(json.dumps(result))
    ctx.exit(result["exit_status"] or 0)


def connect(address: str) -> JobSubmissionClient:
    """Ray's client of the job server at a URL, at host:port, or (`auto`) of the cluster on this machine.

    Raises SapoError where none answers in time, or one that asks for another token than Ray finds here.
    """
    import requests
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    for talkative in ("dashboard_sdk", "job.sdk"):  # of uploads and of connections
        logging.getLogger(f"ray.dashboard.modules.{talkative}").setLevel(logging.WARNING)
    url = address if "://" in address or address == "auto" else f"http://{address}"
    try:
        if url != "auto":  # the client itself would wait without end for one that accepts and is silent
            requests.get(f"{url}/api/version", timeout=_ANSWER_SECONDS)
        os.environ["RAY_API_SERVER_ADDRESS"] = url  # which, like RAY_ADDRESS, Ray prefers to an argument
        return JobSubmissionClient(url)
    except requests.RequestException as error:
        reason = str(getattr(error.args[0], "reason", error)).rpartition(": ")[2]
        raise SapoError(
            f"no Ray job server answers at {_without_password(url)}: {reason}; name the cluster's dashboard, such as "
            "--address http://127.0.0.1:8265"
        ) from error
    except AuthenticationError as error:
        reason = error.message.partition("\n")[0]
        raise SapoError(
            f"{_without_password(url)}: {reason}; set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN_PATH to a file that "
            "holds the cluster's token"
        ) from error


def _submit(client: JobSubmissionClient, command: str, package: Path) -> str:
    """Submit a job; its id. A cluster takes jobs some seconds after its job server first answers."""
    variables = {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_SECONDS)}
    if "HF_HUB_OFFLINE" in os.environ:
        variables["HF_HUB_OFFLINE"] = os.environ["HF_HUB_OFFLINE"]
    environment = {"working_dir": str(package), "env_vars": variables}
    patience = time.monotonic() + _AGENT_SECONDS
    while True:
        try:
            return client.submit_job(entrypoint=command, runtime_env=environment)
        except RuntimeError as error:
            if "No available agent" not in str(error) or time.monotonic() > patience:
                raise SapoError(f"the cluster does not take the job: {str(error).rpartition(': ')[2]}") from error
            time.sleep(1)


def follow(client: JobSubmissionClient, job: str, write: Callable[[str], None]) -> JobDetails:
    """Write a job's output until it has ended; its details. Raises SapoError where the cluster is lost from sight."""
    from aiohttp import ClientError

    try:
        return asyncio.run(_follow(client, job, write))
    except BrokenPipeError:  # it is our reader that is gone
        raise
    except (OSError, RuntimeError, ClientError) as error:
        raise SapoError(f"job {job} is lost from sight and may still be running: {error}") from error


async def _follow(client: JobSubmissionClient, job: str, write: Callable[[str], None]) -> JobDetails:
    """A connection that is cut while the job runs, as proxies do, is made anew: it tells everything once more."""
    written = 0
    while True:
        told = 0
        logs = cast(AsyncGenerator[str, None], client.tail_job_logs(job))
        async with aclosing(logs) as texts:  # also when Ctrl-C cancels this
            with suppress(RuntimeError):
                async for text in texts:
                    told += len(text)
                    if told > written:
                        write(text[written - told :])
                        written = told
        details = client.get_job_info(job)
        if details.status.is_terminal():
            return details
        await asyncio.sleep(1)


def exit_status(details: JobDetails) -> int:
    """The status that a shell would have for a job's command; 1 for a job whose command never ran."""
    if details.status == "STOPPED":
        return 128 + signal.SIGTERM
    status = details.driver_exit_code if details.driver_exit_code is not None else 1
    return status if status >= 0 else 128 - status


def cause(details: JobDetails) -> str:
    """Why a job did not succeed, in one line: the last error in what it said, else what Ray says of it."""
    message = details.message or details.status.value
    errors = re.findall(r"^(?:error|[\w.]+(?:Error|Exception)): (\S.*)", message, flags=re.MULTILINE)
    return errors[-1] if errors else message.partition("\n")[0]


def _without_password(url: str) -> str:
    return re.sub(r"//[^/]*@", "//", url)
