"""What the documents say is what the code does: keys, exit codes, the drawing, links and the names of files.

    python tests/test_docs.py      writes the generated parts of docs/ anew

A generated part stands between two comments, so that a reader sees it like the rest and nobody edits it.
"""

from __future__ import annotations

import ast
import inspect
import re
import tomllib
from pathlib import Path

import numpy as np
import pytest

from distbp import errors
from distbp.config import describe, from_dict
from distbp.config_schema import OPTIONS_OF
from distbp.optim import OPTIMIZERS

REPOSITORY = Path(__file__).resolve().parents[1]
ARCHITECTURE = REPOSITORY / "docs" / "ARCHITECTURE.md"
CONFIGURATION = REPOSITORY / "docs" / "CONFIGURATION.md"
FOLDERS = (".", "docs", "launch", "cluster", "benchmarks")
DOCUMENTS = sorted(path for folder in FOLDERS for path in (REPOSITORY / folder).glob("*.md"))

ALTERNATIVES: dict[str, object] = {
    "seed": 1,
    "data.validation_fraction": 0.2,
    "data.split": "tail",
    "data.normalize": "none",
    "data.augment_crop": 1,
    "data.augment_flip": True,
    "data.augment_noise": 0.1,
    "model.name": "linear",
    "model.hidden": [8],
    "model.activation": "tanh",
    "loss.label_smoothing": 0.1,
    "loss.class_weights": [2.0] * 10,
    "optimizer.name": "adam",
    "optimizer.lr": 0.2,
    "optimizer.momentum": 0.5,
    "optimizer.nesterov": True,
    "optimizer.weight_decay": 0.1,
    "optimizer.average": 0.9,
    "optimizer.clip_norm": 1.0,
    "schedule.name": "constant",
    "schedule.warmup_steps": 1,
    "schedule.warmup_epochs": 1.0,
    "schedule.scaling": "linear",
    "schedule.step_size": 7,
    "schedule.gamma": 0.2,
    "schedule.final_fraction": 0.1,
    "schedule.power": 2.0,
    "schedule.initial_fraction": 0.1,
    "schedule.rise_fraction": 0.1,
    "data.shuffle": "block",
    "train.epochs": 3,
    "train.max_steps": 5,
    "train.batch_size": 32,
    "train.micro_batch": 4,
    "checkpoint.every_steps": 5,
    "checkpoint.every_seconds": 5.0,
    "checkpoint.keep": 5,
    "run.backend": "serial",
    "run.nproc": 2,
    "run.threads": 2,
    "run.out": "elsewhere",
    "run.resume": "never",
    "run.max_restarts": 5,
    "run.join_timeout_s": 5.0,
    "run.verify_every": 5,
    "run.log_samples": True,
    "run.records": ["prometheus"],
    "run.overlap": False,
    "run.bucket_kib": 64,
    "run.ray_insecure": True,
}
"""Key -> a value that is not its default, for the built-in digits."""

NO_ALTERNATIVE = {
    "data.image_size": "the digits are no image files, which is refused at any start; samples are compared",
    "data.path": "the samples are compared, not the name of the file",
    "data.target": "the same; a column that gives other targets gives other samples",
    "data.validation": "the same for the validation samples",
    "loss.name": "a data set has one loss that fits it; every other name is refused at any start",
    "data.length": "for sounds; other lengths are other samples",
    "data.level": "for texts; other tokens are other samples",
    "data.context": "the same",
    "data.stride": "the same",
    "data.categories": "for tables; other features are other samples",
    "data.categorical": "the same",
    "data.on_disk": "where samples are held changes none of them",
    "data.samples": "for bells; more samples are other samples",
    "model.layers": "refused for an mlp; part of the model where it has a meaning",
    "model.heads": "the same",
    "model.width": "the same",
    "model.cross": "the same",
    "model.dropout": "the same",
    "loss.delta": "refused but for 'huber', which is for numbers",
    "optimizer.beta1": "refused for sgd; part of the options of the optimizers that have it",
    "optimizer.beta2": "the same",
    "optimizer.epsilon": "the same",
    "optimizer.trust": "the same",
    "schedule.scaling_batch": "without scaling it means nothing; with it, it is part of the rate",
}
"""Keys without another value for the digits -> what is compared in their place, or why there is none."""


