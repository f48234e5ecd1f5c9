"""Every GPU test and benchmark on one card, in minutes: ``make gpu``, or ``python -m axon_llm.bench.gpu``.

Needs a CUDA device, PyTorch, and no network: weights are random, of named shapes. Each stage is a process of its own
with a time limit, so that one that hangs or crashes costs its own figures and no other's. A stage fails that ran other
than asked: not compiled, or not captured as a CUDA graph. Every report is a file as soon as it is complete:

    OUT/gpu-SHAPE-MODE.json   one run of the bench
    OUT/gpu.json              the stages, their seconds and how they ended
    OUT/gpu.md                the reports as tables

The exit code is 0 if every stage succeeded. ``GPT_FAST`` may name a folder with a checkout of gpt-fast.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from argparse import ArgumentParser
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
SMALL, LARGE = "llama-3.2-1b", "llama-3.1-8b"
BUDGET_S = 450.0
LEAST_S = 20.0  # a stage with less time left than this is not begun
DEPTH, DECODED, PREFILLED, REPETITIONS = 512, 64, 512, 3
# name → quantisation, sequences decoding together, tokens prefilled
MODES: dict[str, tuple[str | None, tuple[int, ...], int]] = {
    "bf16": (None, (1, 8, 64), PREFILLED),
    "int8": ("int8", (1, 8), PREFILLED),
    "int4": ("int4", (1, 8), PREFILLED),
    "fp8": ("fp8", (1, 8), PREFILLED),
    "peers": (None, (1,), 0),
}


@dataclass(slots=True)
class Stage:
    """One process, or two where the first crashed.

    Attributes:
        name: for people.
        limit_s: seconds it may take.
        shape: measured; empty for the tests.
        modes: measured.
        must: whether it failing, or not being begun, makes the run a failure.
        seconds: taken.
        code: exit code; ``None`` if not begun, 124 if stopped at its limit.
    """

    name: str
    limit_s: float
    shape: str = ""
    modes: tuple[str, ...] = ()
    must: bool = True
    seconds: float = 0.0
    code: int | None = None


def stages() -> list[Stage]:
    """What is run, the most wanted first."""
    return [
        Stage("tests", 180),
        Stage("8B shape", 150, LARGE, ("bf16", "int8", "int4")),
        Stage("1B shape", 110, SMALL, ("bf16", "int8", "int4")),
        Stage("8B shape in fp8", 80, LARGE, ("fp8",), must=False),
        Stage("1B shape and peers", 90, SMALL, ("peers",)),
        Stage("8B shape and peers", 120, LARGE, ("peers",), must=False),
    ]


def main(arguments: list[str] | None = None) -> int:
    """Run every stage, or as a child process one of them."""
    parser = ArgumentParser(prog="python -m axon_llm.bench.gpu", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "var")
    parser.add_argument("--seconds", type=float, default=BUDGET_S, help="for everything together")
    parser.add_argument("--shape", default="", help="measure this shape in this process; with MODES")
    parser.add_argument("modes", nargs="*", help=f"of {', '.join(MODES)}")
    options = parser.parse_args(arguments)
    import torch

    if not torch.cuda.is_available():
        print("axon: there is no CUDA device here, so nothing was tested or measured", file=sys.stderr)
        return 1
    options.out.mkdir(parents=True, exist_ok=True)
    if options.shape:
        return measure_modes(options.shape, options.modes, options.out)
    return run_all(stages(), options.out, options.seconds)


def run_all(todo: list[Stage], out: Path, budget_s: float) -> int:
    """Run stage after stage, whatever becomes of each, and write what there is."""
    for old in (*out.glob("gpu-*.json"), *out.glob("gpu-*.started"), out / "gpu.json", out / "gpu.md"):
        old.unlink(missing_ok=True)  # no figure of an earlier run may pass for one of this
    start = time.monotonic()
    for stage in todo:
        left = budget_s - (time.monotonic() - start)
        if left >= LEAST_S:
            print(f"== {stage.name}, at most {min(stage.limit_s, left):.0f} s", flush=True)
            begun = time.monotonic()
            stage.code = run_stage(stage, out, begun + min(stage.limit_s, left))
            stage.seconds = round(time.monotonic() - begun, 1)
        ended = (
            "not begun: no time left" if stage.code is None else "ok" if not stage.code else f"failed ({stage.code})"
        )
        print(f"== {stage.name}: {ended}, {stage.seconds:.1f} s", flush=True)
        write(out / "gpu.json", {"schema": "axon.gpu/1", "stages": [asdict(each) for each in todo]})
    print(f"== {time.monotonic() - start:.1f} s in all", flush=True)
    reports = sorted(str(path) for path in out.glob("gpu-*.json"))
    worst = max((1 if stage.code is None else abs(stage.code) for stage in todo if stage.must), default=0)
    if reports:
        words = [sys.executable, "-m", "cli.benchmarks", "--render", *reports]
        drawn = subprocess.run(words, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False)
        (out / "gpu.md").write_text(drawn.stdout, encoding="utf-8")
        print(drawn.stdout)
        worst = max(worst, drawn.returncode)
    return min(worst, 255)


def run_stage(stage: Stage, out: Path, deadline: float) -> int:
    """Run a stage's process; of modes that a crash left unbegun, another. The worst exit code, or 124 at the limit."""
    if not stage.shape:
        tests = ["-m", "pytest", "-c", os.devnull, "--rootdir", ".", "-q", "-rs", "-p", "no:cacheprovider", "tests/gpu"]
        return run_process(tests, deadline)
    worst, modes = 0, list(stage.modes)
    while modes:
        words = ["-m", "axon_llm.bench.gpu", "--out", str(out.resolve()), "--shape", stage.shape, *modes]
        worst = max(worst, abs(run_process(words, deadline)))
        unbegun = [mode for mode in modes if not (out / f"gpu-{stage.shape}-{mode}.started").exists()]
        if worst == 124 or len(unbegun) == len(modes):
            break
        modes = unbegun
    for mark in out.glob("gpu-*.started"):
        mark.unlink()
    return worst


