"""What an adapter folder wants changed: one target for each parameter of the base."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from graphc.adapters.changes import Added, Change, Dora, Kind, LowRank, Replaced, Rows, Scaled, Stacked
from graphc.adapters.folder import Folder
from graphc.edit import Array

_SUFFIX = re.compile(
    r"^(?P<module>.*?)(?P<depth>(\.base_layer)*)\."
    r"(?P<part>lora_A|lora_B|lora_E|lora_embedding_A|lora_embedding_B|lora_magnitude_vector|ia3_l"
    r"|(?:token_adapter\.)?trainable_tokens_delta)"
    r"(\.(?:default))?(\.(?P<leaf>weight|bias))?$"
)


@dataclass(frozen=True)
class Target:
    """One parameter and what is done to it.

    Attributes:
        module: The module's path in the base.
        leaves: The parameter's name in the module; several where only shapes tell which of them it is.
        kind: What it is.
        change: What is done.
        folder: Whose wish it is.
        optional: Whether the base may lack the parameter.
        slot: Tells the parameters of a module apart whose names are not known yet.
    """

    module: str
    leaves: tuple[str, ...]
    kind: Kind
    change: Change
    folder: Folder
    optional: bool = False
    slot: int = 0

    @property
    def name(self) -> str:
        """The parameter's full name, as PEFT has it."""
        return f"{self.module}.{self.leaves[0]}"


def targets(folder: Folder) -> list[Target]:
    """Everything that a folder wants changed.

    Raises:
        BadInput: Parts are missing, ranks do not fit, or the method cannot be folded; it names the module.
    """
    parts: dict[tuple[str, int], dict[str, Array]] = {}
    plain: list[Target] = []
    for name, array in folder.tensors.items():
        match = _SUFFIX.match(name)
        if match is None:
            plain.append(_plain(folder, name.replace(".base_layer", ""), array))
            continue
        module = match["module"].replace(".base_layer", "")
        if match["part"] == "lora_B" and match["module"].endswith(".base_layer.out_proj"):
            # PEFT adds the adapter of an attention's out_proj twice, when it is trained and when it is merged.
            array = 2 * array
        key = match["part"].removeprefix("token_adapter.") + (".bias" if match["leaf"] == "bias" else "")
        parts.setdefault((module, match["depth"].count("base_layer")), {})[key] = array
    found = [
        replace(target, slot=slot)
        for (module, slot), held in parts.items()
        for target in _adapted(folder, module, held)
    ]
    own = {target.name for target in found}
    # A base weight is saved beside the adapter of an embedding; it only matters where nothing else changes it.
    return found + [target for target in plain if target.name not in own]


def _plain(folder: Folder, name: str, array: Array) -> Target:
    """A parameter that was trained as a whole: ``modules_to_save``, ``bias``."""
    module, _, leaf = name.rpartition(".")
    matrix = array.reshape(len(array), -1) if array.ndim else array.reshape(1, 1)
    return Target(module, (leaf,), "plain", Replaced(matrix), folder)


def _adapted(folder: Folder, module: str, held: dict[str, Array]) -> Iterator[Target]:
    parameters = _parameters(folder, module)
    if parameters:
        name = f"{module}.{parameters[0]}" if len(parameters) == 1 else module
        yield Target(module, parameters, "stack", _experts(folder, name, held), folder)
    elif "ia3_l" in held:
        yield from _scaled(folder, module, held["ia3_l"])
    elif "trainable_tokens_delta" in held:
        yield _tokens(folder, module, held["trainable_tokens_delta"])
    elif "lora_embedding_A" in held or "lora_embedding_B" in held:
        yield _embedding(folder, module, held)
    else:
        yield from _product(folder, module, held)


def _parameters(folder: Folder, module: str) -> tuple[str, ...]:
    """The parameters of a module that ``target_parameters`` names."""
    found = []
    for name in folder.config.get("target_parameters") or ():
        owner, _, leaf = str(name).rpartition(".")
        if module == owner or module.endswith(f".{owner}"):
            found.append(leaf)
    return tuple(found)


def _pair(folder: Folder, module: str, held: dict[str, Array], a: str, b: str) -> tuple[Array, Array]:
    for key, other in ((a, b), (b, a)):
        if key not in held:
            raise folder.bad(f"the adapter of '{module}' is incomplete", f"it has {other} but no {key}")
    return held[a], held[b]


def _scale(folder: Folder, module: str, rank: int) -> float:
    """The factor of a LoRA, which its own rank decides."""
    wanted = folder.pattern("rank_pattern", module, folder.config.get("r", rank))
    if wanted != rank:
        raise folder.bad(
            f"the rank of '{module}' is wrong", f"its weights have rank {rank}, the configuration says {wanted}"
        )
    alpha = float(folder.pattern("alpha_pattern", module, folder.config.get("lora_alpha", 8)))
    return alpha / math.sqrt(rank) if folder.config.get("use_rslora") else alpha / rank


