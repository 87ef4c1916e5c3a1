"""Greedy generation from an artifact that graphc made of a Hugging Face model.

    graphc optimize ./SmolLM2-135M -o smollm2/
    python generate.py smollm2/ "The capital of France is" --tokens 20

It needs onnxruntime and numpy, and tokenizers for text. The artifact is one graph with a past that may be empty
(``model.onnx``), one for the prompt and one for each further token (``prefill.onnx``, ``decode.onnx``), or an encoder
and a decoder; what differs between them is what they take, and they say so.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import onnxruntime as ort


def sessions(folder):
    """The graphs of an artifact by name, under the session options that it asks for."""
    manifest = json.loads((folder / "graphc.json").read_text())
    parts = {name: part["runtime"] for name, part in manifest.get("parts", {"model": manifest}).items()}
    found = {}
    for name, settings in parts.items():
        options = ort.SessionOptions()
        options.intra_op_num_threads = settings.get("threads", 0)
        for key, value in settings.get("session_options", {}).items():
            options.add_session_config_entry(key, value)
        provider = settings.get("provider", "CPUExecutionProvider")
        found[name] = ort.InferenceSession(folder / f"{name}.onnx", options, providers=[provider])
    return found


def run(session, inputs):
    """Run a graph on those of the inputs that it takes; an empty past where there is none yet."""
    batch = len(inputs["input_ids"])
    feeds = {}
    for value in session.get_inputs():
        if value.name in inputs:
            feeds[value.name] = inputs[value.name]
        elif value.name.startswith("past_key_values."):
            _, heads, _, size = value.shape
            dtype = {"tensor(float16)": np.float16}.get(value.type, np.float32)
            feeds[value.name] = np.zeros((batch, heads, 0, size), dtype)
    names = [value.name for value in session.get_outputs()]
    outputs = dict(zip(names, session.run(names, feeds), strict=True))
    present = {n.replace("present.", "past_key_values."): v for n, v in outputs.items() if n.startswith("present.")}
    return outputs, present


def generate(folder, ids, mask=None, tokens=20, end=(), start=0, first=None, last=None):
    """Continue sequences by the most likely token, again and again.

    Args:
        folder: The artifact.
        ids: Token ids, int64 [batch, length]; shorter sequences are padded on the left.
        mask: 1 where there is a token, [batch, length]; all ones when not given.
        tokens: How many to generate at most.
        end: Tokens that end a sequence.
        start: For an encoder with a decoder: the token that the decoder starts with.
        first: The token to begin with, whatever is likely; some models ask for one.
        last: The token to stop with where ``tokens`` are reached.

    Returns:
        The generated tokens, [batch, up to ``tokens``]; after its end, a sequence repeats the token that ended it.
    """
    parts = sessions(Path(folder))
    mask = np.ones_like(ids) if mask is None else mask
    past, inputs = {}, {"input_ids": ids, "attention_mask": mask}
    reads = parts.get("prefill") or parts.get("model")
    if "encoder" in parts:
        encoded, past = run(parts["encoder"], inputs)
        inputs = {"encoder_attention_mask": mask, "encoder_hidden_states": encoded["last_hidden_state"]}
        inputs["input_ids"] = np.full((len(ids), 1), start, np.int64)
        inputs["attention_mask"] = np.ones((len(ids), 1), np.int64)
        reads = parts["decoder"]
    further = parts.get("decode") or reads
    keeps = any(value.name.startswith("past_key_values.") for value in further.get_inputs())
    made, done = [], np.zeros(len(ids), bool)
    for step in range(tokens):
        seen = inputs["attention_mask"]
        positions = np.maximum(np.cumsum(seen, 1) - 1, 0)
        inputs["position_ids"] = positions[:, -inputs["input_ids"].shape[1] :]
        outputs, present = run(further if step else reads, inputs | past)
        past |= present
        best = np.argmax(outputs["logits"][:, -1], axis=-1)
        forced = last if step == tokens - 1 and last is not None else first if step == 0 else None
        best = best if forced is None else np.full_like(best, forced)
        best = np.where(done, made[-1], best) if made else best
        made.append(best)
        done |= np.isin(best, list(end))
        if done.all():
            break
        inputs["attention_mask"] = np.concatenate([seen, np.ones((len(ids), 1), np.int64)], 1)
        new = best[:, None].astype(np.int64)
        inputs["input_ids"] = new if keeps else np.concatenate([inputs["input_ids"], new], 1)
    return np.stack(made, 1)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact", type=Path)
    parser.add_argument("prompt")
    parser.add_argument("--tokens", type=int, default=20, help="how many to generate at most (20)")
    arguments = parser.parse_args()
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(arguments.artifact / "tokenizer.json"))
    place = arguments.artifact / "generation_config.json"
    settings = json.loads(place.read_text()) if place.exists() else {}
    end = settings.get("eos_token_id") or ()
    made = generate(
        arguments.artifact,
        np.array([tokenizer.encode(arguments.prompt).ids], np.int64),
        tokens=arguments.tokens,
        end=[end] if isinstance(end, int) else end,
        start=settings.get("decoder_start_token_id") or 0,
        first=settings.get("forced_bos_token_id"),
        last=settings.get("forced_eos_token_id"),
    )
    print(tokenizer.decode(made[0].tolist()))


if __name__ == "__main__":
    main()