def run_process(words: list[str], deadline: float) -> int:
    """Run this Python with ``words`` until it ends or time is up; its children end with it."""
    process = subprocess.Popen([sys.executable, *words], cwd=ROOT, start_new_session=True)
    try:
        return process.wait(max(0.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        return 124
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # the compiler's helpers are its children too
        process.wait()


def measure_modes(shape: str, modes: list[str], out: Path) -> int:
    """Measure modes of a shape one after the other in this process; 1 if any failed."""
    import torch

    code = 0
    for mode in modes:
        (out / f"gpu-{shape}-{mode}.started").touch()
        start = time.monotonic()
        try:
            report = measure_mode(shape, mode)
            write(out / f"gpu-{shape}-{mode}.json", report)
            wrong = [what for what in ("compiled", "captured") if not report[what]]
            if wrong:
                print(f"axon: {shape} {mode} was not {' and not '.join(wrong)}", file=sys.stderr)
                code = 1
        except torch.AcceleratorError:
            traceback.print_exc()
            return 1  # after that no call of this process can succeed; another process takes what is left
        except Exception:  # the modes after it are still worth measuring
            traceback.print_exc()
            code = 1
        print(f"   {shape} {mode}: {time.monotonic() - start:.1f} s", flush=True)
        torch._dynamo.reset()
        gc.collect()
        torch.cuda.empty_cache()
    return code


def measure_mode(shape: str, mode: str) -> dict[str, Any]:
    """One report: decode behind 512 tokens at every batch, and prefill of 512."""
    import torch

    from axon_llm.bench.report import measured
    from axon_llm.bench.rows import Case
    from axon_llm.bench.torch_peers import DecodePeer, GptFast, TransformersStatic
    from axon_llm.checkpoint import load
    from axon_llm.fast import accelerate

    quantize, batches, prefilled = MODES[mode]
    model, _ = load(f"random:{shape}", device="cuda", dtype="bfloat16")
    model = accelerate(model, quantize, rows=max(batches))
    cases = [Case("tg", DECODED, DEPTH, batch) for batch in batches]
    cases += [Case("pp", prefilled)] if prefilled else []
    peers: dict[str, DecodePeer] = {}
    if mode == "peers":
        given = (model.config, torch.bfloat16, torch.device("cuda"), cases)
        peers["transformers"] = TransformersStatic(*given)
        if folder := os.environ.get("GPT_FAST"):
            peers["gpt-fast"] = GptFast(Path(folder), *given)
    return measured(
        f"random:{shape}", model, cases, quantize=quantize, repetitions=REPETITIONS, compile=True, peers=peers
    )


def write(path: Path, report: dict[str, Any]) -> None:
    """Write a report whole or not at all."""
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(report), encoding="utf-8")
    part.replace(path)


if __name__ == "__main__":
    sys.exit(main())
