"""A Ray driver for the tests of the collective backend: it does what it is told on stdin, one line each.

    python collective_driver.py [ADDRESS]

Tests run without Ray; this program runs in the environment that has it.  A line is `{"do": NAME, "with":
{...}}` in JSON, the answer `{"result": ...}` or `{"error": TRACEBACK}`.  Actors are kept from one line to the
next.  Whatever an operation gives is compared here, with NumPy and a tree that is written down a second time.
"""

from __future__ import annotations

import gc
import hashlib
import itertools
import json
import os
import signal
import sys
import threading
import time
import traceback
from pathlib import Path

import numpy as np
import ray
from ray.experimental import internal_kv

JOINS = {"SUM": np.add, "PRODUCT": np.multiply, "MIN": np.minimum, "MAX": np.maximum}
SHAPES = [(), (0,), (1,), (7,), (3, 0, 2), (5, 13), (1000,)]
LARGE = [(16_385,), (16_384 * 9 + 1,), (600_011,)]
DTYPES = ["f4", "f8", "f2", "i1", "u2", "i4", "i8", "?", "c8"]
DEADLINE_S = 10.0


def tree(values, join):
    """Join values as a tree does whose left half is the largest power of two."""
    if len(values) == 1:
        return values[0]
    half = 1 << ((len(values) - 1).bit_length() - 1)
    return join(tree(values[:half], join), tree(values[half:], join))


def sample(rank, number, shape, dtype):
    """Return array `number` of `rank`, which every rank can make: wide exponents, all bits of integers."""
    rng = np.random.default_rng([rank, number])
    if dtype == "?":
        return np.asarray(rng.random(shape) < 0.7)
    if np.dtype(dtype).kind in "iu":
        info = np.iinfo(dtype)
        return np.asarray(rng.integers(info.min, info.max, shape, dtype, endpoint=True))
    reach = 3 if dtype == "f2" else 9
    array = rng.standard_normal(shape) * 2.0 ** rng.integers(-reach, reach, shape)
    if dtype == "c8":
        array = array + 1j * rng.standard_normal(shape)
    return np.asarray(array, dtype)


def laid_out(array, how):
    """The same values in another layout of memory."""
    if how == "strided" and array.ndim:
        wide = np.zeros((*array.shape[:-1], 2 * array.shape[-1]), array.dtype)
        wide[..., ::2] = array
        return wide[..., ::2]
    if how == "reversed" and array.ndim:
        return array[::-1].copy()[::-1]
    if how == "fortran":
        return array.copy(order="F")
    return array.copy()


def same(a, b):
    """Whether two arrays are the same, bit for bit."""
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


@ray.remote(num_cpus=0.5)
class Rank:
    """An actor that may be a rank of groups."""

    def run(self, function, *arguments):
        """Call a function of this file here."""
        return function(*arguments)


# ----- what actors do


def modules_imported():
    """Which of the packages that must not be needed are loaded, after everything that groups need is."""
    return sorted({"torch", "pyarrow", "cupy"} & set(sys.modules))


def process_number():
    """Return the number of this process."""
    return os.getpid()


def join(world, rank, group, mates=None, deadline_s=DEADLINE_S, meeting_s=30.0):
    """Join a group; `mates` are the processes that this one may find on its node, None for those it can."""
    from ray.util import collective

    from distbp.backends.ray_collective import meeting, register

    register(deadline_s=deadline_s, meeting_s=meeting_s)
    if not hasattr(meeting, "really_find_neighbour"):
        meeting.really_find_neighbour = meeting.find_neighbour
    find = meeting.really_find_neighbour
    if mates is not None:  # As in containers: processes of one machine that cannot see each other.
        meeting.find_neighbour = lambda place, nonce: find(place, nonce) if place[0] in mates else None
    try:
        collective.init_collective_group(world, rank, backend="distbp", group_name=group)
    finally:
        meeting.find_neighbour = find
    return collective.get_group_handle(group).nodes


def leave(group):
    """Destroy a group here."""
    from ray.util import collective

    collective.destroy_collective_group(group)


def traces():
    """What this process holds of any group, what it holds in /dev/shm besides Ray, and how many files."""
    gc.collect()
    lines = Path("/proc/self/maps").read_text().splitlines()
    maps = [line for line in lines if "distbp-collective" in line]
    named = [line for line in lines if "/dev/shm/" in line and "plasma" not in line]
    links = []
    for number in os.listdir("/proc/self/fd"):
        try:
            links.append(os.readlink(f"/proc/self/fd/{number}"))
        except OSError:
            continue
    named += [link for link in links if link.startswith("/dev/shm/") and "plasma" not in link]
    return [*maps, *(link for link in links if "distbp" in link or "pidfd" in link)], named, len(links)


