"""`distbp predict`: the answers of a trained model for new data, as a file.

    FILE.npy   classes: int64 (N,), the class names where all are whole numbers, else their codes, or
               (N, T) for texts: what is expected after each of T places;
               numbers: float32 (N,), or (N, outputs) where there are several
    FILE.csv   classes: `prediction` (the name) and `p_<class>` for each class;
               numbers: `prediction`, or `prediction_0`, `prediction_1`, ...;
               texts: for each place what is expected next, in `sample`, `position`, `prediction`, `p`

Numbers are in the unit of the targets in training: the model's outputs are brought back to it in float64 and
rounded once, to float32, which is how targets are read.

Labels are not needed.  Where there are any, loss and accuracy (for numbers `rmse`, in that unit) are printed
too; loss and accuracy come from the same function as those of training and cost a second pass over the data.

The file appears whole or not at all.  All predictions are held in memory before they are written.
"""

from __future__ import annotations

import csv
import io
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from distbp.cli.model import Samples, TrainedModel
    from distbp.data import Preprocessing

    Array = NDArray[Any]

__all__ = ["command"]


@click.command(help="Apply the model in RUN or CHECKPOINT to all samples of DATA, with labels or without.")
@click.argument("model", metavar="RUN|CHECKPOINT")
@click.argument("data")
@click.option("-o", "--output", required=True, metavar="FILE.{npy,csv}", help="Where to write.")
@click.option(
    "--part",
    type=click.Choice(["train", "validation"]),
    help="Which part, where DATA holds two (train-* and t10k-*, x_train and x_val).  [default: train]",
)
def command(model: str, data: str, output: str, part: str | None) -> None:
    """Predict, write, and say how well it fits if that can be known."""
    path = Path(output)
    encode = _encoder(path)
    from distbp.cli.model import load_model, predict, root_mean_square
    from distbp.cli.whole_file import write_whole
    from distbp.environment import limit_threads

    trained = load_model(model)
    samples = _read(trained, data, part)
    with limit_threads(trained.config.run.threads):
        outputs = predict(trained, samples)
        figures: dict[str, Any] = {}
        if samples.labelled:
            figures = trained.trainer.evaluate(samples.dataset) | root_mean_square(trained, samples, outputs)
    write_whole(path, encode(outputs, trained.preprocessing))
    print(f"{len(outputs):,} predictions in {path}")
    for name, value in figures.items():
        if value is not None:
            print(f"{name:<12}{value}")
    print(f"{'data':<12}{data} (part: {samples.part})")
    print(f"{'checkpoint':<12}{trained.path}")
    if samples.note:
        print(f"note: {samples.note}")


def _encoder(path: Path) -> Callable[[Array, Preprocessing], bytes]:
    """Return the function for the file's suffix; refuse what cannot be written before any work is done."""
    from distbp.errors import CannotWrite, ConfigError

    encoders = {".npy": _as_npy, ".csv": _as_csv}
    if path.suffix.lower() not in encoders:
        raise ConfigError(f"-o: expected a file that ends in .npy or .csv, got {str(path)!r}")
    if not path.parent.is_dir():
        raise CannotWrite(f"{path}: expected an existing directory, got {str(path.parent)!r}; create it")
    return encoders[path.suffix.lower()]


def _read(trained: TrainedModel, data: str, part: str | None) -> Samples:
    """Return the samples with their labels, or without, and then say on stderr why.

    Whether a file has labels is a question of its format, which its reader answers by refusing: so the second
    try decides.  If the samples themselves cannot be used, it fails with the error that matters.
    """
    from distbp.cli.model import read_samples
    from distbp.errors import DataError, InputMissing

    try:
        return read_samples(trained, data, part=part)
    except (DataError, InputMissing) as reason:
        samples = read_samples(trained, data, part=part, labelled=False)
        print(f"distbp: predictions without accuracy, since there are no labels: {reason}", file=sys.stderr)
        return samples


def _as_npy(outputs: Array, preprocessing: Preprocessing) -> bytes:
    """Return the predictions as the bytes of an .npy file; `outputs` (N, O) are logits or numbers."""
    import numpy as np

    names = preprocessing.classes
    if names is None:
        values = (outputs[:, 0] if outputs.shape[1] == 1 else outputs).astype(np.float32)
    else:
        values = np.argmax(outputs, axis=-1).astype(np.int64)
        if all(map(_is_int64, names)):
            values = np.array([int(name) for name in names], np.int64)[values]
    stream = io.BytesIO()
    np.save(stream, np.ascontiguousarray(values), allow_pickle=False)
    return stream.getvalue()


def _is_int64(name: str) -> bool:
    """Say whether a class name is a whole number in its shortest form that int64 holds.

    "07" is not: as a number it could not be told from "7".
    """
    digits = name.removeprefix("-")
    return digits.isascii() and digits.isdecimal() and len(digits) <= 18 and str(int(name)) == name


def _as_csv(outputs: Array, preprocessing: Preprocessing) -> bytes:
    """Return the predictions as CSV; nine digits tell any two float32 numbers apart."""
    import numpy as np

    names = preprocessing.classes
    rows: list[list[str]] = []
    if names is None:
        many = outputs.shape[1] > 1
        rows.append([f"prediction_{column}" if many else "prediction" for column in range(outputs.shape[1])])
        rows += [[f"{value:.9g}" for value in row] for row in outputs.astype(np.float32).tolist()]
    elif outputs.ndim == 3:
        rows += _rows_of_places(outputs, names)
    else:
        rows.append(["prediction", *(f"p_{name}" for name in names)])
        chosen = np.argmax(outputs, axis=1).tolist()
        for code, row in zip(chosen, _probabilities(outputs).tolist(), strict=True):
            rows.append([names[code], *(f"{value:.9g}" for value in row)])
    stream = io.StringIO()
    csv.writer(stream, lineterminator="\n").writerows(rows)
    return stream.getvalue().encode()


def _rows_of_places(outputs: Array, names: tuple[str, ...]) -> Iterator[list[str]]:
    """Yield the rows for `outputs` (N, T, C): one for each place of each sample, with the likeliest class."""
    import numpy as np

    yield ["sample", "position", "prediction", "p"]
    for sample, logits in enumerate(outputs):
        chosen = np.argmax(logits, axis=1).tolist()
        likely = _probabilities(logits).max(axis=1).tolist()
        for position, (code, p) in enumerate(zip(chosen, likely, strict=True)):
            yield [str(sample), str(position), names[code], f"{p:.9g}"]


def _probabilities(logits: Array) -> Array:
    """Return softmax of `logits` (N, C) in float64, shifted by the largest so that exp cannot overflow."""
    import numpy as np

    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    exponentials: Array = np.exp(shifted)
    probabilities: Array = exponentials / exponentials.sum(axis=1, keepdims=True)
    return probabilities
