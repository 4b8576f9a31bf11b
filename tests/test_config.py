"""The configuration: precedence, a table of bad ones, all mistakes at once, and round trips."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from distbp.cli.job import build_schedule
from distbp.config import Config, describe, from_dict, resolve, schema, to_dict, to_toml
from distbp.config_check import keys
from distbp.config_schema import OPTIONS_OF
from distbp.errors import ConfigError, InputMissing
from distbp.optim import OPTIMIZERS, SCHEDULES, Schedule

# One bad `-o` each: the text, the key that the message must name, and a word of what was expected.
BAD_OVERRIDES = [
    ("optimizer.lr=0", "optimizer.lr", "> 0"),
    ("optimizer.lr=-0.1", "optimizer.lr", "> 0"),
    ("optimizer.lr=nan", "optimizer.lr", "finite"),
    ("optimizer.lr=inf", "optimizer.lr", "finite"),
    ("optimizer.lr=1e999", "optimizer.lr", "finite"),
    ("optimizer.lr=fast", "optimizer.lr", "'fast'"),
    ("optimizer.lr=true", "optimizer.lr", "True"),
    ("optimizer.lr=", "optimizer.lr", "''"),
    ("optimizer.lr=[0.1]", "optimizer.lr", "[0.1]"),
    ("optimizer.lr=" + "9" * 400, "optimizer.lr", "400 characters"),
    ("optimizer.lr=0x" + "f" * 20_000, "optimizer.lr", "too long to show"),
    ("optimizer.lr=2024-01-01", "optimizer.lr", "date"),
    ("optimizer.lr=0.1\nseed=1", "optimizer.lr", "seed=1"),
    ("optimizer.momentum=1", "optimizer.momentum", "< 1"),
    ("optimizer.momentum=-0.5", "optimizer.momentum", ">= 0"),
    ("optimizer.nesterov=1", "optimizer.nesterov", "true or false"),
    ("optimizer.nesterov=yes", "optimizer.nesterov", "true or false"),
    ("optimizer.weight_decay=-1", "optimizer.weight_decay", ">= 0"),
    ("optimizer.clip_norm=0", "optimizer.clip_norm", "> 0"),
    ("optimizer.clip_norm=-1.0", "optimizer.clip_norm", "> 0"),
    ("optimizer.name=sdg", "optimizer.name", '"sgd"'),
    ("seed=-1", "seed", ">= 0"),
    ("seed=1.5", "seed", "an integer"),
    ("seed=1.0", "seed", "an integer"),
    ("seed=false", "seed", "False"),
    ("seed=9223372036854775808", "seed", "<= 9223372036854775807"),
    ("data.validation_fraction=1", "data.validation_fraction", "< 1"),
    ("data.validation_fraction=-0.1", "data.validation_fraction", ">= 0"),
    ("data.split=head", "data.split", '"tail"'),
    ("data.normalize=Auto", "data.normalize", '"auto"'),
    ("data.path=a\0b", "data.path", "a text"),
    ("data.path=\udcff", "data.path", "a text"),
    ("data.target=", "data.target", "not empty"),
    ("model.name=resnet", "model.name", '"mlp"'),
    ("model.hidden=1000000000", "model.hidden", "a list"),
    ("model.hidden=128", "model.hidden", "a list"),
    ("model.hidden=[0]", "model.hidden", ">= 1"),
    ("model.hidden=[128, 1000000000]", "model.hidden", "<= 1000000"),
    ("model.hidden=[1000000, 1000000]", "model.hidden", "1000000000000"),
    ("model.hidden=[64, 12.5]", "model.hidden", "an integer"),
    ("model.hidden=[true]", "model.hidden", "an integer"),
    (f"model.hidden={[1] * 1001}", "model.hidden", "1000 items"),
    ("model.activation=swish", "model.activation", '"relu"'),
    ("loss.name=mse", "loss.name", '"mean_squared_error"'),
    ("loss.label_smoothing=1.0", "loss.label_smoothing", "< 1"),
    ("loss.class_weights=[1, -1]", "loss.class_weights", ">= 0"),
    ("loss.class_weights=[1, nan]", "loss.class_weights", "finite"),
    ("loss.class_weights=[]", "loss.class_weights", "1 to"),
    ("loss.class_weights=[0, 0]", "loss.class_weights", "above 0"),
    ("schedule.name=cosin", "schedule.name", '"cosine"'),
    ("schedule.warmup_steps=-1", "schedule.warmup_steps", ">= 0"),
    ("schedule.step_size=0", "schedule.step_size", ">= 1"),
    ("schedule.gamma=0", "schedule.gamma", "> 0"),
    ("schedule.power=0", "schedule.power", "> 0"),
    ("schedule.final_fraction=2", "schedule.final_fraction", "<= 1"),
    ("train.epochs=0", "train.epochs", ">= 1"),
    ("train.epochs=3.0", "train.epochs", "an integer"),
    ("train.epochs=1000000001", "train.epochs", "<= 1000000000"),
    ("train.max_steps=0", "train.max_steps", ">= 1"),
    ("train.batch_size=0", "train.batch_size", ">= 1"),
    ("train.micro_batch=0", "train.micro_batch", ">= 1"),
    ("train.micro_batch=48", "train.micro_batch", "micro_batch 32 or 64, or batch_size 48 or 96"),
    ("train.micro_batch=128", "train.micro_batch", "micro_batch 64, or batch_size 128"),
    ("checkpoint.keep=1", "checkpoint.keep", ">= 2"),
    ("checkpoint.every_steps=0", "checkpoint.every_steps", ">= 1"),
    ("checkpoint.every_seconds=0", "checkpoint.every_seconds", "> 0"),
    ("checkpoint.every_seconds=often", "checkpoint.every_seconds", 'or "auto", or "none"'),
    ("run.backend=slurm", "run.backend", '"mpi"'),
    ("run.nproc=0", "run.nproc", ">= 1"),
    ("run.nproc=65537", "run.nproc", "<= 65536"),
    ("run.threads=0", "run.threads", ">= 1"),
    ("run.resume=", "run.resume", "not empty"),
    ("run.join_timeout_s=0", "run.join_timeout_s", "> 0"),
    ("run.max_restarts=-1", "run.max_restarts", ">= 0"),
    ("run.log_samples=on", "run.log_samples", "true or false"),
    ("train.epoch=3", "train.epoch", "did you mean train.epochs?"),
    ("train.lr=3", "train.lr", "did you mean optimizer.lr?"),
    ("optimizer.learning_rate=3", "optimizer.learning_rate", "did you mean optimizer.lr?"),
    ("optimiser.lr=3", "optimiser.lr", "did you mean optimizer.lr?"),
    ("batchsize=3", "batchsize", "did you mean train.batch_size?"),
    ("nonsense=3", "nonsense", "distbp config show"),
    ("optimizer.lr.x=3", "optimizer.lr.x", "a known key"),
    ("optimizer=sgd", "optimizer", "a table of keys such as optimizer.name"),
    ("optimizer={lrr = 1}", "optimizer.lrr", "did you mean optimizer.lr?"),
    ("optimizer.lr", "optimizer.lr", "key=value"),
    ("=3", "''", "a known key"),
    ("x" * 100_000 + "=3", "100002 characters", "a known key"),
]

# One bad file each: its name, its content, and words that the message must hold.
BAD_FILES: list[tuple[str, bytes, list[str]]] = [
    ("a.toml", b"[optimizer]\nlr = 0.1\nlr = 0.2\n", ["line 3", "lr = 0.2"]),
    ("a.toml", b"seed = 1\n[run\n", ["line 2", "[run"]),
    ("a.toml", b"seed = \xff\n", ["line 1", "UTF-8", "0xff"]),
    ("a.toml", b"seed = 1\nseed.x = 1\n", ["line 2"]),
    ("a.toml", b"# " + b"x" * 1_000_000, ["1000000 bytes"]),
    ("a.toml", b"a=1\n" * 50_000, ["40000 keys and values"]),
    ("a.toml", b"a" + b".a" * 20_000 + b"=1", ["a.a.a"]),
    ("a.toml", b'"\\' * 499_999, ["end of document"]),
    ("a.toml", b"a=" + b"[" * 30_000, ["too deep"]),
    ("a.toml", b"seed=" + b"9" * 5_000, ["4300"]),
    ("a.toml", b"[optimiser]\nlr = 1", ["optimiser", "did you mean optimizer?"]),
    ("a.toml", b"optimizer = 3", ["optimizer", "a table"]),
    ("a.toml", b'"optimizer.lr" = 0.1', ["'optimizer.lr'", "a known key"]),
    ("a.toml", b"[[run]]\nthreads = 1", ["run", "a table"]),
    ("a.toml", b"[optimizer.lr]\nx = 1", ["optimizer.lr", "{'x': 1}"]),
    ("a.json", b'{"seed": 1, "seed": 2}', ["each key once", "'seed'"]),
    ("a.json", b'{"optimizer": {"lr": NaN}}', ["optimizer.lr", "nan"]),
    ("a.json", b'{"optimizer": {"lr": -Infinity}}', ["optimizer.lr", "-inf"]),
    ("a.json", b'{"seed": 1,}', ["line 1"]),
    ("a.json", b"[1, 2]", ["a table of keys", "[1, 2]"]),
    ("a.json", b"", ["line 1"]),
    ("a.json", b"[" * 30_000, ["too deep"]),
    ("a.json", b'{"seed": null}', ["seed", "None"]),
    ("a.yaml", b"seed: 1", [".toml or .json", "'.yaml'"]),
]


def refused(**sources: Any) -> list[str]:
    """Return the lines of the ConfigError that `resolve` raises, one for each mistake."""
    with pytest.raises(ConfigError) as caught:
        resolve(**sources)
    assert caught.value.exit_code == 2
    lines = str(caught.value).splitlines()
    return lines if len(lines) == 1 else [line.removeprefix("  ") for line in lines[1:]]


@pytest.mark.parametrize(("override", "key", "words"), BAD_OVERRIDES, ids=range(len(BAD_OVERRIDES)))
def test_bad_values_are_refused(override: str, key: str, words: str) -> None:
    """A bad value ends with code 2 and one line that names its origin, its key and what was expected."""
    (line,) = refused(overrides=[override])
    assert line.startswith("-o: ")
    assert key in line
    assert words in line
    assert len(line) < 400


@pytest.mark.parametrize(("name", "content", "words"), BAD_FILES, ids=range(len(BAD_FILES)))
def test_bad_files_are_refused(tmp_path: Path, name: str, content: bytes, words: list[str]) -> None:
    """A bad file ends with code 2 and one line that names the file and the place in it."""
    path = tmp_path / name
    path.write_bytes(content)
    (line,) = refused(file=path)
    assert line.startswith(f"file {path}")
    for word in words:
        assert word in line


def test_a_missing_file_is_missing_input(tmp_path: Path) -> None:
    """A configuration file that does not exist is code 66, and named."""
    with pytest.raises(InputMissing, match=r"none\.toml") as caught:
        resolve(file=tmp_path / "none.toml")
    assert caught.value.exit_code == 66


def test_a_directory_is_no_file(tmp_path: Path) -> None:
    """A path that cannot be read is refused with the system's reason."""
    assert "a readable file" in refused(file=tmp_path)[0]


