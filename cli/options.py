"""The options that several commands share, under one name and one meaning. Options beat ``AXON_*`` beat defaults."""

from __future__ import annotations

from typing import Annotated

import typer

from axon_llm.locate import DEFAULT_MODEL

Model = Annotated[
    str,
    typer.Option("--model", "-m", envvar="AXON_MODEL", help="Folder, shipped name, Hub id, or random:SHAPE."),
]
Device = Annotated[str | None, typer.Option(envvar="AXON_DEVICE", help="cpu, cuda, cuda:1 …; a GPU if there is one.")]
Dtype = Annotated[
    str | None, typer.Option(envvar="AXON_DTYPE", help="float32, bfloat16 or float16; the checkpoint's own.")
]
Quantize = Annotated[
    str | None, typer.Option(envvar="AXON_QUANTIZE", help="int8 or int4 weights; fp8 on Nvidia GPUs from Hopper on.")
]
Compile = Annotated[
    bool,
    typer.Option("--compile/--no-compile", envvar="AXON_COMPILE", help="Compile the decode step; slower to start."),
]
MaxSeqLen = Annotated[
    int | None,
    typer.Option(envvar="AXON_MAX_SEQ_LEN", help="Positions in the cache; what the run needs, if not given."),
]
MaxTokens = Annotated[int, typer.Option("--max-tokens", "-n", envvar="AXON_MAX_TOKENS", help="Tokens to generate.")]
MaxTokensThatFit = Annotated[
    int | None,
    typer.Option("--max-tokens", "-n", envvar="AXON_MAX_TOKENS", help="Tokens to generate. [128, or what fits]"),
]
Temperature = Annotated[
    float | None,
    typer.Option("--temperature", "-t", envvar="AXON_TEMPERATURE", help="0 is greedy; the model's own default."),
]
TopP = Annotated[float | None, typer.Option(envvar="AXON_TOP_P", help="Keep the likeliest tokens up to this mass.")]
TopK = Annotated[int | None, typer.Option(envvar="AXON_TOP_K", help="Keep this many of the likeliest tokens.")]
MinP = Annotated[
    float | None, typer.Option(envvar="AXON_MIN_P", help="Keep tokens at least this fraction as likely as the best.")
]
RepetitionPenalty = Annotated[
    float | None, typer.Option(envvar="AXON_REPETITION_PENALTY", help="Above 1: repeat less.")
]
Speculate = Annotated[
    bool,
    typer.Option(
        "--speculate/--no-speculate",
        envvar="AXON_SPECULATE",
        help="Draft tokens from the text's own past and verify them in one pass; changes no answer.",
    ),
]
Seed = Annotated[int | None, typer.Option(envvar="AXON_SEED", help="The same seed gives the same tokens.")]
Stop = Annotated[list[str] | None, typer.Option(help="Stop before this text; may be given several times.")]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON object on standard output.")]

__all__ = [
    "DEFAULT_MODEL",
    "AsJson",
    "Compile",
    "Device",
    "Dtype",
    "MaxSeqLen",
    "MaxTokens",
    "MaxTokensThatFit",
    "MinP",
    "Model",
    "Quantize",
    "RepetitionPenalty",
    "Seed",
    "Speculate",
    "Stop",
    "Temperature",
    "TopK",
    "TopP",
]
