"""The page ``docs/benchmarks.md`` and its pictures, measured now: ``python -m cli.benchmarks`` (or ``make bench``).

Each section is one run of ``axon bench``, whose command stands above its table, so that anyone can repeat it. Peers are
measured in the same run where they are installed: ``AXON_LLAMA_BENCH`` names llama.cpp's llama-bench, and
``AXON_GPT_FAST`` a folder that holds gpt-fast.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from argparse import ArgumentParser
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

from axon_llm.bench import speculation, startup
from axon_llm.bench.rows import STRETCH_S

from .bench import render

DOCS = Path(__file__).resolve().parent.parent / "docs"
PRECISIONS: dict[str, tuple[list[str], str]] = {
    "bfloat16": (["--dtype", "bfloat16"], "llama.cpp"),
    "int8": (["--quantize", "int8"], "llama.cpp:Q8_0"),
    "int4": (["--quantize", "int4"], "llama.cpp:Q4_0"),
}
SHAPES = {"Llama-3.2-1B shape": ("random:llama-3.2-1b", 24), "SmolLM2-135M shape": ("random:smollm2-135m", 128)}


def main() -> int:
    """Measure, write, and return the exit code."""
    parser = ArgumentParser(prog="python -m cli.benchmarks", description=__doc__)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="the smaller shape only, without the scaling runs")
    parser.add_argument("--out", type=Path, default=DOCS)
    parser.add_argument(
        "--render", type=Path, nargs="+", help="print these JSON reports as Markdown, and measure nothing"
    )
    options = parser.parse_args()
    if options.render:
        print("\n\n".join(render(json.loads(path.read_text(encoding="utf-8")), "md") for path in options.render))
        return 0
    options.out.mkdir(exist_ok=True)
    repeat = ["-r", str(options.repetitions)]
    sections: list[str] = []
    shares: dict[str, dict[str, float]] = {}
    head: dict[str, Any] = {}
    for title, (model, tokens) in list(SHAPES.items())[1 if options.quick else 0 :]:
        for precision, (flags, peer) in PRECISIONS.items():
            words = [
                "-m",
                model,
                *flags,
                "-p",
                "512",
                "-n",
                str(tokens),
                "-d",
                "512",
                "-b",
                "1",
                "--compile",
                *repeat,
                *_against(peer),
            ]
            head = _measured(f"{title}, {precision}", words, sections)
            decode = next(row for row in head["rows"] if row["kind"] == "tg")
            shares.setdefault(title, {})[precision] = decode["share_of_ceiling"]
            _write(options.out, head, options.repetitions, sections)
        words = ["-m", model, "--dtype", "bfloat16", "-p", "0", "-n", str(tokens // 2), "-d", "128", *repeat]
        words += [word for size in (1, 2, 4, 8, 16, 32, 64) for word in ("-b", str(size))]
        batches = _measured(f"{title}, bfloat16, by sequences decoding together", words, sections)
        for precision, (flags, peer) in list(PRECISIONS.items())[:2]:
            words = ["-m", model, *flags, "-p", "0", "-n", str(tokens // 2), "-d", "128", "-b", "8"]
            _measured(f"{title}, {precision}, 8 sequences", [*words, "--compile", *repeat, *_against(peer)], sections)
        if title == next(iter(SHAPES)):
            peers = ["transformers", *(f"gpt-fast:{folder}" for folder in [os.environ.get("AXON_GPT_FAST")] if folder)]
            words = ["-m", model, "--dtype", "bfloat16", "-p", "0", "-n", "16", "-d", "512", "-b", "1", "--compile"]
            words += [*repeat, *(word for peer in peers for word in ("--against", peer))]
            _measured(f"{title}, bfloat16, programs in PyTorch", words, sections, required=False)
        words = ["-m", model, "--dtype", "bfloat16", "-p", "0", "-n", "16", "-b", "1", *repeat]
        depths_here = (128, 512, 2048, 8000, *([32000] if title == next(iter(SHAPES)) else []))
        words += [word for depth in depths_here for word in ("-d", str(depth))]
        depths = _measured(f"{title}, bfloat16, by tokens in the cache", words, sections)
        sections += [_slope(depths), ""]
        _write(options.out, head, options.repetitions, sections)
        _draw(title, batches["rows"], depths["rows"], shares[title], options.out)
        sections += [f"![{title}: limits, batches, contexts](benchmarks-{title.split()[0].lower()}.svg)", ""]
        shape = model.removeprefix("random:")
        found = shutil.which(os.environ.get("AXON_LLAMA_BENCH", "llama-bench"))
        program = [f"--llama-bench={found}"] if found else []
        startup_words = ["-m", shape, "-r", str(options.repetitions), *program]
        startup_words += ["--compiled"] if tokens > 100 else []  # the compiler's share is the same for both shapes
        _program(f"{title}, start of a process", "startup", startup_words, startup.render, sections)
        _write(options.out, head, options.repetitions, sections)
        for flags in ([], ["-q", "int8"], ["-q", "int4"]):
            _program(
                f"{title}, speculation{', '.join(['', *flags[1:]])}", "speculation",
                ["-m", model, *flags, "-r", str(options.repetitions)],
                lambda report: speculation.render(report["rows"]), sections,
            )  # fmt: skip
        _write(options.out, head, options.repetitions, sections)
    print(f"written: {options.out / 'benchmarks.md'}", file=sys.stderr)
    return 0


def _write(out: Path, head: dict[str, Any], repetitions: int, sections: list[str]) -> None:
    """Write what has been measured so far: a run takes the better part of an hour, and may be stopped."""
    page = [
        "# Benchmarks",
        "",
        f"Measured on {date.today().isoformat()} by `make bench`: {head['hardware']}, torch {head['torch']}, Python "
        f"{head['python']}, commit {head['commit']}. Random weights (never zero), medians of {repetitions} "
        "interleaved repetitions after one warm-up, with minimum and maximum. `pp512` prefills 512 tokens; "
        '`tg24 @ d512` decodes 24 tokens with 512 in the cache. "Of the limit" holds decode against reading weights '
        "and cache once at the read bandwidth "
        f"measured every {STRETCH_S} s, right before and after, and prefill against the rate of a large matrix product "
        "of the same kind. Memory is read by PyTorch's sum and by our own reader, and the faster of the two counts. "
        "On a shared machine only ratios of one run mean anything.",
        "",
        *sections,
    ]
    (out / "benchmarks.md").write_text("\n".join(page), encoding="utf-8")


def _against(peer: str) -> list[str]:
    """The peer's option, where it is installed."""
    return ["--against", peer] if shutil.which(os.environ.get("AXON_LLAMA_BENCH", "llama-bench")) else []


