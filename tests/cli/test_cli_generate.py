"""Language models from the command line: train, evaluate, predict, generate."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest

from .command_line import refuse, succeed

TEXT = "the cat sat on the mat.\n" * 60


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a run of a small transformer on a text that repeats itself, seen from every position."""
    folder = tmp_path_factory.mktemp("text")
    (folder / "cat.txt").write_text(TEXT)
    options = [
        *("-o", "model.layers=1", "-o", "model.heads=2", "-o", "model.width=32", "-o", "data.context=20"),
        *("-o", "data.stride=1"),
        *("-o", "optimizer.lr=0.01", "--batch-size", 16),
    ]
    printed = succeed("train", "cat.txt", "--epochs", 3, "--nproc", 2, "--out", "run", *options, cwd=folder)
    assert "distbp generate run" in printed
    return folder / "run"


def test_one_worker_trains_the_same_bits(run: Path) -> None:
    """A text model on one worker ends in the bits of two workers."""
    options = ["-c", run / "config.toml", "--nproc", 1, "--backend", "serial", "--out", "one"]
    succeed("train", *options, cwd=run.parent)
    one, two = (json.loads((run.parent / out / "result.json").read_text()) for out in ("one", "run"))
    for figure in ("parameters_sha256", "state_sha256", "validation"):
        assert one[figure] == two[figure]


def test_a_killed_run_goes_on_with_the_same_bits(run: Path) -> None:
    """Stopped half way and resumed with another number of workers, a text model ends in the same bits."""
    constant = ["-c", run / "config.toml", "-o", "schedule.name=constant", "-o", "run.resume=auto"]
    whole = [*constant, "--nproc", 2, "-o", "train.max_steps=80"]
    succeed("train", *whole, "--out", "whole", cwd=run.parent)
    succeed("train", *constant, "--nproc", 3, "-o", "train.max_steps=33", "--out", "half", cwd=run.parent)
    succeed("train", *whole, "--nproc", 1, "--out", "half", cwd=run.parent)
    halves, wholes = (json.loads((run.parent / out / "result.json").read_text()) for out in ("half", "whole"))
    assert halves["state_sha256"] == wholes["state_sha256"]


def test_the_text_is_continued(run: Path) -> None:
    """A model that has seen one sentence over and over continues it, at temperature 0 without a mistake."""
    text = succeed("generate", run, "--prompt", "the cat", "--length", 60, "--temperature", 0, cwd=run.parent)
    assert text.rstrip("\n") == TEXT[:67].rstrip("\n")


def test_a_seed_gives_a_text(run: Path) -> None:
    """The same seed gives the same text, another seed another one at a high temperature."""
    texts = [
        succeed("generate", run, "--temperature", 5, "--length", 80, "--seed", seed, cwd=run.parent)
        for seed in (1, 1, 2)
    ]
    assert texts[0] == texts[1] != texts[2]
    assert len(texts[0]) == 1 + 80 + 1  # The prompt is a new line, and one ends the output.


def test_a_long_prompt_is_cut_at_its_beginning(run: Path) -> None:
    """A prompt longer than the window is shown whole and continued from its end."""
    prompt = TEXT[:100]
    text = succeed("generate", run, "--prompt", prompt, "--length", 20, "--temperature", 0, cwd=run.parent)
    assert text.rstrip("\n") == TEXT[:120].rstrip("\n")


def test_evaluate_and_predict_agree(run: Path, tmp_path: Path) -> None:
    """The accuracy that evaluate prints is the share of places that predict gets right."""
    found = json.loads(succeed("evaluate", run, "cat.txt", "--json", cwd=run.parent))
    assert found["accuracy"] > 0.95
    succeed("predict", run, "cat.txt", "-o", "p.npy", cwd=run.parent)
    predicted = np.load(run.parent / "p.npy", allow_pickle=False)
    alphabet = sorted(set(TEXT))
    codes = np.array([alphabet.index(character) for character in TEXT])
    following = np.lib.stride_tricks.sliding_window_view(codes[1:], 20)
    assert predicted.shape == following.shape
    assert np.mean(predicted == following) == found["accuracy"]
    succeed("predict", run, "cat.txt", "-o", "p.csv", cwd=run.parent)
    with (run.parent / "p.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert [alphabet.index(row["prediction"]) for row in rows] == predicted.reshape(-1).tolist()


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["run", "--prompt", ""], 2, "--prompt: expected at least one character"),
        (["run", "--prompt", "dog"], 65, "'d'"),
        (["run", "--temperature", "nan"], 2, "finite"),
        (["run", "--length", "0"], 2, "length"),
        (["nowhere"], 66, "nowhere"),
    ],
)
def test_what_generate_refuses(run: Path, arguments: list[str], code: int, words: str) -> None:
    """A wrong prompt, temperature, length or run ends with its code and names what is wrong."""
    assert words in refuse(code, "generate", *arguments, cwd=run.parent)


def test_a_model_of_images_writes_no_text(digits_run: Path, tmp_path: Path) -> None:
    """Only a language model generates; another one is a mistake of usage."""
    assert "no language model" not in refuse(2, "generate", digits_run, cwd=tmp_path)
    assert "expected a language model" in refuse(2, "generate", digits_run, cwd=tmp_path)


def test_a_text_wants_a_model_for_codes(run: Path) -> None:
    """An mlp on text, and a transformer on images, are refused before anything starts."""
    message = refuse(2, "train", "cat.txt", "-o", "model.name=mlp", "--out", "x", cwd=run.parent)
    assert "the model takes numbers, the samples are codes" in message
    message = refuse(2, "train", "digits", "-o", "model.name=transformer", "--out", "x", cwd=run.parent)
    assert "the model takes integer codes, the samples are numbers" in message