def test_reports_end_after_a_hundred_mistakes(tmp_path: Path) -> None:
    """Of 13,000 wrong keys only the first 100 are reported: finding near names for all would take minutes."""
    path = tmp_path / "a.toml"
    path.write_text("".join(f"epoch{i} = 1\n" for i in range(13_000)))
    lines = refused(file=path)
    assert len(lines) == 101
    assert lines[-1] == "and more; correct these first"


def test_all_mistakes_are_reported_at_once(tmp_path: Path) -> None:
    """One refusal lists the mistakes of every source, each with its origin, and none twice."""
    path = tmp_path / "job.toml"
    path.write_text("[train]\nepochs = 0\nbatch_size = 60\n[model]\nhiden = [3]\n")
    lines = refused(
        file=path,
        environment={"DISTBP_OPTIMIZER__LR": "-1", "DISTBP_SEDE": "1"},
        flags={"train.micro_batch": 7, "run.nproc": 0},
        overrides=["optimizer.momentum=2", "optimizer.nesterov=true", "loss.name=mean"],
    )
    starts = [": ".join(line.split(": ")[:2]) for line in lines]
    assert starts == [
        f"file {path}: train.epochs",
        f"file {path}: model.hiden",
        "environment DISTBP_OPTIMIZER__LR: optimizer.lr",
        "environment DISTBP_SEDE: sede",
        "flag --nproc: run.nproc",
        "-o: optimizer.momentum",
        "-o: loss.name",
        "flag --micro-batch: train.micro_batch",
    ]


