"""``axon load``: load on any OpenAI-compatible server, and what its clients would have seen."""

from __future__ import annotations

import asyncio
import json
import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from axon_llm.serving.load import Run, Workload
    from axon_llm.serving.load_client import Target
    from axon_llm.serving.load_report import Objective

_SHOWN = (
    ("requests answered", "completed", ""),
    ("requests failed", "failed", ""),
    ("duration", "duration", "s"),
    ("request throughput", "request_throughput", "/s"),
    ("goodput", "request_goodput", "/s"),
    ("output throughput", "output_throughput", "tok/s"),
    ("total throughput", "total_token_throughput", "tok/s"),
    ("most at once", "max_concurrent_requests", ""),
    ("prompt tokens", "total_input_tokens", ""),
    ("  found in a cache", "total_cached_tokens", ""),
)


def command(
    url: Annotated[str, typer.Argument(help="The server, such as http://127.0.0.1:8000; /v1 may be left out.")],
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="By default the first that the server lists.")
    ] = None,
    num_prompts: Annotated[int, typer.Option("--num-prompts", "-n", min=1, help="Requests in all.")] = 100,
    request_rate: Annotated[
        str,
        typer.Option(
            help="Arrivals per second, a Poisson process; several with commas make a sweep; inf: all at once."
        ),
    ] = "inf",
    burstiness: Annotated[
        float, typer.Option(min=0.01, max=1e6, help="1: Poisson; below: burstier; above: steadier.")
    ] = 1.0,
    max_concurrency: Annotated[
        str | None, typer.Option("--max-concurrency", "-c", help="Users at once; several with commas make a sweep.")
    ] = None,
    input_len: Annotated[int, typer.Option(min=1, help="Words of a prompt, about as many tokens.")] = 128,
    output_len: Annotated[int, typer.Option(min=1, help="Tokens of an answer.")] = 64,
    shared_prefix_len: Annotated[int, typer.Option(min=0, help="Of the words, how many all requests share.")] = 0,
    completions: Annotated[bool, typer.Option("--completions", help="/v1/completions instead of chats.")] = False,
    ignore_eos: Annotated[
        bool, typer.Option("--ignore-eos/--no-ignore-eos", help="Answers of exactly the length asked for.")
    ] = True,
    temperature: Annotated[float, typer.Option("--temperature", "-t", min=0.0, max=2.0, help="0 is greedy.")] = 0.0,
    goodput: Annotated[
        list[str] | None,
        typer.Option(help="A limit that good requests keep, in ms: ttft:500, tpot:30, e2el:5000; may be repeated."),
    ] = None,
    against: Annotated[
        str | None, typer.Option(help="A second server: the same load in alternation, and the differences.")
    ] = None,
    api_key_file: Annotated[
        Path | None, typer.Option(help="File with the API key. [else AXON_API_KEY or OPENAI_API_KEY]")
    ] = None,
    warm_ups: Annotated[int, typer.Option(min=0, help="Requests before the clock starts.")] = 2,
    timeout_s: Annotated[
        float, typer.Option("--timeout", min=0.1, help="Seconds after which a request failed.")
    ] = 300.0,
    seed: Annotated[int, typer.Option(help="Of prompts, arrivals and sampling.")] = 0,
    plot: Annotated[Path | None, typer.Option(help="Write a picture (SVG) here.")] = None,
    detailed: Annotated[bool, typer.Option("--detailed", help="Every request's figures in the JSON too.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on standard output.")] = False,
) -> None:
    """Put load on an OpenAI-compatible server and report latencies, throughput and goodput.

    With --request-rate, requests arrive by chance and wait for nobody (open loop); with --max-concurrency alone, so
    many users each ask again when answered (closed loop).
    """
    from dataclasses import replace

    from axon_llm.errors import UsageError
    from axon_llm.serving.load import Workload
    from axon_llm.serving.load_client import Target, first_model
    from axon_llm.serving.load_picture import draw_run, draw_sweep
    from axon_llm.serving.load_report import Objective

    if plot is not None and plot.suffix.lower() != ".svg":
        raise UsageError(f"--plot writes .svg, not {plot.suffix or plot.name!r}")
    if shared_prefix_len >= input_len:
        raise UsageError("--shared-prefix-len must be less than --input-len, or all prompts would be the same.")
    for option, number in (("--burstiness", burstiness), ("--temperature", temperature), ("--timeout", timeout_s)):
        if not math.isfinite(number):
            raise UsageError(f"{option} must be a finite number, not {number}.")
    objective = Objective.parse(goodput or [])
    rates = _rates(request_rate)
    limits = _limits(max_concurrency) if max_concurrency is not None else [None]
    if len(rates) > 1 and len(limits) > 1:
        raise UsageError("A sweep goes over --request-rate or --max-concurrency, not both.")
    if against is not None and len(rates) * len(limits) > 1:
        raise UsageError("--against compares one load; leave the sweep out.")
    unused = [name for name, given in (("--goodput", goodput), ("--plot", plot), ("--detailed", detailed)) if given]
    if against is not None and unused:
        raise UsageError(f"--against compares latencies only; leave {', '.join(unused)} out.")
    key = _api_key(api_key_file)
    target = Target.of(url, key)
    workload = Workload(
        model=model or asyncio.run(first_model(target)),
        num_prompts=num_prompts,
        input_words=input_len,
        output_tokens=output_len,
        shared_words=shared_prefix_len,
        chat=not completions,
        ignore_eos=ignore_eos,
        temperature=temperature,
        seed=seed,
        timeout_s=timeout_s,
    )
    if against is not None:
        other = Target.of(against, key)
        _compare(target, other, workload, model, rates[0], limits[0], burstiness, warm_ups, as_json)
        return
    runs: list[Run] = []
    results: list[dict[str, Any]] = []
    for rate in rates:
        for limit in limits:
            point = replace(workload, seed=seed + 1000 * len(runs))  # other prompts: the server remembers the last ones
            run, result = _measure(target, point, rate, limit, burstiness, warm_ups, objective, detailed)
            runs.append(run)
            results.append(result)
            if not as_json:
                _show(result)
    if plot is not None:
        plot.parent.mkdir(parents=True, exist_ok=True)
        plot.write_text(draw_run(runs[0], results[0]) if len(runs) == 1 else draw_sweep(results), encoding="utf-8")
        typer.echo(f"picture: {plot}", err=True)
    if as_json:
        typer.echo(json.dumps({"schema": "axon.load/1", **(results[0] if len(results) == 1 else {"runs": results})}))
    if any(result["failed"] for result in results):
        raise typer.Exit(1)


