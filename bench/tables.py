"""Write ``bench/results/*.md`` and the table in README.md from the committed results.

    python bench/tables.py [--check]

With ``--check`` nothing is written; the exit code is 1 when a table is not what the results say.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import tvm_page
from compile import GRAPHC, UNVERIFIED
from fuse_page import fuse_page

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results"
SHOWN = (
    "ppocr-det",
    "ppocr-rec",
    "ppocr-cls",
    "silero-vad",
    "minilm-dynamo",
    "minilm-torchscript",
    "bert-torchscript",
    "llama-dynamo",
    "light-densenet121",
    "synthetic-2.4gb",
)
"""The models in README.md."""

Row = dict[str, Any]

LIMITS = (
    ("anonymous memory, 2.4 GB model", "synthetic-2.4gb", "anon_mb", "MB", 500, 150),
    ("CPU time, 4,003-node BERT", "bert-torchscript", "cpu_s", "s", 4, 2.6),
)
"""What, model, key, unit, floor, goal; of graphc without verification."""

SLOWER = 1.02
"""A latency counts as worse when three quarters of the alternating pairs exceed this ratio."""


def table(header: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    """A Markdown table, numbers to the right."""
    header = list(header)
    lines = [" | ".join(header), " | ".join(["---", *["---:"] * (len(header) - 1)])]
    lines += [" | ".join(str(cell) for cell in row) for row in rows]
    return "\n".join(f"| {line} |" for line in lines)


COMPILE_PAGE = f"""\
# Compile benchmark

Written by `bench/tables.py` from `compile.json`; do not edit. Made by
`python bench/compile.py --peers PYTHON`; the last table has the settings of each model.
{{machine}}; Python {{python}}; {{versions}}.{{note}}

Every tool runs as a whole fresh process; within a model the tools take turns. Times are medians, memory is
the peak over all runs. `{GRAPHC}` compares its result with its input, as a user's run does; `{UNVERIFIED}`
does not, like the peers. A dash means that the tool failed or left a model that does not run; the table of
outputs says which.

## Floors and goals

{{judgements}}

## Wall time, s

{{wall}}

## CPU time, s

{{cpu}}

## Peak anonymous memory, MB

{{anon}}

## Peak resident memory (mapped files included), MB

{{rss}}

## Nodes left

Nodes of subgraphs and local functions included, Constant nodes not; those are in brackets.

{{nodes}}

## Latency in ONNX Runtime, relative to the input

One thread, the runtime's own optimisation on for both; the median of alternating pairs. The column `input`
is the input against itself: the noise.

{{latency}}

## Outputs

Against the input with the runtime's optimisation off, on inputs of several sizes: the largest difference
relative to the largest magnitude.

{{outputs}}

## How each was measured

{{settings}}
"""


def compile_page(results: Row) -> str:
    """The page of ``bench/compile.py``'s results."""
    models = results["models"]
    tools = list(dict.fromkeys(tool for model in models for tool in model["tools"]))

    def metric(cell: Callable[[Row], str], *, with_input: bool = False) -> str:
        rows = []
        for model in models:
            before = [cell(model["input"])] if with_input else []
            rows.append([model["name"], *before, *(_cell(model["tools"].get(tool), cell) for tool in tools)])
        return table(["model", *(["input"] if with_input else []), *tools], rows)

    return COMPILE_PAGE.format(
        **{key: results[key] for key in ("machine", "python")},
        note=note(results),
        settings=settings(models),
        versions=", ".join(f"{name} {version}" for name, version in results["versions"].items()),
        judgements=table(("what", "floor", "goal", "measured"), judgements(results)),
        wall=metric(lambda r: f"{r['wall_s']:.2f}"),
        cpu=metric(lambda r: f"{r['cpu_s']:.2f}"),
        anon=metric(lambda r: f"{r['anon_mb']:.0f}"),
        rss=metric(lambda r: f"{r['rss_mb']:.0f}"),
        nodes=metric(_nodes, with_input=True),
        latency=metric(lambda r: f"{r['latency']:.2f}", with_input=True),
        outputs=table(
            ["model", *tools],
            ([model["name"], *(_verdict(model["tools"].get(tool)) for tool in tools)] for model in models),
        ),
    )


def _cell(result: Row | None, cell: Callable[[Row], str]) -> str:
    if result is None or result["failure"]:
        return "-"
    try:
        return cell(result)
    except KeyError:
        return "-"