def test_a_mistake_counts_even_where_it_is_overridden(tmp_path: Path) -> None:
    """A wrong value in a file is refused although a flag replaces it."""
    path = tmp_path / "job.toml"
    path.write_text("seed = -1")
    assert refused(file=path, flags={"seed": 1}) == [
        f"file {path}: seed: expected an integer >= 0 and <= 9223372036854775807, got -1"
    ]


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        (["optimizer.nesterov=true", "optimizer.momentum=0"], "optimizer.momentum"),
        (["loss.name=mean_squared_error", "loss.label_smoothing=0.1"], "loss.label_smoothing"),
        (["loss.name=mean_squared_error", "loss.class_weights=[1, 2]"], "loss.class_weights"),
    ],
)
def test_values_that_do_not_fit_together_are_refused(overrides: list[str], key: str) -> None:
    """An option that another one makes meaningless is a mistake, never ignored; each alone is fine."""
    (line,) = refused(overrides=overrides)
    assert key in line
    for override in overrides:
        resolve(overrides=[override])


def test_the_last_source_wins(tmp_path: Path) -> None:
    """defaults < file < environment < flags < -o, and the origin of each key is known."""
    path = tmp_path / "job.toml"
    path.write_text("[train]\nepochs = 1\nbatch_size = 1\nmax_steps = 1\nmicro_batch = 1\n")
    environment = {f"DISTBP_TRAIN__{key}": "2" for key in ("BATCH_SIZE", "MAX_STEPS", "MICRO_BATCH")}
    resolved = resolve(
        file=path,
        environment=environment,
        flags={"train.max_steps": 3, "train.batch_size": 4, "train.epochs": None},
        overrides=["train.batch_size=5", "train.batch_size = 6"],
    )
    train = resolved.config.train
    assert (train.epochs, train.micro_batch, train.max_steps, train.batch_size) == (1, 2, 3, 6)
    assert resolved.origin["seed"] == "default"
    assert resolved.origin["train.epochs"] == f"file {path}"
    assert resolved.origin["train.micro_batch"] == "environment DISTBP_TRAIN__MICRO_BATCH"
    assert resolved.origin["train.max_steps"] == "flag --max-steps"
    assert resolved.origin["train.batch_size"] == "-o"
    assert list(resolved.origin) == list(keys())


