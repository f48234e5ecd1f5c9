"""``axon compare``: what the KV cache does, on one page."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from axon_llm.errors import UsageError

from . import options

if TYPE_CHECKING:
    from axon_llm.bench.compare import Comparison, Side

DEFAULT_PROMPT = "Once upon a time"
SAY_EVERY_S = 30.0


def command(
    prompt: Annotated[str | None, typer.Argument(help="The text to continue; - reads standard input.")] = None,
    model: options.Model = options.DEFAULT_MODEL,
    max_tokens: options.MaxTokens = 256,
    plot: Annotated[Path | None, typer.Option(help="Write a picture: FILE.svg or FILE.png.")] = None,
    device: options.Device = None,
    dtype: Annotated[
        str,
        typer.Option(envvar="AXON_DTYPE", help="float32, where rounding decides nothing; bfloat16 may meet near-ties."),
    ] = "float32",
    quantize: options.Quantize = None,
    compile: options.Compile = False,
    as_json: options.AsJson = False,
) -> None:
    """Generate with the cache and without it, greedily: the same tokens, and what each of them costs.

    Exits with 1 if the tokens differ, and shows where. In bfloat16 two tokens can be so nearly equally likely that the
    order of a sum decides; how close every choice was is reported.
    """
    if plot is not None and plot.suffix.lower() not in (".svg", ".png"):
        raise UsageError(f"--plot writes .svg or .png, not {plot.suffix or plot.name!r}")
    if plot is not None and not plot.resolve().parent.is_dir():
        plot.resolve().parent.mkdir(parents=True)
    if max_tokens < 1:
        raise UsageError(f"--max-tokens must be at least 1, not {max_tokens}")
    from .generate import read_prompt

    text = DEFAULT_PROMPT if prompt is None else read_prompt(prompt)
    from axon_llm.bench.compare import compare
    from axon_llm.bench.hardware import environment

    from .loading import load

    loaded, tokenizer = load(model, device=device, dtype=dtype, quantize=quantize)
    with _progress(max_tokens) as advance:
        outcome = compare(loaded, tokenizer.encode(text), max_tokens, compile=compile, progress=advance)
    weight = loaded.embed_tokens.weight
    about = {
        "model": model,
        "device": str(weight.device),
        "dtype": str(weight.dtype).removeprefix("torch."),
        "quantize": quantize,
        **environment(weight.device),
    }
    report = as_report(outcome, about)
    if plot is not None:
        from .plot import draw_comparison

        draw_comparison(report, plot)
    if as_json:
        print(json.dumps(report))
    else:
        _print(outcome, report, tokenizer.decode(outcome.cached.tokens))
        if plot is not None:
            print(f"picture: {plot}", file=sys.stderr)
    if outcome.mismatch is not None:
        raise typer.Exit(1)


def as_report(outcome: Comparison, about: dict[str, Any]) -> dict[str, Any]:
    """The outcome as the JSON object that ``--json`` prints (schema ``axon.compare/1``)."""
    mismatch = outcome.mismatch
    return {
        "schema": "axon.compare/1",
        **about,
        "prompt_tokens": outcome.prompt_tokens,
        "completion_tokens": len(outcome.cached.tokens),
        "identical": mismatch is None,
        "mismatch": None
        if mismatch is None
        else {
            "index": mismatch.index,
            "position": outcome.prompt_tokens + mismatch.index,
            "near_tie": mismatch.near_tie,
            "cached": {"token": mismatch.cached.token, "top2_margin": mismatch.cached.margin},
            "uncached": {"token": mismatch.uncached.token, "top2_margin": mismatch.uncached.margin},
        },
        "near_ties": outcome.near_ties,
        "speedup_total": outcome.speedup,
        "speedup_last_token": outcome.uncached.late_s / outcome.cached.late_s,
        "cache_bytes_formula": outcome.cache_bytes_formula,
        "cache_bytes_allocated": outcome.cache_bytes_allocated,
        "cached": _side(outcome, outcome.cached),
        "uncached": _side(outcome, outcome.uncached),
        "positions": outcome.positions,
        "tokens": outcome.cached.tokens,
    }


def _side(outcome: Comparison, side: Side) -> dict[str, Any]:
    return {
        "ttft_s": side.ttft_s,
        "tpot_s": side.tpot_s,
        "total_s": side.total_s,
        "growth_exponent": outcome.exponent(side),
        "per_token_s": side.seconds,
    }


def _print(outcome: Comparison, report: dict[str, Any], text: str) -> None:
    from rich.text import Text

    from axon_llm.shapes import PREFIX

    from .render import human_bytes, human_seconds, sparkline, stdout_console, table

    console = stdout_console()
    about = f"  {report['dtype']} on {report['hardware']}, torch {report['torch']}"
    console.print(Text.assemble((report["model"], "bold"), about))
    console.print(f"{outcome.prompt_tokens} prompt tokens, {len(outcome.cached.tokens)} generated, greedy\n")
    on, off = outcome.cached, outcome.uncached

    def times(one: float | None, other: float | None) -> str:
        return f"{other / one:.1f} ×" if one and other else "–"

    def power(value: float | None) -> str:
        return "too short to fit" if value is None else f"{value:+.2f}"

    exponents = [outcome.exponent(side) for side in (on, off)]
    rows = [
        ("time to first token", human_seconds(on.ttft_s), human_seconds(off.ttft_s), "same work"),
        ("time per token, median", human_seconds(on.tpot_s), human_seconds(off.tpot_s), times(on.tpot_s, off.tpot_s)),
        (
            "the last tokens, median",
            human_seconds(on.late_s),
            human_seconds(off.late_s),
            times(on.late_s, off.late_s),
        ),
        ("all tokens", human_seconds(on.total_s), human_seconds(off.total_s), times(on.total_s, off.total_s)),
        ("growth with context n", *(power(value) for value in exponents), ""),
    ]
    console.print(table(("", "cache on", "cache off", "off / on"), rows))
    width, top = 48, max(off.seconds[1:] or off.seconds)
    console.print("\n[dim]time per token, by position, on one scale[/]")
    console.print(f"  on   {sparkline(on.seconds[1:], width, top)}")
    console.print(f"  off  {sparkline(off.seconds[1:], width, top)}")
    console.print("\n[dim]growth: p in time per token ∝ nᵖ, fitted to logarithms of binned medians; 0 is constant[/]")
    console.print(
        f"cache: {human_bytes(outcome.cache_bytes_formula)} by the formula, "
        f"{human_bytes(outcome.cache_bytes_allocated)} allocated"
    )
    mismatch = outcome.mismatch
    if mismatch is None:
        close = f" ({outcome.near_ties} near-ties among them)" if outcome.near_ties else ""
        console.print(f"[green]same tokens[/]: {len(on.tokens)} of {len(on.tokens)}{close}")
    else:
        console.print(
            f"[red]different tokens[/] from number {mismatch.index + 1}: cache on chose {mismatch.cached.token} "
            f"(ahead by {mismatch.cached.margin:.4f}), cache off {mismatch.uncached.token} "
            f"(ahead by {mismatch.uncached.margin:.4f})"
            + (": a near-tie, which rounding decides; --dtype float32 tells" if mismatch.near_tie else "")
        )
    words = " ".join(text.split())
    if not report["model"].startswith(PREFIX):  # random weights write no text
        console.print(Text(f"\n{words[: 3 * 80]}{'…' if len(words) > 3 * 80 else ''}", style="dim"))


class _progress:  # noqa: N801 - used like a function
    """A progress bar on standard error, where that is a terminal; elsewhere a line every half a minute."""

    def __init__(self, total: int) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        from .render import stderr_console

        console = stderr_console()
        self._bar = Progress(
            TextColumn("cache on and off"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("tokens"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("", total=total)
        self._total, self._said_at, self._console = total, time.monotonic(), console

    def __enter__(self) -> Any:
        self._bar.start()
        return self._advance

    def _advance(self, done: int) -> None:
        self._bar.update(self._task, completed=done)
        if not self._console.is_terminal and time.monotonic() - self._said_at > SAY_EVERY_S:
            self._said_at = time.monotonic()
            print(f"axon: cache on and off: {done} of {self._total} tokens", file=sys.stderr)

    def __exit__(self, *_: object) -> None:
        self._bar.stop()