def battery(group, world, rank, dtypes, shapes, layouts):
    """Run every operation on every kind of array; return how many, what was wrong, and a hash of all."""
    from ray.util import collective
    from ray.util.collective.types import ReduceOp

    numbers, wrong, digest = itertools.count(), [], hashlib.sha256()
    done = 0

    def compare(what, got, expected):
        nonlocal done
        done += 1
        digest.update(got.tobytes())
        if not same(got, expected):
            wrong.append(f"rank {rank}: {what}: got {got.ravel()[:4]}, expected {expected.ravel()[:4]}")

    for dtype, shape, layout in itertools.product(dtypes, shapes, layouts):
        where = f"{dtype}{list(shape)} {layout}"
        number = next(numbers)
        everybody = [sample(r, number, shape, dtype) for r in range(world)]
        mine = everybody[rank]
        # NumPy has an order of complex numbers, but products of them overflow to NaN with signs of their own.
        joins = ["SUM", "MIN"] if dtype == "c8" else JOINS
        for name in joins:
            expected = tree(everybody, JOINS[name])
            x = laid_out(mine, layout)
            collective.allreduce(x, group, ReduceOp[name])
            compare(f"allreduce {name} {where}", x, expected)
            x, root = laid_out(mine, layout), number % world
            collective.reduce(x, root, group, ReduceOp[name])
            compare(f"reduce {name} {where}", x, expected if rank == root else mine)
        for root in range(world):
            x = laid_out(mine, layout)
            collective.broadcast(x, root, group)
            compare(f"broadcast {where} from {root}", x, everybody[root])
        outs = [laid_out(np.zeros_like(mine), layout) for _ in range(world)]
        collective.allgather(outs, laid_out(mine, layout), group)
        for r in range(world):
            compare(f"allgather {where} of {r}", outs[r], everybody[r])
        parts = [[sample(r, 1000 * number + s, shape, dtype) for s in range(world)] for r in range(world)]
        out = laid_out(np.zeros_like(mine), layout)
        given = [laid_out(part, layout) for part in parts[rank]]
        collective.reducescatter(out, given, group)
        compare(f"reducescatter {where}", out, tree([parts[r][rank] for r in range(world)], np.add))
        for part, before in zip(given, parts[rank], strict=True):
            compare(f"what reducescatter was given, {where}", part, before)
        for step in range(1, world):  # Pairs take turns, so that nobody sends to somebody who sends.
            for sender in range(world):
                receiver = (sender + step) % world
                if rank == sender:
                    collective.send(laid_out(mine, layout), receiver, group)
                elif rank == receiver:
                    x = laid_out(np.zeros_like(mine), layout)
                    collective.recv(x, sender, group)
                    compare(f"recv {where} from {sender}", x, everybody[sender])
        collective.barrier(group)
    return done, wrong[:5], digest.hexdigest()


def repeat_sum(group, rank, times, size):
    """Sum the same arrays again and again; return a hash of each result."""
    from ray.util import collective

    hashes = set()
    for _ in range(times):
        x = sample(rank, 5, (size,), "f4")
        collective.allreduce(x, group)
        hashes.add(hashlib.sha256(x.tobytes()).hexdigest())
    return sorted(hashes)


def attempt(operation, *arguments):
    """Call an operation of Ray's, or a function; return the kind of the error, its text, and the seconds."""
    from ray.util import collective

    begun = time.monotonic()
    try:
        (operation if callable(operation) else getattr(collective, operation))(*arguments)
    except Exception as error:
        return type(error).__name__, str(error), time.monotonic() - begun
    return None, "", time.monotonic() - begun


def attempt_on(operation, group, dtype="f4", size=1, *rest):
    """Call an operation on an array; `rest` is a rank, or the name of a reduction."""
    from ray.util import collective
    from ray.util.collective.types import ReduceOp

    rest = [ReduceOp[word] if isinstance(word, str) else word for word in rest]
    if operation == "barrier":
        return attempt("barrier", group)
    if operation == "allreduce":
        return attempt("allreduce", np.ones(size, dtype), group, *rest)
    return attempt(getattr(collective, operation), np.ones(size, dtype), *rest, group)


