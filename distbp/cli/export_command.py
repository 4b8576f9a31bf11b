"""`distbp export`: a trained model as an ONNX file, for programs that know nothing of distbp."""

from __future__ import annotations

from pathlib import Path

import click

__all__ = ["command"]


@click.command(help="Write the model in RUN or CHECKPOINT as an ONNX file, its normalisation included.")
@click.argument("model", metavar="RUN|CHECKPOINT")
@click.option("-o", "--output", required=True, metavar="FILE.onnx", help="Where to write.")
def command(model: str, output: str) -> None:
    """Load, export, write."""
    from distbp.cli.model import load_model
    from distbp.cli.whole_file import write_whole
    from distbp.errors import CannotWrite, ConfigError
    from distbp.onnx_export import export_onnx

    path = Path(output)
    if path.suffix.lower() != ".onnx":
        raise ConfigError(f"-o: expected a file that ends in .onnx, got {output!r}")
    if not path.parent.is_dir():
        raise CannotWrite(f"{path}: expected an existing directory, got {str(path.parent)!r}; create it")
    trained = load_model(model)
    content = export_onnx(trained.trainer.ready(), trained.preprocessing)
    write_whole(path, content)
    print(f"{len(content):,} bytes in {path}")
    print(f"{'checkpoint':<12}{trained.path}")
