"""From the start of a process to its first token: ``python -m axon_llm.bench.startup -m llama-3.2-1b``.

A checkpoint of the shape is written once, with random weights (llama.cpp's files stay in ``~/.cache/axon/gguf``); then
whole processes are timed in turn: ``axon generate`` with a prompt of 512 tokens and one token to generate, in several
modes, and llama.cpp's ``llama-bench`` doing one prefill of 512 without warm-up. Files are in the page cache, as they
are on any machine that has started the model before; the first round, which puts them there, does not count.

A compiled mode is timed twice, to its second token: *cold* compiles everything (an empty compiler cache), *warm* finds
the cache filled.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from argparse import ArgumentParser
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from safetensors.torch import save_file

from axon_llm.bench.hardware import environment
from axon_llm.bench.llama_cpp import TYPES, LlamaBench, kept_gguf
from axon_llm.cache import KVCache
from axon_llm.checkpoint import random_model
from axon_llm.errors import AxonError, UsageError
from axon_llm.fast.packed import write_packed
from axon_llm.model import Transformer
from axon_llm.shapes import PREFIX, SHAPES, shape_config
from axon_llm.tokenizer import byte_backend

PROMPT_TOKENS = 512
ALIKE = {"bfloat16": "BF16", "int8": "Q8_0", "int4": "Q4_0"}  # what a mode of ours is held against


def write_checkpoint(model: Transformer, shape: str, folder: Path) -> None:
    """Write a model with random weights as a Hugging Face folder, with the byte tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    tied = model.config.tie_word_embeddings
    tensors = {
        (name if name.startswith("lm_head") else f"model.{name}"): tensor
        for name, tensor in model.state_dict().items()
        if not (tied and name.startswith("lm_head"))
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(SHAPES[shape]), encoding="utf-8")
    byte_backend().save(str(folder / "tokenizer.json"))


def find_axon() -> str:
    """The installed ``axon``, next to this Python.

    Raises:
        UsageError: the package is not installed.
    """
    found = shutil.which("axon", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")
    if found is None:
        raise UsageError("there is no axon command", "Install the package: pip install -e .")
    return found


def run_process(command: list[str], environment: dict[str, str] | None = None) -> tuple[float, int]:
    """Run a program and wait for its end.

    Returns:
        Seconds from its start to its end, and the most bytes of memory it ever held (resident set).

    Raises:
        AxonError: it failed; the message ends with what it said last.
    """
    with tempfile.TemporaryFile("w+") as said:
        start = time.perf_counter()
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=said, env=environment)
        peak = 0
        while process.poll() is None:
            # The kernel's own high-water mark, of the program alone; that of os.wait4 begins with the parent's.
            with contextlib.suppress(OSError):
                found = re.search(r"VmHWM:\s*(\d+) kB", Path(f"/proc/{process.pid}/status").read_text(encoding="utf-8"))
                peak = int(found[1]) * 1024 if found else peak
            time.sleep(0.005)
        taken = time.perf_counter() - start
        if process.returncode:
            said.seek(0)
            last = (said.read().strip().splitlines() or ["no output"])[-1]
            raise AxonError(f"{command[0]} failed with exit code {process.returncode}: {last}")
    return taken, peak