# ----- generated parts


def key_table() -> str:
    """Return the table of all keys."""
    rows = [
        "| " + " | ".join((f"`{key}`", kind.replace("|", "\\|"), f"`{default}`", description)) + " |"
        for key, kind, default, description in describe()
    ]
    return "\n".join(["| key | value | default | meaning |", "|---|---|---|---|", *rows])


def drawing() -> tuple[tuple[str, tuple[str, ...]], ...]:
    """Return the layers of tests/test_architecture.py, read without running that file."""
    tree = ast.parse((REPOSITORY / "tests" / "test_architecture.py").read_text())
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "DRAWING":
            return ast.literal_eval(node.value)
    raise AssertionError("tests/test_architecture.py has no DRAWING")


def drawing_table() -> str:
    """Return the layers from the top down."""
    rows = [f"| {title} | {' '.join(f'`{name}`' for name in names)} |" for title, names in drawing()]
    return "\n".join(["| layer | modules |", "|---|---|", *rows])


def optimizer_table() -> str:
    """Return the update rules, the rates that they begin with, and their options."""
    rows = []
    for name, kind in sorted(OPTIMIZERS.items()):
        options = inspect.signature(kind).parameters.values()
        listed = ", ".join(f"{option.name} {option.default}".lower() for option in options)
        rows.append(f"| `{name}` | {kind.default_lr} | {listed} |")
    return "\n".join(["| update rule | lr | options |", "|---|---|---|", *rows])


GENERATED = {
    "keys": (CONFIGURATION, key_table),
    "optimizers": (CONFIGURATION, optimizer_table),
    "drawing": (ARCHITECTURE, drawing_table),
}


def generated_part(text: str, name: str) -> re.Match[str]:
    """Return the part called `name` of a document, without its comments."""
    found = re.search(rf"<!-- generated: {name} .*-->\n(.*?)\n<!-- end of {name} -->", text, re.DOTALL)
    assert found, f"no generated part {name!r}"
    return found


def write_generated_parts() -> None:
    """Bring every generated part up to date."""
    for name, (path, make) in GENERATED.items():
        text = path.read_text()
        part = generated_part(text, name)
        path.write_text(text[: part.start(1)] + make() + text[part.end(1) :])


@pytest.mark.parametrize("name", GENERATED)
def test_generated_parts_are_up_to_date(name):
    """Key table and drawing say what the code says; `python tests/test_docs.py` writes them anew."""
    path, make = GENERATED[name]
    assert generated_part(path.read_text(), name)[1] == make()


# ----- configuration


