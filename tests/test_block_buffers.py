"""Memory that is used again, and only when nobody looks at it any more."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
from numpy.testing import assert_array_equal
from ray.data.block import BlockAccessor

from pipeline.block_buffers import BlockBuffers

# Ray warns of its own settings whenever it copies them.
pytestmark = pytest.mark.filterwarnings("ignore:.* is deprecated:Warning:ray.data.context")

SHAPE, DTYPE = (8, 3, 5), np.dtype(np.uint16)


def address(array: np.ndarray) -> int:
    return int(array.__array_interface__["data"][0])


def test_what_is_gone_is_given_out_again() -> None:
    buffers = BlockBuffers()
    first = buffers.empty(SHAPE, DTYPE)
    assert (first.shape, first.dtype, first.flags.writeable, first.flags.c_contiguous) == (SHAPE, DTYPE, True, True)
    where = address(first)
    second = buffers.empty(SHAPE, DTYPE)
    assert address(second) != where
    del first
    assert address(buffers.empty(SHAPE, DTYPE)) == where
    # A little less room will do as well, much less would waste it.
    assert address(buffers.empty((7, 3, 5), DTYPE)) == where
    assert address(buffers.empty((1, 3, 5), DTYPE)) != where


def test_what_a_view_or_a_block_shows_stays_as_it_is() -> None:
    buffers = BlockBuffers()
    for number, keep in enumerate(
        (lambda array: array[2:4, 1], lambda array: memoryview(array), lambda array: block_of(array))
    ):
        array = buffers.empty(SHAPE, DTYPE)
        array[:] = number
        held = keep(array)
        del array
        for _ in range(3):
            buffers.empty(SHAPE, DTYPE)[:] = 99
        shown = held["b10"].combine_chunks().to_numpy_ndarray() if isinstance(held, pa.Table) else np.asarray(held)
        assert_array_equal(shown, np.full_like(shown, number))


def block_of(array: np.ndarray) -> pa.Table:
    block = BlockAccessor.batch_to_block({"b10": array, "row": np.arange(len(array))})
    assert isinstance(block, pa.Table)
    # No copy is made: else there would be nothing to see.
    assert np.shares_memory(BlockAccessor.for_block(block).to_numpy("b10"), array)
    return block


def test_no_more_than_so_much_is_kept() -> None:
    buffers = BlockBuffers()
    for size in range(1, 300):
        buffers.empty((size * 1000,), np.dtype(np.uint8))
    assert len(buffers._kept) <= 64
