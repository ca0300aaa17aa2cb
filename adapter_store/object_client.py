"""Object stores (``s3://``, ``gs://``, and whatever else fsspec can reach), with limits on time, tries and size.

Each kind of store needs its own package, installed by an extra of ours and imported when the first reference names it.
"""

from __future__ import annotations

import hashlib
import logging
import os
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from adapter_store.checkpoint_files import MAX_CONFIG_BYTES, PICKLE_FILE, PICKLE_REMEDY, check_size
from adapter_store.digest import CONFIG_FILE, WEIGHTS_FILE
from adapter_store.errors import AdapterError, AdapterNotFound, AdapterRefused, AdapterUnavailable
from adapter_store.object_calls import Call, Info, answers, file_info, returned
from adapter_store.progress import Progress
from adapter_store.remote import Listing, state_key
from adapter_store.retrying import Passing, keep_trying
from adapter_store.schemes import EXTRAS, package_remedy, scheme_mistake
from adapter_store.settings import StoreSettings
from adapter_store.source import AdapterRef, TemplateFile
from adapter_store.template_files import TEMPLATE_FILES

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem
    from fsspec.callbacks import Callback

T = TypeVar("T")
_INFOS = (Call("info", CONFIG_FILE), Call("info", WEIGHTS_FILE))

# What tells one state of an object from the next, as file systems call it; times where nothing better is there.
_STRONG = (
    "VersionId",
    "version_id",
    "generation",
    "ETag",
    "etag",
    "e_tag",
    "md5Hash",
    "content_md5",
    "sha256",
    "checksum",
)
_WEAK = ("LastModified", "last_modified", "updated", "mtime", "modified", "created")
# At their debug level these write whole requests, session tokens included, to the log.
_TALKATIVE = ("botocore", "aiobotocore", "s3fs", "gcsfs", "google.auth", "adlfs", "azure")
# Failures that the next try has too; by name, for they belong to packages that may not be installed.
_LASTING = frozenset(
    {"NoCredentialsError", "PartialCredentialsError", "CredentialRetrievalError", "ParamValidationError"}
)


