"""The script that stands in an artifact beside the model: runs it once, or continues a text with its caches."""

from __future__ import annotations

import onnx_ir as ir

from graphc import caches


def script(models: list[ir.Model]) -> str:
    """The text of ``run.py`` for the graphs of an artifact; "" where several graphs are no decoder with a cache."""
    decodes = any(caches.pairs(model) for model in models) and all(_reads_tokens(model) for model in models)
    if decodes:
        return _DECODE
    return _ONCE if len(models) == 1 else ""


def _reads_tokens(model: ir.Model) -> bool:
    """Whether a graph gives logits of token ids."""
    given, found = ({value.name for value in values} for values in (model.graph.inputs, model.graph.outputs))
    return "input_ids" in given and "logits" in found


_ONCE = '''\
"""Run the model beside this file: python run.py [INPUTS.npz] [NAME.onnx_adapter].

It needs onnxruntime and numpy only.
"""

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime as ort

here = Path(__file__).resolve().parent
manifest = here / "graphc.json"
settings = json.loads(manifest.read_text())["runtime"] if manifest.exists() else {}
options = ort.SessionOptions()
options.intra_op_num_threads = settings.get("threads", 0)
if any(here.glob("*.onnx_adapter")):
    options.log_severity_level = 3  # inputs with defaults are meant: adapters give them other values
for key, value in settings.get("session_options", {}).items():
    options.add_session_config_entry(key, value)
provider = settings.get("provider", "CPUExecutionProvider")
session = ort.InferenceSession(here / "model.onnx", options, providers=[provider])


def zeros(value):
    """Zeros in the shape of an input; axes of unknown size get 1."""
    shape = [dim if isinstance(dim, int) and dim > 0 else 1 for dim in value.shape]
    kind = value.type.removeprefix("tensor(").removesuffix(")")
    return np.zeros(shape, {"float": "f4", "double": "f8", "string": object}.get(kind, kind))


chosen = ort.RunOptions()
adapters = []  # they must outlive the run
given = {}
for name in sys.argv[1:]:
    if name.endswith(".onnx_adapter"):
        adapters.append(ort.LoraAdapter())
        adapters[-1].Load(name)
        chosen.add_active_adapter(adapters[-1])
    else:
        given = dict(np.load(name, allow_pickle=False))
inputs = {value.name: given.get(value.name, zeros(value)) for value in session.get_inputs()}
for value, result in zip(session.get_outputs(), session.run(None, inputs, chosen)):
    print(value.name, getattr(result, "dtype", type(result).__name__), np.shape(result))
'''

