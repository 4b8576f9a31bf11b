"""Every fault that distbp is made for, the tests that show it, and its long form.

    python -m tests.fault_table                     print the table that docs/FAULTS.md ends with
    python -m tests.fault_table --write             bring that part of docs/FAULTS.md up to date
    python -m tests.fault_table --long [A1 B5 ...]  run the long form of every row, or of these

The last one prints for each row: cases run, how many ended as they must (a run: with equal bits), median and
worst seconds until the fault was noticed, and until training was back in step.

The long form of a row is chaos (`tests/chaos.py`) with this kind of fault alone, or a command that says what
it did in one line, or else the tests of the row, slow ones too: then a case is a test, and nothing is timed.
`--share 0.1` makes a tenth of all counts.  `make faults` runs everything; it takes hours.

`tests/test_fault_table.py` keeps it true: rows and document agree, every test exists, and so does every code
that the document or the product names.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from xml.etree import ElementTree

from tests.soaking import REPOSITORY

DOCUMENT = REPOSITORY / "docs" / "FAULTS.md"
BEGIN, END = "<!-- generated: tests (python -m tests.fault_table --write) -->", "<!-- end of tests -->"

LOCAL = "tests/backends/test_local.py::"
POINTS = "tests/backends/test_fault_points.py::"
AROUND = "tests/backends/test_surroundings.py::"
VERIFY = "tests/test_verify.py::"
STUCK = "tests/backends/test_stuck_workers.py::"
MODEL = "tests/test_recovery_model.py::test_every_interleaving_ends_well"
SCRIPT = "tests/mpi/test_mpirun_script.py::"
SCRIPT_HOSTS = "tests/mpi/test_mpirun_script_hosts.py::"
MPI = "tests/mpi/test_mpi_one_host.py::"
RAY = "tests/ray/test_ray_backend.py::"
CRASH = "tests/checkpoint/test_checkpoint_crash.py::"
DAMAGE = "tests/checkpoint/test_checkpoint_damage.py::"
SAVING = "tests/checkpoint/test_saving_runs.py::"
TRAINER = "tests/test_trainer.py::"
INPUT = "tests/test_bad_input.py::"
TCP = "tests/transports/test_tcp_faults.py::"


@dataclass(frozen=True)
class Chaos:
    """So many faults of these kinds, at random times, by `tests/chaos.py`."""

    where: str
    kinds: tuple[str, ...]
    faults: int


@dataclass(frozen=True)
class Command:
    """A program that prints what `counted` matches, with groups for cases and failures, or survivors."""

    words: tuple[str, ...]
    count: int
    counted: str


@dataclass(frozen=True)
class Row:
    """One fault: its number in docs/FAULTS.md, the tests that show it, and what is run at length."""

    name: str
    fault: str
    tests: tuple[str, ...]
    long: tuple[Chaos | Command, ...] = ()


ROWS = (
    Row(
        "A1",
        "a local worker is killed",
        (
            f"{LOCAL}test_a_killed_worker_costs_one_step",
            f"{LOCAL}test_two_workers_killed_together",
            f"{POINTS}test_a_kill_at_every_point_costs_one_step",
            MODEL,
        ),
        (Chaos("local", ("kill", "segv", "two"), 200),),
    ),
    Row(
        "A3",
        "a rank is killed under mpirun",
        (
            f"{SCRIPT}test_a_killed_rank_is_replaced_by_a_new_start",
            f"{SCRIPT}test_a_killed_launcher_is_replaced_by_a_new_start",
            f"{SCRIPT_HOSTS}test_a_rank_on_another_host_is_named_by_its_worker",
            f"{MPI}test_trouble_on_one_rank_ends_the_job",
        ),
        (Chaos("mpirun", ("kill", "segv", "launcher"), 40),),
    ),
    Row(
        "A4",
        "a Ray actor, keeper, node or driver is lost",
        (
            f"{RAY}test_a_killed_actor_is_replaced",
            f"{RAY}test_a_killed_keeper_is_replaced",
            f"{RAY}test_a_killed_node_comes_back",
            f"{RAY}test_a_killed_driver_takes_its_actors_along",
        ),
        (Chaos("ray", ("kill", "segv", "two", "keeper", "node", "launcher"), 40),),
    ),
    Row(
        "A5",
        "the launching process, or the whole job, is killed",
        (
            f"{LOCAL}test_a_job_killed_as_a_whole_goes_on",
            f"{POINTS}test_a_job_killed_with_its_worker_is_resumed",
            f"{INPUT}test_a_run_directory_in_use_is_refused",
        ),
        (Chaos("local", ("job",), 50),),
    ),
    Row(
        "A6",
        "the terminal or the launching process is gone",
        (
            f"{LOCAL}test_workers_leave_with_a_killed_launcher",
            f"{POINTS}test_a_reader_that_goes_away_does_not_end_the_job",
            f"{RAY}test_a_killed_driver_takes_its_actors_along",
        ),
        (Chaos("local", ("launcher",), 50),),
    ),
    Row(
        "A7",
        "a worker crashes, exits or raises",
        (
            f"{LOCAL}test_an_error_in_one_worker_ends_the_job",
            f"{LOCAL}test_a_worker_that_always_dies_uses_up_its_restarts",
            f"{POINTS}test_other_ends_are_losses_too",
            f"{POINTS}test_an_exception_ends_the_job",
            f"{SCRIPT}test_trouble_on_one_rank_has_a_code_and_a_culprit",
            f"{RAY}test_a_worker_that_raises_is_named",
        ),
    ),
    Row(
        "A8",
        "a worker hangs, or only pauses",
        (
            f"{STUCK}test_a_replacement_has_a_countdown_of_its_own",
            f"{STUCK}test_a_stopped_worker_is_replaced_once",
            f"{POINTS}test_a_stop_is_found_and_the_worker_replaced",
            f"{MPI}test_a_stopped_rank_is_named",
        ),
        (Chaos("local", ("stop",), 20), Chaos("local", ("pause", "pause_all"), 100)),
    ),
    Row(
        "A9",
        "a worker is slow",
        (
            "tests/metrics/test_stragglers.py::test_a_worker_with_little_processor_time_is_named_and_stays",
            "tests/metrics/test_stragglers.py::test_a_slow_worker_is_named_with_its_cost",
            "tests/metrics/test_stragglers.py::test_others_are_not_named",
        ),
    ),
    Row(
        "A10",
        "the network between hosts is cut",
        (
            "tests/mpi/test_mpi_hosts.py::test_a_cut_link_ends_the_job",
            f"{SCRIPT_HOSTS}test_a_cut_link_ends_the_script",
            "tests/transports/test_tcp_processes.py::test_a_cut_link_is_noticed",
        ),
        (Chaos("mpirun", ("cut",), 10),),
    ),
    Row(
        "A11",
        "a connection corrupts, delays or breaks (TCP)",
        (
            f"{TCP}test_one_flipped_bit_in_each_of_10000_frames_is_found",
            f"{TCP}test_a_fault_between_two_hosts_is_named_and_applied_nowhere",
            f"{TCP}test_a_half_open_connection_ends_at_the_deadline",
            f"{TCP}test_slowness_changes_nothing",
        ),
    ),
    Row(
        "A12",
        "another fault during recovery",
        (
            f"{POINTS}test_a_second_loss_during_recovery",
            f"{LOCAL}test_two_workers_killed_together",
            MODEL,
            "tests/test_recovery_model.py::test_a_broken_rule_is_found",
        ),
        (Chaos("local", ("again",), 100),),
    ),
    Row(
        "A13",
        "SIGTERM, SIGUSR1, Ctrl-C",
        (
            f"{LOCAL}test_a_stopped_run_goes_on_with_another_worker_count",
            f"{LOCAL}test_a_signal_to_the_group_saves_and_stops",
            f"{LOCAL}test_a_second_signal_ends_at_once",
            f"{LOCAL}test_ctrl_c_of_a_serial_run",
            f"{SCRIPT}test_a_signal_saves_and_stops",
            f"{RAY}test_a_stopped_run_goes_on_elsewhere",
        ),
        (Chaos("local", ("stop_request",), 50),),
    ),
    Row(
        "A14",
        "a worker is killed for want of memory",
        (f"{AROUND}test_a_worker_that_the_kernel_kills_for_memory_is_named",),
    ),
    Row(
        "A15",
        "the clock jumps",
        (f"{AROUND}test_a_clock_that_jumps_has_no_effect",),
    ),
    Row(
        "A16",
        "a port is taken",
        ("tests/transports/test_listener.py::test_a_taken_port_is_named",),
    ),
    Row(
        "A17",
        "a worker never comes, or there are too many or too few",
        (
            f"{POINTS}test_a_worker_that_never_comes_is_named_and_given_up",
            f"{SCRIPT}test_a_rank_that_differs_is_named",
            f"{SCRIPT}test_a_launcher_of_the_other_library_is_refused",
        ),
    ),
    Row(
        "A18",
        "losses again and again",
        (
            f"{POINTS}test_starts_without_progress_are_counted",
            f"{POINTS}test_a_new_checkpoint_begins_the_count_anew",
            f"{LOCAL}test_a_worker_that_always_dies_uses_up_its_restarts",
            "tests/test_coordinator.py::test_restarts_without_progress_wait_ever_longer",
        ),
    ),
    Row(
        "B1",
        "killed at any point of a save",
        (
            f"{CRASH}test_a_kill_at_every_system_call_leaves_a_whole_checkpoint",
            f"{CRASH}test_the_order_of_system_calls_is_the_promised_one",
            f"{SAVING}test_a_run_killed_in_a_save_goes_on",
        ),
    ),
    Row(
        "B2",
        "a power cut",
        (f"{SAVING}test_the_long_commands_in_short",),
        (
            Command(
                ("tests.power_cuts", "--cuts"),
                200,
                r"(?P<cases>\d+) power cuts, (?P<failures>\d+) with a loss",
            ),
        ),
    ),
    Row(
        "B3",
        "the disk is full, read-only, or fails",
        (
            f"{SAVING}test_a_disk_that_refuses_ends_the_run_after_three",
            f"{SAVING}test_a_save_that_is_refused_costs_a_checkpoint_and_no_bits",
            f"{CRASH}test_an_error_of_the_disk_keeps_the_old_and_removes_its_own",
            f"{CRASH}test_a_failed_fsync_is_never_repeated",
        ),
        (Chaos("local", ("fill",), 50),),
    ),
    Row(
        "B4",
        "a slow disk",
        (
            f"{SAVING}test_training_goes_on_while_a_slow_disk_saves",
            "tests/checkpoint/test_saver.py::test_a_disk_that_hangs_is_named_and_not_waited_for",
        ),
    ),
    Row(
        "B5",
        "a damaged, foreign or older checkpoint",
        (
            f"{DAMAGE}test_every_flipped_byte_is_found",
            f"{DAMAGE}test_every_truncation_and_every_extension_is_found",
            f"{SAVING}test_a_damaged_checkpoint_is_passed_over_unless_it_was_named",
            f"{INPUT}test_a_checkpoint_of_another_model_is_refused",
        ),
        (
            Command(
                ("tests.flips", "--count"), 10_000, r"(?P<cases>\d+) flips and .*: (?P<failures>\d+) missed"
            ),
            Chaos("local", ("flip",), 50),
        ),
    ),
    Row(
        "B6",
        "a hostile checkpoint",
        (
            "tests/hostile/test_hostile.py::test_the_hostile_is_refused_at_small_cost",
            "tests/hostile/test_hostile.py::test_the_commands_answer_with_65",
        ),
    ),
    Row(
        "B7",
        "NaN or Inf in loss, gradient or data",
        (
            f"{TRAINER}test_one_poisoned_step_is_skipped",
            f"{TRAINER}test_a_model_that_diverges_says_where",
            f"{TRAINER}test_broken_parameters_are_never_saved",
        ),
    ),
    Row(
        "B8",
        "workers differ",
        (
            f"{LOCAL}test_workers_that_differ_are_refused",
            f"{LOCAL}test_a_worker_with_another_kernel_is_refused",
            f"{SCRIPT}test_a_rank_that_differs_is_named",
            f"{MPI}test_ranks_that_differ_are_refused",
        ),
    ),
    Row(
        "B9",
        "data that are missing, cut off or impossible",
        (
            f"{INPUT}test_bad_input_is_refused",
            "tests/data/test_bad_data.py::test_truncated_anywhere",
            "tests/data/test_bad_data.py::test_any_bytes_end_in_an_error_of_ours",
            f"{TRAINER}test_data_that_are_not_finite_are_refused",
        ),
    ),
    Row(
        "B10",
        "bits change in memory",
        (
            f"{VERIFY}test_flips_in_processes_are_found_and_undone",
            f"{VERIFY}test_with_every_step_verified_the_host_is_named",
            f"{VERIFY}test_hosts_that_differ_are_found_before_the_next_save",
            f"{VERIFY}test_without_a_checkpoint_the_run_ends_with_80",
            f"{VERIFY}test_every_single_bit_flip_changes_one_checksum",
            "tests/mpi/test_mpi_memory.py::test_the_script_starts_again",
        ),
        (
            Command(
                ("tests.flips_memory", "--parts", "1", "--count"),
                200,
                r"verify_every = 1: found (?P<survived>\d+) of (?P<cases>\d+) flips",
            ),
        ),
    ),
    Row(
        "B11",
        "the run goes on elsewhere",
        (
            f"{LOCAL}test_a_stopped_run_goes_on_with_another_worker_count",
            f"{MPI}test_a_local_run_goes_on_under_mpirun",
            f"{RAY}test_a_stopped_run_goes_on_elsewhere",
        ),
        (Command(("tests.soak", "stops", "--count"), 50, r"(?P<survived>\d+) of (?P<cases>\d+) ended"),),
    ),
    Row(
        "B12",
        "too little memory to share",
        (
            "tests/data/test_shared_data.py::test_too_little_memory",
            "tests/test_arena.py::test_nothing_has_a_name_in_dev_shm",
        ),
    ),
    Row(
        "B13",
        "two jobs, or no right to write",
        (
            f"{INPUT}test_a_run_directory_in_use_is_refused",
            f"{INPUT}test_never_resume_protects_a_run",
            f"{INPUT}test_no_space_in_the_run_directory_is_named",
        ),
    ),
    Row(
        "B14",
        "a wrong configuration",
        (
            "tests/test_config.py::test_bad_values_are_refused",
            "tests/test_config.py::test_bad_files_are_refused",
            "tests/test_config.py::test_all_mistakes_are_reported_at_once",
        ),
    ),
)


NOT_YET: dict[str, str] = {}
"""Faults that have no row yet: what is not built, or not tested."""


# ----- the table in the document


def shown_by() -> str:
    """Return which tests show which row."""
    lines = ["| | fault | shown by |", "|---|---|---|"]
    for row in ROWS:
        shown = "<br>".join(f"`{test.removeprefix('tests/')}`" for test in row.tests)
        lines.append(f"| {row.name} | {row.fault} | {shown} |")
    return "\n".join(lines)


def write_generated_part() -> None:
    """Bring the generated part of the document up to date."""
    text = DOCUMENT.read_text()
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    DOCUMENT.write_text(f"{before}{BEGIN}\n{shown_by()}\n{END}{after}")


# ----- the long form


@dataclass
class Outcome:
    """What the long form of a row gave."""

    cases: int = 0
    survived: int = 0
    noticed: list[float] = field(default_factory=list)
    back: list[float] = field(default_factory=list)
    problem: str = ""

    def columns(self) -> list[str]:
        """Return the columns of the table."""
        figures = [
            f"{what(values):.2f} s" if values else "-"
            for values in (self.noticed, self.back)
            for what in (statistics.median, max)
        ]
        return [str(self.cases), str(self.survived), *figures]


def run_chaos(chaos: Chaos, share: float, outcome: Outcome) -> None:
    """Run faults of one kind; whatever is not as it should be makes the last one a failure."""
    wanted = max(1, round(chaos.faults * share))
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        words = [
            "--where",
            chaos.where,
            "--faults",
            str(wanted),
            "--kinds",
            *chaos.kinds,
            "--json",
            file.name,
        ]
        done = run_module("tests.chaos", words)
        report = json.loads(Path(file.name).read_text() or '{"figures": {}, "problem": "no report"}')
    pairs = [pair for kind in report["figures"].values() for pair in kind]
    outcome.noticed += [seen for seen, _ in pairs if seen is not None]
    outcome.back += [back for _, back in pairs if back is not None]
    bad = bool(report["problem"]) or done.returncode != 0
    outcome.cases += len(pairs) + bad
    outcome.survived += len(pairs)
    if bad:
        outcome.problem = report["problem"] or done.stdout[-300:] + done.stderr[-300:]


def run_command(command: Command, share: float, outcome: Outcome) -> None:
    """Run a program that counts by itself."""
    done = run_module(command.words[0], [*command.words[1:], str(max(1, round(command.count * share)))])
    found = re.search(command.counted, done.stdout)
    if found is None:
        outcome.cases += 1
        outcome.problem = (done.stdout + done.stderr)[-300:]
        return
    counts = {name: int(value) for name, value in found.groupdict().items()}
    outcome.cases += counts["cases"]
    outcome.survived += counts.get("survived", counts["cases"] - counts.get("failures", 0))
    if done.returncode:
        outcome.problem = done.stdout[-300:]


def run_tests(row: Row, outcome: Outcome) -> None:
    """Run the tests of a row, slow ones too; one that is skipped is no case."""
    with tempfile.NamedTemporaryFile(suffix=".xml") as file:
        words = [
            "-m",
            "",
            "--timeout",
            "600",
            "-p",
            "no:cacheprovider",
            f"--junitxml={file.name}",
            *row.tests,
        ]
        done = run_module("pytest", words)
        suite = ElementTree.parse(file.name).getroot()[0]
    failed = int(suite.get("failures", 0)) + int(suite.get("errors", 0))
    outcome.cases = int(suite.get("tests", 0)) - int(suite.get("skipped", 0))
    outcome.survived = outcome.cases - failed
    if done.returncode:
        outcome.problem = done.stdout[-300:]


def run_module(name: str, words: list[str]) -> subprocess.CompletedProcess[str]:
    """Run `python -m NAME WORDS` at the top of the repository."""
    command = [sys.executable, "-m", name, *words]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)


def run_row(row: Row, share: float) -> Outcome:
    """Run the long form of a row."""
    outcome = Outcome()
    for part in row.long:
        if isinstance(part, Chaos):
            run_chaos(part, share, outcome)
        else:
            run_command(part, share, outcome)
    if not row.long:
        run_tests(row, outcome)
    return outcome


def run_long(rows: list[Row], share: float) -> int:
    """Run and print row by row; return 1 if anything was not survived."""
    form = "{:4} {:52} {:>6} {:>9} {:>16} {:>10} {:>16} {:>10}"
    heads = ("cases", "survived", "noticed: median", "worst", "in step: median", "worst")
    print(form.format("", "fault", *heads), flush=True)
    bad = 0
    for row in rows:
        begun = time.monotonic()
        outcome = run_row(row, share)
        print(form.format(row.name, row.fault, *outcome.columns()), flush=True)
        if outcome.problem or outcome.survived < outcome.cases or not outcome.cases:
            bad += 1
            print(f"     NOT SURVIVED, after {time.monotonic() - begun:.0f} s: {outcome.problem}", flush=True)
    return 1 if bad else 0


def main() -> int:
    """Print the table, write it, or run it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("rows", nargs="*", metavar="ROW")
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--long", action="store_true")
    parser.add_argument("--share", type=float, default=1.0)
    arguments = parser.parse_args()
    if unknown := {*arguments.rows} - {row.name for row in ROWS}:
        parser.error(
            f"expected rows among {' '.join(row.name for row in ROWS)}, got {' '.join(sorted(unknown))}"
        )
    rows = [row for row in ROWS if not arguments.rows or row.name in arguments.rows]
    if arguments.write:
        write_generated_part()
    elif arguments.long:
        return run_long(rows, arguments.share)
    else:
        print(shown_by())
    return 0


if __name__ == "__main__":
    sys.exit(main())