def _measure(
    target: Target,
    workload: Workload,
    rate: float,
    limit: int | None,
    burstiness: float,
    warm_ups: int,
    objective: Objective,
    detailed: bool,
) -> tuple[Run, dict[str, Any]]:
    from dataclasses import replace

    from rich.console import Console
    from rich.progress import Progress

    from axon_llm.serving.load import run_load
    from axon_llm.serving.load_report import report

    async def work() -> Run:
        if warm_ups:
            await run_load(
                target, replace(workload, num_prompts=warm_ups, seed=workload.seed + 1_000_003), max_concurrency=1
            )
        with Progress(console=Console(stderr=True), transient=True) as progress:
            task = progress.add_task(_load_name(rate, limit), total=workload.num_prompts)
            return await run_load(
                target,
                workload,
                request_rate=rate,
                max_concurrency=limit,
                burstiness=burstiness,
                on_done=lambda _: progress.advance(task),
            )

    run = asyncio.run(work())
    return run, report(run, objective, base_url=target.base_url, detailed=detailed)


def _compare(
    target: Target,
    other: Target,
    workload: Workload,
    model: str | None,
    rate: float,
    limit: int | None,
    burstiness: float,
    warm_ups: int,
    as_json: bool,
) -> None:
    from axon_llm.serving.load_compare import compare

    how: dict[str, Any] = {"request_rate": rate, "max_concurrency": limit, "burstiness": burstiness}
    result = asyncio.run(compare(target, other, workload, model=model, warm_ups=warm_ups, **how))
    if as_json:
        typer.echo(json.dumps({"schema": "axon.load.compare/1", **result}))
    else:
        typer.echo(f"{'':12}{'here':>12}{'against':>12}{'added':>12}")
        for label in (f"p{percent}_{name}_ms" for name in ("ttft", "tpot") for percent in (50, 99)):
            figures = ((result[label][side], sign) for side, sign in (("here", ""), ("against", ""), ("added", "+")))
            row = ("-" if figure is None else format(figure, f"{sign}.2f") for figure, sign in figures)
            typer.echo(f"{label:12}" + "".join(f"{cell:>12}" for cell in row))
        typer.echo(f"answered: {result['completed'][0]} here, {result['completed'][1]} against")
    if any(result["failed"]):
        raise typer.Exit(1)


