"""`distbp run`: a script that uses the Python API, on several local workers."""

from __future__ import annotations

import sys
from pathlib import Path

import click

__all__ = ["command"]


@click.command(
    help="Run SCRIPT on several workers; options before SCRIPT are distbp's, those after it the script's.",
    context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False},
)
@click.option("--nproc", type=click.IntRange(min=1), help="Number of workers.  [default: cores]")
@click.option(
    "--backend", type=click.Choice(["serial", "local", "ray"]), default=None, help="Who starts the workers."
)
@click.option(
    "--threads", type=click.IntRange(min=1), default=1, show_default=True, help="BLAS threads each."
)
@click.option(
    "--max-restarts",
    type=click.IntRange(min=0),
    default=10,
    show_default=True,
    help="Losses without progress.",
)
@click.option("--ray-insecure", is_flag=True, help="Use a Ray cluster that asks for no token.")
@click.argument("script")
@click.argument("args", nargs=-1, type=click.UNPROCESSED)
def command(
    nproc: int | None,
    backend: str | None,
    threads: int,
    max_restarts: int,
    ray_insecure: bool,
    script: str,
    args: tuple[str, ...],
) -> int:
    """Start the workers, all of which execute the script."""
    from distbp.backends.launcher import claim
    from distbp.environment import available_cores
    from distbp.errors import ConfigError, InputMissing

    if not Path(script).is_file():
        raise InputMissing(f"no such script: {script!r}")
    if backend == "ray":
        from distbp.cli.ray_train import run_on_ray

        return run_on_ray(
            [script, *args], nproc, threads=threads, max_restarts=max_restarts, insecure=ray_insecure
        )
    if backend is None and claim() is not None:
        return _run_here(script, args)
    if backend == "serial" or (backend is None and sys.platform != "linux"):
        if nproc not in (None, 1):
            raise ConfigError(f"--backend serial is one worker, got --nproc {nproc}; use --backend local")
        return _run_here(script, args)
    from distbp.backends.local import LocalJob

    workers = nproc or max(1, available_cores() // threads)
    return LocalJob([script, *args], workers, threads=threads, max_restarts=max_restarts).run()


def _run_here(script: str, args: tuple[str, ...]) -> int:
    """Execute the script in this process."""
    import runpy
    import signal

    for number in (signal.SIGUSR1, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    sys.argv = [script, *args]
    sys.path.insert(0, str(Path(script).resolve().parent))
    runpy.run_path(script, run_name="__main__")
    return 0
