"""Where adapters find their weights: tied, merged with others, without a name, in several graphs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

import graphc
from graphc import runtime
from graphc.adapters import Adapters, adapted
from graphc.errors import BadInput
from tests.adapter_models import (
    ROW,
    L,
    build,
    delta,
    fold,
    lora,
    numbers,
    run,
    source,
    torch,
    trained,
    weights,
)

TIED = "e = Gather(embed__weight, i) h = MatMul(e, w) t = Transpose<perm=[1,0]>(embed__weight) y = MatMul(h, t)"


@pytest.mark.parametrize("layers", [("embed",), ("head",), ("embed", "head")])
def test_tied_weights_get_each_what_its_adapter_says(layers: tuple[str, ...], tmp_path: Path) -> None:
    table, mid, ids = numbers(11, 6), numbers(6, 6, seed=5), np.array([[1, 3, 7]])
    folder = lora(tmp_path / "a", **dict.fromkeys(layers, (11, 6)))
    model = build(TIED, "int64[N,S] i", embed__weight=table, w=mid)
    found, done = fold(model, folder)
    first = table + (delta(folder, "embed") if "embed" in layers else 0)
    last = table + (delta(folder, "head") if "head" in layers else 0)
    np.testing.assert_allclose(run(found, i=ids)[0], first[ids] @ mid @ last.T, rtol=1e-4, atol=1e-5)
    assert done.adapted is not None and done.adapted.refusals


def test_weights_that_peft_keeps_tied_stay_one(tmp_path: Path) -> None:
    table, mid = numbers(11, 6), numbers(6, 6, seed=5)
    folder = lora(tmp_path / "a", config={"ensure_weight_tying": True}, embed=(11, 6))
    found, _ = fold(build(TIED, "int64[N,S] i", embed__weight=table, w=mid), folder)
    assert sorted(found.graph.initializers) == ["embed.weight", "w"]
    np.testing.assert_allclose(weights(found)["embed.weight"], table + delta(folder, "embed"), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("targets", [("q", "k", "v"), ("q", "v"), ("k",)])
@pytest.mark.parametrize("stored", ["in_out", "out_in"])
def test_parts_of_merged_weights(targets: tuple[str, ...], stored: str, tmp_path: Path) -> None:
    sizes = {"q": 6, "k": 3, "v": 3}
    whole = numbers(12, 8)
    folder = lora(tmp_path / "a", **{f"layer__{name}_proj": (sizes[name], 8) for name in targets})
    body = {
        "in_out": "y = MatMul(x, layer__qkv_proj__weight)",
        "out_in": "y = Gemm<transB=1>(x, layer__qkv_proj__weight)",
    }
    held = whole.T.copy() if stored == "in_out" else whole
    model = build(body[stored], "float[N,8] x", layer__qkv_proj__weight=held)
    if targets == ("k",):
        with pytest.raises(BadInput, match=r"not found: layer\.k_proj\.weight"):
            fold(model, folder)
        return
    found, _ = fold(model, folder)
    new = weights(found)["layer.qkv_proj.weight"]
    new = new.T if stored == "in_out" else new
    start = 0
    for name, size in sizes.items():
        change = delta(folder, f"layer.{name}_proj") if name in targets else 0
        np.testing.assert_allclose(
            new[start : start + size], whole[start : start + size] + change, rtol=1e-4, atol=1e-6
        )
        start += size


def test_a_weight_without_a_name_is_found_by_the_module_of_its_node(tmp_path: Path) -> None:
    folder = lora(tmp_path / "a", layers__0__q=(6, 6))
    model = build("y = MatMul(x, val_3)", "float[N,6] x", val_3=numbers(6, 6))
    node = next(iter(model.graph))
    node.metadata_props["pkg.torch.onnx.name_scopes"] = "['', 'layers.0', 'layers.0.q', 'linear']"
    new = weights(fold(model, folder)[0])["val_3"]
    np.testing.assert_allclose(new, numbers(6, 6) + delta(folder, "layers.0.q").T, rtol=1e-5, atol=1e-6)
    node.metadata_props.clear()
    node.name = "/layers.0/q/MatMul"
    new = weights(fold(model, folder)[0])["val_3"]
    np.testing.assert_allclose(new, numbers(6, 6) + delta(folder, "layers.0.q").T, rtol=1e-5, atol=1e-6)


def test_tied_parameters_that_the_torch_frontend_notes(tmp_path: Path) -> None:
    table, mid, ids = numbers(11, 6), numbers(6, 6, seed=5), np.array([[1, 3, 7]])
    folder = lora(tmp_path / "a", head=(11, 6))
    model = build(TIED, "int64[N,S] i", embed__weight=table, w=mid)
    model.graph.initializers["embed.weight"].metadata_props["graphc.aliases"] = "head.weight"
    found, _ = fold(model, folder)
    last = table + delta(folder, "head")
    np.testing.assert_allclose(run(found, i=ids)[0], table[ids] @ mid @ last.T, rtol=1e-4, atol=1e-5)


def test_tied_tables_of_two_modules_get_each_their_own(tmp_path: Path) -> None:
    table, ids = numbers(11, 6), np.array([[1, 3, 7]])
    body = "y = Gather(enc__embed__weight, i) z = Gather(enc__embed__weight, i)"
    model = build(body, "int64[N,S] i", "y z", enc__embed__weight=table)
    model.graph.initializers["enc.embed.weight"].metadata_props["graphc.aliases"] = "dec.embed.weight"
    for node, path in zip(model.graph, ("enc.embed", "dec.embed"), strict=True):
        node.metadata_props["graphc.module"] = path
    folder = lora(tmp_path / "a", enc__embed=(11, 6), dec__embed=(11, 6))
    first, second = run(fold(model, folder)[0], i=ids)
    np.testing.assert_allclose(first, (table + delta(folder, "enc.embed"))[ids], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(second, (table + delta(folder, "dec.embed"))[ids], rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_a_hugging_face_folder_with_its_adapter(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    config = transformers.LlamaConfig(**sizes, vocab_size=99, num_key_value_heads=2, tie_word_embeddings=True)
    torch.manual_seed(0)
    net = transformers.LlamaForCausalLM(config).eval()
    net.save_pretrained(tmp_path / "base")
    model = trained(net, L(r=2, target_modules=["q_proj", "down_proj", "embed_tokens"]), tmp_path / "a")
    options = {"measure": False, "cache": False, "verify": False, "kv_cache": "none"}
    graphc.optimize(tmp_path / "base", tmp_path / "out", adapters=[tmp_path / "a"], **options)
    ids = torch.tensor([[3, 7, 11, 50, 98]])
    session = runtime.session(tmp_path / "out" / "model.onnx", optimise=True)
    given_ = {"input_ids": ids.numpy(), "attention_mask": np.ones((1, 5), np.int64), "position_ids": np.arange(5)[None]}
    named = {value.name for value in ir.load(tmp_path / "out" / "model.onnx").graph.inputs}
    logits = next(iter(session.run({name: given_[name] for name in named}).values()))
    with torch.no_grad():
        wanted = model(input_ids=ids, use_cache=False).logits.numpy()
    np.testing.assert_allclose(logits, wanted, rtol=1e-4, atol=1e-5)


def test_a_source_of_several_graphs(tmp_path: Path) -> None:
    folder = lora(tmp_path / "a", encoder__q=(6, 8), decoder__q=(6, 8))
    held = {"encoder": numbers(8, 6), "decoder": numbers(8, 6, seed=2)}
    parts = [
        replace(source(build(f"y = MatMul(x, {n}__q__weight)", ROW, **{f"{n}__q__weight": a})), name=n)
        for n, a in held.items()
    ]
    whole = parts[0].with_others(parts[1:])
    done = adapted(whole, Adapters.of([folder]))
    for part, (name, array) in zip(done.parts, held.items(), strict=True):
        np.testing.assert_allclose(
            weights(part.model)[f"{name}.q.weight"], array + delta(folder, f"{name}.q").T, rtol=1e-5, atol=1e-6
        )
    switched = adapted(whole, Adapters.of([folder], "dynamic"))
    assert set(switched.beside) == {"a.encoder.onnx_adapter", "a.decoder.onnx_adapter"}
    for part, name in zip(switched.parts, held, strict=True):
        assert [v.name for v in part.model.graph.inputs] == ["x", f"{name}.q.lora_A", f"{name}.q.lora_B"]
    with pytest.raises(BadInput, match=r"not found: other\.q"):
        adapted(whole, Adapters.of([lora(tmp_path / "b", encoder__q=(6, 8), other__q=(6, 8))]))


def test_a_shared_table_that_only_tied_modules_read(tmp_path: Path) -> None:
    """T5's ``shared``: the encoder and the decoder read it as their own; PEFT's merge changes it for both."""
    table, ids = numbers(11, 6), np.array([[1, 3, 7]])
    folder = lora(tmp_path / "a", shared=(11, 6))
    parts = []
    for name in ("encoder", "decoder"):
        model = build("y = Gather(shared__weight, i)", "int64[N,S] i", shared__weight=table)
        model.graph.initializers["shared.weight"].metadata_props["graphc.aliases"] = f"{name}.embed.weight"
        model.graph[0].metadata_props["graphc.module"] = f"{name}.embed"
        parts.append(replace(source(model), name=name))
    done = adapted(parts[0].with_others(parts[1:]), Adapters.of([folder]))
    for part in done.parts:
        np.testing.assert_allclose(
            run(part.model, i=ids)[0], (table + delta(folder, "shared"))[ids], rtol=1e-5, atol=1e-6
        )
    assert done.adapted is not None
    assert any("tied to it" in refusal.reason for refusal in done.adapted.refusals)


@pytest.mark.slow
@pytest.mark.parametrize("targets", [["q", "v", "wi"], ["q", "shared"]])
def test_an_encoder_decoder_with_its_adapter(targets: list[str], tmp_path: Path) -> None:
    """The table that the head is tied to is refused: which of its readers follow the adapter cannot be told."""
    transformers = pytest.importorskip("transformers")
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "vocab_size": 99}
    torch.manual_seed(0)
    net = transformers.T5ForConditionalGeneration(
        transformers.T5Config(**sizes, decoder_start_token_id=0, initializer_factor=2.0)
    ).eval()
    net.save_pretrained(tmp_path / "base")
    model = trained(net, L(r=2, target_modules=targets), tmp_path / "a").merge_and_unload()
    options = {"measure": False, "cache": False, "verify": False, "kv_cache": "none"}
    if "shared" in targets:
        with pytest.raises(BadInput, match="tied to its weight"):
            graphc.optimize(tmp_path / "base", tmp_path / "out", adapters=[tmp_path / "a"], **options)
        return
    graphc.optimize(tmp_path / "base", tmp_path / "out", adapters=[tmp_path / "a"], **options)
    ids, start = np.array([[3, 7, 11, 50, 98]]), np.array([[0, 5, 8]])
    ones, first = np.ones_like(ids), np.ones_like(start)
    given_ = {"input_ids": ids, "attention_mask": ones}
    encoded = runtime.session(tmp_path / "out" / "encoder.onnx", optimise=True).run(given_)
    decoder = runtime.session(tmp_path / "out" / "decoder.onnx", optimise=True)
    all_ = {f"past_key_values{k.removeprefix('present')}": v for k, v in encoded.items() if k.startswith("present")}
    all_ |= {"encoder_hidden_states": encoded["last_hidden_state"], "encoder_attention_mask": ones}
    all_ |= {"input_ids": start, "attention_mask": first, "decoder_input_ids": start, "decoder_attention_mask": first}
    logits = decoder.run({name: all_[name] for name in decoder.input_names})["logits"]
    with torch.no_grad():
        wanted = model(input_ids=torch.from_numpy(ids), decoder_input_ids=torch.from_numpy(start)).logits.numpy()
    np.testing.assert_allclose(logits, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("axes", "columns_first"), [("", False), ("1 0", False), ("", True), ("1 0", True)])
def test_notes_tell_rows_from_columns_of_a_square_weight(axes: str, columns_first: bool, tmp_path: Path) -> None:
    weight = numbers(8, 8)
    folder = lora(tmp_path / "a", config={"fan_in_fan_out": columns_first}, layer__q=(8, 8))
    model = build('y = Einsum<equation="ni,io->no">(x, layer__q__weight)', ROW, layer__q__weight=weight)
    with pytest.raises(BadInput, match="square"):
        fold(model.clone(), folder)
    model.graph[0].metadata_props["graphc.module"] = "layer.q"
    if axes:
        model.graph.initializers["layer.q.weight"].metadata_props["graphc.axes"] = axes
    change = delta(folder, "layer.q")  # (out, in)
    stored = change.T if bool(axes) != columns_first else change
    np.testing.assert_allclose(weights(fold(model, folder)[0])["layer.q.weight"], weight + stored, rtol=1e-5, atol=1e-6)
