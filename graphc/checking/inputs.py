"""Inputs made to fit a model's interface: what a checker feeds a model for which nobody gave data.

Useful inputs need more than a dtype and a shape: token ids must lie in their table, masks must hold 0 and 1 and leave
no row empty, a sample rate must be one that the model knows, symbolic dimensions must agree between inputs. What an
input is for is found in the graph, see :mod:`graphc.checking.roles`; which sizes run, by trying.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx_ir as ir

from graphc.checking.dims import Symbols
from graphc.checking.roles import Role, role
from graphc.checking.widths import fixed
from graphc.contract import Arrays
from graphc.errors import BadInput
from graphc.shapes.expressions import Sizes, evaluate

Array = np.ndarray[Any, np.dtype[Any]]

MAX_ELEMENTS = 1 << 23
"""Elements of all inputs of a case together, above which other sizes of the dynamic dimensions are taken."""

_MAX_DEFAULT = 1 << 16
"""Elements of a default up to which a case gives another value for it."""

ZEROS, WIDE = "zeros", "magnitudes from 1e-4 to 1e2"
STRANGE = (ZEROS, WIDE)
"""Values that are for checks: rewrites must be right for them, too."""

_LAST_PLAIN_IR = 3
"""Up to this IR version every initializer is listed as an input, without being meant as one."""


@dataclass(frozen=True)
class Case:
    """One set of inputs.

    Attributes:
        arrays: Arrays by input name.
        description: The sizes and the kind of values, e.g. ``"batch=2 sequence=7, left padding"``.
        strange: Whether values are such as no data has: what is lossy is not judged by them.
    """

    arrays: Arrays
    description: str = ""
    strange: bool = False


@dataclass(frozen=True)
class Input:
    """An input to be filled: its dimensions are numbers, names, or expressions over names."""

    name: str
    dtype: ir.DataType
    dims: tuple[int | str, ...]
    role: Role

    @property
    def index(self) -> bool:
        """Whether the values index a table, whatever else is done with them."""
        return bool(self.role.bounds)

    @property
    def mask(self) -> bool:
        return self.role.mask and not self.index

    @property
    def choices(self) -> list[float]:
        """The values to choose from, the first the most ordinary; empty if any value will do."""
        if self.dtype == ir.DataType.BOOL and not self.dims:
            return [1, 0]
        if self.index or not self.role.choices:
            return []
        known = sorted(set(self.role.choices), reverse=True)
        # What a single constant is compared with has another branch, too: half as much, as sample rates go.
        return known if len(known) > 1 else [known[0], known[0] // 2]

    @property
    def plain(self) -> bool:
        """Whether the values are numbers to compute with."""
        return self.dtype.is_floating_point() and not (self.role.mask or self.role.sizes or self.choices)


Fill = Callable[[Input, tuple[int, ...], int, np.random.Generator], Array]
"""``fill(input, shape, bound, rng)``: the values of an input; ``bound`` is 0 where nothing is indexed."""


def generate(model: ir.Model, *, seed: int = 0, accepts: Callable[[Arrays], bool] | None = None) -> list[Case]:
    """All that :func:`cases` makes."""
    return list(cases(model, seed=seed, accepts=accepts))


def cases(model: ir.Model, *, seed: int = 0, accepts: Callable[[Arrays], bool] | None = None) -> Iterator[Case]:
    """Make inputs for a model: several sizes of every symbolic dimension, ordinary and special values.

    The same model and seed give the same inputs. Inputs that have defaults (they are initializers too) are left out,
    except in one case.

    Args:
        model: Any model; its declared static dimensions are kept.
        seed: Of the random values.
        accepts: Whether the model runs with some inputs. With it, sizes that do not run are replaced by others
            (equal lengths, multiples of 32, ...), and what never runs is left out.

    Yields:
        Cases that ``accepts`` has just taken, the most ordinary first; none if it took none.

    Raises:
        BadInput: An input is a sequence, a map or an optional, or has no declared rank.
    """
    inputs = [described(model, v) for v in model.graph.inputs if not v.is_initializer()]
    symbols = Symbols.of(inputs, fixed(model))
    takes = accepts or (lambda arrays: True)

    def make(sizes: Sizes, number: int, what: str, fill: Fill = ordinary) -> Case | None:
        if sizes and sum(math.prod(evaluate(dim, sizes) for dim in each.dims) for each in inputs) > MAX_ELEMENTS:
            return None
        case = _case(inputs, sizes, seed + number, what, fill)
        return case if takes(case.arrays) else None

    for fill in (ordinary, cautious):
        for plan in symbols.plans():
            if (first := make(plan(0), 0, "ordinary values", fill)) is None:
                continue
            yield first
            sizes = [plan(0)]
            for variant in symbols.variants[1:]:
                for wanted in symbols.steps(plan, variant):
                    if wanted not in sizes and (case := make(wanted, variant, "ordinary values", fill)):
                        yield case
                        sizes.append(wanted)
                        break
            for number, (what, values) in enumerate(_special(inputs, fill)):
                at = sizes[min(2, len(sizes) - 1)] if number % 2 else sizes[0]
                if case := make(at, 10 + number, what, values):
                    yield replace(case, strange=what in STRANGE)
            if (given := _given(model, first, seed)) and takes(given.arrays):
                yield given
            return


def described(model: ir.Model, value: ir.Value) -> Input:
    """An input of a model with its dimensions and what it is for.

    Raises:
        BadInput: It is a sequence, a map or an optional, or has no declared rank.
    """
    name = value.name or ""
    if not isinstance(value.type, ir.TensorType):
        kind = type(value.type).__name__.removesuffix("Type").lower() if value.type else "of unknown type"
        raise BadInput(f"no values can be made for input '{name}'", why=f"it is no tensor but {kind}")
    if value.shape is None:
        raise BadInput(
            f"no values can be made for input '{name}'",
            why="its rank is not declared",
            hint="give inputs with --data",
        )
    dims: list[int | str] = []
    for axis, size in enumerate(value.shape):
        dim = size if isinstance(size, int) else size.value
        if dim in (None, "", "?") or (isinstance(dim, int) and dim < 0):
            # Nameless: the first dynamic axis is the batch, in caches and recurrent states as well.
            dim = f"{name}.{axis}" if any(isinstance(d, str) for d in dims) else "batch"
        assert dim is not None
        dims.append(dim)
    return Input(name, value.type.dtype, tuple(dims), role(model, value))


def _case(inputs: Sequence[Input], sizes: Sizes, seed: int, what: str, fill: Fill) -> Case:
    arrays = {}
    for number, each in enumerate(inputs):
        shape = tuple(evaluate(dim, sizes) for dim in each.dims)
        bound = min(
            (evaluate(b, sizes) if isinstance(b, int) else sizes.get(b, 1) for b in each.role.bounds), default=0
        )
        array = fill(each, shape, bound, np.random.default_rng((seed, number)))
        arrays[each.name] = _typed(array, each.dtype)
    named = " ".join(f"{symbol}={size}" for symbol, size in sizes.items())
    return Case(arrays, ", ".join(filter(None, (named, what))))


def _typed(array: Array, dtype: ir.DataType) -> Array:
    array = np.asarray(array)  # without dimensions, NumPy makes scalars
    if dtype == ir.DataType.STRING:
        return array.astype(object)
    if dtype.is_floating_point():
        limit = float(dtype.max)
        array = np.clip(array.astype(np.float64), -limit, limit)
    return np.asarray(array, dtype=dtype.numpy())


def _special(inputs: Sequence[Input], usual: Fill) -> Iterator[tuple[str, Fill]]:
    """The kinds of values to try besides ordinary ones, as far as the inputs have a use for them."""
    if any(each.mask and each.dims for each in inputs):
        yield "left padding", _padded(usual, right=False)
        yield "right padding", _padded(usual, right=True)
    for each in inputs:
        for choice in each.choices[1:3]:
            yield f"{each.name}={choice:g}", _chosen(usual, each.name, choice)
    if any(each.plain for each in inputs):
        yield ZEROS, _plain(usual, zeros)
        yield "smooth", _plain(usual, smooth)
        yield WIDE, _plain(usual, wide)
    else:
        yield "other values", usual


def _given(model: ir.Model, case: Case, seed: int) -> Case | None:
    """A case that gives other values than the defaults of inputs that have some."""
    if model.ir_version <= _LAST_PLAIN_IR:
        return None
    rng = np.random.default_rng(seed)
    given = {}
    for value in model.graph.inputs:
        default = value.const_value if value.is_initializer() else None
        if default is not None and default.size <= _MAX_DEFAULT and default.dtype.is_floating_point():
            array = default.numpy()
            given[value.name or ""] = (array * (1 + 0.1 * rng.standard_normal(array.shape))).astype(array.dtype)
    return Case({**case.arrays, **given}, f"{case.description}, defaults replaced") if given else None


_WORDS = np.array(["a", "graph", "compiler", "", "Äpfel 7"], dtype=object)


def ordinary(each: Input, shape: tuple[int, ...], bound: int, rng: np.random.Generator) -> Array:
    """Values that the model may meet: normal floats, indices all over the table, masks that leave out nothing."""
    if each.dtype == ir.DataType.STRING:
        return rng.choice(_WORDS, size=shape)
    if each.choices:
        return np.full(shape, each.choices[0])
    if each.role.sizes and not each.index:
        return _size_like(each.role.sizes[0], shape)
    if each.dtype == ir.DataType.BOOL:
        values = rng.random(shape) < 0.75
        values[..., :1] = True  # no row without any
        return values
    if each.mask:
        return np.ones(shape)
    if each.index:
        return _indices(each, shape, bound, rng)
    if each.dtype.is_integer():
        # Pixels and the like take their whole range; what else integers may be, positive ones do least harm.
        low, high = (each.dtype.min, each.dtype.max) if each.dtype.bitwidth <= 8 else (1, 8)
        return rng.integers(int(low), int(high), size=shape, endpoint=True)
    return rng.standard_normal(shape, dtype=np.float32)


def cautious(each: Input, shape: tuple[int, ...], bound: int, rng: np.random.Generator) -> Array:
    """Ordinary values, but zeros for integers of which nothing is known."""
    known = each.index or each.mask or each.choices or each.role.sizes
    return np.zeros(shape) if each.dtype.is_integer() and not known else ordinary(each, shape, bound, rng)


def _indices(each: Input, shape: tuple[int, ...], bound: int, rng: np.random.Generator) -> Array:
    if "position" in each.name.lower() and shape and shape[-1] <= bound:
        return np.broadcast_to(np.arange(shape[-1]), shape)
    values = np.asarray(rng.integers(0, bound, size=shape))
    if values.size > 2:
        values.reshape(-1)[:2] = 0, bound - 1  # the ends of the table
    return values


def _size_like(wanted: Any, shape: tuple[int, ...]) -> Array:
    match wanted:
        case "count":
            return np.arange(math.prod(shape)).reshape(shape)
        case "scales":
            values = np.ones(shape)
            values.reshape(-1)[-2:] = 2
            return values
        case "reshape":
            values = np.ones(shape)
            values.reshape(-1)[:1] = -1
            return values
    return np.full(shape, wanted)


def _padded(usual: Fill, *, right: bool) -> Fill:
    """Masks that leave out another part of every row, never all of it, at its end or its start."""

    def fill(each: Input, shape: tuple[int, ...], bound: int, rng: np.random.Generator) -> Array:
        if not each.mask or not shape or not shape[-1]:
            return usual(each, shape, bound, rng)
        length = shape[-1]
        kept = rng.integers((length + 1) // 2, max(length, 2), size=(*shape[:-1], 1))
        place = np.arange(length) if right else np.arange(length)[::-1]
        return np.broadcast_to(place, shape) < kept

    return fill


def _chosen(usual: Fill, name: str, choice: float) -> Fill:
    def fill(each: Input, shape: tuple[int, ...], bound: int, rng: np.random.Generator) -> Array:
        return np.full(shape, choice) if each.name == name else usual(each, shape, bound, rng)

    return fill


def _plain(usual: Fill, special: Fill) -> Fill:
    def fill(each: Input, shape: tuple[int, ...], bound: int, rng: np.random.Generator) -> Array:
        return (special if each.plain else usual)(each, shape, bound, rng)

    return fill


def zeros(each: Input, shape: tuple[int, ...], bound: int, rng: np.random.Generator) -> Array:
    return np.zeros(shape, dtype=np.float32)


def wide(each: Input, shape: tuple[int, ...], bound: int, rng: np.random.Generator) -> Array:
    """Positive and negative values, their magnitudes even in the logarithm."""
    return np.asarray(10.0 ** rng.uniform(-4, 2, size=shape) * rng.choice(np.array([-1.0, 1.0]), size=shape))


def smooth(each: Input, shape: tuple[int, ...], bound: int, rng: np.random.Generator) -> Array:
    """Values that change slowly along the last axes: from 0 to 1 as in pictures, or small as in recordings."""
    picture = len(shape) > 3
    depth = 2 if picture else min(len(shape), 1)
    leading = len(shape) - depth
    values = np.zeros(shape)
    for _ in range(3):
        wave = np.ones(shape)
        for axis in range(leading, len(shape)):
            along = np.linspace(0, 2 * np.pi, shape[axis]).reshape(-1, *[1] * (len(shape) - axis - 1))
            phase = rng.uniform(0, 2 * np.pi, size=(*shape[:leading], *[1] * depth))
            wave *= np.sin(rng.uniform(0.5, 4) * along + phase)
        values += wave
    return 0.5 + values / 6 if picture else values / 10
