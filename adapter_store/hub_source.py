"""Adapters in repositories of the Hugging Face Hub, kept on disk once downloaded."""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict
from dataclasses import dataclass, replace

from adapter_store.checkpoint_files import MAX_CONFIG_BYTES, CheckpointFiles, check_size
from adapter_store.digest import CONFIG_FILE, WEIGHTS_FILE
from adapter_store.disk_cache import DiskCache
from adapter_store.errors import AdapterError, AdapterUnavailable
from adapter_store.hub_client import HubClient, HubListing
from adapter_store.load_stats import LoadMeter, SourceStats
from adapter_store.settings import StoreSettings
from adapter_store.single_flight import SingleFlight
from adapter_store.source import AdapterRef, ResolvedAdapter

_log = logging.getLogger(__name__)
_MAX_REMEMBERED = 16_384  # references; a few hundred bytes each


@dataclass(frozen=True, slots=True)
class _Answer:
    """What a reference meant when it was last looked up, valid until ``until`` (monotonic seconds)."""

    until: float
    found: tuple[AdapterRef, str] | None  # pinned reference and digest
    error: AdapterError | None = None


class HubSource:
    """The Hub. Thread-safe; look-ups of one reference and downloads of one content are shared by their callers.

    A branch or tag is asked about at most once per ``hub_refresh_s``, a commit once. What failed is remembered for
    ``negative_ttl_s``. When the Hub cannot be reached, the last known commit of a branch goes on being served.
    """

    def __init__(self, settings: StoreSettings) -> None:
        self._settings = settings
        self._client = HubClient(settings)
        self._disk = DiskCache(settings.path(settings.cache_dir) / "hub", settings.cache_bytes)
        self._lock = threading.Lock()
        self._answers: OrderedDict[AdapterRef, _Answer] = OrderedDict()
        self._downloading = LoadMeter()
        self._hits = self._misses = self._repeated = 0
        self._lookups: SingleFlight[tuple[AdapterRef, str]] = SingleFlight()
        self._downloads: SingleFlight[str] = SingleFlight()

    def resolve(self, name: str, ref: AdapterRef) -> ResolvedAdapter:
        """The commit and digest that ``ref`` means now; the Hub lists both, so nothing is downloaded for it.

        Raises AdapterNotFound (missing, private or gated), AdapterRefused (no adapter in the repository) or
        AdapterUnavailable (no answer in time).
        """
        with self._lock:
            answer = self._answers.get(ref)
        if answer is None or answer.until <= time.monotonic():
            try:
                pinned, digest = self._lookups.run(ref, lambda: self._look_up(name, ref, answer))
            except AdapterError as error:  # a follower shares the failure, not the other caller's name
                raise error.named(name) from None
        elif answer.error is not None:
            with self._lock:
                self._repeated += 1
            raise answer.error.named(name)
        else:
            assert answer.found is not None
            pinned, digest = answer.found
        return ResolvedAdapter(name, pinned, digest)

    def fetch(self, resolved: ResolvedAdapter, max_weights_bytes: int | None = None) -> CheckpointFiles:
        """The files, from disk or downloaded, verified against the digest.

        Raises what ``resolve`` raises; AdapterUnavailable also when the Hub sends other content than was resolved.
        """
        files = self._disk.read(resolved.digest, resolved.name, max_weights_bytes)
        with self._lock:
            self._hits += files is not None
            self._misses += files is None
        if files is not None:
            return files
        self._download(resolved.name, resolved.ref, max_weights_bytes, resolved.digest)
        files = self._disk.read(resolved.digest, resolved.name, max_weights_bytes)
        if files is None:
            raise AdapterUnavailable(resolved.name, "it left the disk cache while it was read; enlarge cache_bytes")
        return files

    def at_hand(self, digest: str | None) -> bool:
        """Whether the content was downloaded before; unknown content was not."""
        return digest is not None and self._disk.holds(digest)

    def forget(self, ref: AdapterRef) -> None:
        """Have the Hub asked about the reference at its next ``resolve``; a commit means the same for ever."""
        with self._lock:
            answer = self._answers.get(ref)
            if answer is not None and (answer.error is not None or not ref.pinned):
                self._answers[ref] = replace(answer, until=0.0)

    def stats(self) -> SourceStats:
        """Downloads, the disk cache, and the failures that are remembered."""
        now = time.monotonic()
        with self._lock:
            failures = sum(answer.error is not None and answer.until > now for answer in self._answers.values())
        return SourceStats(
            self._downloading.totals, self._disk.reading.totals, self._hits, self._misses, failures, self._repeated
        )

    def close(self) -> None:
        """Nothing is held open: connections belong to the Hub library's session."""

    def _look_up(self, name: str, ref: AdapterRef, last: _Answer | None) -> tuple[AdapterRef, str]:
        try:
            found = self._ask(name, ref)
        except AdapterUnavailable as error:
            if last is None or last.found is None:
                self._remember(ref, _Answer(time.monotonic() + self._settings.negative_ttl_s, None, error.named(name)))
                raise
            _log.warning("%s; %s stays at %s meanwhile", error.reason, ref, last.found[0].revision)
            self._remember(ref, replace(last, until=time.monotonic() + self._settings.negative_ttl_s))
            return last.found
        except AdapterError as error:
            self._remember(ref, _Answer(time.monotonic() + self._settings.negative_ttl_s, None, error.named(name)))
            raise
        lasting = float("inf") if ref.pinned else time.monotonic() + self._settings.hub_refresh_s
        self._remember(ref, _Answer(lasting, found))
        return found

    def _ask(self, name: str, ref: AdapterRef) -> tuple[AdapterRef, str]:
        if ref.pinned:
            digest = self._disk.known_digest(_commit_key(ref))
            if digest is not None:
                return ref, digest
        listing = self._client.listing(name, ref)
        pinned = AdapterRef("hub", ref.id, listing.commit)
        return pinned, listing.digest or self._digest_by_download(name, pinned, listing)

    def _digest_by_download(self, name: str, pinned: AdapterRef, listing: HubListing) -> str:
        """Some servers that speak the Hub's API do not list hashes: then only the content tells."""
        known = self._disk.known_digest(_commit_key(pinned))
        if known is not None:
            return known
        check_size(name, WEIGHTS_FILE, listing.weights_bytes or 0, self._settings.hub_max_bytes)
        return self._download(name, pinned, None, None)

    def _download(self, name: str, pinned: AdapterRef, max_weights_bytes: int | None, expected: str | None) -> str:
        limit = min(max_weights_bytes or self._settings.hub_max_bytes, self._settings.hub_max_bytes)
        return self._downloads.run((pinned, limit), lambda: self._download_both(name, pinned, limit, expected))

    def _download_both(self, name: str, pinned: AdapterRef, limit: int, expected: str | None) -> str:
        started = time.monotonic()
        try:
            with self._downloading.measure() as work, self._disk.scratch() as folder:
                self._client.download(name, pinned, CONFIG_FILE, folder / CONFIG_FILE, MAX_CONFIG_BYTES)
                self._client.download(name, pinned, WEIGHTS_FILE, folder / WEIGHTS_FILE, limit)
                files = CheckpointFiles.read(folder, name, limit)
                digest, work.bytes = files.digest(), files.nbytes
                if expected is not None and digest != expected:
                    raise AdapterUnavailable(
                        name, f"what the Hub sent for {pinned} is not the content {expected[:12]}; try again"
                    )
                self._disk.adopt(digest, folder)
                self._disk.remember_digest(_commit_key(pinned), digest)
        except OSError as error:
            raise AdapterUnavailable(name, f"it cannot be kept in cache_dir: {error.strerror or error}") from error
        _log.info("fetched %s (%d bytes) in %.1f s", pinned, files.weights.numel(), time.monotonic() - started)
        return digest

    def _remember(self, ref: AdapterRef, answer: _Answer) -> None:
        with self._lock:
            self._answers[ref] = answer
            self._answers.move_to_end(ref)
            while len(self._answers) > _MAX_REMEMBERED:
                self._answers.popitem(last=False)


def _commit_key(pinned: AdapterRef) -> str:
    return f"{pinned.id.replace('/', '--')}--{pinned.revision}"
