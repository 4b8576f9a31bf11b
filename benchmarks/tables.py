"""What the benchmarks found, as tables in Markdown; each function takes the JSON of one command."""

from __future__ import annotations

from collections.abc import Callable, Iterable


def rows(head: Iterable[str], body: Iterable[Iterable[object]]) -> list[str]:
    """The lines of a table; numbers get the digits that mean something."""
    head = list(head)
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return lines + ["| " + " | ".join(map(shown, entry)) + " |" for entry in body]


def shown(value: object) -> str:
    """A number with three digits or so, or a text."""
    if value is None:
        return "-"
    if isinstance(value, float):
        return (
            f"{value:,.0f}" if abs(value) >= 100 else f"{value:.1f}" if abs(value) >= 10 else f"{value:.3g}"
        )
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def peers(found: dict) -> list[str]:
    """One line for each workload and peer, with the ratios to distbp."""
    table = found["table"]
    base = {row["workload"]: row for row in table if row["peer"] == "distbp b/2" and "error" not in row}
    body, blas = [], {row["peer"]: row["blas"] for row in table if row.get("blas")}
    for row in table:
        own = base.get(row["workload"])
        if "error" in row:
            if row["error"] != "not for this network":
                body.append([row["workload"], row["peer"], row["error"], *[None] * 5])
            continue
        low, high = row["quartiles"]
        ratios = [
            row[key] / own[key] if own and own[key] and row[key] else None for key in ("median", "least")
        ]
        spread = f"{shown(low)} to {shown(high)}"
        body.append([row["workload"], row["peer"], row["median"], spread, row["least"], row["cpu"], *ratios])
    head = (
        "workload",
        "peer",
        "median ms",
        "quartiles",
        "least",
        "cpu ms",
        "median / distbp",
        "least / distbp",
    )
    lines = [f"BLAS of {peer}: {kernel}." for peer, kernel in blas.items() if peer in ("distbp b/2", "ddp")]
    return [*lines, "", *rows(head, body)]


def jobs(found: dict) -> list[str]:
    """Peak memory, and times to the first step."""
    memory = [
        [row["workload"], row["distbp b/2"], row["distbp b/8"], row["ddp"], row["ddp"] / row["distbp b/2"]]
        for row in found["memory"]
    ]
    times = [[row["command"], row["median_s"], row["least_s"]] for row in found["times"]]
    head = ("peak MB of the job", "distbp b/2", "distbp b/8", "ddp", "ddp / distbp b/2")
    return [*rows(head, memory), "", *rows(("to the first step", "median s", "least s"), times)]


def steps(found: dict) -> list[str]:
    """The bound of each workload, the ratio to it, and where the rest goes."""
    body = [
        [row["workload"], row["micro_batch"], row["flops"] / 1e9, row["gflops"], row["products_ms"]]
        + [sum(row["memory_ms"].values()), row["bound_ms"], row["median_ms"], row["ratio"]]
        + [row["rest_ms"][phase] for phase in ("compute", "wait", "reduce", "update")]
        + [row["page_faults"]]
        for row in found["results"]
    ]
    head = ("workload", "micro-batch", "GFLOP", "GFLOP/s a core", "products ms", "memory ms", "bound ms")
    return rows((*head, "step ms", "ratio", "rest: compute", "wait", "reduce", "update", "page faults"), body)


def sameness(found: dict) -> list[str]:
    """The price of each number of micro-batches, a column for each, on each kernel."""
    numbers = sorted({row["micro_batches"] for row in found["table"]})
    entries: dict[tuple[str, str, str], dict[int, dict]] = {}
    for row in found["table"]:
        kernel = row["blas"].rpartition("(")[2].rstrip(")")
        key = row["workload"], kernel, "yes" if row["joined"] else "no"
        entries.setdefault(key, {})[row["micro_batches"]] = row
    body = [
        [*key, *[by_number.get(m, {}).get(what) for what in ("median", "price") for m in numbers]]
        for key, by_number in entries.items()
    ]
    head = ["workload", "kernel", "joined", *[f"M = {m}, ms" for m in numbers]]
    head += [f"price at {m}" for m in numbers]
    return rows(head, body)


def plain(*columns: str) -> Callable[[dict], list[str]]:
    """The table of a `distbp bench`: these columns of its results, or all."""

    def lines(found: dict) -> list[str]:
        names = columns or tuple(found["results"][0])
        head = [name.replace("_", " ") for name in names]
        return rows(head, [[row[name] for name in names] for row in found["results"]])

    return lines
