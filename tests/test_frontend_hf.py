"""Hugging Face folders: what is exported, that it computes and generates what torch does, and what bad folders give."""

from __future__ import annotations

import json
import shutil
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("onnxscript")

from hf_models import GENERATES, MODELS, make, save  # noqa: E402

import graphc  # noqa: E402
from graphc import runtime  # noqa: E402
from graphc.errors import BadInput  # noqa: E402
from graphc.frontends import hf, is_torch  # noqa: E402
from graphc.frontends.huggingface import against, parts, skeleton, weights  # noqa: E402
from graphc.frontends.huggingface.folder import open_folder, quiet  # noqa: E402
from graphc.frontends.huggingface.tasks import model_class  # noqa: E402
from graphc.storage import safetensors  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")

EXAMPLE = Path(__file__).parents[1] / "examples" / "generate"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A folder of each family, made when it is first asked for."""
    root = tmp_path_factory.mktemp("hf")

    def folder(family: str) -> Path:
        return root / family if (root / family).exists() else save(family, root / family)

    return folder


@pytest.fixture(scope="module")
def sources(folders: Callable[[str], Path]) -> Callable[[str], graphc.Source]:
    """The exported graphs of each family; loading compares them with torch."""
    known: dict[str, Any] = {}

    def source(family: str) -> Any:
        if family not in known:
            known[family] = hf.load(folders(family))
        return known[family]

    return source


def generated(artifact: Path, **inputs: Any) -> np.ndarray:
    sys.path.insert(0, str(EXAMPLE))
    try:
        from generate import generate
    finally:
        sys.path.remove(str(EXAMPLE))
    found: np.ndarray = generate(artifact, **inputs)
    return found


def greedy(model: Any, ids: np.ndarray, mask: np.ndarray, tokens: int) -> np.ndarray:
    """What torch generates."""
    with torch.no_grad(), quiet():
        model.generation_config.eos_token_id = None
        found = model.generate(
            input_ids=torch.from_numpy(ids),
            attention_mask=torch.from_numpy(mask),
            do_sample=False,
            max_new_tokens=tokens,
            pad_token_id=0,
        )
    length = 1 if model.config.is_encoder_decoder else ids.shape[1]
    new: np.ndarray = found[:, length:].numpy()
    return new


def prompt(batch: int = 2, length: int = 6) -> tuple[np.ndarray, np.ndarray]:
    """Token ids, and a mask that pads the first sequence on the left."""
    ids = np.random.default_rng(1).integers(4, 90, (batch, length))
    mask = np.ones_like(ids)
    mask[0, :3] = 0
    return ids, mask


def test_decoder_has_the_layout_of_the_generation_tools_and_the_names_of_the_state_dict(
    sources: Any, folders: Any
) -> None:
    source = sources("llama")
    graph = source.original.graph
    inputs = {value.name: str(value.shape) for value in graph.inputs}
    assert inputs["attention_mask"] == "[batch_size,past_sequence_length + sequence_length]"
    assert inputs["past_key_values.1.value"] == "[batch_size,2,past_sequence_length,8]"
    assert list(inputs)[:4] == ["input_ids", "attention_mask", "position_ids", "past_key_values.0.key"]
    outputs = {value.name: str(value.shape) for value in graph.outputs}
    assert outputs["logits"] == "[batch_size,sequence_length,99]"
    assert outputs["present.0.key"] == "[batch_size,2,past_sequence_length + sequence_length,8]"
    state = make("llama").state_dict()
    assert set(state) <= set(graph.initializers)
    held = graph.initializers["model.layers.1.mlp.up_proj.weight"].const_value
    assert isinstance(held, ir.ExternalTensor)
    np.testing.assert_array_equal(held.numpy(), state["model.layers.1.mlp.up_proj.weight"].numpy())
    assert Path(held.path) == folders("llama") / "model.safetensors"
    assert source.measurements["torch"]["worst"] < against.TOLERANCE
    assert {"past_sequence_length": 0, "sequence_length": 7, "batch_size": 2} in source.measurements["torch"]["cases"]


def test_a_padded_sequence_gets_what_it_gets_alone(sources: Any) -> None:
    session = runtime.session(sources("llama").original, optimise=False)
    ids, mask = prompt()
    past = {name: np.zeros((2, 2, 0, 8), np.float32) for name in session.input_names if name.startswith("past")}
    positions = np.maximum(np.cumsum(mask, 1) - 1, 0)
    both = session.run({"input_ids": ids, "attention_mask": mask, "position_ids": positions, **past})["logits"]
    past = {name: array[:1] for name, array in past.items()}
    short = {"input_ids": ids[:1, 3:], "attention_mask": mask[:1, 3:], "position_ids": np.arange(3)[None]}
    alone = session.run({**short, **past})["logits"]
    np.testing.assert_allclose(both[:1, 3:], alone, atol=1e-5)
    with torch.no_grad():
        wanted = make("llama")(torch.from_numpy(ids[:1, 3:])).logits.numpy()
    np.testing.assert_allclose(alone, wanted, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_generates_what_torch_does(family: str, sources: Any, tmp_path: Path) -> None:
    report = graphc.optimize(sources(family), tmp_path / "out", measure=False, cache=False)
    assert report.ok
    ids, mask = prompt()
    found = generated(tmp_path / "out", ids=ids, mask=mask, tokens=8)
    np.testing.assert_array_equal(found, greedy(make(family), ids, mask, 8))
    manifest = json.loads((tmp_path / "out" / "graphc.json").read_text())
    assert {"config.json", "generation_config.json"} <= set(manifest["files"])
    if family == "llama":
        # The artifact is a model to go on with, although it has a config, and so is a folder that others exported.
        assert not graphc.load(tmp_path / "out").result.refusals
        (tmp_path / "out" / "graphc.json").unlink()
        assert not graphc.load(tmp_path / "out").result.refusals
    if family == "t5":
        assert set(manifest["parts"]) == {"encoder", "decoder"}
        assert set(report.parts) == {"encoder", "decoder"}
        # The embedding, which both have, is stored once.
        (data,) = (tmp_path / "out").glob("*.data")
        unique = {id(p): p.numel() * 4 for p in make("t5").parameters()}
        assert data.stat().st_size < sum(unique.values()) * 1.25
        assert report.output["bytes"] == sum(
            p.stat().st_size for p in (tmp_path / "out").iterdir() if p.suffix in (".onnx", ".data")
        )


def test_several_graphs_need_a_folder(sources: Any, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="becomes 2 graphs") as found:
        graphc.optimize(sources("t5"), tmp_path / "out.onnx", verify=False)
    assert "encoder, decoder" in found.value.why
    assert list(tmp_path.iterdir()) == []


def test_what_graphs_hand_each_other_is_not_cut(sources: Any) -> None:
    with pytest.raises(BadInput, match="interfaces of several graphs"):
        graphc.optimize(sources("t5"), None, recipe="prune{ratio=0.5 allow-interface=true},shrink")


def test_stored_dtypes_and_stacked_experts_are_computed_when_read(tmp_path: Path) -> None:
    folder = save("mixtral", tmp_path / "mixtral", lambda model: model.to(torch.bfloat16))
    stored = safetensors.index(folder / "model.safetensors")
    assert any("experts.3.w1" in name for name in stored), "transformers writes one tensor per expert"
    opened = open_folder(folder)
    cls = model_class(opened.config)
    empty = skeleton.skeleton(cls, opened.config)
    assert all(parameter.is_meta for parameter in empty.parameters())
    found = weights.match(empty, stored)
    assert not (found.missing or found.misfit or found.unexpected)
    loaded = skeleton.loaded(cls, opened).state_dict()
    assert set(found.tensors) == set(loaded)
    for name, tensor in found.tensors.items():
        assert not isinstance(tensor, ir.ExternalTensor)
        np.testing.assert_array_equal(tensor.numpy(), loaded[name].numpy(), err_msg=name)


def test_a_head_that_is_not_tied_after_all_keeps_its_own_weights(tmp_path: Path) -> None:
    folder = save("llama", tmp_path / "llama")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    opened = open_folder(folder)
    model = skeleton.skeleton(model_class(opened.config), opened.config)
    found = weights.match(model, safetensors.index(folder / "model.safetensors"))
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    assert not np.array_equal(
        found.tensors["lm_head.weight"].numpy(), found.tensors["model.embed_tokens.weight"].numpy()
    )


def _without(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def _truncated(folder: Path) -> None:
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: len(content) // 2])


def _garbage(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", 10) + b"not a json")


def _shard(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    places = {"weight_map": {"a": "model-00001-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(places))


def _config(**change: Any) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | change))

    return edit


def _pickle(folder: Path) -> None:
    _without(folder)
    torch.save({"a": print}, folder / "pytorch_model.bin")


@pytest.mark.parametrize(
    ("damage", "what", "task"),
    [
        (lambda folder: (folder / "config.json").unlink(), "no Hugging Face model folder", ""),
        (_config(model_type="lama"), "does not know model_type 'lama'", ""),
        (_config(model_type="own", auto_map={"AutoConfig": "own.Config"}), "needs code of its own", ""),
        (_config(quantization_config={"quant_method": "gptq"}), "quantized in a form", ""),
        (_config(intermediate_size=50), "do not fit the config", ""),
        (_config(num_hidden_layers=3), "are not in the folder", ""),
        (_without, "has no weights", ""),
        (_truncated, "weights are damaged", ""),
        (_garbage, "weights are damaged", ""),
        (_shard, "1 of 1 files of weights are missing", ""),
        (_pickle, "without running code", ""),
        (lambda folder: None, "no head for the task 'image-classification'", "image-classification"),
        (lambda folder: None, "there is no task 'image-clasification'", "image-clasification"),
    ],
)
def test_bad_folders_are_explained(
    damage: Callable[[Path], None], what: str, task: str, folders: Any, tmp_path: Path
) -> None:
    folder = shutil.copytree(folders("llama"), tmp_path / "llama")
    damage(folder)
    with pytest.raises(BadInput) as found:
        hf.load(folder, task=task)
    assert what in found.value.what
    assert found.value.hint


def test_the_hub_is_asked_only_by_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="no such folder") as folder:
        hf.load(Path("org/name"))
    assert "hf:org/name" in folder.value.hint
    assert not is_torch("hf:gpt2")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(BadInput, match="cannot get the model from the hub"):
        hf.load(Path("hf:org/name-that-is-not-there"))


@pytest.mark.slow
@pytest.mark.parametrize("family", MODELS)
def test_every_family_is_exported_optimised_and_pruned(family: str, sources: Any, folders: Any) -> None:
    """Exported (which compares with torch), optimised and compared again, then pruned and held to the law."""
    source = sources(family)
    loaded = skeleton.loaded(model_class(source_config(folders(family))), open_folder(folders(family)))
    made = parts.parts(loaded, folders(family))
    for part, each in zip(made, source.parts, strict=True):
        assert each.measurements["torch"]["worst"] < against.TOLERANCE
        report = graphc.optimize(each.with_others([]), None, measure=False, cache=False)
        assert report.ok, [p.error for p in report.passes]
        assert report.output["nodes"] < report.input["nodes"]
        assert against.against_torch(part, report.model, seed=1)["worst"] < 10 * against.TOLERANCE
        pruned = graphc.optimize(
            each.with_others([]), None, recipe="simplify,fuse,prune{ratio=0.25},shrink", measure=False, cache=False
        )
        assert pruned.ok, [p.error for p in pruned.passes]
        assert pruned.rewrite["checked"]
        assert pruned.output["parameters"] < report.output["parameters"]


def source_config(folder: Path) -> Any:
    return open_folder(folder).config


@pytest.mark.slow
@pytest.mark.parametrize("family", [*GENERATES, "bart"])
def test_every_decoder_generates_what_torch_does(family: str, folders: Any, tmp_path: Path) -> None:
    graphc.optimize(folders(family), tmp_path / "out", measure=False, verify=False, cache=False)
    ids, mask = prompt()
    asked = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    last = asked.get("forced_eos_token_id")
    assert (last is not None) == (family == "bart")
    found = generated(tmp_path / "out", ids=ids, mask=mask, tokens=12, start=3, last=last)
    np.testing.assert_array_equal(found, greedy(make(family), ids, mask, 12))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "cache"), [("gpt2", "split"), ("llama", "split"), ("llama", "none"), ("t5", "none")]
)
def test_other_cache_layouts_generate_the_same(family: str, cache: str, folders: Any, tmp_path: Path) -> None:
    report = graphc.optimize(folders(family), tmp_path / "out", measure=False, kv_cache=cache, cache=False)
    ids, mask = prompt()
    found = generated(tmp_path / "out", ids=ids, mask=mask, tokens=8)
    np.testing.assert_array_equal(found, greedy(make(family), ids, mask, 8))
    if cache == "split":
        assert set(report.parts) == {"prefill", "decode"}
        assert len(list((tmp_path / "out").glob("*.data"))) == 1


@pytest.mark.slow
def test_a_task_chooses_the_head(folders: Any, tmp_path: Path) -> None:
    source = hf.load(folders("llama"), task="feature-extraction")
    assert [value.name for value in source.original.graph.outputs] == ["last_hidden_state"]
    with pytest.raises(BadInput, match="are not in the folder"):
        hf.load(folders("llama"), task="text-classification")