def test_text_values_are_toml_or_themselves() -> None:
    """On the command line and in the environment 1e-3 is a number and mlp a text; text keys keep 7 a text."""
    config = resolve(
        environment={"DISTBP_SEED": "7", "DISTBP_OPTIMIZER__NESTEROV": "true"},
        overrides=[
            "optimizer.lr=1e-3",
            "model.name=mlp",
            "model.hidden=[64, 32]",
            "data.target=7",
            "data.path=2024-01-01",
            'run.out="a=b"',
            "checkpoint.every_seconds=none",
            "optimizer.clip_norm=1",
        ],
    ).config
    assert (config.seed, config.optimizer.lr, config.model.hidden) == (7, 1e-3, (64, 32))
    assert (config.data.target, config.data.path, config.run.out) == ("7", "2024-01-01", "a=b")
    assert config.checkpoint.every_seconds is None
    assert config.optimizer.nesterov is True
    assert type(config.optimizer.clip_norm) is float


def test_reserved_and_foreign_variables_are_skipped() -> None:
    """What the launcher sets for its workers, and what is not distbp's, is no configuration."""
    names = ["RANK", "SIZE", "HOST", "RUN", "FAULT", "KEY_FILE"]
    environment = {**{f"DISTBP_{name}": "x" for name in names}, "HOME": "x", "OTHER_DISTBP_SEED": "x"}
    assert resolve(environment=environment).config == Config()


def test_backend_and_nproc_have_short_variables() -> None:
    """DISTBP_BACKEND and DISTBP_NPROC set run.backend and run.nproc; a contradiction is refused."""
    resolved = resolve(environment={"DISTBP_BACKEND": "local", "DISTBP_NPROC": "2"})
    assert (resolved.config.run.backend, resolved.config.run.nproc) == ("local", 2)
    assert resolved.origin["run.nproc"] == "environment DISTBP_NPROC"
    (line,) = refused(environment={"DISTBP_NPROC": "2", "DISTBP_RUN__NPROC": "3"})
    assert "DISTBP_RUN__NPROC='3', got '2'" in line


