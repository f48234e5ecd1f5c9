"""Memory for weights on huge pages."""

from __future__ import annotations

import gc
import mmap
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from axon_llm.fast import pages
from axon_llm.fast.pages import CHUNK, HUGE, LINE, HugePages
from axon_llm.fast.strips import lay_bf16

asks = pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="this system has no huge pages to ask for")


@asks
def test_a_tensor_begins_where_the_one_before_ended() -> None:
    memory = HugePages()
    first, second = memory.empty((3, 5), torch.float32), memory.empty((7,), torch.bfloat16)
    assert first.data_ptr() % HUGE == 0
    assert second.data_ptr() == first.data_ptr() + LINE
    assert first.untyped_storage().nbytes() == first.nbytes


@asks
def test_what_is_written_to_one_tensor_stays_there() -> None:
    memory = HugePages()
    tensors = [memory.empty((size,), torch.int32) for size in (16, 1, 17, 1000)]
    for number, tensor in enumerate(tensors):
        tensor.fill_(number + 1)
    assert [set(tensor.tolist()) for tensor in tensors] == [{1}, {2}, {3}, {4}]


@asks
def test_a_chunk_is_given_back_when_its_tensors_are_gone() -> None:
    memory = HugePages()
    first, second = memory.empty((16,), torch.int32), memory.empty((16,), torch.int32)
    del first
    gc.collect()
    assert memory._chunk() is not None
    del second
    gc.collect()
    assert memory._chunk() is None
    assert memory.empty((16,), torch.int32).numel() == 16


@asks
def test_two_threads_never_get_the_same_memory() -> None:
    memory, before = HugePages(), sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(4) as pool:
            made = list(pool.map(lambda _: memory.empty((3,), torch.int32), range(4000)))
    finally:
        sys.setswitchinterval(before)
    assert len({tensor.data_ptr() for tensor in made}) == len(made)


@asks
def test_a_tensor_may_be_larger_than_a_chunk() -> None:
    large = HugePages().empty((CHUNK + HUGE + 1,), torch.uint8)
    large[-1] = 7
    assert large.numel() == CHUNK + HUGE + 1
    assert int(large[-1]) == 7


@asks
def test_the_strips_of_weights_lie_one_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages, "weights", HugePages())
    first, second = (lay_bf16([torch.randn(32, 64).bfloat16()]) for _ in range(2))
    assert second.data_ptr() == first.data_ptr() + first.nbytes


def test_without_huge_pages_to_ask_for_tensors_are_ordinary_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(mmap, "MADV_HUGEPAGE", raising=False)
    memory = HugePages()
    assert memory.empty((2, 3), torch.float32).shape == (2, 3)
    assert memory._chunk() is None


def test_who_wants_no_huge_pages_gets_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("THP_MEM_ALLOC_ENABLE", "0")
    memory = HugePages()
    assert memory.empty((2, 3), torch.float32).shape == (2, 3)
    assert memory._chunk() is None


@asks
def test_without_address_space_for_a_chunk_tensors_are_ordinary_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(mmap, "mmap", refuse)
    assert HugePages().empty((2, 3), torch.float32).shape == (2, 3)


def test_a_tensor_without_elements_takes_nothing() -> None:
    memory = HugePages()
    assert memory.empty((0, 3), torch.int32).shape == (0, 3)
    assert memory._chunk() is None


@asks
def test_a_kernel_that_has_no_huge_pages_gives_ordinary_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mmap, "MADV_HUGEPAGE", 12345)  # advice that no kernel knows
    memory = HugePages()
    tensor = memory.empty((4,), torch.int32)
    tensor.fill_(3)
    assert tensor.tolist() == [3, 3, 3, 3]


def test_a_copy_has_the_same_values_somewhere_else() -> None:
    tensor = torch.randn(3, 7)
    copy = HugePages().copy(tensor)
    assert torch.equal(copy, tensor)
    assert copy.data_ptr() != tensor.data_ptr()
