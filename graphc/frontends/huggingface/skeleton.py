"""Models of transformers without values: the modules with parameters on the meta device and buffers as they are."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from graphc.errors import BadInput
from graphc.frontends.huggingface.folder import Folder, quiet
from graphc.frontends.huggingface.masks import ATTENTION

if TYPE_CHECKING:
    import torch

EXPERTS = "batched_mm"
"""The implementation of mixtures of experts that has no sizes that depend on values."""


def skeleton(cls: Any, config: Any) -> torch.nn.Module:
    """A model whose parameters take no memory, in float32.

    Raises:
        BadInput: The configuration does not describe a model.
    """
    import torch
    from transformers.initialization import no_init_weights

    own = copy.deepcopy(config)
    with quiet():
        try:
            with _meta_parameters(), no_init_weights():
                model = cls._from_config(own, attn_implementation=ATTENTION, dtype=torch.float32)
            model.tie_weights()
        except Exception as error:  # constructors check their configuration in many ways
            raise BadInput(f"cannot make a {cls.__name__} from the config", why=str(error).split("\n")[0]) from error
        return _ready(model)


def loaded(cls: Any, folder: Folder) -> torch.nn.Module:
    """The model with its weights in memory, as transformers loads it, in float32.

    Raises:
        BadInput: transformers cannot load it.
    """
    import torch

    more: dict[str, Any] = {"gguf_file": folder.gguf.name} if folder.gguf else {}
    # A task's class may differ from the one that was saved.
    with quiet():
        try:
            model, info = cls.from_pretrained(
                folder.path,
                config=None if folder.gguf else copy.deepcopy(folder.config),
                dtype=torch.float32,
                attn_implementation=ATTENTION,
                local_files_only=True,
                trust_remote_code=False,
                weights_only=True,
                output_loading_info=True,
                **more,
            )
        except Exception as error:  # whatever a checkpoint may break
            raise BadInput(
                "transformers cannot load the model", where=str(folder.path), why=str(error).split("\n")[0]
            ) from error
    missing = sorted(info["missing_keys"])
    if missing:
        raise missing_weights(folder, cls, missing)
    model.hf_quantizer = None
    return _ready(model)


def missing_weights(folder: Folder, cls: Any, missing: list[str]) -> BadInput:
    """The error for weights that a model has and the folder has not."""
    return BadInput(
        f"{len(missing)} weights of {cls.__name__} are not in the folder",
        where=str(folder.path),
        why=", ".join(missing[:3]) + (", ..." if len(missing) > 3 else ""),
        hint="--task chooses another head; otherwise the config and the weights are of different models",
    )


def _ready(model: Any) -> Any:
    if getattr(model, "_can_set_experts_implementation", lambda: False)():
        model.set_experts_implementation(EXPERTS)
    return model.eval().requires_grad_(False)


@contextmanager
def _meta_parameters() -> Iterator[None]:
    """Modules made in the block have their parameters on the meta device, one at a time."""
    import torch

    register = torch.nn.Module.register_parameter

    def to_meta(module: torch.nn.Module, name: str, parameter: torch.nn.Parameter | None) -> None:
        if parameter is not None and not parameter.is_meta:
            parameter = torch.nn.Parameter(parameter.data.to("meta"), requires_grad=False)
        register(module, name, parameter)

    torch.nn.Module.register_parameter = to_meta
    try:
        yield
    finally:
        torch.nn.Module.register_parameter = register


@contextmanager
def calling(model: Any, forward: Callable[..., Any]) -> Iterator[None]:
    """``model(...)`` calls another function in the block; so its parameters keep their names."""
    model.forward = forward
    try:
        yield
    finally:
        del model.forward
