"""Terminal tables of the JSON documents; each reads well in 80 columns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from graphc.views import losses
from graphc.views.units import count, percent, seconds, size

if TYPE_CHECKING:
    from graphc.axes.groups import Groups
    from graphc.depth.structure import Structure

Document = Mapping[str, Any]


def _console() -> Console:
    return Console(highlight=False)


def _table(*columns: str, title: str | None = None, right: Sequence[int] = ()) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False, header_style="dim")
    for i, column in enumerate(columns):
        table.add_column(column, justify="right" if i in right else "left", overflow="fold")
    return table


def show_report(report: Document, *, why: bool = False, verbose: bool = False) -> None:
    """Before and after, what each pass did, what was checked, what it cost."""
    console = _console()
    before, after = report["input"], report["output"]
    console.print(_sizes(before, after, report["measurements"]))
    console.print()
    parts = report.get("parts", {})
    for name, part in parts.items():
        console.print(f"[bold]{escape(name)}[/]")
        _show_part(console, part, why, verbose)
        console.print()
    for warning in report["warnings"] if parts else ():
        console.print(f"[yellow]note[/]      {escape(warning)}")
    if not parts:
        _show_part(console, report, why, verbose)
    if after.get("path"):
        console.print(f"[bold]written[/]   {escape(after['path'])}", soft_wrap=True)
    else:
        console.print("[bold]written[/]   nothing (dry run)")


def _show_part(console: Console, report: Document, why: bool, verbose: bool) -> None:
    """What was done to one graph, and what was checked."""
    if preset := report.get("preset"):
        console.print(f"[bold]preset[/]    {escape(preset['name'])}, {escape(preset['kind'])}: {escape(preset['why'])}")
        console.print(f"[bold]recipe[/]    {escape(report['recipe'])}")
        console.print()
    for note in report["notes"]:
        console.print(f"[bold]source[/]    {escape(note)}")
    if report["notes"]:
        console.print()
    table = _table("pass", "what it did")
    for each in report["passes"]:
        table.add_row(escape(each["name"]), _did(each, why or verbose, verbose))
    console.print(table)
    if why:
        _reasons(console, report)
    for each in report["passes"] if why or verbose else ():
        if each.get("losses"):
            console.print(f"\n[bold]{escape(each['name'])}[/]: relative error that each layer alone causes, log scale")
            for line in losses.text(each["losses"]):
                console.print(escape(line), highlight=False, soft_wrap=True)
    console.print()
    _verdict(console, report)
    for warning in report["warnings"]:
        console.print(f"[yellow]note[/]      {escape(warning)}")


def _sizes(before: Document, after: Document, measured: Document) -> Table:
    table = _table("", "before", "after", "change", right=(1, 2, 3))

    def row(name: str, key: str, show: Any) -> None:
        values = [before[key], after[key]] if key in after else [before[key]]
        cells = [show(v) for v in values] + ([""] if len(values) == 1 else [])
        table.add_row(name, *cells, percent(*values) if len(values) == 2 else "")

    row("size", "bytes", size)
    row("parameters", "parameters", count)
    row("nodes", "nodes", str)
    latency = measured.get("latency")
    if latency:
        times = [seconds(latency[k]["median"]) for k in ("input", "output")]
        table.add_row("latency", *times, f"{latency['ratio']:.2f}x")
    return table


def _did(each: Document, hinted: bool, verbose: bool) -> str:
    if each["error"]:
        undone = " [dim](rolled back)[/]" if each["rolled_back"] else ""
        return f"[red]{escape(each['error'])}[/]{undone}"
    changes = each["changes"]
    shown = changes if verbose or len(changes) <= 6 else [*changes[:5], f"... and {len(changes) - 5} more kinds (-v)"]
    lines = [escape(", ".join(shown)) if shown else "nothing to do"]
    refused = sum(r["count"] for r in each["refusals"])
    if refused and not hinted:
        lines.append(f"[dim]{refused} place{'s' if refused > 1 else ''} did not apply: --why[/]")
    return "\n".join(lines)


def _reasons(console: Console, report: Document) -> None:
    table = _table("pass", "times", "why it did not apply", "first at", title="\nleft alone", right=(1,))
    for each in report["passes"]:
        for refusal in sorted(each["refusals"], key=lambda r: -r["count"]):
            table.add_row(
                escape(each["name"]),
                str(refusal["count"]),
                escape(refusal["reason"]),
                escape(refusal["node"]),
            )
    if table.row_count:
        console.print(table)
    else:
        console.print("\nleft alone: nothing was tried in vain")


def _verdict(console: Console, report: Document) -> None:
    rewrite = report["rewrite"]
    if not rewrite:
        console.print("[bold]checked[/]   nothing changed")
    elif not rewrite["checked"]:
        console.print(f"[yellow]unchecked[/] {escape(rewrite['why'])}")
    else:
        provider = rewrite["provider"].removesuffix("ExecutionProvider")
        console.print(
            f"[green]checked[/]   the same on {len(rewrite['cases'])} inputs in ONNX Runtime ({provider}); "
            f"largest error {rewrite.get('worst', 0.0):.2g} of what rounding explains"
        )
    if torch := report["measurements"].get("torch"):
        console.print(
            f"[green]as torch[/]  the same at {len(torch['cases'])} sizes before any pass; largest difference "
            f"{torch['worst']:.2g} of the largest number"
        )
    if made := report["measurements"].get("compiled"):
        console.print(
            f"[green]compiled[/]  the same on {len(made['cases'])} inputs of {len(made['shapes'])} sizes in "
            f"{made['provider']}; largest relative error {made['worst']:.2g}"
        )
    for metric, value in report["approximation"].items():
        console.print(f"[bold]measured[/]  lossy passes cost {escape(metric)} = {value:.3g}")


def show_comparison(found: Document, a: str, b: str) -> None:
    """The verdict of ``graphc verify`` with one row per output."""
    console = _console()
    if not found["checked"]:
        console.print(f"[yellow]not checked[/]: {escape(found['why'])}")
        return
    table = _table("output", "max abs error", "max rel error", "allowed", right=(1, 2, 3))
    for output in found["outputs"]:
        numbers = ["" if output[k] is None else f"{output[k]:.3g}" for k in ("max_abs", "max_rel", "tolerance")]
        table.add_row(escape(output["name"]), *numbers)
    console.print(table)
    for note in found["notes"]:
        console.print(f"[yellow]note[/]: {escape(note)}")
    if found["ok"]:
        console.print(f"[green]same[/]: {escape(b)} computes what {escape(a)} does, on {len(found['cases'])} inputs")
    else:
        console.print(f"[red]different[/]: {escape(found['why'])}")


def show_bench(found: Document) -> None:
    """Latency of each model, and its ratio to the first."""
    console = _console()
    table = _table("model", "median", "spread", "ratio", "peak memory", "provider", right=(1, 2, 3, 4))
    for row in found["models"]:
        table.add_row(
            escape(row["model"]),
            seconds(row["median"]),
            f"{seconds(row['low'])} - {seconds(row['high'])}",
            f"{row['ratio']:.2f}x",
            size(row["memory"]) if row.get("memory") else "",
            escape(row["provider"].removesuffix("ExecutionProvider")),
        )
    console.print(table)
    console.print(f"[dim]{found['rounds']} rounds, interleaved; spread: quartiles; input {escape(found['input'])}[/]")


def show_inspection(found: Document) -> None:
    """What is in a model."""
    console = _console()
    table = _table("", "")
    for name, value in found["summary"].items():
        table.add_row(f"[dim]{name}[/]", escape(str(value)))
    console.print(table)
    for title, key in (("inputs", "inputs"), ("outputs", "outputs")):
        table = _table("name", "type", "shape", title=f"\n{title}")
        for each in found[key]:
            table.add_row(escape(each["name"]), each["type"], escape(each["shape"]))
        console.print(table)
    table = _table("operator", "count", "FLOPs", "bytes", title="\noperators", right=(1, 2, 3))
    for each in found["operators"]:
        flops = count(each["flops"]) if each["flops"] else ""
        table.add_row(escape(each["operator"]), str(each["count"]), flops, size(each["bytes"]) if each["bytes"] else "")
    console.print(table)
    table = _table("tensor", "type", "shape", "bytes", title="\nlargest tensors", right=(3,))
    for each in found["largest"]:
        table.add_row(escape(each["name"]), each["type"], escape(each["shape"]), size(each["bytes"]))
    console.print(table)
    if found["suspicious"]:
        console.print("\n[bold]suspicious[/]")
        for text in found["suspicious"]:
            console.print(f"  - {escape(text)}")


def show_groups(groups: Groups) -> None:
    """What can be cut, and what cannot with the reasons, the most frequent first."""
    from graphc.views.groups import rows

    console = _console()
    table = _table("group", "kind", "size", "params/unit", "exact", "places", right=(2, 3, 5))
    for row in rows(groups):
        table.add_row(*map(escape, row))
    console.print(table)
    reasons: dict[str, list[str]] = {}
    for fixed in groups.fixed:
        reasons.setdefault(fixed.reason, []).append(f"{fixed.value.name}:{fixed.axis}")
    if reasons:
        table = _table("axes", "why they cannot be cut", "first", title="\nfixed", right=(0,))
        for reason, where in sorted(reasons.items(), key=lambda r: -len(r[1])):
            table.add_row(str(len(where)), escape(reason), escape(where[0]))
        console.print(table)
    console.print("[dim]graphc explain MODEL NAME says what goes with a group, or why an axis is fixed[/]")


def show_blocks(structure: Structure) -> None:
    """The blocks of a model, and what each would save."""
    from graphc.views.blocks import rows

    console = _console()
    if not structure.blocks:
        console.print("no residual branch was found: nothing that drop-blocks could take out")
        return
    table = _table("block", "first ... last node", "params", "FLOPs", "can go", right=(2, 3))
    for row in rows(structure):
        table.add_row(*map(escape, row))
    console.print(table)
    console.print("[dim]FLOPs: every dynamic dimension 1. drop-blocks takes out the least important ones[/]")


def show_catalogue(found: Document) -> None:
    """Names with one line each, or the documentation of one."""
    console = _console()
    for section, rows in found.get("sections", {}).items():
        table = _table("name", "effect" if section == "passes" else "", "what it is", title=section)
        for row in rows:
            table.add_row(escape(row["name"]), row.get("effect", ""), escape(row["summary"]))
        console.print(table)
        console.print()
    for line in found.get("more", {}).values():
        console.print(f"[dim]{escape(line)}[/]")
    if "documentation" in found:
        console.print(f"[bold]{escape(found['name'])}[/] [dim]{escape(found.get('kind', ''))}[/]\n")
        if found["kind"] == "recipe":
            console.print(escape(found["documentation"]), soft_wrap=True)
        else:
            from rich.markdown import Markdown

            console.print(Markdown(found["documentation"]))
    if found.get("options"):
        table = _table("option", "what it does", title="\noptions")
        for row in found["options"]:
            takes = row["type"].replace("|", " | ")
            help = f"{escape(row['help'])} [dim]({escape(row['default'])})[/]"
            table.add_row(escape(row["name"]), f"{help}\n{escape(takes)}")
        console.print(table)


def show_doctor(found: Document) -> None:
    """What is installed and what runs where."""
    console = _console()
    table = _table("package", "version", "what it is for")
    for row in found["packages"]:
        table.add_row(row["name"], row["version"] or "[yellow]missing[/]", escape(row["purpose"]))
    console.print(table)
    console.print(f"what stands in brackets: {escape(found['extras'])}")
    if found["providers"]:
        table = _table("execution provider", "runs here", title="\nONNX Runtime")
        for row in found["providers"]:
            table.add_row(row["name"], "[green]yes[/]" if row["runs"] else f"[yellow]no[/] {escape(row['why'])}")
        console.print(table)
        limits = found["limits"]
        console.print(f"loads IR version up to {limits['ir']}, opset up to {limits['opset']}")
    for advice in found["advice"]:
        console.print(f"[yellow]try[/] {escape(advice)}")
    if not found["advice"]:
        console.print("[green]nothing is missing[/]")
