"""Every error that distbp raises on purpose, each with the exit code that it ends the program with.

    DistbpError
    ├── UserCodeError          1   code of the user's raised inside a worker
    ├── ConfigError            2   usage or configuration
    ├── DataError             65   content of a data file is bad
    │   └── CheckpointError   65   content of a checkpoint is bad
    ├── InputMissing          66   a file that was asked for does not exist
    ├── WorkerLost            69   a worker or host was lost: run again, resuming is safe
    │   └── TransportError    69   an exchange between hosts failed
    ├── RestartsUsedUp        70   restarted too often without progress
    ├── CannotWrite           73   output cannot be written, or belongs to another job
    ├── Stopped               75   stopped on request, the checkpoint is safe
    ├── AuthenticationError   77   a peer could not prove who it is
    ├── EnvironmentMismatch   78   launcher, machine or workers do not fit together
    ├── Diverged              79   the loss or the gradient is not finite any more
    └── StateCorrupted        80   the state in memory is damaged, or hosts differ

A message says what was expected, what came, and what to do.  It knows nothing of terminals: the command
line prints it after `distbp:`.
"""

from __future__ import annotations

__all__ = [
    "AuthenticationError",
    "CannotWrite",
    "CheckpointError",
    "ConfigError",
    "DataError",
    "DistbpError",
    "Diverged",
    "EnvironmentMismatch",
    "InputMissing",
    "RestartsUsedUp",
    "StateCorrupted",
    "Stopped",
    "TransportError",
    "UserCodeError",
    "WorkerLost",
    "error_for_code",
]


class DistbpError(Exception):
    """Base of all errors raised on purpose; `exit_code` is what the process ends with.

    `agreed` says that every worker raises this error at the same place, so that one may speak for all.
    """

    exit_code = 1
    agreed = False


class UserCodeError(DistbpError):
    """Code that the user wrote raised inside a worker; the message carries its traceback."""


class ConfigError(DistbpError):
    """The request itself is wrong: an option, a configuration key, a combination."""

    exit_code = 2


class DataError(DistbpError):
    """A data file exists and its content cannot be used."""

    exit_code = 65


class CheckpointError(DataError):
    """A checkpoint exists and its content cannot be trusted."""


class InputMissing(DistbpError):
    """A file or directory that was asked for does not exist."""

    exit_code = 66


class WorkerLost(DistbpError):
    """A worker or a host is gone and cannot be replaced within this start of the job."""

    exit_code = 69


class TransportError(WorkerLost):
    """An exchange between hosts failed or passed its deadline; the message names the peer."""


class RestartsUsedUp(DistbpError):
    """Workers died again and again without a step being made."""

    exit_code = 70


class CannotWrite(DistbpError):
    """A file cannot be written, or the run directory belongs to another job."""

    exit_code = 73


class Stopped(DistbpError):
    """The run was asked to stop; its last checkpoint is durable."""

    exit_code = 75


class AuthenticationError(DistbpError):
    """A peer did not know the run key."""

    exit_code = 77


class EnvironmentMismatch(DistbpError):
    """The launcher, the machine or the workers do not fit together."""

    exit_code = 78


class Diverged(DistbpError):
    """The loss or the gradient was not finite for several steps in a row."""

    exit_code = 79


class StateCorrupted(DistbpError):
    """The state in memory changed behind our back, or hosts hold different states."""

    exit_code = 80


def error_for_code(exit_code: int, message: str) -> DistbpError:
    """Return the error whose exit code is `exit_code`, carrying `message`.

    A worker reports its failure to the coordinator as a number and a text; this turns them back.
    """
    by_code: dict[int, type[DistbpError]] = {
        kind.exit_code: kind
        for kind in (
            UserCodeError, ConfigError, DataError, InputMissing, WorkerLost, RestartsUsedUp, CannotWrite,
            Stopped, AuthenticationError, EnvironmentMismatch, Diverged, StateCorrupted,
        )
    }  # fmt: skip
    return by_code.get(exit_code, DistbpError)(message)
