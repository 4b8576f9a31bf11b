"""`distbp evaluate`: loss and accuracy of a trained model over a data set; for numbers loss and rmse.

The arithmetic is that of validation during training (`evaluation.py`), with the same BLAS threads, so the
same samples give the same figures to the last digit.  The loss of numbers is in units of the variance of the
training targets; `rmse` is in the unit of the targets themselves and costs a second pass over the data.
"""

from __future__ import annotations

import json
import math
from typing import Any

import click

__all__ = ["command"]


@click.command(help="Measure the model of RUN or CHECKPOINT on all samples of DATA.")
@click.argument("model", metavar="RUN|CHECKPOINT")
@click.argument("data")
@click.option("--target", metavar="COLUMN", help="Column of the labels.  [default: as in training]")
@click.option(
    "--part",
    type=click.Choice(["train", "validation"]),
    help="Which part, where DATA holds two (train-* and t10k-*, x_train and x_val).  [default: train]",
)
@click.option(
    "--suspects",
    type=click.IntRange(min=1),
    metavar="N",
    help="Also list the N samples whose label is least likely: it may be wrong.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def command(
    model: str, data: str, target: str | None, part: str | None, suspects: int | None, as_json: bool
) -> None:
    """Print the figures."""
    from distbp.cli.model import load_model, predict, read_samples, root_mean_square
    from distbp.cli.suspects import describe_suspects, find_suspects
    from distbp.environment import limit_threads

    trained = load_model(model)
    samples = read_samples(trained, data, part=part, target=target)
    with limit_threads(trained.config.run.threads):
        figures = trained.trainer.evaluate(samples.dataset)
        regression = trained.preprocessing.task == "regression"
        error = root_mean_square(trained, samples, predict(trained, samples)) if regression else {}
        doubted = [] if suspects is None else find_suspects(trained, samples, suspects)
    report: dict[str, Any] = {
        "loss": figures["loss"],
        "accuracy": figures["accuracy"],
        "entropy": figures["entropy"],
        **error,
        "samples": len(samples.dataset),
        "data": data,
        "part": samples.part,
        "checkpoint": str(trained.path),
        "step": trained.step,
    }
    if as_json:
        # JSON has no NaN, which the loss is when class weights leave nothing to weigh.
        loss = report["loss"]
        if suspects is not None:
            report["suspects"] = doubted
        print(json.dumps(report | {"loss": loss if math.isfinite(loss) else None}, indent=2))
        return
    for name, value in report.items():
        if value is not None:
            print(f"{name:<12}{value}")
    if suspects is not None:
        print("\n".join(describe_suspects(doubted)))
    if samples.note:
        print(f"note: {samples.note}")
