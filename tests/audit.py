"""Watches what every Python process of a job turns into objects or code.

Python itself tells an audit hook when an unpickler looks for a class, and when `marshal` reads.  A hook that
is installed before anything else, in every process that inherits the environment, therefore sees each
attempt, from whatever library.  `marshal.loads` by the import system is how Python reads its own compiled
modules, and does not count.  A pickle of plain numbers and texts names no class: it is not seen, and calls
nothing.
"""

from __future__ import annotations

import os

HOOK = """
import os, sys

_FOLDER = os.environ["AUDIT_FOLDER"]
_log = os.open(os.path.join(_FOLDER, str(os.getpid())), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)


def _hook(event, arguments):
    if event == "pickle.find_class":
        os.write(_log, f"pickle.find_class {arguments}\\n".encode())
    elif event in ("marshal.loads", "marshal.load"):
        caller = sys._getframe(1).f_code.co_filename
        if not caller.startswith("<frozen importlib"):
            os.write(_log, f"{event} in {caller}\\n".encode())


sys.addaudithook(_hook)
os.write(_log, b"watched " + open("/proc/self/cmdline", "rb").read().replace(b"\\0", b" ") + b"\\n")
"""


class Watch:
    """What the processes that ran with `environment` did; `folder` is a directory of its own."""

    def __init__(self, folder):
        self._seen = folder / "seen"
        self._seen.mkdir(parents=True)
        (folder / "sitecustomize.py").write_text(HOOK)
        self._path = str(folder)

    def environment(self, path=""):
        """Return the variables that put the hook into every Python; `path` is the rest of PYTHONPATH."""
        return {
            "AUDIT_FOLDER": str(self._seen),
            "PYTHONPATH": os.pathsep.join(filter(None, [self._path, path])),
        }

    def processes(self, word):
        """Return how many processes with `word` in their command line were watched."""
        heads = [path.read_text().splitlines()[0] for path in self._seen.iterdir()]
        return sum(head.startswith("watched ") and word in head for head in heads)

    def found(self):
        """Return what was unpickled or unmarshalled, with the command line of who did it."""
        found = []
        for path in sorted(self._seen.iterdir()):
            head, *lines = path.read_text().splitlines()
            found += [f"{line} ({head})" for line in lines]
        return found
