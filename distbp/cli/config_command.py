"""`distbp config`: write, show and check configuration files.

All knowledge of keys lies in `distbp/config*.py`; here are files and lines.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import click

__all__ = ["command"]


@click.group(help="Write, show and check configuration files.")
def command() -> None:
    """Hold the subcommands."""


@command.command(help="Write FILE with every key, its default and its explanation.  [default: distbp.toml]")
@click.argument("file", default="distbp.toml")
def init(file: str) -> None:
    """Create the file; one that exists is somebody's work and is never overwritten."""
    from distbp.config import Config, to_toml
    from distbp.errors import CannotWrite, ConfigError

    path = Path(file)
    if path.suffix.lower() != ".toml":
        raise ConfigError(f"expected a file that ends in .toml, got {file!r}")
    try:
        with path.open("x", encoding="utf-8") as stream:
            stream.write(to_toml(Config(), comments=True).lstrip("\n"))
    except FileExistsError:
        raise CannotWrite(
            f"{file}: expected a new file, found one that exists; name another, or remove it"
        ) from None
    except OSError as error:
        raise CannotWrite(f"{file}: expected to write it, got: {error.strerror}; name another") from error
    print(f"wrote {file}; next: distbp train DATA -c {file}")


@command.command(help="Show the configuration that `distbp train` would use here, as TOML.")
@click.option("-c", "--config", "file", type=click.Path(), help="Configuration file, TOML or JSON.")
@click.option(
    "-o", "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Set one configuration key."
)
@click.option("--origin", is_flag=True, help="Say behind each key where its value was set.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def show(file: str | None, overrides: tuple[str, ...], origin: bool, as_json: bool) -> None:
    """Join file, environment and overrides, and print the result."""
    from distbp.config import resolve, to_dict, to_toml

    resolved = resolve(file=Path(file) if file else None, environment=os.environ, overrides=overrides)
    if as_json:
        plain = to_dict(resolved.config)
        print(json.dumps({"config": plain, "origin": resolved.origin} if origin else plain, indent=2))
    elif origin:
        print("\n".join(_with_origin(to_toml(resolved.config), resolved.origin)))
    else:
        print(to_toml(resolved.config), end="")


@command.command(help="Check FILE and report every mistake in it.")
@click.argument("file", type=click.Path())
def check(file: str) -> None:
    """Read the file alone, without environment, so that the verdict is about the file."""
    from distbp.config import resolve

    origin = resolve(file=Path(file)).origin
    count = sum(where != "default" for where in origin.values())
    print(f"{file}: no mistakes; it sets {count} of {len(origin)} keys")


@command.command(help="Print the JSON schema of configuration files, for editors.")
def schema() -> None:
    """Print the schema."""
    from distbp.config import schema as build_schema

    print(json.dumps(build_schema(), indent=2))


def _with_origin(toml: str, origin: Mapping[str, str]) -> Iterator[str]:
    """Yield the lines of `to_toml` with a comment behind each key; what comes out is still TOML."""
    lines = toml.splitlines()
    width = min(60, max(map(len, lines)))
    table = ""
    for line in lines:
        if line.startswith("["):
            table = line.strip("[]") + "."
        name, equals, _ = line.partition(" = ")
        yield f"{line:<{width}}  # {origin[table + name]}" if equals else line
