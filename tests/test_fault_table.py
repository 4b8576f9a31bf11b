"""docs/FAULTS.md says what the product does: what it names exists, and nothing is missing."""

from __future__ import annotations

import ast
import re
from dataclasses import replace
from pathlib import Path

import pytest

from tests.fault_table import BEGIN, DOCUMENT, END, NOT_YET, ROWS, Chaos, shown_by
from tests.soaking import REPOSITORY

CODE = re.compile(r"\b[EW]_[A-Z]+(?:_[A-Z]+)*\b")
FAULTS = {f"A{n}" for n in range(1, 19) if n != 2} | {f"B{n}" for n in range(1, 15)}
"""Every fault that distbp is to survive; there is no A2."""


def document_rows(text: str) -> list[str]:
    """Return the numbers of the rows for users, in order, each once."""
    written = text.partition(BEGIN)[0]
    return list(dict.fromkeys(re.findall(r"^\| ([AB]\d+) \|", written, re.MULTILINE)))


def missing_tests(rows) -> list[str]:
    """Return what the rows name as tests and is none, and rows that name nothing."""
    missing = [f"{row.name} names no test" for row in rows if not row.tests]
    for row in rows:
        for test in row.tests:
            file, _, function = test.partition("::")
            path = REPOSITORY / file
            if not path.exists() or function not in functions(path):
                missing.append(f"{row.name} names {test}")
    return missing


def functions(path: Path) -> set[str]:
    """Return the names of the test functions of a file, without running it."""
    return {
        node.name
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    }


def product_codes(folder: Path) -> set[str]:
    """Return the codes that a line of the product may begin with, without comments and documentation."""
    codes: set[str] = set()
    for path in folder.rglob("*.py"):
        tree = ast.parse(path.read_text())
        texts = [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)]
        codes |= {code for text in texts if isinstance(text, str) for code in CODE.findall(text)}
    return codes


def documented_codes(text: str) -> set[str]:
    """Return the codes of the table of lines."""
    table = text.partition("\n## The lines\n")[2].partition("\n## ")[0]
    return set(re.findall(r"^\| `([EW]_[A-Z_]+)` \|", table, re.MULTILINE))


def test_rows_and_document_agree():
    """The document has the rows of the table, in the same order, and no others."""
    assert document_rows(DOCUMENT.read_text()) == [row.name for row in ROWS]


def test_no_fault_is_forgotten():
    """Every fault has a row, or stands among those that are not built yet, never both."""
    names = [row.name for row in ROWS]
    assert len(names) == len(set(names))
    assert not {*names} & {*NOT_YET}
    assert {*names} | {*NOT_YET} == FAULTS


def test_every_row_names_tests_that_exist():
    """Each row names at least one test, and each test that is named exists."""
    assert missing_tests(ROWS) == []


def test_the_generated_part_is_up_to_date():
    """`python -m tests.fault_table --write` would change nothing."""
    assert DOCUMENT.read_text().partition(BEGIN)[2].partition(END)[0].strip() == shown_by()


def test_every_code_is_documented():
    """Codes of the product and of the table of lines are the same; others are not named anywhere."""
    text = DOCUMENT.read_text()
    assert documented_codes(text) == product_codes(REPOSITORY / "distbp")
    assert set(CODE.findall(text)) <= documented_codes(text)


def test_the_long_form_names_kinds_that_exist():
    """Each fault that the long form asks chaos for is one that chaos knows there."""
    from tests.chaos import Chaos as Soak
    from tests.chaos_worlds import LocalWorld, MpirunWorld, RayWorld

    kinds = {world.name: set(world.kinds) for world in (LocalWorld, MpirunWorld, RayWorld)}
    for row in ROWS:
        for part in row.long:
            assert not isinstance(part, Chaos) or {*part.kinds} <= kinds[part.where], row.name
    for known in kinds.values():
        assert all(hasattr(Soak, f"do_{kind}") for kind in known)


@pytest.mark.parametrize(
    ("tests", "said"),
    [
        ((), "A1 names no test"),
        (("tests/test_nothing.py::test_it",), "A1 names tests/test_nothing.py::test_it"),
        (("tests/test_fault_table.py::test_it",), "A1 names tests/test_fault_table.py::test_it"),
    ],
)
def test_a_row_without_a_test_is_found(tests, said):
    """The check of the rows can fail."""
    assert missing_tests([replace(ROWS[0], tests=tests)]) == [said]


def test_codes_are_found_where_they_are(tmp_path):
    """The check of the codes sees one in a text of the product, and one that is missing in the document."""
    (tmp_path / "a.py").write_text('# E_IN_A_COMMENT\nprint(f"distbp: W_NEW_ONE {1}")\n')
    assert product_codes(tmp_path) == {"W_NEW_ONE"}
    text = DOCUMENT.read_text()
    assert documented_codes(text.replace("| `E_LOST_WORKER` |", "| |")) == documented_codes(text) - {
        "E_LOST_WORKER"
    }
    assert document_rows(text.replace("| A8 |", "| |")) == [row.name for row in ROWS if row.name != "A8"]
