"""What a client may call an adapter, and which reference that is. Touches no network."""

from __future__ import annotations

import copy
import logging
import os
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Literal

from adapter_store.digest import CONFIG_FILE, WEIGHTS_FILE
from adapter_store.errors import AdapterNotFound
from adapter_store.merging_recipe import Merge, MergePart
from adapter_store.references import parse_reference
from adapter_store.settings import StoreSettings
from adapter_store.source import AdapterRef
from adapter_store.template_files import TEMPLATE_FILES

_log = logging.getLogger(__name__)

Origin = Literal["configured", "runtime", "folder", "reference"]


@dataclass(frozen=True, slots=True)
class NamedAdapter:
    """A name and what it stands for. origin: which of the four places said so."""

    name: str
    ref: AdapterRef
    origin: Origin


class AdapterNames:
    """Names to references, for one state of the settings. Thread-safe.

    A name is looked up, in this order, among the adapters of the settings, among those declared at run time, among the
    sub-folders of the settings' folders, and, when it is a reference such as ``hub:acme/x@v1``, in the allow-list.
    Nothing a client sends is ever joined to a path unless it is the plain name of a sub-folder, and a sub-folder whose
    files lie outside its folder (through links) does not exist for clients.
    """

    def __init__(self, settings: StoreSettings) -> None:
        """Raises ValueError when a folder of the settings does not exist."""
        self._settings = settings
        self._runtime: Mapping[str, AdapterRef] = {}
        self._declared = {name: self.rooted(parse_reference(ref)) for name, ref in settings.adapters.items()}
        self._folders = [settings.path(folder) for folder in settings.folders]
        for folder in self._folders:
            if not folder.is_dir():
                raise ValueError(f"folders: {str(folder)!r} is not a folder; create it or correct the setting")
        self._by_ref: dict[AdapterRef, str] | None = None
        self._lock = threading.Lock()
        self._scans: dict[Path, tuple[int, tuple[str, ...]]] = {}

    def with_runtime(self, runtime: Mapping[str, AdapterRef]) -> AdapterNames:
        """The same with these adapters, and no others, declared at run time."""
        made = copy.copy(self)  # shares what is known of the folders
        made._by_ref = None
        made._runtime = {name: self.rooted(ref) for name, ref in runtime.items()}
        return made

    def names(self) -> list[str]:
        """Every adapter that has a name, sorted: declared ones and those found in folders now."""
        found = {*self._declared, *self._runtime}
        for folder in self._folders:
            found.update(self._scan(folder))
        return sorted(found)

    def find(self, name: str) -> NamedAdapter:
        """Where the adapter a client calls ``name`` is kept. Raises AdapterNotFound."""
        if (declared := self._declared.get(name)) is not None:
            return NamedAdapter(name, declared, "configured")
        if (runtime := self._runtime.get(name)) is not None:
            return NamedAdapter(name, runtime, "runtime")
        for folder in self._folders:
            if _is_plain_name(name) and _holds_adapter(folder, name):
                return NamedAdapter(name, AdapterRef("local", str(folder / name)), "folder")
        if AdapterRef.is_meant(name):
            return NamedAdapter(name, self._allowed(name), "reference")
        known = self.names()
        some = ", ".join(known[:10]) + (", ..." if len(known) > 10 else "")
        raise AdapterNotFound(
            name,
            f"there is no adapter of this name; known ones: {some or 'none'}; "
            "declare it under adapters or put it in an adapter folder",
        )

    def name_of(self, ref: AdapterRef) -> str | None:
        """A name that stands for this place, pinned or not; of several, any. Looks at no file."""
        if self._by_ref is None:
            known = {**self._runtime, **self._declared}
            self._by_ref = {one.unpinned: name for name, one in known.items()}
            self._by_ref |= {one: name for name, one in known.items()}
        name = self._by_ref.get(ref) or self._by_ref.get(ref.unpinned)
        if name is None and ref.source == "local" and Path(ref.id).parent in self._folders:
            name = Path(ref.id).name
        return name

    def rooted(self, ref: AdapterRef) -> AdapterRef:
        """The reference with local paths made absolute, as the settings' other paths are."""
        if ref.source == "merge":
            return Merge.of(ref).moved(self.rooted).ref
        return AdapterRef("local", str(self._settings.path(ref.id))) if ref.source == "local" else ref

    def _allowed(self, name: str) -> AdapterRef:
        if Merge.is_meant(name):
            return self._merged(name)
        try:
            ref = AdapterRef.parse(name)
        except ValueError as error:
            raise AdapterNotFound(name, str(error)) from error
        if ref.source == "local":
            # Judged by where it really is, so that neither ".." nor a link leads out of an allowed folder.
            ref = AdapterRef("local", str(Path(ref.id).resolve())) if Path(ref.id).is_absolute() else ref
            inside = _files_inside(Path(ref.id), Path(ref.id))
        else:
            inside = True
        bare = str(ref.unpinned)
        if not inside or not any(fnmatchcase(bare, p) or fnmatchcase(str(ref), p) for p in self._settings.allow):
            raise AdapterNotFound(name, "clients may not name this reference; the operator can add it to allow")
        return ref

    def _merged(self, name: str) -> AdapterRef:
        """A merge of what clients may name, each part found as if it were named alone."""
        try:
            merge, most = Merge.parse(name), self._settings.merge_parts
            if len(merge.parts) > most:
                raise ValueError(f"it merges {len(merge.parts)} adapters; at most {most} may be (store.merge_parts)")
            return merge.located(lambda part: self._part(name, part)).ref
        except ValueError as error:
            raise AdapterNotFound(name, str(error)) from error

    def _part(self, whole: str, part: MergePart) -> AdapterRef:
        try:
            return self.find(part.called).ref
        except AdapterNotFound as error:
            raise part.error(whole, error) from None

    def _scan(self, folder: Path) -> tuple[str, ...]:
        """Names in a folder. The folder's own modification time says whether an entry came or went; a sub-folder that
        is still being filled keeps the listing from being remembered."""
        try:
            stamp = folder.stat().st_mtime_ns
            with self._lock:
                known = self._scans.get(folder)
            if known is not None and known[0] == stamp:
                return known[1]
            entries = sorted(entry.name for entry in folder.iterdir() if entry.is_dir())
        except OSError as error:
            _log.warning("adapter folder %s cannot be listed: %s", folder, error.strerror)
            return ()
        names = tuple(name for name in entries if _is_plain_name(name) and _holds_adapter(folder, name))
        with self._lock:
            if len(names) == len(entries):
                self._scans[folder] = (stamp, names)
            else:
                self._scans.pop(folder, None)
        return names


def _is_plain_name(name: str) -> bool:
    return bool(name) and not name.startswith(".") and not any(c in name for c in "/\\\0")


def _holds_adapter(folder: Path, name: str) -> bool:
    try:
        if not (folder / name / CONFIG_FILE).is_file():
            return False
    except OSError:  # a name longer than the file system allows
        return False
    return _files_inside(folder / name, folder)


def _files_inside(adapter: Path, folder: Path) -> bool:
    """Whether the adapter's files, all links followed, lie in ``folder``."""
    root, place = folder.resolve(), adapter.resolve()
    inside = place.is_relative_to(root)
    # On the path of every request, and a link costs ten times what it costs to find that there is none.
    return all(
        (inside and not os.path.islink(file)) or Path(file).resolve().is_relative_to(root)  # noqa: PTH114
        for file in (f"{place}/{one}" for one in (CONFIG_FILE, WEIGHTS_FILE, *TEMPLATE_FILES))
    )