def _nodes(result: Row) -> str:
    return f"{result['nodes']:,}" + (f" ({result['constants']:,})" if result["constants"] else "")


def _verdict(result: Row | None) -> str:
    if result is None:
        return "not run"
    if result["failure"] or not result["same"]:
        reason = result["failure"] or result["why"]
        return f"**{reason}**" + (f" ({result['error']:.0e})" if result.get("error") else "")
    return f"equal ({result['error']:.0e})" if result["error"] else "identical"


def _right(result: Row | None) -> bool:
    """Whether the tool wrote a model that runs and computes the same."""
    return result is not None and not result["failure"] and result["same"] is True


def judgements(results: Row) -> Iterator[tuple[str, ...]]:
    """Each floor and goal that this benchmark decides: what, floor, goal, what was measured."""
    models = results["models"]
    by_name = {model["name"]: model["tools"] for model in models}

    for what, model, key, unit, floor, goal in LIMITS:
        value = by_name.get(model, {}).get(UNVERIFIED, {}).get(key)
        shown = "not measured" if value is None else f"{value:g} {unit}"
        yield what, *(f"{bound:g} {unit}: {_met(value, bound)}" for bound in (floor, goal)), shown

    # Both: the floor speaks of the whole process, and CPU time is what other load on the machine disturbs least.
    for key, what in (("wall_s", "wall time"), ("cpu_s", "CPU time")):
        slower = _exceeding(models, "onnxslim", 1, key), _exceeding(models, "onnxsim", 2, key)
        yield (
            f"{what} without verification",
            f"onnxslim's: {_none(slower[0])}",
            f"2x onnxsim's: {_none(slower[1])}",
            "; ".join(slower[0] + slower[1]) or "within both everywhere",
        )
    more = [text for model in models if (text := _more_nodes(model))]
    yield (
        "nodes",
        f"the fewest of the right peers: {_none(more)}",
        "",
        "; ".join(more) or "fewest or equal everywhere",
    )
    late = [
        f"{m['name']} {m['tools'][GRAPHC]['latency']:.2f}x"
        for m in models
        if m["tools"][GRAPHC].get("latency_low", 0) > SLOWER
    ]
    yield "latency", f"not above the input's: {_none(late)}", "", "; ".join(late) or "never above"
    tools = dict.fromkeys(tool for model in models for tool in model["tools"])
    wrong = {tool: [m["name"] for m in models if tool in m["tools"] and not _right(m["tools"][tool])] for tool in tools}
    counted = ", ".join(f"{tool} {len(names)}" for tool, names in wrong.items())
    yield "models wrong or failed", f"none: {_none(wrong.get(GRAPHC, []))}", "", counted


def _met(value: float | None, bound: float) -> str:
    return "?" if value is None else "met" if value <= bound else "**missed**"


def _none(found: list[str]) -> str:
    return f"**missed on {len(found)}**" if found else "met"


def _exceeding(models: list[Row], peer: str, factor: float, key: str) -> list[str]:
    """Models on which graphc without verification takes longer than ``factor`` times what a peer takes."""
    found = []
    for model in models:
        ours, theirs = model["tools"].get(UNVERIFIED), model["tools"].get(peer)
        if ours and theirs and not theirs["failure"] and ours[key] > factor * theirs[key]:
            found.append(f"{model['name']} {ours[key] / theirs[key]:.2f}x {peer}")
    return found


def _more_nodes(model: Row) -> str:
    """Who leaves fewer nodes than graphc and is right; empty if nobody."""
    ours = model["tools"].get(GRAPHC, {}).get("nodes")
    peers = {
        tool: result["nodes"]
        for tool, result in model["tools"].items()
        if tool not in (GRAPHC, UNVERIFIED) and _right(result)
    }
    best = min(peers, key=lambda tool: peers[tool], default=None)
    if best is None or (ours is not None and ours <= peers[best]):
        return ""
    return f"{model['name']} {ours}, {best} {peers[best]}"


