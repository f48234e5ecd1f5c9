"""``axon bench``: prefill and decode speeds, held against what this machine can do."""

from __future__ import annotations

import csv
import io
import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

from axon_llm.errors import UsageError

from . import options

if TYPE_CHECKING:
    from axon_llm.model import Transformer

FORMATS = ("md", "json", "csv")
MOST_THREADS = 1024  # where the system makes no more of them, the process ends without a word


def command(
    model: options.Model = options.DEFAULT_MODEL,
    prompt: Annotated[list[int] | None, typer.Option("-p", "--pp", help="Prefill this many tokens. [512]")] = None,
    decode: Annotated[list[int] | None, typer.Option("-n", "--tg", help="Decode this many tokens. [128]")] = None,
    depth: Annotated[
        list[int] | None,
        typer.Option("-d", "--depth", help="Tokens in the cache before decoding. [0 and 2048, or what fits]"),
    ] = None,
    batch: Annotated[
        list[int] | None, typer.Option("-b", "--batch", help="Sequences decoding together. [1 and 8]")
    ] = None,
    repetitions: Annotated[
        int, typer.Option("-r", "--repetitions", min=1, max=1000, help="Times each row is measured.")
    ] = 5,
    output: Annotated[str, typer.Option("-o", "--output", help="md, json or csv.")] = "md",
    device: options.Device = None,
    dtype: options.Dtype = None,
    quantize: options.Quantize = None,
    compile: options.Compile = False,
    threads: Annotated[int | None, typer.Option(min=1, max=MOST_THREADS, help="CPU threads; torch's default.")] = None,
    against: Annotated[
        list[str] | None,
        typer.Option(
            help="Measure a peer in turn: llama.cpp, llama.cpp:Q8_0, llama.cpp:Q4_0, transformers, gpt-fast:FOLDER."
        ),
    ] = None,
    llama_bench: Annotated[
        str | None, typer.Option(envvar="AXON_LLAMA_BENCH", help="llama.cpp's llama-bench, if not on the PATH.")
    ] = None,
    as_json: options.AsJson = False,
) -> None:
    """Measure prefill (pp) and decode (tg) in tokens/s, and the share of the machine's limits, in one interleaved run.

    Decode is held against reading weights and cache once at the bandwidth around it (on a CPU every quarter of a
    second), prefill against the rate of a large matrix product.
    """
    output = "json" if as_json else output
    if output not in FORMATS:
        raise UsageError(f"--output {output!r} is not known", f"Known: {', '.join(FORMATS)}.")
    import torch

    from axon_llm.bench.report import measured
    from axon_llm.bench.rows import Case

    from .loading import load
    from .render import stderr_console

    prefills, decodes, batches = prompt or [512], decode or [128], batch or [1, 8]
    loaded, _ = load(model, device=device, dtype=dtype, quantize=quantize, rows=max(batches))
    if threads is not None:  # after loading, which chooses a number by the model's size
        torch.set_num_threads(threads)
    context = loaded.config.max_position_embeddings
    depths = depth if depth is not None else [0, *([2048] if context >= 2048 + max(decodes) else [])]
    cases = [Case("pp", count) for count in prefills if count]
    cases += [Case("tg", count, d, b) for b in batches for d in depths for count in decodes if count]
    for case in cases:
        if case.tokens < 1 or case.depth < 0 or case.batch < 1 or case.tokens + case.depth > context:
            raise UsageError(f"{case.name} × {case.batch} does not fit the model's context of {context}")
    if not cases:
        raise UsageError("nothing to measure")
    console = stderr_console()
    peers = _peers(against or [], model, loaded, cases, llama_bench)
    with console.status("warming up") as status:
        report = measured(
            model,
            loaded,
            cases,
            quantize=quantize,
            repetitions=repetitions,
            compile=compile,
            peers=peers,
            progress=lambda name: status.update(name) if console.is_terminal else None,
        )
    print(render(report, output))