class ObjectClient:
    """A ``RemoteClient``. Credentials are read from the environment at each exchange, and are in no message.

    An object store does not say what content it has, so the content's digest pins an adapter: whoever names
    ``s3://bucket/prefix@<digest>`` gets that or nothing. What the store does say (version, ETag, time) tells when the
    objects changed.
    """

    immutable = False  # the objects of a prefix may be replaced

    def __init__(self, settings: StoreSettings) -> None:
        self._settings = settings
        self._lock = threading.Lock()
        self._open: dict[tuple[str, str], tuple[bytes, AbstractFileSystem]] = {}

    def listing(self, name: str, ref: AdapterRef, retries: int | None = None) -> Listing:
        """See ``RemoteClient``. Three exchanges at the same time, none of them long."""

        def once() -> Listing:
            *files, listed = self._ask(ref, *_INFOS, Call("ls", "", options={"detail": True}))
            return replace(self._listing(name, ref, *files), template=self._template(ref, listed))

        return self._exchange(name, ref, once, retries)

    def is_lent(self, ref: AdapterRef) -> bool:
        """Never: object stores know this server only."""
        del ref
        return False

    def pin(self, listing: Listing, digest: str) -> AdapterRef:
        """Its content."""
        return AdapterRef(listing.ref.source, listing.ref.id, digest)

    def download(self, name: str, ref: AdapterRef, folder: Path, limit: int) -> str | None:
        """See ``RemoteClient``. Begins anew when an object is replaced meanwhile."""
        deadline = time.monotonic() + self._settings.limits(ref).download_timeout_s

        def once() -> str | None:
            before = self._list(name, ref)
            check_size(name, WEIGHTS_FILE, before.weights_bytes or 0, limit)
            self._get_both(ref, folder, before.weights_bytes, max(deadline - time.monotonic(), 0.01))
            for file, most in ((CONFIG_FILE, MAX_CONFIG_BYTES), (WEIGHTS_FILE, limit)):
                check_size(name, file, (folder / file).stat().st_size, most)
            size = (folder / WEIGHTS_FILE).stat().st_size
            if self._list(name, ref) != before or before.weights_bytes not in {None, size}:
                raise Passing(AdapterUnavailable(name, f"{ref.unpinned} was being replaced while it was read"))
            return before.state

        return self._exchange(name, ref, once, None, deadline)

    def read(self, name: str, ref: AdapterRef, file: str, limit: int) -> bytes:
        """See ``RemoteClient``."""

        def once() -> bytes:
            (info,) = map(file_info, self._ask(ref, Call("info", file)))
            check_size(name, file, int((info or {}).get("size") or 0), limit)
            return returned(self._ask(ref, Call("cat_file", file)))[0]

        return self._exchange(name, ref, once, None)

    def _get_both(self, ref: AdapterRef, folder: Path, weights_bytes: int | None, timeout_s: float) -> None:
        with Progress(f"fetching {WEIGHTS_FILE} of {ref.unpinned}", weights_bytes) as progress:
            config = Call("get_file", CONFIG_FILE, (str(folder / CONFIG_FILE),))
            moved = {"callback": _told(progress)}
            weights = Call("get_file", WEIGHTS_FILE, (str(folder / WEIGHTS_FILE),), moved)
            returned(self._ask(ref, config, weights, timeout_s=timeout_s))

    def _template(self, ref: AdapterRef, listed: Any) -> TemplateFile | None:
        there = self._beside(ref, listed)
        for file in TEMPLATE_FILES:
            if file in there:  # read at each look where the store says nothing that could tell
                return TemplateFile(file, state_key(_state(there[file]) or f"looked at {time.time()}"))
        return None

    def _beside(self, ref: AdapterRef, listed: Any) -> dict[str, Info]:
        """The files at ``ref`` by name. ``listed``: the answer to ``ls``, one exchange where asking for a file that is
        not there would be two; but not everybody may list."""
        if not isinstance(listed, PermissionError):
            (infos,) = returned([listed])
            return {info["name"].rpartition("/")[2]: info for info in infos if info.get("type") == "file"}
        asked = zip(TEMPLATE_FILES, self._ask(ref, *(Call("info", file) for file in TEMPLATE_FILES)), strict=True)
        # Who may not list is refused what is not there.
        found = {file: file_info(answer) for file, answer in asked if not isinstance(answer, PermissionError)}
        return {file: info for file, info in found.items() if info is not None}

    def _list(self, name: str, ref: AdapterRef) -> Listing:
        return self._listing(name, ref, *self._ask(ref, *_INFOS))

    def _listing(self, name: str, ref: AdapterRef, *infos: Any) -> Listing:
        """From the answers to ``_INFOS``."""
        config, weights = map(file_info, infos)
        if config is None:
            raise AdapterNotFound(name, f"there is no {CONFIG_FILE} at {ref.unpinned} that this server may read")
        check_size(name, CONFIG_FILE, int(config.get("size") or 0), MAX_CONFIG_BYTES)
        if weights is None:
            (pickle,) = map(file_info, self._ask(ref, Call("info", PICKLE_FILE)))
            what = f"there is no {WEIGHTS_FILE} at {ref.unpinned}" if pickle is None else PICKLE_REMEDY
            raise AdapterRefused(name, what)
        states = [_state(config), _state(weights)]
        state = None if None in states else state_key(str(ref.unpinned), *map(str, states))
        return Listing(ref.unpinned, state, None, weights.get("size"))

    def _ask(self, ref: AdapterRef, *calls: Call, timeout_s: float | None = None) -> list[Any]:
        """Answers, or exceptions, of calls on the adapter's files."""
        timeout_s = self._settings.limits(ref).timeout_s if timeout_s is None else timeout_s
        return answers(self._system(ref), str(ref.unpinned), calls, timeout_s)

    def _system(self, ref: AdapterRef) -> AbstractFileSystem:
        """The file system for ``ref``, opened anew when a credential in the environment was replaced."""
        source = self._settings.source(ref)
        secrets: dict[str, str] = {}
        for option, variable in source.env.items():
            value = os.environ.get(variable)
            if not value:
                raise _NoCredential(f"the environment variable {variable}, which holds its {option!r}, is not set")
            secrets[option] = value
        stamp = hashlib.sha256(repr(sorted(secrets.items())).encode()).digest()
        key = (ref.source, self._settings.source_key(ref))
        with self._lock:
            known = self._open.get(key)
            if known is None or known[0] != stamp:
                options = {**_defaults(ref.source, self._settings.limits(ref).timeout_s), **source.options, **secrets}
                known = self._open[key] = (stamp, _open(ref.source, options))
        return known[1]

    def _exchange(
        self, name: str, ref: AdapterRef, work: Callable[[], T], retries: int | None, deadline: float | None = None
    ) -> T:
        """``work``'s result, with whatever the file system raises as ours, and further tries after what may pass."""

        def once() -> T:
            try:
                return work()
            except (AdapterError, Passing):
                raise
            except Exception as error:  # the packages have their own; none of their texts is repeated
                _translate(name, ref, error)

        return keep_trying(once, self._settings.limits(ref).retries if retries is None else retries, deadline)