def _measured(title: str, words: list[str], sections: list[str], *, required: bool = True) -> dict[str, Any]:
    """Run ``axon bench``, add its section to the page, and return its report: empty if it failed but may fail."""
    print(f"{title} …", file=sys.stderr)
    package = __package__ or "cli"
    done = subprocess.run(
        [sys.executable, "-m", f"{package}.main", "bench", *words, "-o", "json"],
        stdout=subprocess.PIPE,
        text=True,
        check=required,
        cwd=DOCS.parent,
    )
    if done.returncode:
        print(f"not measured: {shlex.join(words)}", file=sys.stderr)
        return {}
    report: dict[str, Any] = json.loads(done.stdout)
    shown = shlex.join("gpt-fast:FOLDER" if word.startswith("gpt-fast:") else word for word in words)
    sections += [f"## {title}", "", f"`axon bench {shown}`", "", render(report, "md"), ""]
    return report


def _program(
    title: str, name: str, words: list[str], draw: Callable[[dict[str, Any]], str], sections: list[str]
) -> None:
    """Run one of the benchmarks that are programs of their own, and add its section to the page."""
    print(f"{title} …", file=sys.stderr)
    command = [sys.executable, "-m", f"axon_llm.bench.{name}", *words, "--json"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, cwd=DOCS.parent)
    shown = " ".join(word for word in words if not word.startswith("--llama-bench"))
    sections += [f"## {title}", "", f"`python -m axon_llm.bench.{name} {shown}`", "", draw(json.loads(done.stdout)), ""]


def _slope(report: dict[str, Any]) -> str:
    """What a longer context costs, against reading the keys and values that it adds.

    Both steps are told in bytes that memory could have read meanwhile, by the probes around them: the two may have met
    a memory of different speeds.
    """
    rows = {row["depth"]: row for row in report["rows"]}
    short, sentences = rows[512], []
    for depth, long in rows.items():
        if depth >= 8000:
            least = long["bytes_per_token"] - short["bytes_per_token"]
            taken = long["bytes_per_token"] / long["share_of_ceiling"]
            taken -= short["bytes_per_token"] / short["share_of_ceiling"]
            sentences.append(
                f"From 512 to {depth:,} tokens keys and values add {least / 1e6:.0f} MB to a step, and lengthen it by "
                f"as much as reading {taken / 1e6:.0f} MB takes at the bandwidth around it: {taken / least:.1f} ×."
            )
    return " ".join(sentences)


def _draw(title: str, batches: list[Any], depths: list[Any], shares: dict[str, float], out: Path) -> None:
    """Three panels: share of the limit by precision, tokens/s by batch, time per token by context."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    from .plot import INK, OFF, ON, STYLE

    with plt.rc_context(STYLE):
        figure, (left, middle, right) = plt.subplots(1, 3, figsize=(13, 4), constrained_layout=True)
        left.bar(list(shares), [100 * share for share in shares.values()], color=ON, width=0.5)
        left.axhline(100, color=OFF, linewidth=1.5)
        left.set_ylabel("% of read bandwidth, decode")
        middle.plot([row["batch"] for row in batches], [row["tokens_per_s_median"] for row in batches], "o-", color=ON)
        middle.set_xlabel("sequences decoding together")
        middle.set_ylabel("tokens/s, all together")
        right.plot(
            [row["depth"] for row in depths], [row["ms_per_step"] for row in depths], "o-", color=ON, label="measured"
        )
        slope = [row["ms_per_step"] * row["share_of_ceiling"] for row in depths]
        right.plot([row["depth"] for row in depths], slope, "--", color=OFF, label="bytes / bandwidth")
        right.set_xlabel("tokens in the cache")
        right.set_ylabel("ms per token")
        right.legend(frameon=False)
        for axes in (left, middle, right):
            axes.set_ylim(bottom=0)
        figure.suptitle(title, x=0.01, ha="left", weight="bold", color=INK)
        figure.savefig(out / f"benchmarks-{title.split()[0].lower()}.svg", metadata={"Date": None})
        plt.close(figure)


if __name__ == "__main__":
    sys.exit(main())
