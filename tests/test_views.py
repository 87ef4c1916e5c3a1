"""Pictures and tables: well-formed, complete, and readable in 80 columns."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

import graphc
from graphc.cli import main
from graphc.views import groups as view
from graphc.views import html, units

DATA = Path(__file__).parent / "data"


@pytest.fixture(scope="module")
def vit() -> object:
    return graphc.groups(DATA / "fmnist_vit_tiny.onnx")


def test_the_document_places_every_unit(vit: object) -> None:
    found = view.document(vit)  # type: ignore[arg-type]
    assert found["schema"] == "graphc-groups/1" and json.dumps(found)
    assert {g["kind"] for g in found["groups"]} >= {"head", "neuron", "width"}
    for group, listed in zip(vit, found["groups"], strict=True):  # type: ignore[call-overload]
        for place, shown in zip(group.places, listed["places"], strict=True):
            if "units" in shown:
                np.testing.assert_array_equal(shown["units"], place.units)
                continue
            for unit in (0, group.size - 1):
                first = shown["offset"] + unit * shown["stride"]
                repeats = range(shown["repeat"])
                expected = [
                    first + r * group.size * shown["stride"] + i for r in repeats for i in range(shown["stride"])
                ]
                assert place.indices(unit).tolist() == expected


def test_the_picture_has_a_rail_for_every_group_and_a_row_for_every_weight(vit: object) -> None:
    root = ET.fromstring(view.svg(vit))  # type: ignore[arg-type]
    space = "{http://www.w3.org/2000/svg}"
    titles = [t.text for t in root.iter(f"{space}title")]
    assert len(titles) == len(list(vit))  # type: ignore[call-overload]
    weights = {p.value.name for g in vit for p in g.places}  # type: ignore[attr-defined]
    shown = {(t.text or "").strip() for t in root.iter(f"{space}text")}
    assert weights <= shown
    assert len(list(root.iter(f"{space}circle"))) == sum(len(g.places) for g in vit)  # type: ignore[attr-defined]


def test_rails_of_one_lane_do_not_overlap(vit: object) -> None:
    rows = {p.value.name or "": i for i, p in enumerate(p for g in vit for p in g.places)}  # type: ignore[attr-defined]
    lanes: dict[int, list[tuple[int, int]]] = {}
    for lane, first, last, _ in view._rails(vit, rows):  # type: ignore[arg-type]
        assert all(last < a or b < first for a, b in lanes.get(lane, []))
        lanes.setdefault(lane, []).append((first, last))


def test_dot_names_every_group(vit: object) -> None:
    text = view.dot(vit)  # type: ignore[arg-type]
    assert text.startswith("graph groups {") and text.rstrip().endswith("}")
    assert all(g.name in text for g in vit)  # type: ignore[attr-defined]
    assert text.count(" -- ") == sum(len(g.places) for g in vit)  # type: ignore[attr-defined]


def test_groups_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = str(DATA / "fmnist_resnet.onnx")
    assert main(["inspect", model, "--groups"]) == 0
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 80
    assert main(["inspect", model, "--svg", str(tmp_path / "g.svg")]) == 0
    assert (tmp_path / "g.svg").read_text().startswith("<svg")
    assert main(["inspect", model, "--dot"]) == 0
    assert capsys.readouterr().out.startswith("graph")
    assert main(["explain", model, "layers.0.c1.weight"]) == 0
    assert "layers.0.c1.weight:0" in capsys.readouterr().out
    assert main(["explain", model, "layers.0.c1.weigth"]) == 2
    assert "did you mean 'layers.0.c1.weight'" in capsys.readouterr().err


class _Balanced(HTMLParser):
    """Checks that every tag is closed in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: object) -> None:
        if tag not in ("meta", "br", "rect"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in ("rect",):
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_shows_numbers_reasons_and_hostile_names_escaped() -> None:
    report = graphc.optimize(DATA / "tiny_mixtral_bytes.onnx", recipe="simplify,fuse", measure=False, cache=False)
    document = report.to_json()
    document["input"]["path"] = "/x/<script>alert(1)</script>.onnx"
    parser = _Balanced()
    parser.feed(html.page(document))
    assert parser.open == [] and "<script>" not in html.page(document)
    reason = next(r["reason"] for p in document["passes"] for r in p["refusals"])
    assert reason in parser.text


@pytest.mark.parametrize(
    ("shown", "text"),
    [
        (units.size(0), "0 B"),
        (units.size(999), "999 B"),
        (units.size(1253575), "1.25 MB"),
        (units.size(2.4e9), "2.4 GB"),
        (units.count(12), "12"),
        (units.count(307402), "307 k"),
        (units.seconds(0.00042), "420 µs"),
        (units.seconds(0.0032), "3.2 ms"),
        (units.seconds(12.345), "12.3 s"),
        (units.percent(100, 50), "-50 %"),
        (units.percent(100, 100), "0 %"),
        (units.percent(1000, 1015), "+1.5 %"),
        (units.percent(0, 5), ""),
    ],
)
def test_numbers_read_well(shown: str, text: str) -> None:
    assert shown == text
