"""The page of the fusion benchmark's results."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

Row = dict[str, Any]

PAGE = """\
# Fusion benchmark

Written by `bench/tables.py` from `fuse.json`; do not edit. Made by `python bench/fuse.py --peers PYTHON`.
{machine}; {versions}.

ONNX Runtime runs every variant with all of its own optimisation. *Fused*: attention blocks that it runs as one
operator. *Latency*: the median over alternating rounds of the ratio to the input, with quartiles; below 1 is faster.
*Memory*: the peak of a session that loads the model and runs once, less that of Python and ONNX Runtime. *Error*: the
largest difference of an output from that of the input. *Against the best*: graphc's ratio divided by the smallest of
the others, the input among them; it is slower where that is above {slower}.

## graphc against the best of the others

{best}

## All variants

{rows}

## How each was measured

{settings}
"""

SLOWER = 1.02
INPUT, OURS = "input", "graphc"


def fuse_page(results: Row, table: Callable[[Iterable[str], Iterable[Iterable[object]]], str]) -> str:
    """The page as Markdown; ``table(header, rows)`` writes its tables."""
    best, rows = [], []
    for model in results["models"]:
        shapes = list(dict.fromkeys(row["input"] for row in model["results"]))
        fused = {row["variant"]: row for row in model["results"] if "blocks" in row}
        for shape in shapes:
            here = {row["variant"]: row for row in model["results"] if row["input"] == shape}
            others = {label: row for label, row in here.items() if not label.startswith(OURS)}
            for label, row in here.items():
                first = row.get("blocks") is not None
                rows.append(
                    [
                        model["name"],
                        shape,
                        label,
                        f"{row['blocks']} of {model['attentions']}" if first else "",
                        f"{row['ms']:.2f}",
                        f"{row['ratio']:.3f} ({row['low']:.2f} to {row['high']:.2f})",
                        f"{row['peak_mb']:.0f}" if first else "",
                        f"{row['difference']:.1e}",
                    ]
                )
            if OURS in here:
                name, least = min(others.items(), key=lambda item: float(item[1]["ratio"]))
                against = here[OURS]["ratio"] / least["ratio"]
                counts = f"{fused[OURS]['blocks']} of {model['attentions']}"
                most = max(row["blocks"] for label, row in fused.items() if not label.startswith(OURS))
                cells = [f"{here[OURS]['ratio']:.3f}", f"{least['ratio']:.3f} ({name})", f"{against:.3f}"]
                best.append([model["name"], shape, counts, most, *cells])
        rows += [[model["name"], "", label, why, *[""] * 4] for label, why in model["failed"].items()]
    settings = [[m["name"], m["measured"], m["seconds"], m["load"]] for m in results["models"]]
    return PAGE.format(
        machine=results["machine"],
        versions=", ".join(f"{name} {version}" for name, version in results["versions"].items()),
        slower=SLOWER,
        best=table(["model", "input", "fused", "others fuse", "graphc", "best other", "against the best"], best),
        rows=table(["model", "input", "variant", "fused", "ms", "latency", "memory, MB", "error"], rows),
        settings=table(["model", "measured", "seconds", "load"], settings),
    )
