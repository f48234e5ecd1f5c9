"""Linear layers with a choice of kernel: drop-in replacements for ``nn.Linear`` in inference.

``PlainLinear`` keeps the weights as they are stored in the checkpoint (they may be a memory map): nothing is to be done
at start. ``PackedLinear`` stores them in the layout oneDNN's kernels read fastest. Both compute what ``nn.Linear``
computes, up to the order of summation.

Legend: R rows · K input channels · N output channels

Read next: ``strips.py`` (weights for our own kernels), ``replace.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from axon_llm.fast import native, ops


class FastLinear(nn.Module):
    """What all variants share: sizes, a name, and the bytes one step has to read.

    Attributes:
        in_features: K.
        out_features: N.
        kind: name of the variant.
    """

    kind = ""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FastLinear:
        # Whatever the model is converted to, kernels read scales and packed values in the types they were made in.
        made = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, buffer in made.items():
            converted = self._buffers[name]
            if buffer is not None and converted is not None and converted.dtype != buffer.dtype:
                self._buffers[name] = buffer.to(converted.device)
        return self

    @property
    def weight_bytes(self) -> int:
        """Bytes of weights and scales that every pass reads."""
        raise NotImplementedError

    def extra_repr(self) -> str:
        """Sizes and kind, for ``print(model)``."""
        return f"{self.in_features} → {self.out_features}, {self.kind}"


class PlainLinear(FastLinear):
    """Weights as stored, a memory map if that is what they are, multiplied by our own kernel where there is one.

    Args:
        weight: ``[N, K]``, kept without a copy.
        bias: ``[N]`` or ``None``.
    """

    kind = "plain"
    strip_kind = 3  # as numbered in kernels/weights.h
    scale = None

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        super().__init__(weight.shape[1], weight.shape[0])
        self.weight = nn.Parameter(weight.detach(), requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        self.on_cpu = weight.device.type == "cpu"
        self.native = self.on_cpu and weight.dtype == torch.bfloat16 and weight.is_contiguous() and native.loaded()
        self.products = int(ops.products()) if self.native else 0

    def forward(self, x: Tensor) -> Tensor:
        """``x`` ``[…, K]`` → ``[…, N]``."""
        if self.native:
            y: Tensor = torch.ops.axon.bf16_stored(x, self.weight, self.products)
        elif self.on_cpu and x.numel() == self.in_features:
            y = (torch.ops.axon.gemv if torch.compiler.is_compiling() else ops.gemv)(x, self.weight)
        else:
            return F.linear(x, self.weight, self.bias)
        return y if self.bias is None else y + self.bias

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weight."""
        return self.weight.nbytes


class ParallelLinear(nn.Module):
    """Several linears with the same input as one, their outputs side by side, where no copy of the weights is wanted.

    Args:
        linears: in the order of their outputs.
    """

    linears: Sequence[PlainLinear]

    def __init__(self, linears: Sequence[PlainLinear]) -> None:
        super().__init__()
        self.linears = nn.ModuleList(linears)  # type: ignore[assignment]

    def forward(self, x: Tensor) -> Tensor:
        """``x`` ``[…, K]`` → ``[…, N]``, N the sum of theirs."""
        return torch.cat(self.parts(x), dim=-1)

    def parts(self, x: Tensor) -> list[Tensor]:
        """The same before it is put side by side, which a large result takes the memory for twice."""
        return [linear(x) for linear in self.linears]


class PackedLinear(FastLinear):
    """Weights in oneDNN's layout, chosen for a given number of rows and used for any.

    The layout is opaque and belongs to this process: it cannot be saved, moved or differentiated.

    Args:
        weight: ``[N, K]`` bfloat16 or float32 on the CPU; not needed afterwards.
        bias: ``[N]`` or ``None``.
        rows: rows the layout is chosen for.
    """

    kind = "packed"

    def __init__(self, weight: Tensor, bias: Tensor | None = None, rows: int = 1) -> None:
        super().__init__(weight.shape[1], weight.shape[0])
        self.dtype = weight.dtype
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), rows)
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """``x`` ``[…, K]`` → ``[…, N]``."""
        linear = torch.ops.axon.packed_linear if torch.compiler.is_compiling() else ops.packed_linear
        y: Tensor = linear(x, self.packed, self.bias, self.out_features)
        return y

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weight, without the padding the layout may add."""
        return self.in_features * self.out_features * self.dtype.itemsize
