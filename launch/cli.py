"""The `sapo` command. Each subcommand is the function of the same name in the module of the same name."""

from __future__ import annotations

import importlib
import traceback
from typing import Any

import click

from launch import signals
from sapo_ray.errors import SapoError, one_line, told

COMMANDS = ("plan", "run", "submit", "label", "evaluate", "processbench", "show", "audit", "model", "doctor")


class Failure(click.ClickException):
    """One line on stderr and exit status 2."""

    exit_code = 2

    def show(self, file: Any = None) -> None:
        click.echo(f"error: {self.message}", err=True)


class Benchmark(click.Command):
    """A command of its own: a SapoError is one line, as from `sapo`; any other error shows where it came from."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except SapoError as error:
            raise Failure(one_line(error)) from error


class Commands(click.Group):
    """Loads a subcommand's module only when it is asked for, and turns errors into one line."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        command = getattr(importlib.import_module(f"launch.{cmd_name}"), cmd_name)
        assert isinstance(command, click.Command)
        return command

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except click.exceptions.NoArgsIsHelpError:  # the help of a group of commands, asked for without one
            raise
        except click.UsageError as error:
            command = error.ctx.command_path if error.ctx else "sapo"
            raise Failure(f"{error.format_message()} (see {command} --help)") from error
        except BrokenPipeError:  # whoever read the output has had enough; click ends quietly
            raise
        except (SapoError, OSError) as error:
            if ctx.params["debug"]:
                traceback.print_exc()
            raise Failure(one_line(error)) from error
        except KeyboardInterrupt:
            line, status = signals.last_words()
            click.echo(line, err=True)
            ctx.exit(status)
        except (click.ClickException, click.exceptions.Exit, click.Abort):
            raise
        except Exception as error:  # a full disk, say, or a fault of ours: one line, too
            if ctx.params["debug"]:
                traceback.print_exc()
            raise Failure(f"{told(error)} (`sapo --debug …` shows where)") from error


@click.command(cls=Commands, epilog="Example: sapo doctor")
@click.option("--debug", is_flag=True, help="Print the traceback of an error, too.")
def cli(debug: bool) -> None:
    """SAPO: self-adaptive process optimization of small reasoners."""


def main() -> None:
    """Run the command that the process's arguments name, and exit."""
    signals.listen()
    cli(prog_name="sapo")
