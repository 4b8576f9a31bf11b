"""The drawing of the house, kept true: who may import whom, and what no file may do.

The source is parsed (`ast`), so that an import inside a function counts as one at the top does.  Imports
under `if TYPE_CHECKING` exist for the type checker alone and do not count.

    pytest tests/test_architecture.py -s     also prints the imports as they are, and the lines of every file
"""

from __future__ import annotations

import ast
import graphlib
import importlib
import io
import re
import subprocess
import sys
import tokenize
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import distbp

REPOSITORY = Path(__file__).resolve().parents[1]
PACKAGE = REPOSITORY / "distbp"

DRAWING = (
    (
        "the commands and the small API",
        (
            "cli",
            "api",
            "bench",
            "doctor",
            "doctor_folder",
            "doctor_links",
            "doctor_mpi",
            "doctor_ranks",
            "doctor_ray",
            "doctor_ray_links",
            "doctor_ray_nodes",
            "doctor_upload",
            "doctor_witness",
        ),
    ),
    ("what the user calls", ("trainer",)),
    (
        "who starts workers, who decides, and what a worker does",
        ("backends", "coordinator", "worker", "run_directory"),
    ),
    (
        "before and after a step",
        (
            "state",
            "after_step",
            "closer_look",
            "diagnostician",
            "planning",
            "exchange",
            "divergence",
            "lane",
            "trial",
            "verify",
        ),
    ),
    (
        "what those share",
        (
            "backends.base",
            "job",
            "evaluation",
            "generation",
            "onnx_export",
            "onnx_graph",
            "onnx_layers",
            "saver",
            "metrics",
            "worker_log",
        ),
    ),
    ("the parts", ("nn", "optim", "data", "checkpoint", "reduce", "arena")),
    (
        "what the parts stand on",
        ("transports", "partition", "random", "barrier", "environment", "cgroups", "fault_points"),
    ),
    ("the run description", ("config", "config_check", "config_read", "config_schema", "config_write")),
    ("the ground", ("crc", "deadline", "errors", "leaf", "terminal")),
)
"""Layers from the top down.  A module imports from its own layer and from those below, never from above.

`backends.base` is the contract of the backends, and lies below them: the step loop is written against it.
A new module is added to the layer that is as low as its imports allow.
"""

ISLANDS = ("nn", "optim", "data", "checkpoint", "transports")
"""These do not even import each other, so each can be read, tested and replaced alone."""

ONLY_IN = {
    "mpi4py": {"transports.mpi", "backends.mpi"},
    "ray": {
        "backends.ray",
        "backends.ray_cluster",
        "backends.ray_doctor",
        "backends.ray_memory",
        "backends.ray_collective",
        "backends.ray_collective.board",
    },
    "PIL": {"data.image_folder"},
    "onnx": {"onnx_export", "onnx_graph"},
    "pyarrow": {"data.parquet"},
    "mlflow": {"metrics.trackers"},
    "wandb": {"metrics.trackers"},
}
"""Optional packages, imported lazily and only where a backend or transport is made of them."""

DYNAMIC_IMPORTS = {
    "": "public names are loaded when they are first used",
    "cli.main": "a command is loaded when it is called",
    "environment": "asks NumPy itself which processor features it uses",
}
"""Modules that may import by a name made at run time, which this file cannot follow, and why."""

MOST_LINES = 450
MOST_LINES_OF_A_FUNCTION = 60
LONG_FUNCTIONS: dict[str, str] = {}
"""`module.function` -> why it may be longer."""

TRAIN_FLAGS = [
    "-c", "-o", "--nproc", "--backend", "--epochs", "--batch-size", "--micro-batch", "--seed", "--target",
    "--out", "--resume", "--dry-run",
]  # fmt: skip
"""The options of `distbp train` as documented, in that order."""


# ----- reading the source


