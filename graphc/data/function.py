"""Samples from a function of the user's: ``file.py:function`` or ``package.module:function``.

It is called without arguments and gives cases: mappings from input name to array, or pairs of such a mapping and
the labels of the case.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import onnx_ir as ir

from graphc.contract import Arrays
from graphc.data.arrays import fitting
from graphc.data.samples import Samples
from graphc.errors import BadInput
from graphc.named_function import named_function


def load(name: str, model: ir.Model) -> Samples:
    """The cases of a named function.

    Raises:
        BadInput: There is no such function, it fails, or gives something else than cases that fit.
    """
    function = named_function(name, "data")
    try:
        given = list(function())
    except Exception as failure:  # whatever the user's code raises
        raise BadInput(
            "the function that gives the data failed",
            where=name,
            why=f"{type(failure).__name__}: {failure}",
            hint="it is called without arguments and yields mappings from input name to array",
        ) from failure
    return checked(given, model, name)


def checked(given: Iterable[Any], model: ir.Model, where: str) -> Samples:
    """Cases in the dtypes of a model's interface, from mappings or pairs of a mapping and labels."""
    cases: list[Arrays] = []
    labels: list[np.ndarray[Any, Any]] = []
    for i, each in enumerate(given):
        place = f"{where}, case {i}"
        case, label = each if isinstance(each, tuple) and len(each) == 2 else (each, None)
        if not isinstance(case, Mapping):
            raise BadInput("a case must be a mapping from input name to array", where=place)
        if label is not None:
            labels.append(np.asarray(label))
        cases.append(fitting({str(n): np.asarray(a) for n, a in case.items()}, model, place))
    if labels and len(labels) != len(cases):
        raise BadInput("some cases have labels and others not", where=where)
    return Samples(cases, labels)