def measure(shape: str, folder: Path, repetitions: int, llama_bench: str | None, compiled: bool) -> dict[str, Any]:
    """Time every mode in turn.

    Returns:
        ``seconds``: median by mode; ``over_llama_cpp``: median ratio of neighbouring runs to llama.cpp with weights of
        as many bits, by mode, where it is there;
        ``peak_bytes``: by mode; ``weight_and_cache_bytes``: what they would be with nothing else in memory.
    """
    model = random_model(shape_config(PREFIX + shape), torch.device("cpu"), torch.bfloat16)
    plain = folder / shape
    write_checkpoint(model, shape, plain)
    for quantize in ("int8", "int4"):
        write_packed(plain, folder / f"{shape}-{quantize}", quantize)
    gguf = {kind: kept_gguf(PREFIX + shape, kind) for kind in TYPES} if llama_bench else {}
    cache_bytes = KVCache.bytes_for(model.config, slots=1, max_seq_len=PROMPT_TOKENS + 1, dtype=torch.bfloat16)
    needed = {}
    for mode, stored in (("bfloat16", plain), ("int8, packed", f"{plain}-int8"), ("int4, packed", f"{plain}-int4")):
        needed[mode] = cache_bytes + sum(path.stat().st_size for path in Path(stored).glob("*.safetensors"))
    del model
    prompt = "x" * PROMPT_TOKENS
    axon = find_axon()
    ours = [axon, "generate", prompt, "-n", "1", "-m"]
    modes: dict[str, Callable[[], tuple[float, int]]] = {
        "bfloat16": lambda: run_process([*ours, str(plain)]),
        "int8, packed": lambda: run_process([*ours, f"{plain}-int8"]),
        "int4, packed": lambda: run_process([*ours, f"{plain}-int4"]),
    }
    if compiled:
        cache = folder / "compiler-cache"
        environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(cache)}
        # The first token comes from the prefill: it is the second that a compiled step gives.
        two = [axon, "generate", prompt, "-n", "2", "--compile", "-m", str(plain)]

        def cold() -> tuple[float, int]:
            shutil.rmtree(cache, ignore_errors=True)
            return run_process(two, environment)

        modes["bfloat16, compiled, cold, to the second token"] = cold
        modes["bfloat16, compiled, warm, to the second token"] = lambda: run_process(two, environment)
    for kind, path in gguf.items():
        theirs = [str(llama_bench), "-m", str(path), "-p", str(PROMPT_TOKENS), "-n", "0", "-r", "1"]
        theirs += ["--no-warmup", "-t", str(torch.get_num_threads()), "-ngl", "0"]
        modes[f"llama.cpp {kind}"] = partial(run_process, theirs)
    seconds: dict[str, list[float]] = {name: [] for name in modes}
    peak = dict.fromkeys(modes, 0)
    for repetition in range(repetitions + 1):
        for name, run in modes.items():
            taken, most = run()
            peak[name] = max(peak[name], most)
            if repetition:
                seconds[name].append(taken)
    alike = {name: f"llama.cpp {kind}" for name in modes for prefix, kind in ALIKE.items() if name.startswith(prefix)}
    return {
        "seconds": {name: median(taken) for name, taken in seconds.items()},
        "over_llama_cpp": {
            name: median(a / b for a, b in zip(seconds[name], seconds[theirs], strict=True))
            for name, theirs in alike.items()
            if theirs in seconds
        },
        "peak_bytes": peak,
        "weight_and_cache_bytes": needed,
    }


def main() -> int:
    """Measure and print a table, or JSON."""
    parser = ArgumentParser(prog="python -m axon_llm.bench.startup", description=__doc__)
    parser.add_argument("-m", "--model", default="llama-3.2-1b", choices=sorted(SHAPES))
    parser.add_argument("-r", "--repetitions", type=int, default=3)
    parser.add_argument("--llama-bench", default=os.environ.get("AXON_LLAMA_BENCH"))
    parser.add_argument("--compiled", action="store_true", help="also the compiled modes, cold and warm")
    parser.add_argument("--folder", type=Path, help="where to write the checkpoints (default: a temporary folder)")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    program = LlamaBench.find(options.llama_bench) if options.llama_bench else None
    about: dict[str, Any] = environment(torch.device("cpu"))
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        result = measure(options.model, Path(folder), options.repetitions, program, options.compiled)
    if options.json:
        print(json.dumps({"schema": "axon.bench-startup/1", "model": options.model, **about, **result}))
        return 0
    print(f"{options.model}, prompt of {PROMPT_TOKENS} tokens, {about['hardware']}, torch {about['torch']}\n")
    print(render(result))
    return 0


def render(result: dict[str, Any]) -> str:
    """The result of ``measure`` as a Markdown table."""
    lines = [
        "| from process start to first token | s | over llama.cpp | peak memory, MB | above weights and cache |",
        "|---|---:|---:|---:|---:|",
    ]
    for name, value in result["seconds"].items():
        ratio, needed = result["over_llama_cpp"].get(name), result["weight_and_cache_bytes"].get(name)
        peak = result["peak_bytes"][name]
        above = "" if needed is None else f"{100 * (peak / needed - 1):.0f} %"
        lines.append(f"| {name} | {value:.2f} | {f'{ratio:.2f} ×' if ratio else ''} | {peak / 1e6:.0f} | {above} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