def test_json_files_are_read_like_toml(tmp_path: Path) -> None:
    """The same keys in JSON give the same configuration; null is "none"; a byte order mark is no matter."""
    (tmp_path / "a.json").write_text('{"optimizer": {"lr": 1}, "checkpoint": {"every_seconds": null}}')
    (tmp_path / "a.toml").write_text(
        '\ufeff[optimizer]\r\nlr = 1\r\n[checkpoint]\r\nevery_seconds = "none"\r\n'
    )
    assert resolve(file=tmp_path / "a.json").config == resolve(file=tmp_path / "a.toml").config


TEXTS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1)


def values_of(kind: Any) -> st.SearchStrategy[Any]:
    """Return a strategy for the values that a declared type accepts."""
    inspect = msgspec.inspect
    match kind:
        case inspect.BoolType():
            return st.booleans()
        case inspect.LiteralType():
            return st.sampled_from(kind.values)
        case inspect.IntType():
            return st.integers(kind.ge, kind.le)
        case inspect.FloatType():
            low = kind.gt if kind.gt is not None else kind.ge
            high = kind.lt if kind.lt is not None else kind.le
            return st.floats(
                low,
                high,
                exclude_min=kind.gt is not None,
                exclude_max=kind.lt is not None,
                allow_nan=False,
                allow_infinity=False,
            )
        case inspect.StrType():
            return TEXTS
        case inspect.VarTupleType():
            return st.lists(values_of(kind.item_type), min_size=kind.min_length or 0, max_size=5)
        case inspect.UnionType():
            return st.one_of(*map(values_of, kind.types))
    raise AssertionError(kind)


