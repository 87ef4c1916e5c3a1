"""The report as one self-contained HTML page: numbers first, then passes, checks and reasons."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Any

from graphc.views import losses
from graphc.views.units import count, percent, seconds, size

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #1a1a1a }
h1 { font-size: 1.4rem } h2 { font-size: 1.05rem; margin-top: 2rem }
table { border-collapse: collapse; width: 100% } td, th { text-align: left; padding: .25rem .75rem .25rem 0;
vertical-align: top; border-bottom: 1px solid #e5e5e5 } td.n, th.n { text-align: right; white-space: nowrap }
.good { color: #0a7a2f } .bad { color: #b3261e } .dim { color: #777 } code { font-size: .9em }
svg text { font: 12px system-ui, sans-serif }
@media (prefers-color-scheme: dark) { body { background: #161616; color: #e6e6e6 } td, th { border-color: #333 } }
"""


def page(report: Mapping[str, Any]) -> str:
    """The whole page.

    Args:
        report: The document of ``Report.to_json``.
    """
    name = escape(report["input"]["path"].rsplit("/", 1)[-1])
    parts = [
        f"<!doctype html><html lang='en'><meta charset='utf-8'><title>graphc: {name}</title>",
        f"<style>{_STYLE}</style><h1>graphc optimize {name}</h1>",
        _verdict(report),
        _bars(report),
        *(_details(part, name) for name, part in report.get("parts", {"": report}).items()),
        f"<p class='dim'>recipe <code>{escape(report['recipe'])}</code>, target <code>{escape(report['target'])}"
        f"</code>, schema <code>{escape(report['schema'])}</code></p></html>",
    ]
    return "\n".join(parts) + "\n"


def _details(report: Mapping[str, Any], name: str) -> str:
    """What was done to one graph; its name is empty where it is the only one."""
    of = f" of {escape(name)}" if name else ""
    return "\n".join(
        [
            f"<h2>Passes{of}</h2>",
            _passes(report),
            f"<h2>Left alone{of}</h2>",
            _reasons(report),
            *(
                f"<h2>What each layer alone costs: {escape(each['options'])}{of}</h2>{losses.table(each['losses'])}"
                for each in report["passes"]
                if each.get("losses")
            ),
            f"<h2>Checked outputs{of}</h2>",
            _outputs(report),
        ]
    )


def _verdict(report: Mapping[str, Any]) -> str:
    rewrite = report["rewrite"]
    if not rewrite:
        text = "<p>Nothing changed.</p>"
    elif not rewrite["checked"]:
        text = f"<p class='bad'>Not checked: {escape(rewrite['why'])}</p>"
    else:
        text = (
            f"<p class='good'>The same on {len(rewrite['cases'])} inputs; the largest error is "
            f"{rewrite['worst']:.2g} of what rounding explains.</p>"
        )
    costs = "".join(
        f"<p>Lossy passes cost {escape(metric)} = {value:.3g}.</p>" for metric, value in report["approximation"].items()
    )
    notes = "".join(f"<p class='bad'>{escape(text)}</p>" for text in report["warnings"])
    made = "".join(f"<p>{escape(note)}</p>" for note in report["notes"])
    if preset := report.get("preset"):
        chosen = f"{preset['name']}, {preset['kind']}: {preset['why']}"
        made += f"<p>Preset {escape(chosen)}; <code>{escape(report['recipe'])}</code>.</p>"
    return text + costs + notes + made


def _bars(report: Mapping[str, Any]) -> str:
    """Before and after as pairs of bars, each pair on its own scale."""
    before, after = report["input"], report["output"]
    rows: list[tuple[str, float, float, Callable[[float], str]]] = [
        ("size", before["bytes"], after["bytes"], size),
        ("parameters", before["parameters"], after["parameters"], count),
        ("nodes", before["nodes"], after["nodes"], count),
    ]
    latency = report["measurements"].get("latency")
    if latency:
        rows.append(("latency", latency["input"]["median"], latency["output"]["median"], seconds))
    drawn = []
    for i, (label, a, b, show) in enumerate(rows):
        top, scale = 46 * i, 420 / max(a, b, 1e-12)
        drawn.append(
            f"<text x='0' y='{top + 22}' fill='currentColor'>{label}</text>"
            f"<rect x='90' y='{top + 4}' width='{a * scale:.1f}' height='14' fill='#9aa5b1'/>"
            f"<rect x='90' y='{top + 21}' width='{b * scale:.1f}' height='14' fill='#2f6feb'/>"
            f"<text x='{96 + a * scale:.1f}' y='{top + 15}' fill='currentColor'>{show(a)}</text>"
            f"<text x='{96 + b * scale:.1f}' y='{top + 32}' fill='currentColor'>{show(b)} ({percent(a, b)})</text>"
        )
    return (
        f"<svg role='img' aria-label='before and after' viewBox='0 0 680 {46 * len(rows)}' width='100%'>"
        + "".join(drawn)
        + "</svg><p class='dim'>grey: before, blue: after</p>"
    )


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]], right: tuple[int, ...] = ()) -> str:
    def line(cells: tuple[str, ...], tag: str) -> str:
        marked = (f"<{tag}{' class=n' if i in right else ''}>{cell}</{tag}>" for i, cell in enumerate(cells))
        return "<tr>" + "".join(marked) + "</tr>"

    return "<table>" + line(head, "th") + "".join(line(row, "td") for row in rows) + "</table>"


def _passes(report: Mapping[str, Any]) -> str:
    rows = []
    for each in report["passes"]:
        what = f"<span class='bad'>{escape(each['error'])}</span>" if each["error"] else ""
        changes = "" if each["rolled_back"] else "<br>".join(map(escape, each["changes"]))
        rows.append((f"<code>{escape(each['options'])}</code>", each["effect"], what or changes or "nothing to do",
                     f"{each['seconds']:.2f} s"))  # fmt: skip
    return _table(("pass", "effect", "what it did", "time"), rows, right=(3,))


def _reasons(report: Mapping[str, Any]) -> str:
    rows = [
        (escape(each["name"]), str(r["count"]), escape(r["reason"]), f"<code>{escape(r['node'])}</code>")
        for each in report["passes"]
        for r in sorted(each["refusals"], key=lambda r: -r["count"])
    ]
    return (
        _table(("pass", "times", "why it did not apply", "first at"), rows, right=(1,)) if rows else "<p>Nothing.</p>"
    )


def _outputs(report: Mapping[str, Any]) -> str:
    rows = [
        (
            f"<code>{escape(o['name'])}</code>",
            *("" if o[k] is None else f"{o[k]:.3g}" for k in ("max_abs", "max_rel", "tolerance")),
        )
        for o in report["rewrite"].get("outputs", ())
    ]
    return _table(("output", "max abs error", "max rel error", "allowed"), rows, right=(1, 2, 3)) if rows else ""