SHRINK_PAGE = """\
# Pruning benchmark

Written by `bench/tables.py` from `shrink.json`; do not edit. Made by
`python bench/shrink.py --peers PYTHON --torch PYTHON`; the last table has the settings of each model.
{machine}; Python {python}; {versions}.{note}

One shot, no healing: the given ratio of units goes from every channel, neuron and attention-head group that the tool
finds, smallest L2 norm first. Everything is relative to the input. `exact` is graphc's recipe without pruning: what is
below it comes from cutting. Latency is that of ONNX Runtime on one thread, its own optimisation on. Error is the root
mean square of the outputs' difference by that of the outputs, on random inputs: it says how much was taken away, not
how good the model still is. Near or above 1, as in most rows, nothing useful is left without retraining: these rows
compare size and speed, not quality. graphc's numbers include its own check that cutting changed nothing but the zeros.

{rows}

Peak anonymous memory of pruning and shrinking the 2.4 GB model: {anon}.

## How each was measured

{settings}
"""


def settings(models: list[Row]) -> str:
    """When and how each model was measured; a result file may hold several runs."""
    header = ["model", "day", "runs of each tool", "seconds per latency", "load average at the start"]
    keys = ("measured", "rounds", "seconds", "load")
    return table(header, ([m["name"], *("-" if m.get(key) is None else m[key] for key in keys)] for m in models))


def note(results: Row) -> str:
    """What else a reader must know about these numbers; empty if nothing."""
    return f" {results['note']}" if results.get("note") else ""


def shrink_page(results: Row) -> str:
    """The page of ``bench/shrink.py``'s results."""
    rows, anon = [], "not measured"
    for model in results["models"]:
        before = model["results"][0]
        for each in model["results"][1:]:
            if model["name"] == "synthetic-2.4gb" and each["ratio"] and not each["failure"]:
                anon = f"{each['anon_mb']:.0f} MB (floor 600 MB: {_met(each['anon_mb'], 600)}, goal 200 MB: "
                anon += f"{_met(each['anon_mb'], 200)})"
            if each["failure"] or "latency" not in each:
                rows.append([model["name"], each["ratio"], each["variant"], *"----", each["failure"] or each["why"]])
                continue
            ratios = [each[key] / before[key] if before[key] else 1 for key in ("parameters", "flops", "bytes")]
            shown = [f"{ratio:.2f}" for ratio in (*ratios, each["latency"])]
            error = "-" if each["rms"] is None else f"{each['rms']:.2g}"
            rows.append([model["name"], each["ratio"] or "", each["variant"], *shown, error])
    return SHRINK_PAGE.format(
        **{key: results[key] for key in ("machine", "python")},
        note=note(results),
        settings=settings(results["models"]),
        versions=", ".join(f"{name} {version}" for name, version in results["versions"].items()),
        rows=table(["model", "ratio", "tool", "parameters", "FLOPs", "file", "latency", "error"], rows),
        anon=anon,
    )


FRONTENDS_PAGE = """\
# Frontend benchmark

Written by `bench/tables.py` from `frontends.json`; do not edit. Made by `python bench/frontends.py`; the last table has
the settings of each model. {machine}; Python {python}; {versions}.{note}

From a torch module (a factory) or a Hugging Face folder (`-hf`) to an ONNX file, each tool as a whole fresh process on
one thread. `torch.onnx.export` runs alone, with its own optimisation on. `graphc` exports, optimises, and compares its
result with torch and with what was exported; `graphc --no-verify` does not. Nodes are those of all graphs of a model,
Constant nodes left out. Latency is the CPU time of ONNX Runtime on one thread with its own optimisation on, relative to
what `torch.onnx.export` wrote, with the middle half of the alternating pairs; only where all of that is above 1 is
graphc slower. The weights of `large-hf` are streamed from the folder into the file; its checks are included.

{rows}

## How each was measured

{settings}
"""


def frontends_page(results: Row) -> str:
    """The page of ``bench/frontends.py``'s results."""
    rows = []
    for model in results["models"]:
        for tool, each in model["tools"].items():
            if each["failure"]:
                rows.append([model["name"], tool, *"-----", each["failure"]])
                continue
            latencies = (
                f"{at + ': ' if at != 'model' else ''}{r['ratio']:.2f} ({r['ratio_low']:.2f} to {r['ratio_high']:.2f})"
                for at, r in each.get("latency", {}).items()
            )
            numbers = [f"{each['wall_s']:.1f}", f"{each['cpu_s']:.1f}", f"{each['anon_mb']:.0f}"]
            weights, nodes = f"{each['weights_mb']:.0f}", f"{each['nodes']:,}"
            rows.append([model["name"], tool, *numbers, weights, nodes, ", ".join(latencies)])
    header = ["model", "tool", "wall, s", "CPU, s", "peak anonymous, MB", "weights, MB", "nodes", "latency"]
    return FRONTENDS_PAGE.format(
        **{key: results[key] for key in ("machine", "python")},
        note=note(results),
        settings=settings(results["models"]),
        versions=", ".join(f"{name} {version}" for name, version in results["versions"].items()),
        rows=table(header, rows),
    )