def module_name(path: Path) -> str:
    """Return the dotted name below `distbp`: "data.order" for distbp/data/order.py, "" for the package."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


SOURCES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}
TREES = {name: ast.parse(path.read_text(), filename=str(path)) for name, path in SOURCES.items()}


@dataclass(frozen=True)
class Import:
    """One module that another one loads, and whether only inside a function."""

    importer: str  # Without "distbp.".
    line: int
    full_name: str
    lazy: bool

    @property
    def own(self) -> str | None:
        """The imported module without "distbp.", or None if it is not ours."""
        first, _, rest = self.full_name.partition(".")
        return rest if first == "distbp" else None

    def __str__(self) -> str:
        return f"{place(self.importer, self.line)} imports {self.full_name}"


def place(name: str, line: int) -> str:
    """Return where something stands, as editors understand it."""
    return f"{SOURCES[name].relative_to(REPOSITORY)}:{line}"


def nodes(name: str) -> list[tuple[str, ast.AST]]:
    """Return every node of a module, each with the place where it stands."""
    return [(place(name, getattr(node, "lineno", 0)), node) for node in ast.walk(TREES[name])]


def running_nodes(node: ast.AST, lazy: bool = False) -> Iterator[tuple[ast.AST, bool]]:
    """Yield every node below `node` that can run, with whether it stands inside a function."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        yield child, lazy
        yield from running_nodes(child, lazy or isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef))


def loaded_modules(node: ast.AST) -> set[str]:
    """Return the full names of the modules that a statement imports; `from a import b` may load a.b."""
    if isinstance(node, ast.Import):
        return {alias.name for alias in node.names}
    if isinstance(node, ast.ImportFrom):
        assert node.module is not None, f"line {node.lineno}: expected an absolute import, got a relative one"
        inner = [f"{node.module}.{alias.name}" for alias in node.names]
        return {name if name.removeprefix("distbp.") in SOURCES else node.module for name in inner}
    return set()


IMPORTS = [
    Import(importer, getattr(node, "lineno", 0), full_name, lazy)
    for importer, tree in TREES.items()
    for node, lazy in running_nodes(tree)
    for full_name in sorted(loaded_modules(node))
]
OWN = [(found, found.own) for found in IMPORTS if found.own]


def drawn(name: str) -> str:
    """Return the longest name in the drawing that `name` belongs to."""
    known = [entry for _, entries in DRAWING for entry in entries]
    fitting = [entry for entry in known if name == entry or name.startswith(f"{entry}.")]
    assert fitting, f"distbp.{name} stands nowhere in DRAWING: add it to the lowest layer its imports allow"
    return max(fitting, key=len)


def layer(name: str) -> int:
    """Return how far from the top a module stands."""
    entry = drawn(name)
    return next(index for index, (_, entries) in enumerate(DRAWING) if entry in entries)


def functions(name: str) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    """Yield every function of a module, nested ones too."""
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield f"{name}.{node.name}", node


def code_lines(path: Path) -> int:
    """Return how many lines hold code: not blank, not only comment, not docstring."""
    layout = {
        tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER,
    }  # fmt: skip
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(path.read_text()).readline):
        if token.type not in layout:
            lines.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(TREES[module_name(path)]):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            assert node.end_lineno is not None
            lines.difference_update(range(node.lineno, node.end_lineno + 1))
    return len(lines)


# ----- who may import whom


def test_imports_go_down() -> None:
    """No module imports from a layer above its own, not even inside a function."""
    upwards = [
        f"{found}: {DRAWING[layer(own)][0]!r} lies above {DRAWING[layer(found.importer)][0]!r}"
        for found, own in OWN
        if found.importer and layer(own) < layer(found.importer)
    ]
    assert not upwards, "\n".join(upwards)


def test_islands_do_not_know_each_other() -> None:
    """nn, optim, data, checkpoint and transports can each be read and replaced alone."""
    bridges = [
        str(found)
        for found, own in OWN
        if drawn(own) in ISLANDS and found.importer.split(".")[0] in {*ISLANDS} - {drawn(own)}
    ]
    assert not bridges, "\n".join(bridges)


def test_imports_make_no_circle() -> None:
    """No two modules need each other, lazily or not."""
    graph: dict[str, set[str]] = {name: set() for name in SOURCES}
    for found, own in OWN:
        graph[found.importer].add(own)
    graphlib.TopologicalSorter(graph).prepare()  # Raises CycleError, which names the circle.


def test_names_are_imported_from_their_homes() -> None:
    """Our own files take nothing but the version from `distbp` itself: it would hide where a name lives."""
    hidden = [
        f"{where} takes {alias.name} from distbp"
        for name in SOURCES
        for where, node in nodes(name)
        if name and isinstance(node, ast.ImportFrom) and node.module == "distbp"
        for alias in node.names
        if alias.name not in SOURCES and alias.name != "__version__"
    ]
    assert not hidden, "\n".join(hidden)


def test_imports_by_computed_names_are_listed() -> None:
    """A module that imports by a name made at run time is listed above with its reason, and no other does."""
    dynamic = {
        name
        for name in SOURCES
        for _, node in nodes(name)
        if isinstance(node, ast.Call)
        and ast.unparse(node.func) in ("importlib.import_module", "import_module", "__import__")
    }
    assert dynamic == set(DYNAMIC_IMPORTS)