class _NoCredential(Exception):
    pass


def _translate(name: str, ref: AdapterRef, error: Exception) -> NoReturn:
    place, kind = ref.unpinned, type(error).__name__
    if isinstance(error, PermissionError | FileNotFoundError):
        raise AdapterNotFound(
            name,
            f"there is nothing at {place} that this server may read; check the spelling, and that the credentials that "
            "store.sources names for it give access",
        ) from None
    if isinstance(error, ImportError):
        raise AdapterRefused(name, f"{place} cannot be read on this machine: {package_remedy(ref.source)}") from None
    if isinstance(error, ValueError) and (mistake := scheme_mistake(ref.source)) is not None:
        raise AdapterRefused(name, mistake) from None
    if isinstance(error, _NoCredential):
        raise AdapterUnavailable(name, f"{place} cannot be read: {error}") from None
    failure = AdapterUnavailable(name, f"{place} could not be read ({kind})")
    if kind in _LASTING or isinstance(error, ValueError | TypeError):
        raise failure from None
    raise Passing(failure) from None


def _told(progress: Progress) -> Callback:
    """What file systems call as bytes arrive."""
    from fsspec.callbacks import Callback  # noqa: PLC0415 - with the store's package, an extra

    done = 0

    def moved(size: int | None, value: int, **_: Any) -> None:
        nonlocal done
        progress.advance(value - done)
        done = value

    return Callback(hooks={"progress": moved})


def _state(info: Info) -> str | None:
    """What the store says of an object, as far as it changes with the content."""
    for names in (_STRONG, _WEAK):
        said = [f"{name}={info[name]}" for name in names if info.get(name)]
        if said:
            return f"size={info.get('size')} " + " ".join(said)
    return None


def _defaults(scheme: str, timeout_s: float) -> dict[str, Any]:
    """One try an exchange, for we try again ourselves, and an end to silence."""
    if EXTRAS.get(scheme) == "s3":
        retries = {"max_attempts": 0}
        limits = {"connect_timeout": timeout_s, "read_timeout": timeout_s, "retries": retries}
        return {"config_kwargs": limits | {"max_pool_connections": 64}}
    return {"requests_timeout": timeout_s} if EXTRAS.get(scheme) == "gs" else {}


def _open(scheme: str, options: Mapping[str, Any]) -> AbstractFileSystem:
    import fsspec  # noqa: PLC0415 - with the store's package, an extra

    for name in _TALKATIVE:
        logger = logging.getLogger(name)
        logger.setLevel(max(logger.level, logging.INFO))
    # Instances and listings are otherwise kept by the package, credentials and stale states with them.
    system = fsspec.filesystem(scheme, **options, skip_instance_cache=True, use_listings_cache=False)
    if hasattr(system, "retries"):
        system.retries = 1
    return system
