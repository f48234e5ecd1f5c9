"""``axon quantize``: a checkpoint with packed 8- or 4-bit weights from one with float weights."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated

import typer

from .options import DEFAULT_MODEL, AsJson, Model


def command(
    output: Annotated[Path, typer.Argument(help="Folder to write; new or empty.")],
    model: Model = DEFAULT_MODEL,
    weights: Annotated[str, typer.Option("--weights", "-w", help="int8 or int4.")] = "int8",
    as_json: AsJson = False,
) -> None:
    """Write a checkpoint with packed 8- or 4-bit weights, which loads without quantising anything.

    Use it like any other model: axon generate -m OUTPUT.
    """
    from axon_llm.errors import UsageError
    from axon_llm.fast.packed import write_packed
    from axon_llm.locate import locate
    from axon_llm.shapes import PREFIX

    if model.startswith(PREFIX):
        raise UsageError(f"{model} has no checkpoint to quantise", "--quantize quantises random weights as they load.")
    source = locate(model)
    start = time.perf_counter()
    written = write_packed(source, output, weights)
    seconds = time.perf_counter() - start
    original = sum(path.stat().st_size for path in source.glob("*.safetensors"))
    if as_json:
        figures = {"weights": weights, "source_bytes": original, "written_bytes": written, "seconds": round(seconds, 3)}
        typer.echo(json.dumps({"schema": "axon.quantize/1", "output": str(output), **figures}))
        return
    typer.echo(
        f"{output}: {weights}, {written / 1e6:,.1f} MB from {original / 1e6:,.1f} MB in {seconds:.1f} s", err=True
    )