def test_the_coordinator_is_pure() -> None:
    """The coordinator sees no clock, file, socket or process: events in, actions out."""
    allowed = {
        "__future__",
        "collections.abc",
        "dataclasses",
        "enum",
        "typing",
        "distbp.arena",
        "distbp.errors",
    }
    assert {found.full_name for found in IMPORTS if found.importer == "coordinator"} <= allowed
    called = {ast.unparse(node.func) for _, node in nodes("coordinator") if isinstance(node, ast.Call)}
    assert not called & {"open", "print", "input"}


@pytest.mark.parametrize("package", ONLY_IN)
def test_optional_packages_stay_at_the_border(package: str) -> None:
    """mpi4py and ray are imported only by the files that wrap them, and only when they are used."""
    for found in IMPORTS:
        if found.full_name.split(".")[0] == package:
            assert found.importer in ONLY_IN[package], str(found)
            assert found.lazy, f"{found} at the top: import it inside the function that needs it"


def test_only_declared_packages_are_imported() -> None:
    """Whatever is not Python's own is a required dependency in pyproject.toml, or optional and listed."""
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    declared = {re.split(r"[^A-Za-z0-9_-]", wanted)[0] for wanted in project["dependencies"]}
    declared = {name.replace("-", "_") for name in declared}
    strangers = [
        str(found)
        for found in IMPORTS
        if found.own is None
        and found.full_name.split(".")[0] not in {*sys.stdlib_module_names, *declared, *ONLY_IN, "distbp"}
    ]
    assert not strangers, "\n".join(strangers)


