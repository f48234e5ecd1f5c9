"""``axon inspect``: what a model is and what its cache will take, from its configuration and file headers alone."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from axon_llm.config import ModelConfig
from axon_llm.errors import CheckpointError, UsageError

from . import options

if TYPE_CHECKING:
    from axon_llm.fast.plan import Plan

CONTEXTS = (512, 2048, 8192, 32768, 131072)
SLOTS = (1, 8, 64)
ELEMENT_BYTES = {"float32": 4, "bfloat16": 2}
LEAST_MEMORY = 1 << 20
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_STORED_BYTES = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}


def command(
    model: Annotated[
        str, typer.Argument(envvar="AXON_MODEL", help="Folder, shipped name, Hub id, or random:SHAPE.")
    ] = options.DEFAULT_MODEL,
    memory: Annotated[str, typer.Option(help="Memory to fill, such as 16GiB.")] = "16GiB",
    as_json: options.AsJson = False,
) -> None:
    """Show parameters, bytes of weights, and cache bytes by context, slots and dtype.

    Loads no weights. Of a model on the Hub it downloads none either, but the headers of their files.
    """
    room = parse_bytes(memory)
    from axon_llm.locate import locate
    from axon_llm.shapes import PREFIX, shape_config

    if model.startswith(PREFIX):
        config = shape_config(model)
        weight_bytes, folder = config.num_parameters * ELEMENT_BYTES["bfloat16"], None
    else:
        folder = locate(model, weights=False)
        config = ModelConfig.from_file(folder / "config.json")
        weight_bytes = sum(
            math.prod(shape) * _STORED_BYTES.get(dtype, 1) for dtype, shape in headers_of(model, folder).values()
        )
    report = as_report(model, str(folder) if folder else None, config, weight_bytes, room)
    if as_json:
        print(json.dumps(report))
    else:
        _print(report, config)


def headers_of(model: str, folder: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Name → (dtype, shape) of every tensor: of the files in ``folder``, or on the Hub where not all of them are here.

    Raises:
        ModelError: they cannot be read.
    """
    from axon_llm.checkpoint import tensor_headers
    from axon_llm.locate import hub_headers, is_hub_id

    try:
        return tensor_headers(folder)
    except CheckpointError:
        if not is_hub_id(model):
            raise
    return hub_headers(model)


def as_report(model: str, folder: str | None, config: ModelConfig, weight_bytes: int, room: int) -> dict[str, Any]:
    """The JSON object that ``--json`` prints (schema ``axon.inspect/1``)."""
    contexts = sorted({*(c for c in CONTEXTS if c < config.max_position_embeddings), config.max_position_embeddings})
    import torch

    from axon_llm.cache import KVCache
    from axon_llm.engine.admission import slots_that_fit

    dtypes = {name: getattr(torch, name) for name in ELEMENT_BYTES}

    def cache_bytes(slots: int, context: int, dtype: str) -> int:
        return KVCache.bytes_for(config, slots=slots, max_seq_len=context, dtype=dtypes[dtype])

    cache = [
        {"context": context, "slots": slots, "dtype": dtype, "bytes": cache_bytes(slots, context, dtype)}
        for dtype in ELEMENT_BYTES
        for context in contexts
        for slots in SLOTS
    ]
    # Run in another type than they are stored in, the weights take another amount of memory too.
    running = {
        dtype: weight_bytes if config.packed or dtype == config.dtype else config.num_parameters * size
        for dtype, size in ELEMENT_BYTES.items()
    }
    fits = [
        {
            "context": context,
            "dtype": dtype,
            "sequences": slots_that_fit(config, room - running[dtype], max_seq_len=context, dtype=dtypes[dtype]),
        }
        for dtype in ELEMENT_BYTES
        for context in contexts
    ]
    plans = chosen_plans()
    windows = sorted({window for window in config.layer_windows if window is not None})
    return {
        "schema": "axon.inspect/1",
        "model": model,
        "folder": folder,
        "family": config.family,
        "parameters": config.num_parameters,
        "weight_bytes": weight_bytes,
        "stored_dtype": config.dtype or None,
        "num_layers": config.num_layers,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_heads": config.num_heads,
        "num_kv_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_position_embeddings,
        "rope": config.rope.kind,
        "sliding_windows": windows,
        "tie_word_embeddings": config.tie_word_embeddings,
        "kv_bytes_per_token": {dtype: cache_bytes(1, 1, dtype) for dtype in ELEMENT_BYTES},
        "cache": cache,
        "memory_bytes": room,
        "fits": fits,
        "decode_kernels": {name: plan.decode for name, plan in plans.items()},
        "prefill_kernels": {name: plan.prefill for name, plan in plans.items()},
    }


