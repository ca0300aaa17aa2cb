"""Memory that files are read into again."""

from __future__ import annotations

from adapter_store.spare_memory import SpareMemory


def test_the_smallest_buffer_that_fits_is_used_again() -> None:
    spare = SpareMemory(100)
    large, small = spare.take(60), spare.take(30)
    spare.give(large)
    spare.give(small)
    assert spare.take(20) is small
    assert spare.take(20) is large
    assert spare.take(20) is not small, "it is in use"


def test_a_small_file_leaves_large_buffers_alone() -> None:
    spare = SpareMemory(100)
    large = spare.take(60)
    spare.give(large)
    assert spare.take(14).numel() == 14
    assert spare.take(15) is large


def test_no_more_is_kept_than_allowed() -> None:
    spare = SpareMemory(100)
    first, second = spare.take(60), spare.take(60)
    spare.give(first)
    spare.give(second)
    assert spare.take(60) is first
    assert spare.take(60) is not second
    assert spare.take(0).numel() == 0