def section(title: str) -> str:
    """Return the text under one heading of docs/CONFIGURATION.md."""
    text = CONFIGURATION.read_text()
    found = re.search(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", text, re.DOTALL | re.MULTILINE)
    assert found, f"docs/CONFIGURATION.md has no section {title!r}"
    return found[1]


def known_keys() -> list[str]:
    """Return the path of every key, in the order of the schema."""
    return [key.key for key in describe()]


@pytest.fixture(scope="module")
def identity():
    """Return the function that says what a configuration of the built-in digits is compared by at resume."""
    from distbp.cli.job import build_trainer, completed, fit_options, load_data

    def compute(key: str | None = None, value: object = None) -> dict[str, object]:
        tree: dict[str, dict[str, object]] = {"data": {"path": "digits"}}
        if key is not None:
            table, _, name = key.rpartition(".")
            (tree.setdefault(table, {}) if table else tree)[name] = value
        config = from_dict(tree)
        prepared = load_data(config)
        config = completed(config, prepared)
        options = fit_options(config, prepared.preprocessing, None)
        trainer = build_trainer(config, prepared.preprocessing)
        return trainer.plan(prepared.train, prepared.validation, workers=1, **options).identity

    return compute


def test_every_key_has_an_alternative():
    """A new key says here whether it may change on resume, or why this cannot be tried."""
    assert sorted([*ALTERNATIVES, *NO_ALTERNATIVE]) == sorted(known_keys())


def test_keys_that_may_change_on_resume_are_the_listed_ones(identity):
    """The keys listed as free are exactly those that the comparison at resume does not see."""
    listed = re.findall(r"`([a-z_.]+)`", section("What may change on resume").split("\n\n")[1])
    first = identity()
    free = [key for key, value in ALTERNATIVES.items() if identity(key, value) == first]
    assert listed == free


def test_data_are_compared_by_content(identity, tmp_path):
    """The same samples under another name are the same run; one other sample is another run."""
    from distbp.data import load

    source = load("digits").train
    np.savez(tmp_path / "same.npz", x=source.x, y=source.y)
    changed = source.x.copy()
    changed[0] = 0
    np.savez(tmp_path / "other.npz", x=changed, y=source.y)
    assert identity("data.path", str(tmp_path / "same.npz")) == identity()
    assert identity("data.path", str(tmp_path / "other.npz")) != identity()
    assert identity("data.validation", str(tmp_path / "other.npz")) != identity()


def test_no_document_names_a_key_that_does_not_exist():
    """A key in back quotes, such as `train.epochs`, exists."""
    tables = {key.partition(".")[0] for key in known_keys() if "." in key}
    for path in DOCUMENTS:
        for name in re.findall(r"`([a-z]+\.[a-z_]+)`", path.read_text()):
            if name.partition(".")[0] in tables and not name.endswith((".py", ".md")):
                assert name in known_keys(), f"{path.name} names {name}"


def test_every_option_of_an_optimizer_is_a_key():
    """The options that the configuration knows of each update rule are those of its class."""
    taken = {name: tuple(sorted(inspect.signature(kind).parameters)) for name, kind in OPTIMIZERS.items()}
    assert taken == OPTIONS_OF


# ----- exit codes


def test_exit_codes_are_those_of_the_errors():
    """The table of exit codes has every error of errors.py with its code, and no other."""
    rows = re.findall(r"^\| (\d+) \| (.*?) \|", section("Exit codes"), re.MULTILINE)
    listed = {(int(code), name) for code, names in rows for name in re.findall(r"`(\w+)`", names)}
    kinds = [getattr(errors, name) for name in errors.__all__ if name[0].isupper()]
    raised = {(kind.exit_code, kind.__name__) for kind in kinds if kind is not errors.DistbpError}
    assert listed == raised
    assert {int(code) for code, _ in rows} == {code for code, _ in raised} | {0, 130}


# ----- what documents point at


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_links_lead_somewhere(path):
    """Every relative link of a document leads to a file, and to a heading if it names one."""
    for target in re.findall(r"\]\(([^)\s]+)\)", path.read_text()):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, heading = target.partition("#")
        file = (path.parent / name).resolve() if name else path
        assert file.exists(), f"{path.name} links to {target}"
        assert not heading or heading in headings(file), f"{path.name} links to {target}"


def headings(path: Path) -> set[str]:
    """Return the anchors of a document's headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.*)$", path.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_files_that_are_named_exist(path):
    """A file of this repository that a document names by its path exists."""
    pattern = r"(?<![\w/.-])((?:distbp|tests|docs|launch|cluster|benchmarks)/[\w/.-]*\.(?:py|md|sh|npz))\b"
    for name in re.findall(pattern, path.read_text()):
        assert (REPOSITORY / name).exists(), f"{path.name} names {name}"


def test_every_dependency_has_its_paragraph():
    """Whatever pyproject.toml asks for is explained under "Dependencies" in docs/ARCHITECTURE.md."""
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"].values()
    wanted = [*project["dependencies"], *(requirement for extra in extras for requirement in extra)]
    explained = ARCHITECTURE.read_text().partition("\n## Dependencies\n")[2].partition("\n## ")[0]
    for requirement in wanted:
        name = re.split(r"[^A-Za-z0-9_-]", requirement)[0]
        assert f"**{name}**" in explained, f"{name} has no paragraph"


if __name__ == "__main__":
    write_generated_parts()