def _show(result: dict[str, Any]) -> None:
    typer.echo(f"{result['model_id']} at {result['base_url']}: {_load_of(result)}")
    for error in result["errors"][:3]:
        typer.echo(f"  error: {error}", err=True)
    if not result["completed"]:
        typer.echo("  no request was answered")
    else:
        _show_figures(result)
    for name, judged in result["objective"].items():
        verdict = "met" if judged["met"] else "missed"
        typer.echo(f"  objective {name} ≤ {judged['limit']:g}: {verdict}")


def _show_figures(result: dict[str, Any]) -> None:
    for label, name, unit in _SHOWN:
        value = result[name]
        typer.echo(f"  {label:20}{value:>12,}" if isinstance(value, int) else f"  {label:20}{value:>12,.2f} {unit}")
    typer.echo(f"  {'ms':20}{'mean':>12}{'p50':>12}{'p90':>12}{'p99':>12}")
    for name in ("ttft", "tpot", "itl", "e2el"):
        figures = [result[f"{statistic}_{name}_ms"] for statistic in ("mean", "p50", "p90", "p99")]
        typer.echo(f"  {name.upper():20}" + "".join(f"{'-' if f is None else format(f, '.2f'):>12}" for f in figures))


def _load_of(result: dict[str, Any]) -> str:
    rate = result["request_rate"]
    return _load_name(math.inf if rate == "inf" else rate, result["max_concurrency"])


def _load_name(rate: float, limit: int | None) -> str:
    parts = [] if math.isinf(rate) else [f"{rate:g} requests/s"]
    parts += [f"{limit} at once"] if limit else []
    return ", ".join(parts) or "all at once"


def _rates(text: str) -> list[float]:
    """``--request-rate``: arrivals per second; infinite for all at once."""
    from axon_llm.errors import UsageError

    try:
        rates = [float(part) for part in text.split(",")]
    except ValueError:
        rates = []
    if not rates or not all(rate > 0 for rate in rates):
        raise UsageError(f"--request-rate takes positive numbers or inf, several with commas; not {text!r}.")
    return rates


def _limits(text: str) -> list[int | None]:
    """``--max-concurrency``: users at once."""
    from axon_llm.errors import UsageError

    try:
        limits: list[int | None] = [int(part) for part in text.split(",")]
    except ValueError:
        limits = []
    if not limits or not all(limit is not None and limit >= 1 for limit in limits):
        raise UsageError(f"--max-concurrency takes integers from 1, several with commas; not {text!r}.")
    return limits


def _api_key(path: Path | None) -> str:
    from axon_llm.errors import UsageError

    if path is None:
        return os.environ.get("AXON_API_KEY") or os.environ.get("OPENAI_API_KEY") or ""
    try:
        return path.read_text(encoding="utf-8").strip()
    except OSError as error:
        raise UsageError(f"Cannot read the key from {path}: {error.strerror}.") from None
    except UnicodeDecodeError:
        raise UsageError(f"Cannot read the key from {path}: it is not text.") from None