def chosen_plans() -> dict[str, Plan]:
    """What multiplies by the weights on this machine, by precision, as ``axon_llm.fast`` decides it."""
    import torch

    from axon_llm.fast.replace import plan_for

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return {
        "float32": plan_for(device, torch.float32, None),
        "bfloat16": plan_for(device, torch.bfloat16, None),
        "int8": plan_for(device, torch.bfloat16, "int8"),
        "int4": plan_for(device, torch.bfloat16, "int4"),
    }


def parse_bytes(text: str) -> int:
    """``16GiB``, ``16G``, ``500MB`` (binary units) or a plain number as bytes.

    Raises:
        UsageError: anything else.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?\s*", text, re.IGNORECASE)
    amount = float(match[1]) * _UNITS[match[2].upper()] if match else 0.0
    if not 0 < amount < math.inf:
        raise UsageError(f"--memory {text!r} is not an amount of memory", "Such as 16GiB or 500MiB.")
    found = int(amount)
    if found < LEAST_MEMORY:
        raise UsageError(f"--memory {text!r} is {found} bytes, which holds nothing", "Such as 16GiB or 500MiB.")
    return found


def _print(report: dict[str, Any], config: ModelConfig) -> None:
    from rich.text import Text

    from .render import human_bytes, human_count, stdout_console, table

    console = stdout_console()
    heads = f"{config.num_heads} query heads, {config.num_kv_heads} KV heads of {config.head_dim}"
    windows = f", sliding windows {report['sliding_windows']}" if report["sliding_windows"] else ""
    tied = "tied" if config.tie_word_embeddings else "untied"
    about = f"  {config.family}, {human_count(config.num_parameters)} parameters"
    console.print(
        Text.assemble((report["model"], "bold"), f"{about}, {human_bytes(report['weight_bytes'])} of weights")
    )
    console.print(f"{config.num_layers} layers of {config.hidden_size} / {config.intermediate_size}, {heads}{windows}")
    console.print(
        f"{config.vocab_size} tokens, {tied} embeddings, context {config.max_position_embeddings}, "
        f"{config.rope.kind} rope\n"
    )
    per_token = ", ".join(f"{human_bytes(count)} in {dtype}" for dtype, count in report["kv_bytes_per_token"].items())
    console.print(f"KV cache per token and sequence: {per_token}")
    console.print("[dim]= 2 · layers · KV heads · head_dim · bytes per element[/]\n")
    contexts = sorted({entry["context"] for entry in report["cache"]})
    size = {(e["dtype"], e["context"], e["slots"]): e["bytes"] for e in report["cache"]}
    fits = {(e["dtype"], e["context"]): e["sequences"] for e in report["fits"]}
    for dtype in ELEMENT_BYTES:
        rows = [
            (str(context), *(human_bytes(size[dtype, context, slots]) for slots in SLOTS), str(fits[dtype, context]))
            for context in contexts
        ]
        columns = (
            f"context ({dtype})",
            *(f"{s} slot{'s' if s > 1 else ''}" for s in SLOTS),
            f"fit in {human_bytes(report['memory_bytes'])}",
        )
        console.print(table(columns, rows))
        console.print()
    room = human_bytes(report["memory_bytes"])
    console.print(
        f"[dim]fit: sequences whose cache fits besides the weights in {room}; --memory for another amount[/]\n"
    )
    kernels = [(name, how, report["prefill_kernels"][name]) for name, how in report["decode_kernels"].items()]
    console.print(table(("weights on this machine", "one row (decode)", "many rows (prefill)"), kernels))
