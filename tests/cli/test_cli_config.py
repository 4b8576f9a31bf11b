"""`distbp config`: files that round-trip, mistakes that are all reported, and where a value comes from."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path

from distbp.config import describe

from .command_line import refuse, succeed


def test_init_writes_every_key_with_its_default(tmp_path: Path) -> None:
    """The file that `init` writes is right, sets every key, explains it, and changes nothing."""
    assert "distbp.toml" in succeed("config", "init", cwd=tmp_path)
    text = (tmp_path / "distbp.toml").read_text()
    for key in describe():
        assert key.description in text
    assert f"sets {len(describe())} of {len(describe())} keys" in succeed(
        "config", "check", "distbp.toml", cwd=tmp_path
    )
    plain = succeed("config", "show", "--json", cwd=tmp_path)
    assert succeed("config", "show", "-c", "distbp.toml", "--json", cwd=tmp_path) == plain


def test_init_never_overwrites(tmp_path: Path) -> None:
    """A file that exists keeps its content and the code is 73, as for a place that cannot be written."""
    (tmp_path / "mine.toml").write_text("seed = 7\n")
    assert "mine.toml" in refuse(73, "config", "init", "mine.toml", cwd=tmp_path)
    assert (tmp_path / "mine.toml").read_text() == "seed = 7\n"
    assert "nowhere" in refuse(73, "config", "init", "nowhere/new.toml", cwd=tmp_path)
    assert ".toml" in refuse(2, "config", "init", "new.yaml", cwd=tmp_path)


def test_show_is_a_file_that_gives_itself(tmp_path: Path) -> None:
    """What `show` prints, with or without origins, is TOML that resolves to the same configuration."""
    given = ("-o", "optimizer.lr=0.3", "-o", "model.hidden=[7,5]", "-o", "data.path=a # b")
    wanted = json.loads(succeed("config", "show", *given, "--json", cwd=tmp_path))
    assert wanted["model"]["hidden"] == [7, 5]
    for option in ((), ("--origin",)):
        (tmp_path / "shown.toml").write_text(succeed("config", "show", *given, *option, cwd=tmp_path))
        again = succeed("config", "show", "-c", "shown.toml", "--json", cwd=tmp_path)
        assert json.loads(again) == wanted


def test_origin_names_who_set_a_value(tmp_path: Path) -> None:
    """File, environment, option and default are told apart, and the last one wins."""
    (tmp_path / "a.toml").write_text("seed = 1\n[optimizer]\nlr = 0.2\nmomentum = 0.5\n")
    arguments = ("config", "show", "-c", "a.toml", "-o", "seed=3", "--origin")
    environment = {"DISTBP_OPTIMIZER__LR": "0.25"}
    found = json.loads(succeed(*arguments, "--json", cwd=tmp_path, **environment))
    assert found["config"]["optimizer"]["lr"] == 0.25
    assert found["config"]["seed"] == 3
    assert {
        key: found["origin"][key] for key in ("seed", "optimizer.lr", "optimizer.momentum", "run.out")
    } == {
        "seed": "-o",
        "optimizer.lr": "environment DISTBP_OPTIMIZER__LR",
        "optimizer.momentum": "file a.toml",
        "run.out": "default",
    }
    lines = succeed(*arguments, cwd=tmp_path, **environment).splitlines()
    (line,) = (line for line in lines if line.startswith("lr "))
    assert line.split("# ") == ["lr = 0.25".ljust(line.index("#")), "environment DISTBP_OPTIMIZER__LR"]


def test_check_reports_every_mistake(tmp_path: Path) -> None:
    """All mistakes of a file are reported at once with 2; a file that is not there is 66."""
    (tmp_path / "bad.toml").write_text("sed = 1\n[train]\nepochs = 0\n")
    message = refuse(2, "config", "check", "bad.toml", cwd=tmp_path)
    assert "sed" in message
    assert "train.epochs" in message
    assert "gone.toml" in refuse(66, "config", "check", "gone.toml", cwd=tmp_path)


def test_check_judges_the_file_alone(tmp_path: Path) -> None:
    """A mistake in the environment is not a mistake of the file."""
    (tmp_path / "good.toml").write_text("seed = 1\n")
    printed = succeed("config", "check", "good.toml", cwd=tmp_path, DISTBP_SEED="minus one")
    assert "sets 1 of" in printed
    assert "DISTBP_SEED" in refuse(2, "config", "show", cwd=tmp_path, DISTBP_SEED="minus one")


def test_schema_is_json_that_knows_every_key(tmp_path: Path) -> None:
    """The JSON schema describes every key of every table."""
    found = json.loads(succeed("config", "schema", cwd=tmp_path))
    known = set()
    for name, kind in found["$defs"].items():
        prefix = "" if name == "Config" else f"{name.lower()}."
        known |= {prefix + key for key in kind["properties"]}
    assert {key.key for key in describe()} <= known


def test_the_commented_file_is_toml(tmp_path: Path) -> None:
    """Comments of `init` do not disturb TOML readers."""
    succeed("config", "init", "a.toml", cwd=tmp_path)
    assert tomllib.loads((tmp_path / "a.toml").read_text())["optimizer"]["name"] == "auto"
