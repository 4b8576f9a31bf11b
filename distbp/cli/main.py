"""The `distbp` command: finds the subcommand, and turns errors into messages and exit codes.

Subcommands are imported when they are called, so that `distbp --help` needs neither NumPy nor rich.
"""

from __future__ import annotations

import importlib
import os
import signal
import sys
import time
from typing import TYPE_CHECKING, Any, NoReturn

import click

if TYPE_CHECKING:
    from distbp.errors import DistbpError

__all__ = ["COMMANDS", "main"]

COMMANDS = {
    "bench": "measure what this machine can do and what distbp reaches",
    "compare": "say in what two runs differ: configuration, curves, results, bits",
    "config": "write, show and check configuration files",
    "doctor": "say what works on this machine, and how to cure what does not",
    "evaluate": "measure a trained model on a data set",
    "export": "write a trained model as an ONNX file",
    "generate": "write text with a trained language model",
    "inspect": "show what a checkpoint holds and whether it is whole",
    "lr-find": "find a learning rate that fits a data set and a model",
    "ls": "list the runs below a directory",
    "predict": "apply a trained model to new data",
    "report": "write a run on one page, report.html",
    "run": "run a script that uses the Python API on several workers",
    "simulate": "predict the time of a step on many hosts",
    "train": "train a model on a data set",
    "watch": "look at a run while it goes on, in a terminal or a browser",
}
"""Name -> what it does.  The module `distbp.cli.<name>_command`, with _ for -, holds a `command`."""

_HEAD = """Train neural networks on every core you have, with the same bits for any number of workers.

\b
  distbp train digits                          train on the built-in digits
  distbp train data.csv --target price         train on a table
  distbp run --nproc 4 train.py                run your own script on four workers
"""


_OPTIONS = {"suspects": "distbp evaluate RUN DATA --suspects 20"}
"""What may be taken for a command, and what to type."""

_RANK_0_SPEAKS_WITHIN_S = 10.0
"""How much later than another rank, at the most, rank 0 may start and still be heard."""


class _LazyGroup(click.Group):
    """A group that imports a subcommand only when it is used."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(f"distbp.cli.{cmd_name.replace('-', '_')}_command")
        command: click.Command = module.command
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name = args[0]
        if name not in COMMANDS and not name.startswith("-"):
            import difflib

            near = difflib.get_close_matches(name, COMMANDS, n=1)
            cure = f"; did you mean {near[0]!r}?" if near else ""
            cure = f"; it is an option: {_OPTIONS[name]}" if name in _OPTIONS else cure
            raise click.UsageError(f"No such command {name!r}{cure}", ctx)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


def _print_version(context: click.Context, parameter: click.Parameter, value: bool) -> None:
    if value and not context.resilient_parsing:
        from distbp import __version__

        click.echo(f"distbp {__version__}")
        context.exit()


@click.group(cls=_LazyGroup, help=_HEAD, context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--version",
    is_flag=True,
    callback=_print_version,
    expose_value=False,
    is_eager=True,
    help="Show the version.",
)
def _group() -> None:
    """Hold the subcommands."""


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit with the code that `errors.py` assigns to what happened."""
    open_missing_streams()
    _stop_quietly_until_ready()
    from distbp.backends.launcher import claim
    from distbp.errors import DistbpError

    try:
        code: Any = _group.main(arguments, prog_name="distbp", standalone_mode=False)
    except DistbpError as error:
        end_with(error)
    except click.exceptions.Abort:
        sys.exit(130)
    except click.ClickException as error:
        started = claim()
        if started is None or started.rank == 0:
            error.show()
        elif started.launcher == "Open MPI":  # The others let rank 0 live when another rank has ended.
            _wait_for_rank_0(error.exit_code)
        sys.exit(error.exit_code)
    sys.exit(code if isinstance(code, int) else 0)


def end_with(error: DistbpError) -> NoReturn:
    """Print the error and exit with its code; under MPI an error of one rank alone ends all of them."""
    mpi = sys.modules.get("distbp.backends.mpi")
    if mpi is not None and mpi.MPIMembership.current is not None:
        mpi.MPIMembership.current.end(error, "")
    print(f"distbp: {error}", file=sys.stderr, flush=True)
    sys.exit(error.exit_code)


def _wait_for_rank_0(code: int) -> None:
    """Let rank 0, which has the same command, say what is wrong: Open MPI ends all when one has ended."""
    for number in (signal.SIGUSR1, signal.SIGTERM):
        signal.signal(number, lambda number, frame: os._exit(code))
    time.sleep(_RANK_0_SPEAKS_WITHIN_S)


def open_missing_streams() -> None:
    """Open /dev/null in place of closed standard streams, so that no other file takes their place."""
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
            setattr(sys, name, open(number, mode, closefd=False))  # noqa: SIM115  Open for the process's life.


def _stop_quietly_until_ready() -> None:
    """Give SIGUSR1 an answer while the program still starts: nothing has begun, so 75 is the truth."""

    def stop(number: int, frame: object) -> None:
        print("distbp: stopped on request; nothing is half written, run again to go on", file=sys.stderr)
        os._exit(75)

    for number in (signal.SIGUSR1, signal.SIGTERM):
        signal.signal(number, stop)


if __name__ == "__main__":
    main()
