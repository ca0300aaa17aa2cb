"""Which KV-cache pages are free, used or kept for their content. Knows numbers only; the runner has the tensors."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence


class PagePool:
    """KV pages with users. A page without any is free, or kept while nobody needs the room if its content has a key.

    Sequences whose tokens begin alike may use the same pages: a page with a key is full and is not written again.

    on_free: called with pages whose content is gone, before anyone else can get them (poisoning, in tests).
    """

    def __init__(self, num_pages: int, page_size: int, on_free: Callable[[Sequence[int]], None] | None = None) -> None:
        assert num_pages >= 1
        assert page_size >= 1
        self.num_pages = num_pages
        self.page_size = page_size
        self._on_free = on_free
        self._free = list(range(num_pages - 1, -1, -1))  # a stack: the warmest page is reused first
        self._users = [0] * num_pages
        self._kept: OrderedDict[int, None] = OrderedDict()  # pages with a key and no users, the first to go first
        self._keys: dict[int, bytes] = {}
        self._by_key: dict[bytes, int] = {}
        self._owners: dict[int, str | None] = {}  # of pages with a key

    @property
    def free_pages(self) -> int:
        """Pages without users, kept ones among them."""
        return len(self._free) + len(self._kept)

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
        if missing > self.free_pages:
            return False
        for _ in range(missing):
            page = self._free.pop() if self._free else self._drop_kept()
            self._users[page] = 1
            pages.append(page)
        return True

    def free(self, pages: list[int]) -> None:
        """Take all of ``pages`` back from one user and empty the list."""
        if not pages:
            return
        gone: list[int] = []
        for page in reversed(pages):  # of one sequence's kept pages the last go first: those before them stay of use
            assert self._users[page], f"page {page} was freed twice"
            self._users[page] -= 1
            if self._users[page]:
                continue
            if page in self._keys:
                self._kept[page] = None
            else:
                gone.append(page)
        if gone and self._on_free is not None:
            self._on_free(gone[::-1])
        self._free.extend(gone[::-1])
        pages.clear()

    def share(self, keys: Iterable[bytes]) -> list[int]:
        """Pages that hold what the first of ``keys`` name, one after the other up to the first unknown; now used."""
        pages: list[int] = []
        for key in keys:
            page = self._by_key.get(key)
            if page is None:
                break
            self._kept.pop(page, None)
            self._users[page] += 1
            pages.append(page)
        return pages

    def publish(self, page: int, key: bytes, owner: str | None = None) -> None:
        """Say that a page in use is full and what it holds. Of two pages with one key the first is the one to share.

        owner: whose content it is, for ``forget``.
        """
        assert self._users[page], f"page {page} has no user"
        if key not in self._by_key and page not in self._keys:
            self._keys[page], self._by_key[key], self._owners[page] = key, page, owner

    def forget(self, owner: str) -> int:
        """Free the kept pages of this owner, and keep none that is in use now; returns how many were freed."""
        gone = [page for page in self._kept if self._owners[page] == owner]
        for page in [page for page, whose in self._owners.items() if whose == owner]:
            self._unname(page)
        for page in gone:
            del self._kept[page]
        if gone and self._on_free is not None:
            self._on_free(gone)
        self._free.extend(gone)
        return len(gone)

    def _drop_kept(self) -> int:
        page, _ = self._kept.popitem(last=False)
        self._unname(page)
        if self._on_free is not None:
            self._on_free([page])
        return page

    def _unname(self, page: int) -> None:
        del self._by_key[self._keys.pop(page)]
        del self._owners[page]
