"""Models as trainable torch modules, and back: any ``.onnx`` can be scored by gradients and fine-tuned.

torch is imported when a function is called.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import onnx_ir as ir

from graphc.environment import to_install
from graphc.errors import BadInput

if TYPE_CHECKING:
    from torch.fx import GraphModule

__all__ = ["from_torch", "to_torch"]


def to_torch(model: ir.Model, *, quantized: bool = False) -> GraphModule:
    """A torch module that computes what the model does and can be trained.

    Its parameters are the float constants (initializers, and Constant nodes of some exporters) that are weights, under
    their names: a dot in a name makes a submodule,
    so that ``state_dict`` keys equal initializer names, except where torch reserves a name or two collide (then
    underscores are appended). ``module.meta["initializers"]`` maps every parameter and buffer to its constant,
    ``module.meta["inputs"]`` every argument to its graph input. Running statistics, scales and bounds, masks, integers,
    and numbers of one element are buffers or code. An initializer with many readers is one parameter. What bodies of
    control flow hold counts as well; of constants that they name alike, the second is called ``name#2`` and so on.
    What constants that are not trained determine is computed here, once, into buffers outside of the state.

    The module takes tensors by position in the order of the graph's inputs, or by name with ``_`` where Python allows
    no other character, and returns a dict by output name. It computes the same in training mode: dropout and batch
    statistics stay off. Sizes are Python numbers, so that ``torch.export`` can trace it; but not If, Loop and Scan,
    which run in Python.

    Args:
        model: At opset 13 or later; it is not changed. Its weights are copied.
        quantized: Whether scales of quantized weights are parameters, too: those by which DequantizeLinear multiplies
            constant codes. ``module.meta["scales"]`` maps each to the buffer of its codes. These may be replaced by
            floats (``torch.func.functional_call``), through which gradients then flow.

    Raises:
        BadInput: torch is missing, or operators have no torch form; they are all named.
    """
    _require()
    from graphc.fx.build import build

    return build(model, quantized=quantized)


def from_torch(module: GraphModule, model: ir.Model) -> ir.Model:
    """A copy of the model with the values that the module's parameters now have, in the model's dtypes.

    So have the codes of which scales are parameters.

    Local functions are inlined in it, so that each call's weights are its own.

    Args:
        module: Made by :func:`to_torch` of ``model`` and trained since, on any device.
        model: The model; it is not changed.

    Raises:
        BadInput: The module is another's: an initializer is missing or has another shape.
    """
    _require()
    from graphc.fx.build import write_back

    return write_back(module, model)


def _require() -> None:
    try:
        import torch  # noqa: F401
    except ImportError as error:
        raise BadInput("torch is not installed", why=str(error), hint=to_install("torch")) from None
