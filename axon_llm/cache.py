"""The KV cache: one preallocated pair of tensors that holds what attention needs to remember.

A decoder produces, for every token and layer, a key and a value vector that every later token will look at. They never
change once computed, so they are computed once and kept. This file is that memory and nothing more. It does not know
what attention is, which tokens it holds or how far each sequence has come: the caller owns *positions*, as a tensor,
and says where to write.

Legend: L layers · B slots (one sequence each) · T new tokens · S max_seq_len · Hkv KV heads · D head_dim

Read next: ``layers/attention.py``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from axon_llm.config import ModelConfig


class KVCache:
    """Keys and values of every layer for a fixed number of slots and positions, allocated once.

    Static on purpose: shapes never depend on how long a sequence is, so a compiled decode step never recompiles, and
    the memory a server needs is known before the first request arrives.

    Attributes:
        k: keys, ``[L, B, Hkv, S, D]``.
        v: values, same shape.

    Args:
        config: the model's dimensions.
        slots: how many sequences can be resident at once.
        max_seq_len: positions per slot; the model's ``max_position_embeddings`` when omitted.
        device: where the tensors live.
        dtype: element type of the tensors.

    Raises:
        ValueError: ``slots`` or ``max_seq_len`` is not positive.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        slots: int = 1,
        max_seq_len: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        max_seq_len = config.max_position_embeddings if max_seq_len is None else max_seq_len
        if slots < 1 or max_seq_len < 1:
            raise ValueError(f"a cache needs at least one slot and one position, not {slots} × {max_seq_len}")
        shape = (config.num_layers, slots, config.num_kv_heads, max_seq_len, config.head_dim)
        # Zeros, not empty: masked positions are multiplied by a softmax weight of exactly 0, and 0 · NaN is NaN.
        self._set(torch.zeros(shape, device=device, dtype=dtype), torch.zeros(shape, device=device, dtype=dtype))

    def _set(self, k: Tensor, v: Tensor) -> None:
        self.k, self.v = k, v  # [L, B, Hkv, S, D]
        # One view per layer, made here and not in forward: to the compiler they are inputs that do not overlap, which
        # it updates in place; slicing one big tensor inside the graph would tempt it to copy the whole cache.
        self._layers = tuple(zip(k.unbind(0), v.unbind(0), strict=True))

    @staticmethod
    def bytes_for(config: ModelConfig, *, slots: int, max_seq_len: int, dtype: torch.dtype) -> int:
        """The memory formula: ``2 · L · slots · S · Hkv · D · bytes per element`` (the 2 is one K and one V)."""
        elements = 2 * config.num_layers * slots * max_seq_len * config.num_kv_heads * config.head_dim
        return elements * dtype.itemsize

    @property
    def nbytes(self) -> int:
        """Bytes held by K and V together; equal to :meth:`bytes_for`."""
        return self.k.nbytes + self.v.nbytes

    @property
    def slots(self) -> int:
        """Number of slots, B."""
        return self.k.shape[1]

    @property
    def max_seq_len(self) -> int:
        """Positions per slot, S."""
        return self.k.shape[3]

    def slot(self, index: int) -> KVCache:
        """A one-slot view, sharing memory: row 0 of a forward pass over it is slot ``index`` here."""
        return self._view(self.k[:, index : index + 1], self.v[:, index : index + 1])

    def view(self, *, slots: int | None = None, length: int | None = None) -> KVCache:
        """A view of the first ``slots`` slots and the first ``length`` positions, sharing memory.

        Attention over the view costs ``length`` positions instead of ``max_seq_len``: the unused tail is never read.
        """
        return self._view(self.k[:, :slots, :, :length], self.v[:, :slots, :, :length])

    def _view(self, k: Tensor, v: Tensor) -> KVCache:
        view = object.__new__(KVCache)
        view._set(k, v)
        return view

    def layer(self, index: int) -> tuple[Tensor, Tensor]:
        """Keys and values of one layer over all positions, ``[B, Hkv, S, D]`` each, sharing memory."""
        return self._layers[index]

    def update(self, layer: int, positions: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write new keys and values of one layer at their positions, and return everything that layer remembers.

        Args:
            layer: which layer.
            positions: absolute positions of the new tokens, ``[B, T]`` int64, each below ``max_seq_len``.
            k: new keys, ``[B, Hkv, T, D]``; cast to the cache's dtype.
            v: new values, same shape.

        Returns:
            The layer's keys and values over all positions, ``[B, Hkv, S, D]`` each. Positions never written, or
            written by a sequence that used this slot before, are in there too: masking them is attention's business.
        """
        keys, values = self.layer(layer)
        # Assignment by index, not scatter_: a compiled step then writes in place, where scatter_ copies the whole view.
        rows = torch.arange(len(positions), device=positions.device)[:, None]  # [B, 1]
        # Two index tensors with a slice between them: PyTorch puts their dimensions [B, T] first, hence the transpose.
        keys[rows, :, positions] = k.transpose(1, 2).to(keys.dtype)  # [B, T, Hkv, D]
        values[rows, :, positions] = v.transpose(1, 2).to(values.dtype)
        return keys, values
