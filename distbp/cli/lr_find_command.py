"""`distbp lr-find`: which learning rate fits, measured by a range test (`metrics/lr_range.py`).

It trains as `distbp train` would, with the same options and the same workers, but in a directory of its own
that is removed, and with a rate that rises from step to step.  The bits do not depend on the workers, so
neither does the suggestion.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import click

from distbp.cli.train_command import data_options, read_config

if TYPE_CHECKING:
    from distbp.config import Config
    from distbp.metrics.lr_range import Suggestion

__all__ = ["command"]

_DOWN, _UP = 1e-4, 1e3
"""The range around the optimizer's own rate that is tried if nothing else was said."""

_ROWS = 24
_BAR = 40


@click.command(
    help="Find a learning rate for DATA: train a few steps with a rate that rises, print the loss and a rate "
    "that fits. Takes the options of `distbp train`; schedule, epochs and checkpoints mean nothing here, and "
    "no run directory is made."
)
@data_options
@click.option("--lowest", type=float, help="The first rate.  [default: the optimizer's own / 10,000]")
@click.option("--highest", type=float, help="The last rate.  [default: the optimizer's own x 1,000]")
@click.option("--steps", type=click.IntRange(min=10), default=150, show_default=True, help="Steps to make.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def command(
    data: str | None,
    file: str | None,
    overrides: tuple[str, ...],
    lowest: float | None,
    highest: float | None,
    steps: int,
    as_json: bool,
    **flags: str | None,
) -> None:
    """Measure, and print what was found."""
    from distbp.cli.job import completed, load_data
    from distbp.cli.lr_find import measure
    from distbp.metrics.lr_range import RangeTest, suggest
    from distbp.optim import OPTIMIZERS

    config = read_config(data, file, overrides, flags).config
    _check(config)
    prepared = load_data(config)
    config = completed(config, prepared)
    usual = OPTIMIZERS[config.optimizer.name].default_lr
    test = RangeTest(lowest or usual * _DOWN, highest or usual * _UP, steps)
    _check_range(test.lowest, test.highest)
    rates, losses = measure(config, prepared, test)
    found = suggest(rates, losses)
    if as_json:
        finite = [loss if math.isfinite(loss) else None for loss in losses]
        report = {"lr": found.lr, "least_at": found.least_at, "turns_at": found.turns_at}
        print(json.dumps(report | {"configured": config.optimizer.lr, "rates": rates, "losses": finite}))
        return
    print("\n".join(_curve(rates, losses)))
    print(_verdict(found, config))


def _check(config: Config) -> None:
    """Refuse what would not be done."""
    from distbp.errors import ConfigError

    if config.run.backend in ("mpi", "ray"):
        raise ConfigError(
            f"run.backend: lr-find trains on this machine, 'local' or 'serial', got {config.run.backend!r}; "
            "the rate that it finds holds for every backend"
        )


def _check_range(lowest: float, highest: float) -> None:
    """Refuse a range that does not rise."""
    from distbp.errors import ConfigError

    if not (0 < lowest < highest < math.inf):
        raise ConfigError(
            f"--lowest, --highest: expected 0 < lowest < highest, got {lowest:g} and {highest:g}"
        )


def _curve(rates: list[float], losses: list[float]) -> Iterator[str]:
    """Yield a line for some of the rates: the smoothed loss, and a bar of its length."""
    from distbp.metrics.lr_range import smoothed

    averages = smoothed(losses)
    yield f"{'rate':>10}  {'loss':>10}"
    top = max(averages[0], 1e-30) * 1.5 if averages else 1.0
    every = max(1, -(-len(averages) // _ROWS))
    for place in range(0, len(averages), every):
        loss = averages[place]
        bar = "#" * round(_BAR * min(1.0, loss / top))
        yield f"{rates[place]:>10.2g}  {loss:>10.4g}  {bar}{'>' if loss > top else ''}"
    if len(averages) < len(losses):
        yield f"{rates[len(averages)]:>10.2g}  not finite"


def _verdict(found: Suggestion, config: Config) -> str:
    """Say which rate to take."""
    configured: Any = config.optimizer.lr
    if found.lr is None:
        return (
            "the loss fell at no rate by 5 %: more --steps, another range (--lowest, --highest), or see what "
            "`distbp train` says of the model"
        )
    turns = (
        "" if found.turns_at is None else f", and above {found.turns_at:.2g} it is worse than at the start"
    )
    return (
        f"the loss is least at {found.least_at:.2g}{turns}\n"
        f"suggested: -o optimizer.lr={found.lr:g}   (configured: {configured:g})"
    )
