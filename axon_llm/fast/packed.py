"""Checkpoints whose linear layers are stored quantised, so that loading is a memory map and not half a minute of work.

A packed checkpoint is a model folder like any other: ``config.json`` (with a marker, ``axon_packed``), safetensors,
tokenizer files. Its linears are stored fused, under the names of the fast model:

* int8: ``NAME.q`` int8 ``[N, K]`` and ``NAME.scale`` float32 ``[N]``;
* int4: ``NAME.packed`` uint8 ``[N, K / 2]`` and ``NAME.scales`` bfloat16 ``[K / 32, N, 2]``, both as the CPU's int4
  kernel reads them (``int4.py``). A machine whose kernel wants another layout converts when it loads.

Embedding, norms and biases are stored as they were. ``NAME.bias`` where there is one.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from axon_llm.checkpoint import load_model, opened, resolve_dtype, tensor_files, without_memory
from axon_llm.config import ModelConfig
from axon_llm.errors import CheckpointError, UsageError
from axon_llm.fast.int4 import Int4Linear, layout_is_known, pack, unpack
from axon_llm.fast.linear import FastLinear
from axon_llm.fast.replace import build, fuse, quantised, stack
from axon_llm.model import Transformer

VERSION = 1
_CARRIED = ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "special_tokens_map.json")
_PARTS = {"int8": ("q", "scale"), "int4": ("packed", "scales")}


def write_packed(source: Path, target: Path, quantize: str) -> int:
    """Quantise the checkpoint in one folder into another.

    Args:
        source: a model folder with float weights.
        target: created; must not exist, or be empty.
        quantize: ``"int8"`` or ``"int4"``.

    Returns:
        Bytes of the tensors written.

    Raises:
        ModelError: the source cannot be read, or is packed already.
        UsageError: the target holds something, the sizes cannot be grouped, or the quantisation is not known.
    """
    if quantize not in _PARTS:
        raise UsageError(f"a checkpoint cannot be packed as {quantize!r}", f"Known: {', '.join(_PARTS)}.")
    config = ModelConfig.from_file(source / "config.json")
    if config.packed:
        raise CheckpointError(f"{source} is packed already ({config.packed})", "Start from the original checkpoint.")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UsageError(f"{target} exists and is not an empty folder", "Name a new folder.")
    if quantize == "int4" and not layout_is_known():
        raise UsageError("this CPU's int4 kernel has another layout than the one packed checkpoints use")
    model = load_model(source, config, torch.device("cpu"))
    tensors: dict[str, Tensor] = {}

    def keep(name: str, linears: list[nn.Linear]) -> nn.Module:
        values = quantised(quantize, linears)
        if quantize == "int4":
            if values[0].shape[0] % 64:
                raise UsageError(f"{name} has {values[0].shape[0]} output channels; packed int4 needs a multiple of 64")
            values = pack(*values)
        tensors.update({f"{name}.{part}": value for part, value in zip(_PARTS[quantize], values, strict=True)})
        bias = stack([linear.bias for linear in linears])
        if bias is not None:
            tensors[f"{name}.bias"] = bias
        return nn.Identity()

    fuse(model, keep)
    tensors |= {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    target.mkdir(parents=True, exist_ok=True)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    (target / "model.safetensors").chmod(0o644)  # written for its owner alone, unlike every other file
    raw = json.loads((source / "config.json").read_text(encoding="utf-8"))
    raw["axon_packed"] = {"version": VERSION, "weights": quantize}
    (target / "config.json").write_text(json.dumps(raw, indent=2) + "\n", encoding="utf-8")
    for path in (*(source / name for name in _CARRIED), *source.glob("*.jinja")):
        if path.is_file():
            shutil.copyfile(path, target / path.name)
    return sum(tensor.nbytes for tensor in tensors.values())


def load_packed(
    folder: Path,
    config: ModelConfig,
    device: torch.device,
    dtype: str | torch.dtype | None = None,
    quantize: str | None = None,
) -> Transformer:
    """Load a packed checkpoint. The result is what ``accelerate`` would have made of the original.

    Args:
        folder: the checkpoint.
        config: read from it.
        device: where to.
        dtype: of activations, embedding and norms; as stored when omitted.
        quantize: ``None``, or what the checkpoint is.

    Raises:
        CheckpointError: tensors missing, extra, or wrongly shaped.
        UsageError: another quantisation was asked for.
    """
    if quantize not in (None, config.packed):
        raise UsageError(
            f"{folder} is packed as {config.packed} and cannot become {quantize}", "Start from the original checkpoint."
        )
    stored: dict[str, Tensor] = {}
    for path in tensor_files(folder):
        with opened(path) as file:
            stored |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dictionary
    target = resolve_dtype(dtype, str(stored["embed_tokens.weight"].dtype).removeprefix("torch."), device)

    def take(name: str, shape: torch.Size) -> Tensor:
        tensor = stored.pop(name, None)
        if tensor is None:
            raise CheckpointError(f"{folder} lacks {name}", "Do config.json and the weights belong together?")
        if tensor.shape != shape:
            raise CheckpointError(f"{folder}: {name} is {list(tensor.shape)}, should be {list(shape)}")
        return tensor

    def make(name: str, linears: list[nn.Linear]) -> nn.Module:
        n, k = sum(linear.out_features for linear in linears), linears[0].in_features
        has_bias = linears[0].bias is not None
        bias = take(f"{name}.bias", torch.Size([n])).to(device, target) if has_bias else None
        if config.packed == "int8":
            values = take(f"{name}.q", torch.Size([n, k])), take(f"{name}.scale", torch.Size([n]))
            return build("int8", tuple(value.to(device) for value in values), bias)
        packed = take(f"{name}.packed", torch.Size([n, k // 2]))
        return _int4(packed, take(f"{name}.scales", torch.Size([k // 32, n, 2])), bias, device)

    if device.type == "cpu" and config.packed == "int4" and not layout_is_known():
        print("axon: int4 weights are converted to this CPU's layout while loading", file=sys.stderr)  # noqa: T201
    model = fuse(without_memory(config), make)
    for name, parameter in list(model.named_parameters()):
        if parameter.is_meta:
            owner, _, leaf = name.rpartition(".")
            value = take(name, parameter.shape).to(device, target)
            setattr(model.get_submodule(owner), leaf, nn.Parameter(value, requires_grad=False))
    if stored:
        raise CheckpointError(f"{folder} holds unexpected {', '.join(sorted(stored)[:3])}")
    model.rope.to(device)
    return model.eval().requires_grad_(False)


def _int4(packed: Tensor, scales: Tensor, bias: Tensor | None, device: torch.device) -> FastLinear:
    """The linear for int4 weights as stored; in another layout where the device wants one."""
    if device.type == "cpu" and layout_is_known():
        return Int4Linear(packed, scales, bias)
    q = unpack(packed).transpose(1, 2).reshape(packed.shape[0], -1)
    scale, middle = scales[..., 0].T.contiguous(), scales[..., 1].T.contiguous()
    return build("int4", (q.to(device), scale.to(device), middle.to(device)), bias)
