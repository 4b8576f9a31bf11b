"""A bar for each peer of each workload, as SVG: how long its step is, in steps of distbp."""

from __future__ import annotations

WIDTH, LABEL, BAR, GAP, HEAD = 760, 190, 14, 12, 30
MOST = 8.0
COLOURS = {
    "distbp b/2": "#1b6ca8",
    "distbp b/8": "#7fb3d5",
    "ddp": "#c0392b",
    "torch": "#e67e22",
    "compile": "#f1c40f",
    "sklearn": "#7f8c8d",
}


def bars(table: list[dict]) -> str:
    """The plot of a table of `benchmarks.peers`; bars longer than 8 are cut, and all say their length."""
    base = {
        row["workload"]: row["median"] for row in table if row["peer"] == "distbp b/2" and "error" not in row
    }
    rows = [row for row in table if "error" not in row and row["workload"] in base]
    scale = (WIDTH - LABEL - 70) / MOST
    shapes, y, last = [], HEAD, None
    for row in rows:
        if last not in (None, row["workload"]):
            y += GAP
        last = row["workload"]
        ratio = row["median"] / base[row["workload"]]
        length = max(1.0, min(ratio, MOST) * scale)
        name = f"{row['workload']}, {row['peer']}"
        shapes += [
            f'<text x="{LABEL - 8}" y="{y + 11}" text-anchor="end">{name}</text>',
            f'<rect x="{LABEL}" y="{y}" width="{length:.1f}" height="{BAR - 2}" '
            f'fill="{COLOURS[row["peer"]]}"/>',
            f'<text x="{LABEL + length + 5:.1f}" y="{y + 11}">{ratio:.2f}</text>',
        ]
        y += BAR
    one = LABEL + scale
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{y + 12}" '
            'font-family="sans-serif" font-size="11">',
            f'<rect width="{WIDTH}" height="{y + 12}" fill="white"/>',
            f'<text x="{LABEL}" y="16">a step, in steps of distbp with half-batch micro-batches</text>',
            f'<line x1="{one:.1f}" y1="{HEAD - 6}" x2="{one:.1f}" y2="{y}" stroke="#999"/>',
            *shapes,
            "</svg>\n",
        ]
    )