def _product(folder: Folder, module: str, held: dict[str, Array]) -> Iterator[Target]:
    """Linear layers and convolutions."""
    a, b = _pair(folder, module, held, "lora_A", "lora_B")
    kind: Kind = "image" if a.ndim > 2 else "linear"
    right, left = a.reshape(len(a), -1), b.reshape(len(b), -1)
    if left.shape[1] != right.shape[0]:
        grouped = kind == "image" and right.shape[0] % left.shape[1] == 0
        raise folder.bad(
            f"the adapter of '{module}' cannot be folded" if grouped else f"the ranks of '{module}' differ",
            "its convolution has groups, through which its adapter mixes"
            if grouped
            else f"lora_A has shape {list(a.shape)}, lora_B {list(b.shape)}",
        )
    low = _adalora(folder, module, left, right, held) if "lora_E" in held else None
    change: Change
    change = low = low or LowRank(left, right, _scale(folder, module, len(right)))
    if folder.config.get("use_dora"):
        magnitude = held.get("lora_magnitude_vector")
        if magnitude is None:
            raise folder.bad(f"the adapter of '{module}' is incomplete", "DoRA needs lora_magnitude_vector")
        change = Dora(low, _vector(folder, module, magnitude, low.shape[0], "lora_magnitude_vector"))
    yield Target(module, ("weight", "in_proj_weight"), kind, change, folder)
    if "lora_B.bias" in held:
        bias = low.scale * held["lora_B.bias"].astype(np.float64)
        yield Target(module, ("bias",), "plain", Added(bias.reshape(-1, 1)), folder)


def _vector(folder: Folder, module: str, array: Array, size: int, name: str) -> Array:
    if array.size != size:
        raise folder.bad(f"'{name}' of '{module}' has {array.size} elements, not {size}")
    return array.reshape(-1)


def _adalora(folder: Folder, module: str, left: Array, right: Array, held: dict[str, Array]) -> LowRank:
    """``B (A * E) alpha / (rank + 1e-5)``; as in loralib, the rank is what was left of it."""
    values = _vector(folder, module, held["lora_E"], len(right), "lora_E")
    keep = np.ones(len(right), bool)
    for name, mask in (folder.config.get("rank_pattern") or {}).items():
        if name.removesuffix(".lora_E") in (module, f"base_model.model.{module}") and sum(mask) != len(right):
            if len(mask) != len(right):
                raise folder.bad(f"the rank of '{module}' is wrong", f"{len(right)} instead of {sum(mask)}")
            keep = np.asarray(mask, bool)
    alpha = float(folder.pattern("alpha_pattern", module, folder.config.get("lora_alpha", 8)))
    rank = int(keep.sum())
    scaled = (right.astype(np.float64) * values.astype(np.float64)[:, None])[keep]
    return LowRank(left[:, keep], scaled, (alpha if alpha > 0 else rank) / (rank + 1e-5), "AdaLoRA")


def _embedding(folder: Folder, module: str, held: dict[str, Array]) -> Target:
    a, b = _pair(folder, module, held, "lora_embedding_A", "lora_embedding_B")
    if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1]:
        why = f"lora_embedding_A has shape {list(a.shape)}, lora_embedding_B {list(b.shape)}"
        raise folder.bad(f"the ranks of '{module}' differ", why)
    low = LowRank(a.T, b.T, _scale(folder, module, len(a)))
    if not folder.config.get("use_dora"):
        return Target(module, ("weight",), "table", low, folder)
    magnitude = held.get("lora_magnitude_vector")
    if magnitude is None:
        raise folder.bad(f"the adapter of '{module}' is incomplete", "DoRA needs lora_magnitude_vector")
    vector = _vector(folder, module, magnitude, low.shape[1], "lora_magnitude_vector")
    return Target(module, ("weight",), "table", Dora(low, vector, axis=1), folder)


def _experts(folder: Folder, module: str, held: dict[str, Array]) -> Change:
    """A LoRA on a parameter that is no layer's weight, with one expert or many.

    PEFT stores (rank x experts, in) and (out, rank x experts); which of its axes is which depends on the base, so here
    is (experts, out, in), and whoever knows the base transposes.
    """
    a, b = _pair(folder, module, held, "lora_A", "lora_B")
    rank = int(folder.pattern("rank_pattern", module, folder.config.get("r", 8)))
    if len(a) != b.shape[-1] or len(a) % rank:
        why = f"lora_A has shape {list(a.shape)}, lora_B {list(b.shape)}, the configuration says rank {rank}"
        raise folder.bad(f"the ranks of '{module}' differ", why)
    experts = len(a) // rank
    left = b.reshape(len(b), rank, experts).transpose(2, 0, 1)
    return Stacked(left, a.reshape(experts, rank, -1), _scale(folder, module, rank))


def _scaled(folder: Folder, module: str, factors: Array) -> Iterator[Target]:
    """IA3: factors of the outputs, or of the inputs of feed-forward modules."""
    names = folder.config.get("feedforward_modules") or ()
    inputs = (
        re.fullmatch(names, module) is not None
        if isinstance(names, str)
        else any(module.endswith(name) for name in names)
    )
    kind: Kind = "image" if factors.ndim > 2 else "linear"
    yield Target(module, ("weight",), kind, Scaled(factors.reshape(-1), 1 if inputs else 0), folder)
    if not inputs:
        yield Target(module, ("bias",), "plain", Scaled(factors.reshape(-1), 0), folder, optional=True)


def _tokens(folder: Folder, module: str, values: Array) -> Target:
    """Rows of an embedding that were trained."""
    indices = folder.config.get("trainable_token_indices") or folder.config.get("token_indices")
    if isinstance(indices, dict):
        indices = next((v for k, v in indices.items() if module == k or module.endswith(f".{k}")), None)
    if not isinstance(indices, list) or len(indices) != len(values):
        raise folder.bad(f"the trained tokens of '{module}' do not fit", "their indices are missing or too few")
    return Target(module, ("weight",), "table", Rows(tuple(map(int, indices)), values), folder)
