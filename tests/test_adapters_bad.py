"""Adapters that do not fit, are damaged, or are asked for what they cannot do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from graphc.adapters import Adapters
from graphc.errors import BadInput
from tests.adapter_models import (
    Experts,
    fold,
    lora,
    plain,
    same,
    torch,
    weights,
)


@pytest.mark.parametrize(
    "layers, config, message",
    [
        ({"layer__q": (7, 8)}, {}, r"does not fit 'layer\.q\.weight'(.|\n)*\[6, 8\], the adapter is for \[7, 8\]"),
        ({"layer__k": (6, 8)}, {}, r"fits nothing(.|\n)*not found: layer\.k\.weight(.|\n)*layer\.[qv]\.weight"),
        ({"layer__q": (6, 8), "layer__k": (6, 8)}, {}, r"the model lacks(.|\n)*layer\.k\.weight"),
        ({"layer__q": (6, 8)}, {"r": 3}, r"rank of 'layer\.q' is wrong(.|\n)*rank 2, the configuration says 3"),
        ({"layer__q": (6, 8)}, {"peft_type": "LOHA"}, r"type LOHA cannot be folded"),
        ({"layer__q": (6, 8)}, {"peft_type": "PROMPT_TUNING"}, r"type PROMPT_TUNING"),
        ({"layer__q": (6, 8)}, {"layer_replication": [[0, 1]]}, r"layer replication"),
        ({"layer__q": (6, 8)}, {"use_qalora": True}, r"QALoRA"),
        ({"layer__q": (6, 8)}, {"init_lora_weights": "pissa_niter_4"}, r"base that was changed(.|\n)*pissa_niter_4"),
        ({"layer__q": (6, 8)}, {"use_dora": True}, r"'layer\.q' is incomplete(.|\n)*lora_magnitude_vector"),
        ({"layer__q": (6, 8)}, {"alpha_pattern": {"q(": 3}}, r"no regular expression"),
    ],
)
def test_adapters_that_do_not_fit(layers: dict[str, Any], config: dict[str, Any], message: str, tmp_path: Path) -> None:
    folder = lora(tmp_path / "a", config=config, **layers)
    with pytest.raises(BadInput, match=message) as caught:
        fold(plain(), folder)
    assert str(folder) in str(caught.value)


def damaged(folder: Path, what: str) -> None:
    from safetensors.numpy import load_file, save_file

    path = folder / "adapter_model.safetensors"
    held = load_file(path)
    first, second = sorted(held)
    match what:
        case "NaN":
            held[first] = np.full_like(held[first], np.nan)
        case "half":
            del held[second]
        case "ranks":
            held[first] = held[first][:1]
        case "empty":
            held = {}
        case "integers":
            held[first] = held[first].astype(np.int32)
    save_file(held, path)
    if what == "truncated":
        path.write_bytes(path.read_bytes()[:-40])
    if what == "missing":
        path.unlink()
    if what == "config":
        (folder / "adapter_config.json").write_text("[1")
    if what == "no config":
        (folder / "adapter_config.json").unlink()


@pytest.mark.parametrize(
    "what, message",
    [
        ("NaN", r"layer\.q\.lora_A\.weight' has NaN"),
        ("half", r"'layer\.q' is incomplete(.|\n)*no lora_B"),
        ("ranks", r"ranks of 'layer\.q' differ(.|\n)*\[1, 8\](.|\n)*\[6, 2\]"),
        ("empty", r"is empty"),
        ("integers", r"int32, not floating"),
        ("truncated", r"no safetensors file"),
        ("missing", r"has no weights"),
        ("config", r"cannot read the adapter's configuration"),
        ("no config", r"no adapter folder"),
    ],
)
def test_damaged_adapters(what: str, message: str, tmp_path: Path) -> None:
    folder = lora(tmp_path / "a", layer__q=(6, 8))
    damaged(folder, what)
    with pytest.raises(BadInput, match=message):
        fold(plain(), folder)


def test_a_pickled_adapter_is_read_without_unpickling(tmp_path: Path) -> None:
    from safetensors.numpy import load_file

    folder = lora(tmp_path / "a", layer__q=(6, 8))
    wanted = weights(fold(plain(), folder)[0])
    held = {name: torch.tensor(array) for name, array in load_file(folder / "adapter_model.safetensors").items()}
    (folder / "adapter_model.safetensors").unlink()
    torch.save(held, folder / "adapter_model.bin")
    same(weights(fold(plain(), folder)[0]), wanted)
    torch.save({"a": Experts}, folder / "adapter_model.bin")
    with pytest.raises(BadInput, match="cannot read the adapter"):
        fold(plain(), folder)


@pytest.mark.parametrize(
    "how, message",
    [
        ({"combine": "tise"}, "did you mean 'ties'"),
        ({"combine": "ties{densty=1}"}, "did you mean 'density'"),
        ({"combine": "ties{density=2}"}, "out of range"),
        ({"combine": "della{density=0.95}"}, "within 0 and 1"),
        ({"combine": "cat,ties"}, "takes one method"),
        ({"mode": "folded"}, "did you mean 'fold'"),
        ({"mode": "dynamic", "combine": "ties"}, "not combined"),
    ],
)
def test_flags_that_cannot_be_used(how: dict[str, str], message: str, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=message):
        Adapters.of([tmp_path], **how)