def test_importing_everything_does_nothing() -> None:
    """Importing every module prints nothing, starts no thread, and loads no optional package."""
    program = (
        "import importlib, sys, threading\n"
        f"for name in {[f'distbp.{name}' for name in SOURCES if name]!r}: importlib.import_module(name)\n"
        "assert threading.active_count() == 1, threading.enumerate()\n"
        f"print(sorted(set(sys.modules) & {{'torch', *{sorted(ONLY_IN)!r}}}))\n"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert (ended.stdout, ended.stderr) == ("[]\n", "")


# ----- what no file may do


ADDING = {
    *(
        "add",
        "subtract",
        "multiply",
        "divide",
        "maximum",
        "minimum",
        "sum",
        "nansum",
        "mean",
        "average",
        "prod",
    ),
    *("dot", "vdot", "inner", "matmul", "einsum", "cumsum", "accumulate", "reduce", "reduceat"),
    *("allreduce", "reduce_scatter", "scan", "exscan", "Reduce", "Allreduce", "Iallreduce", "Reduce_scatter"),
    *("Reduce_scatter_block", "Scan", "Exscan", "Accumulate", "SUM", "PROD", "MAX", "MIN"),
}
"""NumPy's and MPI's names for joining values; a transport has no use for any of them."""

COUNTERS = {"self.bytes_sent"}
"""Lists in which a transport counts its own traffic: not values that anybody trains with."""


def test_transports_do_not_add() -> None:
    """One function adds, and it is no transport's: no reduction by NumPy or MPI, no `array[...] += other`."""
    names = [name for name in SOURCES if name.split(".")[0] == "transports"]
    assert names
    for where, node in [found for name in names for found in nodes(name)]:
        if isinstance(node, ast.Attribute):
            assert node.attr not in ADDING, f"{where} uses .{node.attr}: reduce.py adds"
        if isinstance(node, ast.AugAssign):
            target = ast.unparse(node.target.value) if isinstance(node.target, ast.Subscript) else None
            assert target is None or target in COUNTERS, f"{where} changes elements of {target} in place"
        assert not isinstance(node, ast.MatMult), "a transport has no use for @"
        assert not (isinstance(node, ast.Name) and node.id == "sum"), f"{where} uses sum: reduce.py adds"


def test_nothing_is_unpickled_or_evaluated() -> None:
    """No file of distbp can turn bytes into code: no pickle or its relatives, no eval, no exec."""
    relatives = {"pickle", "_pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "code", "codeop"}
    for found in IMPORTS:
        assert found.full_name.split(".")[0] not in relatives, str(found)
        assert found.full_name != "multiprocessing", f"{found}: its workers are started through pickle"
    for where, node in [found for name in SOURCES for found in nodes(name)]:
        if isinstance(node, ast.Name):
            assert node.id not in ("eval", "exec", "compile"), f"{where} uses {node.id}"
        if isinstance(node, ast.keyword) and node.arg == "allow_pickle":
            assert ast.unparse(node.value) == "False", f"{where} allows pickle"


def test_no_tracked_file_knows_this_machine() -> None:
    """No file names a directory of the machine it was written on."""
    if not (REPOSITORY / ".git").exists():
        pytest.skip("not a git checkout: which files belong to the repository is not known")
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=REPOSITORY, capture_output=True, check=True, timeout=60,
    )  # fmt: skip
    paths = [REPOSITORY / name.decode() for name in listed.stdout.split(b"\0") if name]
    assert len(paths) > len(SOURCES)
    # Put together here so that this file does not find itself.
    foreign = re.compile(rb"(?<![\w.])/(?:" + b"|".join([b"work", b"root", b"home", b"Users"]) + rb")/[\w.]+")
    found = [
        f"{path.relative_to(REPOSITORY)}: {match.group().decode()}"
        for path in paths
        if path.is_file()
        for match in foreign.finditer(path.read_bytes())
    ]
    assert not found, "\n".join(found)


# ----- how the source is kept


@pytest.mark.parametrize("name", SOURCES)
def test_every_module_says_what_it_is(name: str) -> None:
    """Every module begins with a docstring."""
    assert ast.get_docstring(TREES[name]), f"{place(name, 1)} has no module docstring"


def test_files_stay_readable() -> None:
    """No file is longer than can be read in one sitting."""
    lines = {name: len(path.read_text().splitlines()) for name, path in SOURCES.items()}
    too_long = [f"{place(name, 1)}: {count} lines" for name, count in lines.items() if count > MOST_LINES]
    assert not too_long, "\n".join(too_long)


def test_functions_fit_a_screen() -> None:
    """The body of a function, without docstring, fits a screen; exceptions are listed with their reason."""
    long = {}
    for name in SOURCES:
        for function, node in functions(name):
            body = node.body[1:] if ast.get_docstring(node) is not None else node.body
            if body and (body[-1].end_lineno or 0) - body[0].lineno + 1 > MOST_LINES_OF_A_FUNCTION:
                long[function] = place(name, node.lineno)
    assert set(long) == set(LONG_FUNCTIONS), long


@pytest.mark.parametrize("name", SOURCES)
def test_every_public_name_exists(name: str) -> None:
    """What a module lists in `__all__` can be imported from it, and is listed once."""
    module = importlib.import_module(f"distbp.{name}".rstrip("."))
    public = getattr(module, "__all__", [])
    assert len(set(public)) == len(public)
    assert [entry for entry in public if not hasattr(module, entry)] == []


def test_public_names_of_the_package_are_sorted() -> None:
    """`distbp.__all__` is sorted, so that a name is found by eye."""
    assert distbp.__all__
    assert distbp.__all__ == sorted(distbp.__all__)


def test_flags_of_train_are_the_documented_ones() -> None:
    """`distbp train` has exactly the options that its documentation lists, in the same order."""
    command = importlib.import_module("distbp.cli.train_command").command
    options = [parameter.opts for parameter in command.params if parameter.param_type_name == "option"]
    assert [names[0] for names in options] == TRAIN_FLAGS


def test_the_drawing_names_only_what_exists() -> None:
    """Every name in the drawing is a module; `-s` prints their imports, and the lines of every file."""
    names = [entry for _, entries in DRAWING for entry in entries]
    assert len(names) == len(set(names))
    assert [entry for entry in names if entry not in SOURCES] == [], "DRAWING names modules that do not exist"
    print("\n\nImports as they are, from the top down")
    for title, entries in DRAWING:
        print(f"\n{title}")
        for entry in entries:
            targets = {drawn(own) for found, own in OWN if found.importer and drawn(found.importer) == entry}
            print(f"  {entry:<15} -> {', '.join(sorted(targets - {entry}, key=names.index)) or '(nothing)'}")
    print("\nLines, lines of code")
    counts = {path: (len(path.read_text().splitlines()), code_lines(path)) for path in SOURCES.values()}
    for path, (lines, code) in counts.items():
        print(f"  {lines:>6} {code:>6}  {path.relative_to(REPOSITORY)}")
    total_lines, total_code = (sum(column) for column in zip(*counts.values(), strict=True))
    assert 0 < total_code < total_lines
    print(f"  {total_lines:>6} {total_code:>6}  in {len(counts)} files")
