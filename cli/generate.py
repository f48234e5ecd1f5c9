"""``axon generate``: complete one prompt."""

from __future__ import annotations

import dataclasses
import json
import sys
from typing import Annotated, Any

import typer

from axon_llm.errors import AxonError, UsageError
from axon_llm.fast.memory import made_to_stay

from . import options
from .sampling import given, sampling

# Tokens up to which weights are used as they are stored: laying them out for the CPU kernels takes as long as some
# hundred tokens gain by it, and longer where the system has to find the memory.
SHORT = 256
DEFAULT_TOKENS = 128


def command(
    prompt: Annotated[
        str | None, typer.Argument(help="The text to continue; - or nothing reads standard input.")
    ] = None,
    model: options.Model = options.DEFAULT_MODEL,
    max_tokens: options.MaxTokensThatFit = None,
    temperature: options.Temperature = None,
    top_p: options.TopP = None,
    top_k: options.TopK = None,
    min_p: options.MinP = None,
    repetition_penalty: options.RepetitionPenalty = None,
    seed: options.Seed = None,
    stop: options.Stop = None,
    device: options.Device = None,
    dtype: options.Dtype = None,
    quantize: options.Quantize = None,
    compile: options.Compile = False,
    speculate: options.Speculate = False,
    cache: Annotated[
        bool, typer.Option("--cache/--no-cache", help="Keep keys and values, or recompute them for every token.")
    ] = True,
    max_seq_len: options.MaxSeqLen = None,
    stats: Annotated[bool, typer.Option("--stats", help="Token counts and times, on standard error.")] = False,
    as_json: options.AsJson = False,
) -> None:
    """Complete a prompt. The text goes to standard output as it is generated, everything else to standard error."""
    if not cache and (compile or speculate or max_seq_len):
        raise UsageError(
            "--no-cache recomputes everything: --compile, --speculate and --max-seq-len have no place in it"
        )
    most = DEFAULT_TOKENS if max_tokens is None else max_tokens
    wanted = given(
        most,
        stop,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
    )
    text = read_prompt(prompt)
    once = most <= SHORT and not (compile or speculate)
    with made_to_stay():
        from axon_llm.engine.engine import Engine
        from axon_llm.engine.speculate import DEFAULT_DRAFTS
        from axon_llm.engine.uncached import generate_uncached

        from .loading import cache_length, load

        loaded, tokenizer = load(model, device=device, dtype=dtype, quantize=quantize, once=once)
    tokens = tokenizer.encode(text)
    limit = loaded.config.max_position_embeddings
    if max_tokens is None:
        wanted["max_tokens"] = most = max(1, min(most, (max_seq_len or limit) - len(tokens)))
    params = sampling(tokenizer, wanted)
    length = cache_length(len(tokens), most, max_seq_len, limit)
    if cache:
        engine = Engine(
            loaded, tokenizer, max_seq_len=length, compile=compile, speculate=DEFAULT_DRAFTS if speculate else 0
        )
        events = engine.generate(tokens, params)
    else:
        events = generate_uncached(loaded, tokenizer, tokens, params)
    pieces, ids, last = [], [], None
    for event in events:
        pieces.append(event.text)
        if event.token is not None:
            ids.append(event.token)
        if not as_json:
            sys.stdout.write(event.text)
            sys.stdout.flush()
        last = event
    assert last is not None
    if as_json:
        report: dict[str, Any] = {
            "schema": "axon.generate/1",
            "model": model,
            "text": "".join(pieces),
            "tokens": ids,
            "finish_reason": last.finish_reason,
            "usage": dataclasses.asdict(last.usage) if last.usage else None,
            "timings": dataclasses.asdict(last.timings) if last.timings else None,
            "cache": cache,
        }
        print(json.dumps(report, ensure_ascii=False))
    elif not "".join(pieces).endswith("\n"):
        print()
    if stats and last.usage and last.timings:
        print(stats_line(last.usage, last.timings, last.finish_reason), file=sys.stderr)
    if last.finish_reason == "error":
        raise AxonError(last.error or "the generation failed")


def stats_line(usage: Any, timings: Any, finish_reason: str | None) -> str:
    """One line about a completion: tokens, reuse, time to first token, time per output token."""
    from .render import human_seconds

    cached = f" ({usage.cached_tokens} from the cache)" if usage.cached_tokens else ""
    speed = f" · {1 / timings.tpot_s:.1f} tokens/s" if timings.tpot_s else ""
    return (
        f"{usage.prompt_tokens} prompt tokens{cached} · {usage.completion_tokens} generated ({finish_reason}) · "
        f"TTFT {human_seconds(timings.ttft_s)} · TPOT {human_seconds(timings.tpot_s)}{speed}"
    )


def read_prompt(prompt: str | None) -> str:
    """The prompt from the command line or standard input.

    Raises:
        UsageError: it is empty, or not UTF-8.
    """
    if prompt is None or prompt == "-":
        if sys.stdin.isatty():
            print("Type the prompt, then Ctrl-D.", file=sys.stderr)
        data = sys.stdin.buffer.read()
        try:
            prompt = data.decode("utf-8")
        except UnicodeDecodeError as error:
            raise UsageError(
                f"standard input is not UTF-8 (byte {error.start})", "Convert it, e.g. with iconv."
            ) from None
    if not prompt:
        raise UsageError("the prompt is empty", 'Give some text: axon generate "Once upon a time"')
    if any("\ud800" <= character <= "\udfff" for character in prompt):
        raise UsageError("the prompt is not UTF-8")
    return prompt
