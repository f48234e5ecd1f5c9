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
import importlib.util
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
DEPTH, FAR, DECODED, PREFILLED, REPETITIONS = 512, 8192, 64, 512, 3


@dataclass(frozen=True, slots=True)
class Mode:
    """What one report is about.

    Attributes:
        quantize: as ``accelerate`` takes it.
        batches: sequences decoding together.
        depths: tokens in the cache before.
        prefilled: tokens of the prefill that is measured too; 0 for none.
        compile: compile the step; it is captured either way.
        peer: measured in turn.
    """

    quantize: str | None = None
    batches: tuple[int, ...] = (1,)
    depths: tuple[int, ...] = (DEPTH,)
    prefilled: int = 0
    compile: bool = False
    peer: str = ""


MODES = {
    "bf16": Mode(None, (1, 8, 64), prefilled=PREFILLED),
    "int8": Mode("int8", (1, 8, 64), prefilled=PREFILLED),
    "int4": Mode("int4", (1, 8, 64), prefilled=PREFILLED),
    "fp8": Mode("fp8", (1, 8), prefilled=PREFILLED),
    "context": Mode(depths=(DEPTH, FAR)),
    "compiled": Mode(compile=True),
    "transformers": Mode(peer="transformers"),
    "gpt-fast": Mode(peer="gpt-fast"),
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
        needs: an environment variable without which there is no such stage.
        seconds: taken.
        code: exit code; ``None`` if not begun, 124 if stopped at its limit.
    """

    name: str
    limit_s: float
    shape: str = ""
    modes: tuple[str, ...] = ()
    must: bool = True
    needs: str = ""
    seconds: float = 0.0
    code: int | None = None


def stages() -> list[Stage]:
    """What is run, the most wanted first."""
    todo = [
        Stage("tests", 180),
        Stage("8B shape", 90, LARGE, ("bf16", "int8", "int4")),
        Stage("1B shape", 60, SMALL, ("bf16", "int8", "int4")),
        Stage("8B shape and gpt-fast", 120, LARGE, ("gpt-fast",), must=False, needs="GPT_FAST"),
        Stage("8B shape and transformers", 90, LARGE, ("transformers",), must=False),
        Stage("8B shape, more", 60, LARGE, ("context", "fp8"), must=False),
        Stage("1B shape, compiled", 90, SMALL, ("compiled",), must=False),
    ]
    return [stage for stage in todo if not stage.needs or stage.needs in os.environ]


def main(arguments: list[str] | None = None) -> int:
    """Run every stage, or as a child process one of them."""
    parser = ArgumentParser(prog="python -m axon_llm.bench.gpu", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "var")
    parser.add_argument("--seconds", type=float, default=BUDGET_S, help="for everything together")
    parser.add_argument("--stage", action="append", help="run this one, and others so named, in this order")
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
    todo = stages()
    if options.stage:
        known = {stage.name: stage for stage in todo}
        if unknown := [name for name in options.stage if name not in known]:
            parser.error(f"no stage {unknown[0]!r} here; there are {', '.join(known)}")
        todo = [known[name] for name in options.stage]
    return run_all(todo, options.out, options.seconds)


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
        workers = str(max(1, min(12, (os.cpu_count() or 1) * 3 // 4)))  # a test mostly compiles kernels
        together = ["-n", workers] if importlib.util.find_spec("xdist") else []
        return run_process(tests + together, deadline)
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
            asked = ("compiled", "captured") if MODES[mode].compile else ("captured",)
            wrong = [what for what in asked if not report[what]]
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
    """One report."""
    import torch

    from axon_llm.bench.report import measured
    from axon_llm.bench.rows import Case
    from axon_llm.bench.torch_peers import DecodePeer, GptFast, TransformersStatic
    from axon_llm.checkpoint import load
    from axon_llm.fast import accelerate

    asked = MODES[mode]
    model, _ = load(f"random:{shape}", device="cuda", dtype="bfloat16")
    model = accelerate(model, asked.quantize, rows=max(asked.batches))
    cases = [Case("tg", DECODED, depth, batch) for depth in asked.depths for batch in asked.batches]
    cases += [Case("pp", asked.prefilled)] if asked.prefilled else []
    given = (model.config, torch.bfloat16, torch.device("cuda"), cases)
    peers: dict[str, DecodePeer] = {}
    if asked.peer == "transformers":
        peers["transformers"] = TransformersStatic(*given)
    elif asked.peer:
        peers["gpt-fast"] = GptFast(Path(os.environ["GPT_FAST"]), *given)
    return measured(
        f"random:{shape}",
        model,
        cases,
        quantize=asked.quantize,
        repetitions=REPETITIONS,
        compile=asked.compile,
        peers=peers,
    )


def write(path: Path, report: dict[str, Any]) -> None:
    """Write a report whole or not at all."""
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(report), encoding="utf-8")
    part.replace(path)


if __name__ == "__main__":
    sys.exit(main())
