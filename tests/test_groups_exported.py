"""The same modules as three exporters write them: the groups, and the law on each of them."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from fragments import feeds, run

from graphc.axes import cut
from graphc.axes.groups import analyse
from graphc.contract import Capabilities, Context, Pass
from graphc.passes.fuse import Fuse
from graphc.passes.shrink import Shrink
from graphc.passes.simplify import Simplify

FOLDER = Path(__file__).parent / "data" / "fragments"
TRUTH: dict[str, list[tuple[str, int, bool]]] = json.loads((FOLDER / "exported.json").read_text())
EXPORTS = [(name, how) for name in TRUTH for how in ("dynamo", "dynamo-raw", "torchscript")]
CONTEXT = Context(Capabilities("portable", 10, {"": 21}))

MISSED = {
    # SplitToSequence and SequenceAt instead of Split; the unfolded export wraps negative indices by arithmetic.
    ("llama", "dynamo-raw"): {("head", 2, True), ("head_dim", 3, True)},
    ("experts", "dynamo-raw"): {("expert", 4, True)},
    ("lstm", "dynamo-raw"): {("neuron", 4, True), ("neuron", 3, True)},
}
"""What is not found in an export as it comes, before ``simplify``."""


BEFORE: dict[str, tuple[Pass, ...]] = {
    "as exported": (),
    "simplified": (Simplify(),),
    "fused": (Simplify(), Fuse()),
}


def load(name: str, how: str, before: str) -> ir.Model:
    model = ir.load(FOLDER / f"{name}-{how}.onnx")
    for each in BEFORE[before]:
        each.run(model, CONTEXT)
    return model


@pytest.mark.parametrize("before", BEFORE)
@pytest.mark.parametrize(("name", "how"), EXPORTS)
def test_groups(name: str, how: str, before: str) -> None:
    found = Counter((g.kind, g.size, g.exact) for g in analyse(load(name, how, before)).groups)
    expected = Counter(map(tuple, TRUTH[name]))
    missed = expected - found
    assert set(missed) <= MISSED.get((name, how), set()), missed
    assert not found - expected


@pytest.mark.parametrize("before", BEFORE)
@pytest.mark.parametrize(("name", "how"), EXPORTS)
def test_law(name: str, how: str, before: str) -> None:
    """All groups together, and each alone, written dead and removed."""
    rng = np.random.default_rng(2)
    count = len(analyse(load(name, how, before)).groups)
    alone = [{i} for i in range(count)] if before == "simplified" else []
    for chosen in [*alone, set(range(count))]:
        model = load(name, how, before)
        groups = analyse(model)
        keep = {}
        for i in chosen:
            group = groups.groups[i]
            if group.exact and group.size > group.min_keep:
                keep[group.name] = rng.permutation(group.size) < max(group.min_keep, group.size // 2)
        if not keep:
            continue
        cut.zero(model, groups, keep)
        zeroed = ir.to_proto(model)
        result = Shrink().run(model, CONTEXT)
        small = ir.to_proto(model)
        inputs = feeds(zeroed, 11)
        expected, got = run(zeroed, inputs), run(small, inputs)
        assert any("removed" in change for change in result.changes)
        for output, array in expected.items():
            # Float32 sums of at most a few hundred terms.
            limit = 2e-5 * (np.abs(array).max() + 1e-6)
            np.testing.assert_allclose(got[output], array, rtol=0, atol=limit, err_msg=f"{output} {list(keep)}")
