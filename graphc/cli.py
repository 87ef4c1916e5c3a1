"""The command line: argument parsing only; every command's work is a function of the library.

Nothing heavy is imported before a command runs, so that ``--help`` is instant.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from graphc import __version__, commands
from graphc.errors import ExitCode, GraphcError
from graphc.startup import prepare_process

EPILOG = """\
exit codes: 0 done, 1 a check or a gate failed, 2 bad input
start here: graphc optimize model.onnx      what runs here: graphc doctor
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code. Without arguments it is the process's own."""
    if argv is None:
        prepare_process()
    arguments = _parser().parse_args(argv)
    try:
        return int(arguments.run(arguments))
    except GraphcError as error:
        print(f"graphc: error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("graphc: interrupted; nothing was written", file=sys.stderr)
        return ExitCode.BAD_INPUT
    except BrokenPipeError:
        # The reader of our output went away (`graphc list | head`): not an error of ours.
        sys.stderr.close()
        return ExitCode.OK
    except MemoryError:
        print("graphc: error: out of memory\n  try:   close other programs, or use --no-verify", file=sys.stderr)
        return ExitCode.BAD_INPUT


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="graphc",
        description="Make a trained neural network smaller and faster, prove what can be proved, measure the rest.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"graphc {__version__}")
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _optimize(subparsers)
    _inspect(subparsers)
    _explain(subparsers)
    _verify(subparsers)
    _bench(subparsers)
    _list(subparsers)
    _doctor(subparsers)
    return parser


def _command(subparsers: Any, name: str, run: Callable[[Any], int], help: str, **more: Any) -> argparse.ArgumentParser:
    command: argparse.ArgumentParser = subparsers.add_parser(
        name, help=help, description=help, formatter_class=argparse.RawDescriptionHelpFormatter, **more
    )
    command.set_defaults(run=run)
    return command


def _optimize(subparsers: Any) -> None:
    command = _command(
        subparsers,
        "optimize",
        commands.optimize,
        "Make a model smaller and faster and check that it still computes the same.",
        epilog="examples:\n"
        "  graphc optimize model.onnx\n"
        "  graphc optimize model.onnx --preset small --calibrate samples.npz\n"
        "  graphc optimize model.onnx -o out.onnx -p 'simplify,fuse{only=conv-bn}' --why\n"
        "  graphc optimize model.onnx -o artifact/ -r recipe.toml --data samples.npz --report report.html\n"
        "  graphc optimize package.module:Net --inputs 'x=float32[1,3,32,32]'\n",
    )
    command.add_argument("model", type=Path, help=_MODEL)
    _torch_flags(command)
    out = command.add_argument_group("output")
    out.add_argument(
        "-o",
        "--output",
        type=Path,
        metavar="PATH",
        help="FILE.onnx, or a FOLDER/ for the artifact (model.opt.onnx)",
    )
    out.add_argument("--report", type=Path, metavar="FILE", help="write the report (.json or .html)")
    out.add_argument("--depfile", type=Path, metavar="FILE", help="write the files read, for make and ninja")
    out.add_argument("--dry-run", action="store_true", help="do everything but write the output")
    what = command.add_argument_group("what to do")
    which = what.add_mutually_exclusive_group()
    which.add_argument("-p", "--passes", metavar="TEXT", help="a recipe as text: 'simplify,fuse{only=conv-bn}'")
    which.add_argument("-r", "--recipe", metavar="FILE", help="a recipe as a TOML file, or a shipped one's name")
    which.add_argument(
        "--preset",
        metavar="NAME",
        help="what you want: small, balanced or fast; or a shipped recipe's name; see 'graphc list recipes'",
    )
    what.add_argument("-t", "--target", default="onnxruntime", metavar="TARGET", help="onnxruntime (default) or tvm")
    what.add_argument("--stop-after", metavar="PASS", help="stop after this pass; --resume goes on from the output")
    what.add_argument("--resume", action="store_true", help="go on with a model written by --stop-after")
    what.add_argument("--seed", type=int, default=0, help="seed of everything random (0)")
    hub = command.add_argument_group("Hugging Face models")
    hub.add_argument("--task", default="", metavar="TASK", help="what to export, e.g. fill-mask (the saved head)")
    hub.add_argument(
        "--kv-cache",
        default="merged",
        choices=("merged", "split", "none"),
        help="of models that generate: one graph with a past that may be empty, one for the prompt and one for "
        "further tokens, or no past (merged)",
    )
    adapt = command.add_argument_group("adapters")
    adapt.add_argument(
        "--adapter",
        action="append",
        default=[],
        metavar="FOLDER[=WEIGHT]",
        help="a PEFT adapter (LoRA, DoRA, AdaLoRA, IA3) to fold into the weights; repeatable",
    )
    adapt.add_argument(
        "--adapter-mode",
        choices=("fold", "dynamic"),
        default="fold",
        help="fold into the weights, or keep beside the model to switch at run time (fold)",
    )
    adapt.add_argument(
        "--adapter-combine",
        default="cat",
        metavar="METHOD",
        help="how several are combined: cat, linear, svd, ties, dare_linear, dare_ties, magnitude_prune, della, "
        "star; with options: 'ties{density=0.5}' (cat: their sum)",
    )
    passes = command.add_argument_group("options of passes, also settable in the recipe")
    passes.add_argument("--ratio", type=float, metavar="PART", help="prune and others: the part to remove")
    passes.add_argument("--mask", metavar="FILE", help="prune: a safetensors file of booleans, true = keep")
    passes.add_argument(
        "--allow-interface", action="store_true", help="prune, shrink: inputs and outputs may get narrower"
    )
    target = command.add_argument_group("options of targets, also settable as in -t 'tvm{threads=2}'")
    target.add_argument("--shapes", nargs="+", metavar="NAME=SIZE", help="tvm: sizes of dynamic dimensions: batch=1,8")
    target.add_argument("--tune", type=float, metavar="MINUTES", help="tvm: measure loops and take the fastest")
    target.add_argument("--trials", type=int, metavar="N", help="tvm: measure at most N loops")
    check = command.add_argument_group("checks and limits")
    check.add_argument(
        "--data",
        metavar="DATA",
        help="inputs to check and measure on: .npz, text, a folder of arrays or pictures, FILE.py:FUNCTION",
    )
    check.add_argument("--calibrate", metavar="DATA", help="inputs to collect statistics on, in the same forms")
    check.add_argument("--tokenizer", type=Path, metavar="PATH", help="for text: a folder with tokenizer.json")
    check.add_argument(
        "--max-drop",
        action="append",
        default=[],
        metavar="METRIC=VALUE",
        help="limit for lossy passes: error, top1, kl, perplexity or file.py:function; repeatable",
    )
    check.add_argument("--max-size", metavar="SIZE", help="limit of the output: 10MB, 0.5x")
    check.add_argument("--max-latency", metavar="TIME", help="limit of the latency: 5ms, 0.8x")
    check.add_argument("--strict", action="store_true", help="fail if any pass had to be rolled back")
    check.add_argument("--unchecked", action="store_true", help="run all passes even if nothing can be checked here")
    check.add_argument("--no-verify", action="store_true", help="skip all checks")
    check.add_argument("--no-measure", action="store_true", help="do not time input and output")
    check.add_argument(
        "--timings", type=Path, metavar="FILE", help="the timing table that decides in 'lower'; made if there is none"
    )
    check.add_argument("--no-cache", action="store_true", help="neither read nor write the cache")
    _verbosity(command)
    command.add_argument("--why", action="store_true", help="list everything that did not apply, with its reason")


_MODEL = "an .onnx file, an artifact, a Hugging Face folder, or a torch module: package.module:name or a .pt2 file"


def _torch_flags(command: argparse.ArgumentParser) -> None:
    group = command.add_argument_group(
        "torch modules",
        "NAME in package.module:NAME is a module, a class of one, or a function that returns one or\n"
        "(module, example_inputs). The current folder can be imported from.",
    )
    group.add_argument(
        "--inputs",
        metavar="INPUTS",
        help="example inputs: a .npz file, or text such as 'ids=int64[1,16]<1000 x=float32[1,3,32,32] flag=true'; "
        "<1000 bounds integers (2)",
    )
    group.add_argument(
        "--dynamic",
        default="auto",
        metavar="AXES",
        help="sizes that stay dynamic: auto, batch, none, or 'ids:0=batch,1=sequence x:0=batch' (auto)",
    )


def _inspect(subparsers: Any) -> None:
    command = _command(subparsers, "inspect", commands.inspect, "Show what is in a model.")
    command.add_argument("model", type=Path, help=_MODEL)
    _torch_flags(command)
    what = command.add_mutually_exclusive_group()
    what.add_argument("--text", action="store_true", help="print the whole graph as text")
    what.add_argument("--groups", action="store_true", help="show what can be cut together, and what cannot and why")
    what.add_argument("--blocks", action="store_true", help="show the blocks and residual branches that can be dropped")
    draw = command.add_mutually_exclusive_group()
    draw.add_argument("--dot", nargs="?", const="-", metavar="FILE", help="draw the groups for Graphviz")
    draw.add_argument("--svg", nargs="?", const="-", metavar="FILE", help="draw the groups as a picture")
    command.add_argument("--allow-interface", action="store_true", help="count inputs and outputs as free to cut")
    _json_flag(command)


def _explain(subparsers: Any) -> None:
    command = _command(
        subparsers,
        "explain",
        commands.explain,
        "Say what goes with a weight, a node or a group when it is cut, or why it cannot be cut.",
    )
    command.add_argument("model", type=Path, help=_MODEL)
    _torch_flags(command)
    command.add_argument("name", help="a weight, a node or a group, as 'graphc inspect --groups' shows it")
    command.add_argument("--allow-interface", action="store_true", help="count inputs and outputs as free to cut")


def _verify(subparsers: Any) -> None:
    command = _command(subparsers, "verify", commands.verify, "Check that two models compute the same.")
    command.add_argument("a", type=Path, help="the reference")
    command.add_argument("b", type=Path, help="the model to check")
    _torch_flags(command)
    command.add_argument("--data", metavar="DATA", help="inputs to compare on; made to fit if not given")
    command.add_argument("--tokenizer", type=Path, metavar="PATH", help="for text: a folder with tokenizer.json")
    command.add_argument("--seed", type=int, default=0, help="seed of the inputs made (0)")
    _json_flag(command)


def _bench(subparsers: Any) -> None:
    command = _command(subparsers, "bench", commands.bench, "Time models against each other, interleaved in one run.")
    command.add_argument("models", type=Path, nargs="+", metavar="MODEL", help="the first is the baseline")
    _torch_flags(command)
    command.add_argument("--data", metavar="DATA", help="inputs to run; made to fit if not given")
    command.add_argument("--tokenizer", type=Path, metavar="PATH", help="for text: a folder with tokenizer.json")
    command.add_argument("--seconds", type=float, default=5.0, help="time to spend, for all models together (5)")
    command.add_argument("--threads", type=int, default=0, help="threads of the runtime (0: its default)")
    command.add_argument("--provider", default="CPUExecutionProvider", help="execution provider")
    _json_flag(command)


def _list(subparsers: Any) -> None:
    command = _command(
        subparsers, "list", commands.list, "Show passes, backends, recipes, or the documentation of one."
    )
    command.add_argument("what", nargs="?", metavar="WHAT", help="passes, rules, backends, recipes, or a NAME")
    _json_flag(command)


def _doctor(subparsers: Any) -> None:
    command = _command(
        subparsers, "doctor", commands.doctor, "Show what is installed, what runs where, what to install."
    )
    _json_flag(command)


def _json_flag(command: argparse.ArgumentParser) -> None:
    command.add_argument("--json", action="store_true", help="print JSON for machines")


def _verbosity(command: argparse.ArgumentParser) -> None:
    _json_flag(command)
    command.add_argument("-q", "--quiet", action="store_true", help="print errors only")
    command.add_argument("-v", "--verbose", action="store_true", help="print every change of every pass")


if __name__ == "__main__":
    sys.exit(main())
