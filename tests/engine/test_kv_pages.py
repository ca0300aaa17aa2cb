"""The page pool: all or nothing, nothing freed twice, nothing in use given away, kept pages found while they last."""

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


def keyed(pool: PagePool, pages: list[int], names: str) -> None:
    for page, name in zip(pages, names, strict=False):
        pool.publish(page, name.encode())


def keys(names: str) -> list[bytes]:
    return [name.encode() for name in names]


def test_pages_with_keys_are_shared_and_kept() -> None:
    pool = PagePool(num_pages=4, page_size=2)
    first: list[int] = []
    pool.extend(first, 6)
    keyed(pool, first, "ab")
    second = pool.share(keys("abx"))
    assert second == first[:2]
    assert pool.extend(second, 6)
    assert pool.free_pages == 0
    whole = list(first)
    pool.free(first)
    assert pool.free_pages == 1, "the first two pages are still in use"
    pool.free(second)
    assert pool.free_pages == 4
    assert pool.share(keys("ab")) == whole[:2]
    assert pool.share(keys("b")) == [whole[1]]
    assert pool.share(keys("xb")) == []


def test_kept_pages_go_when_the_room_is_needed_the_last_of_a_prompt_first() -> None:
    gone: list[list[int]] = []
    pool = PagePool(num_pages=3, page_size=2, on_free=lambda pages: gone.append(list(pages)))
    first: list[int] = []
    pool.extend(first, 6)
    keyed(pool, first, "abc")
    a, b, c = first
    pool.free(first)
    assert gone == []
    other: list[int] = []
    assert pool.extend(other, 4)
    assert gone == [[c], [b]]
    assert other == [c, b]
    assert pool.share(keys("abc")) == [a]
    assert not pool.extend(other, 6), "the last page is in use again"


def test_a_page_keeps_its_first_name_and_a_name_its_first_page() -> None:
    pool = PagePool(num_pages=3, page_size=2)
    first: list[int] = []
    second: list[int] = []
    pool.extend(first, 2)
    pool.extend(second, 4)
    keyed(pool, first, "a")
    keyed(pool, second, "ab")
    duplicate, tail = second
    pool.free(second)
    assert pool.share(keys("ab")) == [*first, tail]
    more: list[int] = []
    assert pool.extend(more, 2)
    assert more == [duplicate], "a page that nobody can find is free at once"


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 24), st.integers(0, 2)), max_size=60))
def test_what_is_found_is_what_was_written(steps: list[tuple[int, int, int]]) -> None:
    """Four owners write texts that begin alike; whoever shares a page finds there what its key says."""
    size = 4
    pool = PagePool(num_pages=9, page_size=size)
    owners: list[list[int]] = [[] for _ in range(4)]
    content: dict[int, str] = {}
    for owner, length, text in steps:
        pages = owners[owner]
        pool.free(pages)
        names = [f"{text}:{min(page, 3 if text else page)}:{page}" for page in range(length // size)]
        shared = pool.share(name.encode() for name in names)
        assert [content[page] for page in shared] == names[: len(shared)]
        pages += shared
        if not pool.extend(pages, length):
            pool.free(pages)
            continue
        for page, name in zip(pages[len(shared) :], names[len(shared) :], strict=False):
            content[page] = name
            pool.publish(page, name.encode())
        for page in pages[len(names) :]:
            content[page] = "partly full"
        used = {page for other in owners for page in other}
        assert pool.free_pages == pool.num_pages - len(used)