def attempt_join(*arguments):
    """Try to join a group."""
    return attempt(join, *arguments)


def misuse(group):
    """Give the group what it has to refuse; return the texts of the errors, and what a sum is afterwards."""
    from ray.util import collective
    from ray.util.collective.types import AllReduceOptions, BroadcastOptions

    handle = collective.get_group_handle(group)
    read_only = np.ones(3)
    read_only.flags.writeable = False
    given = {
        "no array": lambda: handle.allreduce([[1.0, 2.0]], AllReduceOptions()),
        "two arrays": lambda: handle.allreduce([np.ones(1), np.ones(1)], AllReduceOptions()),
        "masked": lambda: handle.allreduce([np.ma.masked_array([1.0], [True])], AllReduceOptions()),
        "read-only": lambda: collective.allreduce(read_only, group),
        "objects": lambda: handle.broadcast([np.array([None])], BroadcastOptions()),
        "byte order": lambda: collective.allreduce(
            np.ones(1, ">f4" if sys.byteorder == "little" else "<f4"), group
        ),
        "texts": lambda: collective.allreduce(np.array(["a"]), group),
        "dates": lambda: collective.allreduce(np.zeros(1, "M8[s]"), group),
        "another shape": lambda: collective.allgather([np.ones(2)], np.ones(3), group),
        "another type": lambda: collective.reducescatter(np.ones(2), [np.ones(2, "f4")], group),
    }
    errors = {}
    for what, call in given.items():
        kind, text, _ = attempt(call)
        errors[what] = f"{kind}: {text}"
    x = np.arange(3.0)
    collective.allreduce(x, group)
    return errors, x.tolist()


def sum_until_it_fails(group, size, alone):
    """Sum until an operation raises; return the kind, the text, the seconds since a rank was killed.

    `alone` is where whoever kills leaves the time.
    """
    from ray.util import collective

    x = np.ones(size, "f4")
    while True:
        try:
            collective.allreduce(x, group)
        except Exception as error:
            until = time.monotonic() + 5
            while not os.path.exists(alone) and time.monotonic() < until:
                time.sleep(0.01)
            return type(error).__name__, str(error), time.time() - os.path.getmtime(alone)


def both_ways(group, rank, size):
    """Send to the other rank in one thread while receiving from it in another."""
    from ray.util import collective

    other = 1 - rank
    incoming = np.zeros(size, "f4")
    sending = threading.Thread(target=collective.send, args=(sample(rank, 1, (size,), "f4"), other, group))
    sending.start()
    collective.recv(incoming, other, group)
    sending.join(DEADLINE_S)
    return not sending.is_alive() and same(incoming, sample(other, 1, (size,), "f4"))


def count_anew(group, rank):
    """Make the gate count anew after every few rounds, and sum all the while."""
    from ray.util import collective

    from distbp.backends.ray_collective import memory

    memory.MOST_ROUNDS, before = 5, memory.MOST_ROUNDS
    try:
        return repeat_sum(group, rank, 100, 1000) + repeat_sum(group, rank, 10, 200_000)
    finally:
        collective.barrier(group)
        memory.MOST_ROUNDS = before


# ----- what tests ask for


