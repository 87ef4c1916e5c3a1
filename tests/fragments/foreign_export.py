"""Tiny random models as other exporters write them: ``tests/data/foreign/*.onnx``.

The files are committed, tests only read them. To make them again, run this once for each exporter in an environment of
its own: ``PYTHON tests/fragments/foreign_export.py tensorflow`` (tensorflow, tf2onnx), ``paddle`` (paddlepaddle,
paddle2onnx, packaging), ``optimum`` (optimum-onnx with the transformers it wants). Metadata is left out: it names files
of the machine.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent.parent / "data" / "foreign"

EXPECTED: dict[str, dict[str, int]] = {
    "tensorflow-encoder": {"Attention": 1, "LayerNormalization": 2, "Gelu": 1, "Softmax": 0},
    "tensorflow-causal": {"Attention": 1, "LayerNormalization": 1, "Softmax": 0},
    "tensorflow-grouped": {"Attention": 1, "RMSNormalization": 1, "Softmax": 0},
    "tensorflow-norms": {"HardSwish": 1},
    "paddle-masked": {"Attention": 1, "LayerNormalization": 2, "Gelu": 1, "Softmax": 0},
    "paddle-norms": {"InstanceNormalization": 2, "HardSwish": 1},
    "optimum-t5": {"Attention": 1, "RMSNormalization": 3, "Softmax": 0},
    "optimum-mpnet": {"Attention": 1, "LayerNormalization": 3, "Gelu": 1, "Softmax": 0},
    "optimum-deberta": {"Attention": 1, "LayerNormalization": 3, "Gelu": 1, "Softmax": 0},
    "optimum-clip": {"Attention": 2, "Softmax": 0},
    "optimum-swin": {"Attention": 1, "LayerNormalization": 4, "Gelu": 1, "Softmax": 0},
    "optimum-convnext": {"LayerNormalization": 2, "Gelu": 1},
    "optimum-llama-past": {"Attention": 1, "RMSNormalization": 3, "RotaryEmbedding": 2, "Softmax": 0},
    "optimum-gpt2-past": {"Attention": 1, "LayerNormalization": 3, "Gelu": 1, "Softmax": 0},
    "optimum-t5-past": {"Attention": 2, "RMSNormalization": 4, "Softmax": 0},
    "optimum-t5-merged": {"Attention": 4, "RMSNormalization": 8, "Softmax": 0},
}
"""What must be recognised in each file, and what must not be left."""


def tensorflow() -> None:
    """Keras models, through tf2onnx, which Keras' own export uses, too."""
    import keras
    import numpy as np
    import tensorflow as tf
    import tf2onnx
    from keras import layers as k

    def gelu(x: Any) -> Any:
        return k.Activation(lambda t: keras.activations.gelu(t, approximate=True))(x)

    def encoder() -> Any:
        ids = keras.Input((None,), dtype="int32", name="ids")
        x = k.Embedding(32, 16)(ids)
        x = k.LayerNormalization(epsilon=1e-6)(x + k.MultiHeadAttention(4, 4)(x, x))
        return keras.Model(ids, k.LayerNormalization(epsilon=1e-6)(x + k.Dense(16)(gelu(k.Dense(24)(x)))))

    def causal() -> Any:
        ids = keras.Input((None,), dtype="int32", name="ids")
        x = k.Embedding(32, 16)(ids)
        x = k.LayerNormalization()(x + k.MultiHeadAttention(4, 4)(x, x, use_causal_mask=True))
        return keras.Model(ids, x + k.Dense(16)(k.Activation("silu")(k.Dense(24)(x))))

    def grouped() -> Any:
        x = given = keras.Input((8, 16), name="x")
        x = k.RMSNormalization()(x + k.GroupQueryAttention(4, 4, 2)(x, x))
        return keras.Model(given, x + k.Dense(16)(k.Activation("silu")(k.Dense(24)(x))))

    def norms() -> Any:
        x = given = keras.Input((8, 8, 4), name="x")
        x = k.Activation("silu")(k.GroupNormalization(2)(k.Conv2D(8, 3, padding="same")(x)))
        x = k.Activation("hard_silu")(k.GroupNormalization(-1)(k.Conv2D(8, 3, padding="same")(x)))
        return keras.Model(given, k.Conv2D(4, 3, padding="same")(x))

    for make in (encoder, causal, grouped, norms):
        keras.utils.set_random_seed(0)
        model = make()
        for weight in model.weights:
            weight.assign(np.array(weight) + 0.05 * np.random.randn(*weight.shape))
        (given,) = model.inputs
        signature = [tf.TensorSpec(given.shape, given.dtype, name=given.name)]
        path = FOLDER / f"tensorflow-{make.__name__}.onnx"
        function = tf.function(model, input_signature=signature)
        tf2onnx.convert.from_function(function, input_signature=signature, opset=17, output_path=str(path))
        _strip(path)