_DECODE = '''\
"""Continue token ids by the most likely token: python run.py [INPUTS.npz] [TOKENS] [NAME.onnx_adapter].

INPUTS.npz has input_ids [batch, length], and attention_mask where sequences are padded on the left. It needs
onnxruntime and numpy only. Keys and values never pass through Python: what a step gives is bound to the next one, and
where graphc.json says so, the next one appends to it in the same buffer.
"""

import json
import sys
import time
from pathlib import Path

import numpy as np
import onnxruntime as ort

here = Path(__file__).resolve().parent
manifest = json.loads((here / "graphc.json").read_text())
settings = {name: part["runtime"] for name, part in manifest.get("parts", {"model": manifest}).items()}


def load(name):
    """A graph of this artifact under the session options that it asks for."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = settings[name].get("threads", 0)
    options.log_severity_level = 3 if adapters else 2  # inputs with defaults are meant: adapters give them other values
    for key, value in settings[name].get("session_options", {}).items():
        options.add_session_config_entry(key, value)
    provider = settings[name].get("provider", "CPUExecutionProvider")
    return ort.InferenceSession(here / f"{name}.onnx", options, providers=[provider])


def empty(value, batch):
    """A cache that holds nothing yet."""
    kind = {"tensor(float16)": np.float16, "tensor(int8)": np.int8}.get(value.type, np.float32)
    return ort.OrtValue.ortvalue_from_numpy(np.zeros((batch, value.shape[1], 0, value.shape[3]), kind))


def roomy(value, room):
    """A buffer of ``room`` positions that begins with what a cache holds."""
    held = value.numpy()
    buffer = np.zeros((*held.shape[:2], room, held.shape[3]), held.dtype)
    buffer[:, :, : held.shape[2]] = held
    return ort.OrtValue.ortvalue_from_numpy(buffer)


def step(name, feeds, past):
    """Run a graph; the logits, and the caches for the next step by the names that it has for them."""
    session, in_place = graphs[name], settings[name].get("in_place")
    sources = {present: before for before, present in settings[name].get("caches", {}).items()}
    binding = session.io_binding()
    held = {}  # a binding keeps no array alive
    for value in session.get_inputs():
        if value.name in feeds:
            held[value.name] = np.ascontiguousarray(feeds[value.name])
            binding.bind_cpu_input(value.name, held[value.name])
        else:
            held[value.name] = past.get(value.name) or empty(value, len(feeds["input_ids"]))
            binding.bind_ortvalue_input(value.name, held[value.name])
    outputs = [value.name for value in session.get_outputs()]
    for output in outputs:
        if in_place and output in sources:
            binding.bind_ortvalue_output(output, past[sources[output]])
        else:
            binding.bind_output(output)
    session.run_with_iobinding(binding, chosen)
    found = dict(zip(outputs, binding.get_outputs()))
    # Only the value that was made of a buffer keeps it alive.
    found |= {output: past[sources[output]] for output in outputs if in_place and output in sources}
    return found["logits"].numpy(), {output: value for output, value in found.items() if output != "logits"}


given, tokens, adapters, chosen = {"input_ids": np.array([[1, 2, 3]])}, 16, [], ort.RunOptions()
for argument in sys.argv[1:]:
    if argument.endswith(".onnx_adapter"):
        adapters.append(ort.LoraAdapter())  # they must outlive the run
        adapters[-1].Load(argument)
        chosen.add_active_adapter(adapters[-1])
    elif argument.isdigit():
        tokens = int(argument)
    else:
        given = dict(np.load(argument, allow_pickle=False))
graphs = {name: load(name) for name in settings}
first, further = ("prefill", "decode") if "decode" in graphs else ("model", "model")
names = {present: past for past, present in settings[further]["caches"].items()}
ids = given["input_ids"].astype(np.int64)
mask = given.get("attention_mask", np.ones_like(ids)).astype(np.int64)
made, past, times, seen, left, room = [], {}, [], 0, ids, mask.shape[1] + tokens
# A graph for one token at a time reads a prompt like that, too.
one = any(value.name == "input_ids" and value.shape[1] == 1 for value in graphs[first].get_inputs())
if settings[first].get("in_place"):
    inputs = [value for value in graphs[first].get_inputs() if value.name in settings[first]["caches"]]
    past = {value.name: roomy(empty(value, len(ids)), room) for value in inputs}
begin = time.perf_counter()
while len(made) < tokens:
    width = 1 if one else left.shape[1]
    ids, left, seen = left[:, :width], left[:, width:], seen + width
    positions = np.maximum(np.cumsum(mask[:, :seen], 1) - 1, 0)[:, -width:]
    feeds = {"input_ids": ids, "attention_mask": mask[:, :seen], "position_ids": positions}
    logits, present = step(further if made else first, feeds, past)
    past = {names[output]: value for output, value in present.items()}
    if left.shape[1]:
        continue
    if not made and settings[further].get("in_place") and not settings[first].get("in_place"):
        past = {name: roomy(value, room) for name, value in past.items()}
    left = np.argmax(logits[:, -1:], axis=-1).astype(np.int64)
    mask = np.concatenate([mask, np.ones_like(left)], 1)
    made.append(left)
    times.append(time.perf_counter() - begin)
    begin = time.perf_counter()
for row in np.concatenate(made, 1):
    print(*row)
print(f"first token {times[0] * 1e3:.1f} ms, then {np.median(times[1:] or times) * 1e3:.1f} ms each", file=sys.stderr)
'''