def readme_table(results: Row) -> str:
    """README.md's table: what graphc made of some of the models."""
    rows = []
    for model in results["models"]:
        after, before = model["tools"].get(GRAPHC), model["input"]
        if model["name"] not in SHOWN or after is None:
            continue
        if not _right(after):
            rows.append([model["name"], before["nodes"], "-", "-", "-", "-", _verdict(after)])
            continue
        rows.append(
            [
                model["name"],
                f"{before['nodes']:,}",
                f"{after['nodes']:,}",
                f"{before['bytes'] / 1e6:,.1f}",
                f"{after['bytes'] / 1e6:,.1f}",
                f"{after['latency']:.2f}",
                f"{after['cpu_s']:.1f} s CPU",
            ]
        )
    header = ["model", "operators before", "after", "MB before", "after", "latency, after / before", "graphc took"]
    return table(header, rows)


QUALITY_PAGE = """\
# Quality

Written by `bench/tables.py` from `quality.json`; do not edit. Made by
`python bench/quality.py --text FOLDER`, which says what the models and their data are.

Statistics come from calibration data, quality from held-out data. Latency is that of ONNX Runtime, after / before, with
one thread and in turns; it is missing where it was not measured. Load is how many processes wanted a core meanwhile.
"""


def quality_page(results: Row) -> str:
    """What compression costs and brings, a table for each experiment."""
    lines = [QUALITY_PAGE]
    for name, found in results["experiments"].items():
        dense, metric = found["dense"], found["metric"]
        rows = [
            [
                row["variant"],
                f"{row['ratio']:.0%}",
                f"{row['quality']:.4g}",
                f"{row['parameters'] / dense['parameters']:.2f}",
                f"{row['flops'] / dense['flops']:.2f}" if "flops" in row and "flops" in dense else "",
                "" if row["latency"] is None else f"{row['latency']:.2f}",
                row.get("load", ""),
                "" if row["seconds"] is None else f"{row['seconds']:.0f}",
            ]
            for row in found["rows"]
        ]
        header = ["method", "removed", metric, "parameters", "FLOPs", "latency", "load", "seconds"]
        dense_text = f"Dense: {metric} {dense['quality']:.4g}, {dense['parameters']:,} parameters."
        about = [found["about"], ""] if found.get("about") else []
        more = [found["note"], ""] if found.get("note") else []
        lines += [f"## {name}", "", f"{dense_text} {found['machine']}.", "", *about, table(header, rows), "", *more]
    return "\n".join(lines)


PAGES: dict[str, Callable[[Row], str]] = {
    "compile": compile_page,
    "frontends": frontends_page,
    "fuse": lambda results: fuse_page(results, table),
    "quality": quality_page,
    "shrink": shrink_page,
    "tvm": lambda results: tvm_page.page(results, table),
}
"""What writes ``NAME.md`` from ``NAME.json``."""


def pages() -> dict[Path, str]:
    """Every file that is written from results, with its text."""
    results = {name: json.loads(path.read_text()) for name in PAGES if (path := RESULTS / f"{name}.json").exists()}
    texts = {RESULTS / f"{name}.md": PAGES[name](each) for name, each in results.items()}
    if "compile" in results:
        readme = ROOT / "README.md"
        marked = re.compile(r"(<!-- bench/tables.py: compile -->\n).*?(<!-- end -->)", re.DOTALL)
        text, count = marked.subn(lambda m: f"{m[1]}{readme_table(results['compile'])}\n{m[2]}", readme.read_text())
        if count != 1:
            sys.exit("README.md has no place marked for the table")
        texts[readme] = text
    return texts


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing, fail if something would change")
    check = parser.parse_args().check
    stale = 0
    for path, text in pages().items():
        if not path.exists() or path.read_text() != text:
            stale = 1
            print(f"{'stale' if check else 'written'}: {path.relative_to(ROOT)}")
            if not check:
                path.write_text(text)
    return stale if check else 0


if __name__ == "__main__":
    sys.exit(main())