class Stage:
    """The actors of a driver, and the scenarios that tests ask for by name."""

    def __init__(self, addresses):
        self.addresses = addresses
        self.ranks = {}
        self.num_groups = itertools.count()

    # ----- groups

    def actors(self, count):
        """Return actors 0 to `count` - 1; with addresses, number i is on the node of `addresses[i]`."""
        for number in range(count):
            if number not in self.ranks:
                place = {f"node:{self.addresses[number]}": 0.001} if self.addresses else {}
                self.ranks[number] = Rank.options(resources=place).remote()
        return [self.ranks[number] for number in range(count)]

    def everybody(self, actors, function, arguments, timeout=60):
        """Call a function on all actors at once, each with its own arguments; return what they gave."""
        return ray.get(self.begin(actors, function, arguments), timeout=timeout)

    def begin(self, actors, function, arguments):
        """The same without waiting."""
        return [actor.run.remote(function, *own) for actor, own in zip(actors, arguments, strict=True)]

    def group(self, layout, deadline_s=DEADLINE_S, name=None):
        """Make a group whose ranks are on the nodes of `layout`, pretended ones without addresses."""
        world = sum(map(len, layout))
        actors, name = self.actors(world), name or f"group {next(self.num_groups)}"
        mates = [None] * world
        if not self.addresses and len(layout) > 1:
            pids = self.everybody(actors, process_number, [()] * world)
            mates = [[pids[r] for r in next(n for n in layout if rank in n)] for rank in range(world)]
        arguments = [(world, rank, name, mates[rank], deadline_s) for rank in range(world)]
        for nodes in self.everybody(actors, join, arguments):
            assert [list(ranks) for ranks in nodes] == layout, f"expected {layout}, got {nodes}"
        return name, actors

    def end(self, name, actors):
        """Destroy a group."""
        self.everybody(actors, leave, [(name,)] * len(actors))

    # ----- what works

    def matrix(self, layout, dtypes, shapes, layouts):
        """Run the battery; return what each rank found."""
        name, actors = self.group(layout)
        arguments = [(name, len(actors), rank, dtypes, shapes, layouts) for rank in range(len(actors))]
        results = self.everybody(actors, battery, arguments, timeout=90)
        self.end(name, actors)
        return results

    def repetitions(self, layout, times, size):
        """Return the hashes of many sums on all ranks."""
        name, actors = self.group(layout)
        results = self.everybody(actors, repeat_sum, [(name, r, times, size) for r in range(len(actors))])
        self.end(name, actors)
        return results

    def counting_anew(self, layout):
        """Return the hashes of sums while barriers are counted anew."""
        name, actors = self.group(layout)
        results = self.everybody(actors, count_anew, [(name, rank) for rank in range(len(actors))])
        self.end(name, actors)
        return results

    def both_directions(self, layout, size):
        """Return whether two ranks can send to each other at once."""
        name, actors = self.group(layout)
        results = self.everybody(actors, both_ways, [(name, rank, size) for rank in range(2)])
        self.end(name, actors)
        return results

    def two_groups(self):
        """Use two groups in turns, of other ranks in another order, then both names again for other sizes."""
        actors, results = self.actors(3), []
        for world in (3, 2):
            turned = actors[:world][::-1]
            for name, order in (("a", actors[:world]), ("b", turned)):
                self.everybody(order, join, [(world, rank, name) for rank in range(world)])
            for name, order in (("a", actors[:world]), ("b", turned), ("a", actors[:world])):
                results.append(self.everybody(order, repeat_sum, [(name, r, 1, 99) for r in range(world)]))
            for name in "ab":
                self.end(name, actors[:world])
        return results

    def imported(self):
        """Return which packages that must not be needed an actor has loaded after all of the above."""
        return self.everybody(self.actors(2), modules_imported, [()] * 2)

    def left_over(self, layout):
        """Return what processes hold before, during and after groups, and the notes that are left."""
        actors = self.actors(sum(map(len, layout)))
        self.end(*self.group(layout))  # What is loaded and opened once is not left over.
        before, during = self.everybody(actors, traces, [()] * len(actors)), []
        for _ in range(3):
            name, _ = self.group(layout)
            self.everybody(actors, repeat_sum, [(name, r, 1, 200_000) for r in range(len(actors))])
            during.append(self.everybody(actors, traces, [()] * len(actors)))
            during.append(self.notes())
            self.end(name, actors)
        after = self.everybody(actors, traces, [()] * len(actors))
        return before, during, after, self.notes()

    def notes(self):
        """Return the keys of all notes that groups have in Ray's store."""
        return [key.decode() for key in internal_kv._internal_kv_list(b"", namespace=b"distbp-collective")]

    # ----- what does not

    def differing(self, layout, calls):
        """Let rank r call `calls[r]`, an operation on an array; return the errors, then those of barriers."""
        name, actors = self.group(layout, 2.0)
        arguments = [(operation, name, *rest) for operation, *rest in calls]
        errors = self.everybody(actors, attempt_on, arguments)
        again = self.everybody(actors, attempt, [("barrier", name)] * len(actors))
        self.end(name, actors)
        return errors, again

    def refused(self):
        """Hand over what cannot be used; return the errors, and a sum after them."""
        name, actors = self.group([[0]])
        errors = self.everybody(actors, misuse, [(name,)])[0]
        self.end(name, actors)
        return errors

    def absent(self, world, ranks, meeting_s):
        """Let only some ranks come; return their errors."""
        actors = self.actors(len(ranks))
        errors = self.everybody(
            actors, attempt_join, [(world, rank, "absent", None, 1.0, meeting_s) for rank in ranks]
        )
        return errors, self.notes()

    def disagreeing(self):
        """Let two ranks name other group sizes; return their errors."""
        actors = self.actors(2)
        arguments = [(2 + rank, rank, "odd", None, 1.0, 10.0) for rank in range(2)]
        return self.everybody(actors, attempt_join, arguments), self.notes()

    def replaced_while_meeting(self):
        """Kill a rank that waits for the last one; another actor comes in its place."""
        actors = self.actors(3)
        first = actors[0].run.remote(join, 3, 0, "again")
        actors[1].run.remote(join, 3, 1, "again")
        until = time.monotonic() + 20
        while not any(note.endswith("/1") for note in self.notes()) and time.monotonic() < until:
            time.sleep(0.01)
        ray.kill(actors[1], no_restart=True)
        del self.ranks[1]
        substitute = self.actors(3)[1]
        ray.get(substitute.run.remote(process_number))  # Starting takes longer than dying.
        rest = [actors[2].run.remote(join, 3, 2, "again"), substitute.run.remote(join, 3, 1, "again")]
        nodes = ray.get([first, *rest], timeout=40)
        order = [actors[0], substitute, actors[2]]
        sums = self.everybody(order, repeat_sum, [("again", rank, 1, 99) for rank in range(3)])
        self.end("again", order)
        return nodes, sums

    def killed(self, layout, victim, size):
        """Kill a rank in the middle of sums; return what the others saw, and whether a new group works."""
        name, actors = self.group(layout)
        pids = self.everybody(actors, process_number, [()] * len(actors))
        sign = os.path.join(os.environ["RAY_TEST_FOLDER"], f"killed {name}")
        calls = self.begin(actors, sum_until_it_fails, [(name, size, sign)] * len(actors))
        time.sleep(0.5)
        open(sign + " soon", "w").close()
        if self.addresses:
            ray.kill(actors[victim], no_restart=True)
        else:
            os.kill(pids[victim], signal.SIGKILL)
        os.rename(sign + " soon", sign)
        del self.ranks[victim]
        others = [rank for rank in range(len(actors)) if rank != victim]
        errors = ray.get([calls[rank] for rank in others], timeout=40)
        self.everybody([actors[rank] for rank in others], leave, [(name,)] * len(others))
        return errors, self.notes()

    def waiting_for(self, layout, what):
        """Let all but the last rank sum, while that one leaves, is stopped, or does nothing."""
        name, actors = self.group(layout, 2.0)
        last = actors[-1]
        pid = ray.get(last.run.remote(process_number))
        if what == "leaves":
            ray.get(last.run.remote(leave, name))
        elif what == "is stopped":
            os.kill(pid, signal.SIGSTOP)
        arguments = [("allreduce", name, "f4", 1000)] * (len(actors) - 1)
        try:
            errors = self.everybody(actors[:-1], attempt_on, arguments)
        finally:
            os.kill(pid, signal.SIGCONT)
        self.end(name, actors[:-1] if what == "leaves" else actors)
        return errors

    def receiving_from_the_dead(self, layout):
        """Kill a rank from which another one wants to receive."""
        name, actors = self.group(layout)
        pid = ray.get(actors[1].run.remote(process_number))
        call = actors[0].run.remote(attempt_on, "recv", name, "f4", 1000, 1)
        time.sleep(0.3)
        os.kill(pid, signal.SIGKILL)
        del self.ranks[1]
        error = ray.get(call, timeout=30)
        ray.get(actors[0].run.remote(leave, name))
        return error


def main():
    """Do what comes on stdin until it ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # Whatever Ray prints is no answer.
    given = [word.split(",") for word in sys.argv[1:2]]
    if given:
        ray.init(address="auto", log_to_driver=False)
    else:
        ray.init(
            num_cpus=4, include_dashboard=False, log_to_driver=False, object_store_memory=100 << 20,
            _temp_dir=os.environ["RAY_TEST_FOLDER"],
        )  # fmt: skip
    stage = Stage(given[0] if given else None)
    print(json.dumps({"result": "ready"}), file=answers, flush=True)
    for line in sys.stdin:
        order = json.loads(line)
        try:
            answer = {"result": getattr(stage, order["do"])(**order["with"])}
        except BaseException:
            answer = {"error": traceback.format_exc()}
            for number in list(stage.ranks):  # Whatever they are doing.
                ray.kill(stage.ranks.pop(number), no_restart=True)
        print(json.dumps(answer), file=answers, flush=True)
    ray.shutdown()


if __name__ == "__main__":
    main()
