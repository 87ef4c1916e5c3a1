"""The graphs that a model of transformers is made into, their inputs and outputs, and how each is called.

Inputs and outputs are named as ONNX Runtime's tools for generation have them: ``input_ids``, ``attention_mask``,
``position_ids``, ``past_key_values.{layer}.key`` and ``.value`` ``[batch, heads, past, head size]``; ``logits``,
``present.{layer}.key`` and ``.value``. The past may have length 0, so that one graph reads the prompt and goes on from
there. Of an encoder and a decoder, the encoder's graph also computes the decoder's keys and values of the encoded
sequence, ``present.{layer}.encoder.key``, which are the same for every token.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graphc.errors import BadInput, nearest
from graphc.export.capture import standing_in
from graphc.frontends.huggingface.inputs import (
    BATCH,
    ENCODED,
    PAST,
    SEQUENCE,
    TOTAL,
    Input,
    example,
    of_forward,
    setting,
)

if TYPE_CHECKING:
    import torch

CACHES = ("merged", "split", "none")
"""One graph with a past that may be empty; one graph for the prompt and one for each further token; no past."""

Forward = Callable[["list[torch.Tensor]"], "tuple[torch.Tensor, ...]"]


@dataclass(frozen=True)
class Part:
    """One graph of a model.

    Attributes:
        name: What to call it: ``model``, ``encoder``, ``decoder``, ``prefill``, ``decode``.
        inputs: Its inputs.
        outputs: The names of its outputs.
        forward: Computes the outputs from the inputs, in these orders.
    """

    name: str
    inputs: tuple[Input, ...]
    outputs: tuple[str, ...]
    forward: Forward


@dataclass(frozen=True)
class _State:
    """The keys and values of one layer: heads, and the sizes of a key and a value."""

    heads: int
    key: int
    value: int


SIZES = {BATCH: 2, SEQUENCE: 5, PAST: 7, ENCODED: 11, "decoder_sequence_length": 6, "samples": 4000} | {
    "text_batch_size": 2,
    "image_batch_size": 3,
}
"""The sizes to trace with."""


def parts(model: Any, folder: Path, kv_cache: str = "merged") -> list[Part]:
    """The graphs of a model.

    Args:
        model: With or without values.
        folder: The model's folder.
        kv_cache: One of ``CACHES``, for models that generate.

    Raises:
        BadInput: The model works in a way that has no such graphs.
    """
    if kv_cache not in CACHES:
        raise BadInput(f"there is no cache layout '{kv_cache}'", hint=nearest(kv_cache, CACHES))
    parameters = inspect.signature(type(model).forward).parameters
    generates = model.can_generate() and "past_key_values" in parameters
    if generates and model.config.is_encoder_decoder:
        return _encoder_decoder(model, folder, kv_cache)
    others = [name for name in ("pixel_values", "input_features", "input_values") if name in parameters]
    if generates and others:
        raise BadInput(
            f"{type(model).__name__} generates text from more than text, which graphc does not export",
            why=f"it takes {', '.join(others)}",
            hint="export it yourself and give graphc the module (package.module:factory)",
        )
    if generates:
        return _decoder(model, kv_cache)
    return [_once(model, folder)]


def _once(model: Any, folder: Path) -> Part:
    """A model that is run once, without state."""
    cls = type(model)
    parameters = inspect.signature(cls.forward).parameters
    inputs = of_forward(cls, model.config, folder, decoder=bool(model.config.is_encoder_decoder))
    more = {"use_cache": False} if "use_cache" in parameters else {}

    def call(tensors: list[torch.Tensor]) -> dict[str, torch.Tensor]:
        given = {each.name: tensor for each, tensor in zip(inputs, tensors, strict=True)}
        return _tensors(cls.forward(model, **given, **more, return_dict=True))

    with standing_in(model):
        outputs = tuple(call(example(inputs, SIZES)))
    return Part("model", inputs, outputs, lambda tensors: tuple(call(tensors).values()))


def _tensors(output: Any) -> dict[str, torch.Tensor]:
    import torch

    return {name: value for name, value in output.items() if isinstance(value, torch.Tensor)}


def _decoder(model: Any, kv_cache: str) -> list[Part]:
    """A decoder of text: one graph, or one for the prompt and one for each further token."""
    cls = type(model)
    states = _states(model, lambda cache: _first(model, cache))
    positions = "position_ids" in inspect.signature(cls.forward).parameters
    vocabulary = int(setting(model.config, "vocab_size"))

    def part(name: str, *, past: bool, keep: bool, length: int | str = SEQUENCE) -> Part:
        total = (TOTAL if length == SEQUENCE else f"{PAST} + {length}") if past else length
        inputs = [
            Input("input_ids", (BATCH, length), "ids", vocabulary),
            Input("attention_mask", (BATCH, total), "mask"),
        ]
        if positions:
            inputs.append(Input("position_ids", (BATCH, length), "positions"))
        count = len(inputs)
        inputs += _pasts(states) if past else []

        def forward(tensors: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
            given = {each.name: tensor for each, tensor in zip(inputs[:count], tensors, strict=False)}
            cache = filled(tensors[count:]) if past else empty()
            found = cls.forward(
                model, **given, past_key_values=cache if keep else None, use_cache=keep, return_dict=True
            )
            return (found.logits, *(contents(cache) if keep else ()))

        outputs = ("logits", *(_names("present", states) if keep else ()))
        return Part(name, tuple(inputs), outputs, forward)

    if kv_cache == "none":
        return [part("model", past=False, keep=False)]
    if kv_cache == "merged":
        return [part("model", past=True, keep=True)]
    return [part("prefill", past=False, keep=True), part("decode", past=True, keep=True, length=1)]


def _encoder_decoder(model: Any, folder: Path, kv_cache: str) -> list[Part]:
    """An encoder, whose graph also computes the decoder's keys and values of its result, and a decoder."""
    if kv_cache == "split":
        raise BadInput(
            "an encoder with a decoder has no split cache",
            why="its encoder's graph already is the one for the prompt",
            hint="--kv-cache merged or none",
        )
    cls = type(model)
    sources = of_forward(cls, model.config, folder)
    sources = tuple(
        Input(i.name, tuple(ENCODED if d == SEQUENCE else d for d in i.dims), i.kind, i.bound) for i in sources
    )
    masked = any(each.name == "attention_mask" for each in sources)
    encoder = model.get_encoder()
    known = inspect.signature(type(encoder).forward).parameters

    def encode(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        given = {each.name: tensor for each, tensor in zip(sources, tensors, strict=True) if each.name in known}
        found: torch.Tensor = type(encoder).forward(encoder, **given, return_dict=True).last_hidden_state
        return found

    def decode(ids: torch.Tensor, hidden: torch.Tensor, mask: torch.Tensor | None, cache: Any) -> torch.Tensor:
        from transformers.modeling_outputs import BaseModelOutput

        found = cls.forward(
            model,
            encoder_outputs=BaseModelOutput(last_hidden_state=hidden),
            **({"attention_mask": mask} if masked else {}),
            decoder_input_ids=ids,
            past_key_values=cache,
            use_cache=cache is not None,
            return_dict=True,
        )
        logits: torch.Tensor = found.logits
        return logits

    def start(tensors: Sequence[torch.Tensor], cache: Any) -> torch.Tensor:
        """Encode, and decode one token, which fills the cache; returns what was encoded."""
        import torch

        hidden = encode(tensors)
        ids = torch.zeros((tensors[0].shape[0], 1), dtype=torch.int64)
        decode(ids, hidden, tensors[1] if masked else None, cache)
        return hidden

    own, cross = (
        _states(model, lambda cache: start(example(sources, SIZES), _both(cache, empty()))),
        _states(model, lambda cache: start(example(sources, SIZES), _both(empty(), cache))),
    )
    with standing_in(model):
        width = int(encode(example(sources, SIZES)).shape[-1])
    length: int | str = ENCODED if masked else _encoded(model, sources, encode)

    def first(tensors: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        if kv_cache == "none":
            return (encode(tensors),)
        cache = empty()
        return (start(tensors, _both(empty(), cache)), *contents(cache))

    ids = Input("input_ids", (BATCH, SEQUENCE), "ids", int(setting(model.config, "vocab_size")))
    masks = [Input("encoder_attention_mask", (BATCH, ENCODED), "mask")] if masked else []
    if kv_cache == "none":
        hidden = Input("encoder_hidden_states", (BATCH, length, width))

        def plain(tensors: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
            return (decode(tensors[0], tensors[-1], tensors[1] if masked else None, None),)

        return [
            Part("encoder", sources, ("last_hidden_state",), first),
            Part("decoder", (ids, *masks, hidden), ("logits",), plain),
        ]
    own_inputs, cross_inputs = _pasts(own, ".decoder"), _pasts(cross, ".encoder", length)
    inputs = (ids, *masks, *own_inputs, *cross_inputs)

    def further(tensors: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        rest = tensors[1 + len(masks) :]
        cache, given = filled(rest[: len(own_inputs)]), filled(rest[len(own_inputs) :])
        keys = rest[len(own_inputs)]
        # Nobody reads what was encoded, once its keys and values are there; its sizes are.
        hidden = keys.new_zeros((keys.shape[0], keys.shape[2], width))
        logits = decode(tensors[0], hidden, tensors[1] if masked else None, _both(cache, given))
        return (logits, *contents(cache))

    return [
        Part("encoder", sources, ("last_hidden_state", *_names("present", cross, ".encoder")), first),
        Part("decoder", inputs, ("logits", *_names("present", own, ".decoder")), further),
    ]


def _encoded(model: Any, sources: tuple[Input, ...], encode: Callable[[list[torch.Tensor]], torch.Tensor]) -> int | str:
    """The length of what is encoded, or its name where it follows from an input's."""
    if any(isinstance(dim, str) for each in sources for dim in each.dims[1:]):
        return ENCODED
    with standing_in(model):
        return int(encode(example(sources, SIZES)).shape[1])


def _states(model: Any, run: Callable[[Any], Any]) -> list[_State]:
    """The state that every layer keeps, found by running the model once without values."""
    cache = empty()
    try:
        with standing_in(model):
            run(cache)
        shapes = [(layer.keys.shape, layer.values.shape) for layer in cache.layers]
    except (AttributeError, NotImplementedError, TypeError, ValueError) as error:
        raise BadInput(
            f"{type(model).__name__} keeps a state that is not keys and values",
            why=str(error).split("\n")[0],
            hint="--kv-cache none",
        ) from error
    return [_State(int(key[1]), int(key[3]), int(value[3])) for key, value in shapes]


def _first(model: Any, cache: Any) -> None:
    import torch

    ids = torch.zeros((1, 2), dtype=torch.int64)
    type(model).forward(model, input_ids=ids, attention_mask=ids + 1, past_key_values=cache, use_cache=True)


def _names(stem: str, states: Sequence[_State], whose: str = "") -> tuple[str, ...]:
    return tuple(f"{stem}.{i}{whose}.{what}" for i in range(len(states)) for what in ("key", "value"))


def _pasts(states: Sequence[_State], whose: str = "", length: int | str = PAST) -> list[Input]:
    sizes = [size for state in states for size in ((state.heads, state.key), (state.heads, state.value))]
    return [
        Input(name, (BATCH, heads, length, size))
        for name, (heads, size) in zip(_names("past_key_values", states, whose), sizes, strict=True)
    ]


def empty() -> Any:
    """A cache without layers; they are added as the model asks for them."""
    from transformers.cache_utils import DynamicCache

    cache = DynamicCache()
    cache.layer_class_to_replicate = _layer_class()
    return cache


def filled(tensors: Sequence[torch.Tensor]) -> Any:
    """A cache with the keys and values of every layer, in turn; a layer never drops any, whatever its window."""
    cache = empty()
    for keys, values in zip(tensors[::2], tensors[1::2], strict=True):
        layer = _layer_class()()
        layer.keys, layer.values = keys, values
        layer.dtype, layer.device, layer.is_initialized = keys.dtype, keys.device, True
        cache.layers.append(layer)
    return cache


def contents(cache: Any) -> list[torch.Tensor]:
    """The keys and values of every layer, in turn."""
    return [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]


def _both(own: Any, cross: Any) -> Any:
    """The decoder's cache of its own and of the encoded sequence."""
    from transformers.cache_utils import EncoderDecoderCache

    return EncoderDecoderCache(own, cross)


def _layer_class() -> Any:
    from transformers.cache_utils import DynamicLayer

    class Layer(DynamicLayer):  # type: ignore[misc]
        """A layer whose first keys are taken as they are, instead of being joined to an empty tensor."""

        is_initialized: bool

        def update(self, keys: Any, values: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
            if not self.is_initialized:
                self.keys, self.values = keys, values
                self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True
                return keys, values
            both: tuple[Any, Any] = super().update(keys, values, *args, **kwargs)
            return both

    return Layer
