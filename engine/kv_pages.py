"""Which KV-cache pages are free. Knows numbers only; the tensors belong to the runner."""

from __future__ import annotations

from collections.abc import Callable, Sequence


class PagePool:
    """A free list of KV pages; every page has one owner at most.

    on_free: called with the pages just given back, before anyone else can get them (poisoning, in tests).
    """

    def __init__(self, num_pages: int, page_size: int, on_free: Callable[[Sequence[int]], None] | None = None) -> None:
        assert num_pages >= 1
        assert page_size >= 1
        self.num_pages = num_pages
        self.page_size = page_size
        self._on_free = on_free
        self._free = list(range(num_pages - 1, -1, -1))  # a stack: the warmest page is reused first
        self._used = bytearray(num_pages)

    @property
    def free_pages(self) -> int:
        return len(self._free)

    @property
    def capacity(self) -> int:
        """Tokens that fit when one sequence has every page."""
        return self.num_pages * self.page_size

    def pages_for(self, tokens: int) -> int:
        """Pages that ``tokens`` tokens take."""
        return -(-tokens // self.page_size)

    def extend(self, pages: list[int], tokens: int) -> bool:
        """Grow ``pages`` in place until ``tokens`` tokens fit. All or nothing: False leaves everything as it was."""
        missing = self.pages_for(tokens) - len(pages)
        if missing > len(self._free):
            return False
        for _ in range(missing):
            page = self._free.pop()
            self._used[page] = True
            pages.append(page)
        return True

    def free(self, pages: list[int]) -> None:
        """Take all of ``pages`` back and empty the list."""
        if not pages:
            return
        for page in pages:
            assert self._used[page], f"page {page} was freed twice"
            self._used[page] = False
        if self._on_free is not None:
            self._on_free(pages)
        self._free.extend(pages)
        pages.clear()
