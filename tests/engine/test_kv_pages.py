"""The page pool: one owner a page, all or nothing, nothing freed twice."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.kv_pages import PagePool


def test_pages_grow_with_tokens_and_come_back() -> None:
    pool = PagePool(num_pages=4, page_size=16)
    pages: list[int] = []
    assert [pool.pages_for(tokens) for tokens in (0, 1, 16, 17)] == [0, 1, 1, 2]
    assert pool.extend(pages, 16)
    assert len(pages) == 1
    assert pool.extend(pages, 10)
    assert len(pages) == 1
    assert pool.extend(pages, 33)
    assert len(set(pages)) == 3
    assert pool.free_pages == 1
    pool.free(pages)
    assert (pages, pool.free_pages, pool.capacity) == ([], 4, 64)


def test_extending_is_all_or_nothing() -> None:
    pool = PagePool(num_pages=2, page_size=4)
    pages: list[int] = []
    assert pool.extend(pages, 4)
    before = list(pages)
    assert not pool.extend(pages, 13)
    assert (pages, pool.free_pages) == (before, 1)
    assert pool.extend(pages, 8)


def test_freeing_twice_is_caught() -> None:
    pool = PagePool(num_pages=2, page_size=4)
    pages: list[int] = []
    pool.extend(pages, 8)
    copy = list(pages)
    pool.free(pages)
    with pytest.raises(AssertionError, match="freed twice"):
        pool.free(copy)


def test_freed_pages_are_shown_before_they_are_given_out_again() -> None:
    freed: list[list[int]] = []
    pool = PagePool(2, 4, on_free=lambda pages: freed.append([*pages, pool.free_pages]))
    pages: list[int] = []
    pool.extend(pages, 8)
    pool.free(pages)
    pool.free(pages)
    assert freed == [[0, 1, 0]]


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 40)), max_size=60))
def test_no_page_has_two_owners(steps: list[tuple[int, int]]) -> None:
    pool = PagePool(num_pages=9, page_size=4)
    owners: list[list[int]] = [[] for _ in range(4)]
    for owner, tokens in steps:
        if tokens == 0:
            pool.free(owners[owner])
        else:
            had = len(owners[owner])
            fits = pool.pages_for(tokens) - had <= pool.free_pages
            assert pool.extend(owners[owner], tokens) == fits
            assert len(owners[owner]) == (max(had, pool.pages_for(tokens)) if fits else had)
        used = [page for pages in owners for page in pages]
        assert len(used) == len(set(used)) == pool.num_pages - pool.free_pages
