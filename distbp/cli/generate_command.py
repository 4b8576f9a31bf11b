"""`distbp generate`: text from a trained language model."""

from __future__ import annotations

import math
import sys

import click

__all__ = ["command"]


@click.command(help="Continue PROMPT with the language model in RUN or CHECKPOINT, and print the text.")
@click.argument("model", metavar="RUN|CHECKPOINT")
@click.option("--prompt", default=None, metavar="TEXT", help="How the text begins.  [default: a new line]")
@click.option(
    "--length", type=click.IntRange(1, 1_000_000), default=500, show_default=True, help="Tokens to add."
)
@click.option(
    "--temperature",
    type=click.FloatRange(min=0),
    default=0.8,
    show_default=True,
    help="Below 1 likely tokens become more likely; 0 takes the most likely one.",
)
@click.option(
    "--seed", type=click.IntRange(0, 2**63 - 1), default=0, show_default=True, help="What is drawn."
)
def command(model: str, prompt: str | None, length: int, temperature: float, seed: int) -> None:
    """Encode the prompt, generate, and print."""
    import numpy as np

    from distbp.cli.model import load_model
    from distbp.data.text import decode, encode
    from distbp.environment import limit_threads
    from distbp.errors import ConfigError
    from distbp.generation import generate

    trained = load_model(model)
    schema = trained.preprocessing.schema
    if schema.get("format") != "text":
        raise ConfigError(
            f"{trained.path}: expected a language model, trained on a text, got a model of "
            f"{trained.config.data.path!r}; distbp predict applies it to new data"
        )
    if not math.isfinite(temperature):
        raise ConfigError(f"--temperature: expected a finite number >= 0, got {temperature!r}")
    if prompt == "":
        raise ConfigError("--prompt: expected at least one character, got an empty text; leave it out")
    if prompt is None:
        prompt = "\n" if schema["level"] == "byte" or "\n" in schema["classes"] else schema["classes"][0]
    begin = encode(schema, prompt.encode("utf-8", "surrogateescape"), "--prompt").astype(np.int64)
    with limit_threads(trained.config.run.threads):
        network = trained.trainer.ready()
        tokens = generate(network, begin, length, temperature=temperature, seed=seed)
    sys.stdout.buffer.write(decode(schema, tokens) + b"\n")
    sys.stdout.flush()
