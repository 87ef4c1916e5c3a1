"""From a configuration and a task to the class of transformers that computes it, by transformers' own tables."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from graphc.errors import BadInput, nearest


def model_class(config: Any, task: str = "", *, generates: bool = False) -> Any:
    """The model's class.

    Args:
        config: Its configuration.
        generates: Whether a class that generates text is meant where the configuration names none, as GGUF files do.
        task: The name of a pipeline (``text-classification``) or of an auto class (``masked-lm`` for
            ``AutoModelForMaskedLM``); empty for the class that was saved.

    Raises:
        BadInput: There is no such task, or the model has no head for it.
    """
    import transformers

    if not task:
        for name in config.architectures or ():
            found = getattr(transformers, name, None)
            if found is not None:
                return found
        text = (transformers.AutoModelForCausalLM, transformers.AutoModelForSeq2SeqLM) if generates else ()
        found = (_class(auto, config) for auto in (*text, transformers.AutoModel))
        return next(filter(None, found), None) or _no_task(config, "")
    known = dict(_tasks())
    if task not in known:
        raise BadInput(f"there is no task '{task}'", hint=nearest(task, list(known)))
    for auto in known[task]:
        found = _class(auto, config)
        if found is not None:
            return found
    return _no_task(config, task)


def _no_task(config: Any, task: str) -> Any:
    possible = sorted(name for name, autos in _tasks() if any(_class(auto, config) for auto in autos))
    raise BadInput(
        f"a model of type '{config.model_type}' has no head for the task '{task}'"
        if task
        else f"transformers has no model for '{config.model_type}'",
        hint=f"--task {' or '.join(possible)}" if possible else "",
    )


def _tasks() -> Iterator[tuple[str, tuple[Any, ...]]]:
    """Every task with the auto classes that make models for it."""
    import transformers
    from transformers.pipelines import PIPELINE_REGISTRY

    for name in dir(transformers):
        if name.startswith("AutoModelFor"):
            words = re.findall(r"[A-Z]+(?![a-z])|[A-Z][a-z]*\d*", name.removeprefix("AutoModelFor"))
            yield "-".join(words).lower(), (getattr(transformers, name),)
    for name in PIPELINE_REGISTRY.get_supported_tasks():
        try:
            entry = PIPELINE_REGISTRY.check_task(name)[1]
        except (KeyError, ValueError):
            continue
        yield name, tuple(getattr(transformers, each) if isinstance(each, str) else each for each in entry["pt"])


def _class(auto: Any, config: Any) -> Any:
    """The class that an auto class makes for a configuration, or None."""
    mapping = auto._model_mapping
    if type(config) not in mapping:
        return None
    found = mapping[type(config)]
    if not isinstance(found, tuple):
        return found
    return next((each for each in found if each.__name__ in (config.architectures or ())), found[0])