def paddle() -> None:
    """Paddle layers, through paddle2onnx."""
    import paddle
    import paddle2onnx
    from paddle import nn

    class Masked(nn.Layer):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(32, 16)
            layer = nn.TransformerEncoderLayer(16, 4, 24, dropout=0.0, activation="gelu", normalize_before=True)
            self.encoder = nn.TransformerEncoder(layer, 1)

        def forward(self, ids: Any, mask: Any) -> Any:
            added = (1.0 - paddle.cast(mask, "float32")).unsqueeze([1, 2]) * -1e4
            return self.encoder(self.table(ids), added)

    class Norms(nn.Layer):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2D(3, 8, 3, padding=1), nn.Conv2D(8, 8, 3, padding=1)
            self.grouped, self.each = nn.GroupNorm(2, 8), nn.InstanceNorm2D(8)

        def forward(self, x: Any) -> Any:
            x = nn.functional.silu(self.grouped(self.first(x)))
            return nn.functional.hardswish(self.each(self.second(x)))

    spec = paddle.static.InputSpec
    ids = [spec([None, None], "int64", name) for name in ("ids", "mask")]
    for name, layer, inputs in (("masked", Masked, ids), ("norms", Norms, [spec([None, 3, 8, 8], "float32", "x")])):
        paddle.seed(0)
        model = layer()
        model.eval()
        path = FOLDER / f"paddle-{name}.onnx"
        with tempfile.TemporaryDirectory() as folder:
            paddle.jit.save(paddle.jit.to_static(model, input_spec=inputs, full_graph=True), f"{folder}/model")
            paddle2onnx.export(f"{folder}/model.json", f"{folder}/model.pdiparams", str(path), opset_version=17)
        _strip(path)


def optimum() -> None:
    """Transformers, through Hugging Face Optimum."""
    import torch
    import transformers as t
    from optimum.exporters.onnx import onnx_export_from_model

    layer = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 24}
    text = {"vocab_size": 32, "max_position_embeddings": 64}
    relative = {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "position_buckets": 8}
    both = {"text_config": {**layer, **text, "eos_token_id": 31}}
    both["vision_config"] = {**layer, "image_size": 32, "patch_size": 16}
    t5 = t.T5Config(d_model=16, d_kv=4, d_ff=24, num_layers=1, num_heads=4, vocab_size=32, decoder_start_token_id=0)
    swin = t.SwinConfig(image_size=16, patch_size=2, embed_dim=8, depths=[1], num_heads=[2], window_size=4)
    convnext = t.ConvNextConfig(hidden_sizes=[8], depths=[1], num_stages=1, image_size=32)
    gpt2 = t.GPT2Config(n_embd=16, n_layer=1, n_head=4, vocab_size=32, n_positions=64)
    llama = t.LlamaConfig(**layer, **text, num_key_value_heads=2)
    features, generation, translation = "feature-extraction", "text-generation-with-past", "text2text-generation"
    models = {
        "t5": (lambda: t.T5ForConditionalGeneration(t5), translation, "encoder_model"),
        "mpnet": (lambda: t.MPNetModel(t.MPNetConfig(**layer, **text)), features, "model"),
        "deberta": (
            lambda: t.DebertaV2Model(t.DebertaV2Config(**layer, **text, share_att_key=True, **relative)),
            features,
            "model",
        ),
        "clip": (
            lambda: t.CLIPModel(t.CLIPConfig(**both, projection_dim=8)),
            "zero-shot-image-classification",
            "model",
        ),
        "swin": (lambda: t.SwinModel(swin, add_pooling_layer=False), features, "model"),
        "convnext": (lambda: t.ConvNextModel(convnext), features, "model"),
        "llama-past": (lambda: t.LlamaForCausalLM(llama), generation, "model"),
        "gpt2-past": (lambda: t.GPT2LMHeadModel(gpt2), generation, "model"),
        "t5-past": (lambda: t.T5ForConditionalGeneration(t5), f"{translation}-with-past", "decoder_with_past_model"),
        "t5-merged": (lambda: t.T5ForConditionalGeneration(t5), f"{translation}-with-past", "decoder_model_merged"),
    }
    for name, (make, task, file) in models.items():
        path = FOLDER / f"optimum-{name}.onnx"
        if path.exists():
            continue
        torch.manual_seed(0)
        with tempfile.TemporaryDirectory() as folder:
            options = {"task": task, "do_validation": False, "no_post_process": False, "opset": 17}
            onnx_export_from_model(make().eval(), output=folder, **options)
            path.write_bytes(Path(folder, f"{file}.onnx").read_bytes())
        _strip(path)


def _strip(path: Path) -> None:
    """Leave out what names files of this machine, and what is said of values inside."""
    import onnx

    model = onnx.load(path)
    graphs = [model.graph]
    for graph in graphs:
        graphs += [attribute.g for node in graph.node for attribute in node.attribute if attribute.HasField("g")]
        for holder in (graph, *graph.node, *graph.value_info, *graph.input):
            holder.ClearField("metadata_props")
            holder.ClearField("doc_string")
        graph.ClearField("value_info")
    model.ClearField("metadata_props")
    model.ClearField("doc_string")
    onnx.save(model, path)


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    {"tensorflow": tensorflow, "paddle": paddle, "optimum": optimum}[sys.argv[1]]()