@st.composite
def trees(draw: st.DrawFn) -> dict[str, Any]:
    """Draw a nested dictionary of right values for some keys; values that do not fit together are dropped."""
    tree: dict[str, Any] = {}
    for path, key in keys().items():
        if draw(st.booleans()):
            value = draw(st.none() | values_of(key.type) if key.optional else values_of(key.type))
            table, _, name = path.rpartition(".")
            (tree.setdefault(table, {}) if table else tree)[name] = value
    loss, optimizer, train = (tree.get(table, {}) for table in ("loss", "optimizer", "train"))
    if train.get("micro_batch"):
        train["batch_size"] = train["micro_batch"] * draw(st.integers(1, 10**9 // train["micro_batch"]))
    if optimizer.get("momentum") == 0:
        optimizer.pop("nesterov", None)
    if optimizer.get("name", "auto") != "auto":
        wrong = {option for options in OPTIONS_OF.values() for option in options} - {
            *OPTIONS_OF[optimizer["name"]]
        }
        tree["optimizer"] = {option: value for option, value in optimizer.items() if option not in wrong}
    if tree.get("schedule", {}).get("warmup_steps"):
        tree["schedule"].pop("warmup_epochs", None)
    if loss.get("name", "auto") not in ("auto", "cross_entropy"):
        tree["loss"] = {"name": loss["name"]}
    elif not any(loss.get("class_weights") or [1]):
        del loss["class_weights"]
    loss.pop("delta", None)
    if len(tree.get("model", {}).get("hidden") or []) > 1:
        tree["model"]["hidden"] = [1 + width % 10_000 for width in tree["model"]["hidden"]]
    return tree


@given(trees())
def test_every_configuration_reads_back_equal(tree: dict[str, Any]) -> None:
    """TOML, with and without comments, and dictionaries carry a configuration to the last bit."""
    config = from_dict(tree)
    assert from_dict(tomllib.loads(to_toml(config))) == config
    assert from_dict(tomllib.loads(to_toml(config, comments=True))) == config
    assert from_dict(json.loads(json.dumps(to_dict(config)))) == config
    assert msgspec.convert(to_dict(config), Config) == config


WILD = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text()
    | st.sampled_from(["none", "auto", "sgd", 0, 1, 1.0, 10**400, -0.0]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=4,
)


def refusal(call: Callable[..., object], *args: Any, **named: Any) -> str | None:
    """Return the message of the ConfigError that a call raises, None if it raises none."""
    try:
        call(*args, **named)
    except ConfigError as error:
        return str(error)
    return None


@given(st.sampled_from(sorted(keys())), WILD)
def test_any_value_is_stored_or_refused(path: str, value: Any) -> None:
    """Whatever comes, a key stores what msgspec also accepts and what is finite, or names itself."""
    table, _, name = path.rpartition(".")
    tree = {table: {name: value}} if table else {name: value}
    message = refusal(from_dict, tree)
    if message is None:
        config = from_dict(tree)
        assert msgspec.convert(to_dict(config), Config) == config
        numbers = [number for number in _leaves(to_dict(config)) if isinstance(number, float)]
        assert all(math.isfinite(number) for number in numbers)
    else:
        assert message.startswith(f"dictionary: {path}: expected ")


def _leaves(tree: Any) -> list[Any]:
    if isinstance(tree, dict):
        return [leaf for inner in tree.values() for leaf in _leaves(inner)]
    return [leaf for inner in tree for leaf in _leaves(inner)] if isinstance(tree, list) else [tree]


@given(st.dictionaries(st.text(), WILD, max_size=4))
def test_any_tree_is_accepted_or_refused(tree: dict[str, Any]) -> None:
    """No tree of any shape ends in another error than ConfigError, which names its origin."""
    message = refusal(from_dict, {**tree, "unknown": tree})
    assert message is not None
    assert "dictionary: unknown: expected a known key" in message


@given(st.text())
def test_any_override_is_accepted_or_refused(text: str) -> None:
    """No `-o` text of any kind ends in another error than ConfigError; unknown keys always do."""
    refusal(resolve, overrides=[f"seed={text}"])
    assert refusal(resolve, overrides=[f"unknown{text}=1"])


def test_every_key_is_explained() -> None:
    """The list, the schema and the template name every key, with a type, a default and a description."""
    described = describe()
    assert [entry.key for entry in described] == list(keys())
    assert all(entry.type and entry.default and entry.description for entry in described)
    assert next(entry for entry in described if entry.key == "schedule.power").type == "a finite number > 0"
    definitions = json.loads(json.dumps(schema()))["$defs"]
    assert definitions["Schedule"]["properties"]["power"]["exclusiveMinimum"] == 0
    assert definitions["Optimizer"]["additionalProperties"] is False
    template = to_toml(Config(), comments=True)
    assert all(entry.description in template for entry in described)


def test_defaults_are_right_values() -> None:
    """The defaults pass the checks that they are the fallback of."""
    assert from_dict({}) == Config()
    assert from_dict(to_dict(Config())) == Config()


def test_choices_equal_the_tables_of_optim() -> None:
    """The configuration offers exactly the optimizers and schedules that there are, with their options."""
    choices = {path: set(getattr(key.type, "values", ())) for path, key in keys().items()}
    assert choices["optimizer.name"] == {"auto", *OPTIMIZERS}
    assert choices["schedule.name"] == set(SCHEDULES)
    config = from_dict({"optimizer": {"name": "sgd", "lr": 0.1}})
    assert build_schedule(config) == Schedule(lr=0.1)


@pytest.mark.parametrize(
    ("overrides", "key", "words"),
    [
        (["optimizer.name=adam", "optimizer.momentum=0.9"], "optimizer.momentum", "lars, rmsprop, sgd"),
        (["optimizer.name=sgd", "optimizer.beta1=0.9"], "optimizer.beta1", "adam, adamw, lamb, lion"),
        (["optimizer.name=lion", "optimizer.nesterov=true"], "optimizer.nesterov", "it is for sgd"),
        (["schedule.warmup_epochs=1", "schedule.warmup_steps=5"], "schedule.warmup_epochs", "5 steps"),
    ],
)
def test_options_of_another_update_rule_are_refused(overrides: list[str], key: str, words: str) -> None:
    """An option that would have no effect is a mistake, and the message says whose it is."""
    (line,) = refused(overrides=overrides)
    assert key in line
    assert words in line


def test_the_configuration_imports_no_numpy() -> None:
    """`distbp --help` and a refused configuration do not pay for NumPy."""
    program = "import sys, distbp.config as c; c.resolve(); sys.exit('numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], env=dict(os.environ), check=False).returncode == 0


@pytest.mark.parametrize("text", ['["user","item"]', "user,item", "[user, item]"])
def test_a_list_of_texts_needs_no_quotes(text):
    """A shell takes quotes away, so names of columns may come without."""
    found = resolve(overrides=[f"data.categorical={text}"]).config.data.categorical
    assert found == ("user", "item")


@pytest.mark.parametrize("text", ["user,,item", "user,", ","])
def test_empty_names_in_a_list_are_refused(text):
    """A comma too many is a mistake and not a column."""
    with pytest.raises(ConfigError, match=r"data\.categorical: expected a list"):
        resolve(overrides=[f"data.categorical={text}"])