def _peers(
    names: list[str], model: str, loaded: Transformer, cases: list[Any], llama_bench: str | None
) -> dict[str, Any]:
    """The peers asked for, each with weights of the model's shape."""
    from pathlib import Path

    import torch

    from axon_llm.bench.llama_cpp import TYPES, LlamaBench, kept_gguf
    from axon_llm.bench.torch_peers import GptFast, TransformersStatic

    weight = loaded.embed_tokens.weight
    shape = (loaded.config, weight.dtype, weight.device, cases)

    peers: dict[str, Any] = {}
    for name in names:
        program, _, kind = name.partition(":")
        if program == "llama.cpp" and (kind or "BF16") in TYPES:
            found = LlamaBench.find(llama_bench)
            peers[name] = LlamaBench(found, kept_gguf(model, kind or "BF16"), torch.get_num_threads())
        elif name == "transformers":
            peers[name] = TransformersStatic(*shape)
        elif program == "gpt-fast" and kind:
            peers["gpt-fast"] = GptFast(Path(kind), *shape)
        else:
            known = "Known: llama.cpp[:BF16|Q8_0|Q4_0], transformers, gpt-fast:FOLDER."
            raise UsageError(f"--against {name!r} is not known", known)
    return peers


def _steps(report: dict[str, Any]) -> str:
    """How the decode step ran, where that is not simply as PyTorch runs it."""
    asked = ["compiled" if report["compiled"] else "NOT compiled, though asked to be"] if report["compile"] else []
    words = [*asked, *(["captured as a CUDA graph"] if report["captured"] else [])]
    if report["device"].startswith("cuda") and not report["captured"]:
        words.append("NOT captured")
    return f"; decode step {', '.join(words)}" if words else ""


def render(report: dict[str, Any], output: str) -> str:
    """The report as Markdown, JSON or CSV."""
    if output == "json":
        return json.dumps(report)
    if output == "csv":
        target = io.StringIO()
        common = {
            k: report[k] for k in ("model", "dtype", "quantize", "device", "hardware", "threads", "torch", "commit")
        }
        writer = csv.DictWriter(target, [*common, *report["rows"][0]], lineterminator="\n")
        writer.writeheader()
        writer.writerows({**common, **row} for row in report["rows"])
        return target.getvalue().rstrip("\n")
    kind = report["quantize"] or report["dtype"]
    kernels = ", ".join(f"{count} {name}" for name, count in report["linears"]["kernels"].items()) or "F.linear"
    bandwidth = "copy bandwidth" if report["device"].startswith("cuda") else "read bandwidth"
    slower = bandwidth == "read bandwidth" and report["sum_gb_per_s"] < 0.97 * report["read_gb_per_s"]
    summed = f" (as PyTorch sums it: {report['sum_gb_per_s']:.1f})" if slower else ""
    lines = [
        f"{report['model']}, {kind}, {report['hardware']}{_steps(report)}",
        f"torch {report['torch']}, axon {report['commit'] or report['axon']}",
        f"linears: {kernels}; {bandwidth} {report['read_gb_per_s']:.1f} GB/s{summed}, matrix product "
        f"{report['matmul_tflop_per_s']:.2f} TFLOP/s in the same run",
        "",
        "| test | batch | tokens/s: median (min … max) | ms / step | MB / token | of the limit |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for row in report["rows"]:
        moved = "" if row["bytes_per_token"] is None else f"{row['bytes_per_token'] / 1e6:.1f}"
        lines.append(
            f"| {row['test']} | {row['batch']} | {row['tokens_per_s_median']:.1f} "
            f"({row['tokens_per_s_min']:.1f} … {row['tokens_per_s_max']:.1f}) | {row['ms_per_step']:.2f} | {moved} | "
            f"{100 * row['share_of_ceiling']:.0f} % {row['ceiling']} |"
        )
    if report["peers"]:
        lines += [
            "",
            "| test | peer | its tokens/s (median) | ours over its: median (min … max) |",
            "|---|---|---:|---:|",
        ]
    for entry in report["peers"]:
        lines.append(
            f"| {entry['test']} | {entry['peer']} | {entry['tokens_per_s_median']:.1f} | "
            f"{entry['ratio_median']:.2f} ({entry['ratio_min']:.2f} … {entry['ratio_max']:.2f}) |"
        )
    versions = {entry["version"]: None for entry in report["peers"] if entry["version"]}
    if versions:
        lines += ["", f"Peers: {', '.join(versions)}."]
    return "\n".join(lines)
