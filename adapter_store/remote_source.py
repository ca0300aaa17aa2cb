"""Adapters on a network, kept on disk once downloaded."""

from __future__ import annotations

import contextlib
import json
import logging
import threading
import time
from collections import OrderedDict
from dataclasses import dataclass, replace
from pathlib import Path

from adapter_store.checkpoint_files import CheckpointFiles, Meanwhile, check_size
from adapter_store.digest import WEIGHTS_FILE
from adapter_store.disk_cache import DiskCache
from adapter_store.errors import AdapterChanged, AdapterError, AdapterNotFound, AdapterRefused, AdapterUnavailable
from adapter_store.failures import RecentFailures
from adapter_store.load_stats import LoadMeter, SourceStats
from adapter_store.remote import Listing, RemoteClient, state_key
from adapter_store.settings import StoreSettings
from adapter_store.single_flight import SingleFlight
from adapter_store.source import AdapterRef, ResolvedAdapter, TemplateFile
from adapter_store.template_files import TEMPLATE_FILES, Templates, templates_in

_log = logging.getLogger(__name__)
_MAX_REMEMBERED = 16_384  # references; a few hundred bytes each


@dataclass(frozen=True, slots=True)
class _Answer:
    """What a reference was when it was last looked up, taken as valid until ``until`` (monotonic seconds)."""

    until: float
    pinned: AdapterRef
    digest: str
    template: TemplateFile | None

    def named(self, name: str) -> ResolvedAdapter:
        return ResolvedAdapter(name, self.pinned, self.digest, self.template)


class RemoteSource:
    """Servers of one kind. Thread-safe; look-ups of one reference and downloads of one content are shared.

    A server is asked about a reference at most once per ``refresh_s``, also about one that is pinned and on this
    machine, so that access which was taken away ends. What failed is remembered for ``negative_ttl_s``. While the
    server cannot be reached, what is known of a reference goes on being served. One process of this machine at a time
    downloads an adapter; the others wait for it.
    """

    def __init__(self, settings: StoreSettings, client: RemoteClient, disk: DiskCache) -> None:
        self._settings = settings
        self._client = client
        self._disk = disk
        self._lock = threading.Lock()
        self._answers: OrderedDict[AdapterRef, _Answer] = OrderedDict()
        self._failures = RecentFailures(settings.negative_ttl_s)
        self._lookups: SingleFlight[_Answer] = SingleFlight()
        self._downloads: SingleFlight[tuple[str, CheckpointFiles]] = SingleFlight()
        self._downloading = LoadMeter()
        self._hits = self._misses = 0

    def resolve(self, name: str, ref: AdapterRef) -> ResolvedAdapter:
        """The content that ``ref`` means now. Downloads it only where the server does not say which that is.

        Raises AdapterNotFound (missing or closed), AdapterRefused (no adapter there) or AdapterUnavailable.
        """
        recalled = self.recall(name, ref)
        if recalled is not None:
            return recalled
        try:
            return self._lookups.run(ref, lambda: self._look_up(name, ref)).named(name)
        except AdapterError as error:  # a follower shares the failure, not the other caller's name
            raise error.named(name) from None

    def prove(self, name: str, ref: AdapterRef) -> ResolvedAdapter:
        """What the server shows of ``ref`` now, to whoever this thread asks for (see ``HubTokens``). What others were
        told counts for nothing, and a failure is not remembered. Raises as ``resolve`` does."""
        listing = self._client.listing(name, ref)
        digest = self._digest(name, ref, listing)
        return ResolvedAdapter(name, self._client.pin(listing, digest), digest, listing.template)

    def recall(self, name: str, ref: AdapterRef) -> ResolvedAdapter | None:
        """What the server last said, as long as that counts, and while somebody else waits for the next word."""
        now = time.monotonic()
        with self._lock:
            answer = self._answers.get(ref)
        if answer is not None and answer.until <= now:
            late = now - answer.until > self._settings.limits(ref).refresh_s
            answer = None if late or not self._lookups.running(ref) else answer
        if answer is not None:
            return answer.named(name)
        self._failures.check(ref, name)
        return None

    def fetch(
        self, resolved: ResolvedAdapter, max_weights_bytes: int | None = None, meanwhile: Meanwhile | None = None
    ) -> CheckpointFiles:
        """The files, from disk or downloaded, verified against the digest.

        Raises what ``resolve`` raises. Content that is not the resolved one is fetched once more; then it is
        AdapterChanged, or AdapterRefused where a pinned reference can have one content only.
        """
        files = self._disk.read(resolved.digest, resolved.name, max_weights_bytes, meanwhile)
        with self._lock:
            self._hits += files is not None
            self._misses += files is None
        if files is not None:
            return files
        limit = min(max_weights_bytes or self._max_bytes(resolved.ref), self._max_bytes(resolved.ref))
        lent = self._client.is_lent(resolved.ref)
        if not lent:
            self._failures.check(resolved.ref, resolved.name)
        try:
            return self._download(resolved.name, resolved.ref, None, limit, resolved.digest)[1]
        except (AdapterUnavailable, AdapterNotFound) as error:  # a refusal may depend on who asks: see its limit
            if not lent:
                self._failures.add(resolved.ref, error)
            raise error.named(resolved.name) from None

    def templates(self, resolved: ResolvedAdapter) -> Templates:
        """From the server, once for each state on this machine."""
        where = resolved.template
        assert where is not None
        state = state_key(str(resolved.ref), where.file, where.version)
        with contextlib.suppress(ValueError):
            if known := self._disk.known_note(state):
                return json.loads(known)
        data = self._client.read(resolved.name, resolved.ref, where.file, TEMPLATE_FILES[where.file])
        templates = templates_in(resolved.name, where.file, data)
        with contextlib.suppress(OSError):
            self._disk.remember_note(state, json.dumps(templates))
        return templates

    def at_hand(self, ref: AdapterRef, digest: str | None) -> bool:
        """Whether the content was downloaded before, or could not be a moment ago; unknown content was not."""
        return (digest is not None and self._disk.holds(digest)) or self._failures.holds(ref)

    def forget(self, ref: AdapterRef) -> None:
        """Have the server asked about the reference at its next ``resolve``."""
        self._failures.forget(ref)
        with self._lock:
            answer = self._answers.get(ref)
            if answer is not None:
                self._failures.forget(answer.pinned)
                self._answers[ref] = replace(answer, until=0.0)

    def stats(self) -> SourceStats:
        """Downloads, look-ups in the disk cache, and failures. Reading the disk is the disk cache's own number."""
        return SourceStats(
            download=self._downloading.totals,
            disk_hits=self._hits,
            disk_misses=self._misses,
            remembered_failures=len(self._failures),
            failures_repeated=self._failures.repeated,
        )

    def close(self) -> None:
        """Nothing is held open: connections belong to the protocol's library."""

    def _look_up(self, name: str, ref: AdapterRef) -> _Answer:
        with self._lock:
            known = self._answers.get(ref)
        known = known or self._known_before(ref)
        try:
            # Who has an answer waits for one try only: it goes on being served meanwhile.
            listing = self._client.listing(name, ref, retries=None if known is None else 0)
            digest = self._digest(name, ref, listing)
        except AdapterUnavailable as error:
            if known is None:
                self._failures.add(ref, error)
                raise
            _log.warning("%s; what is known of it is served meanwhile", error.reason)
            return self._remember(ref, replace(known, until=time.monotonic() + self._settings.negative_ttl_s))
        except AdapterError as error:
            self._failures.add(ref, error)
            self._close(ref, known)
            raise
        pinned = self._client.pin(listing, digest)
        if ref == pinned:
            self._note(ref, digest, listing.template)
        until = time.monotonic() + self._settings.limits(ref).refresh_s
        return self._remember(ref, _Answer(until, pinned, digest, listing.template))

    def _known_before(self, ref: AdapterRef) -> _Answer | None:
        """What an earlier run left of a pinned reference on this machine."""
        digest = self._disk.known_digest(state_key(str(ref))) if ref.pinned else None
        noted = self._disk.known_note(state_key(str(ref), "template"))
        if digest is None or noted is None or not self._disk.holds(digest):
            return None
        file, _, version = noted.partition(" ")
        return _Answer(0.0, ref, digest, TemplateFile(file, version) if file in TEMPLATE_FILES else None)

    def _note(self, ref: AdapterRef, digest: str, template: TemplateFile | None) -> None:
        """For a later run that finds the server down; only that would miss it."""
        where = "none" if template is None else f"{template.file} {template.version}"
        for state, note in ((state_key(str(ref)), digest), (state_key(str(ref), "template"), where)):
            if self._disk.known_note(state) != note:
                with contextlib.suppress(OSError):
                    self._disk.remember_note(state, note)

    def _close(self, ref: AdapterRef, known: _Answer | None) -> None:
        """Forget what could be served of the reference: an outage must not open it again."""
        with self._lock:
            self._answers.pop(ref, None)
        for gone in {ref} if known is None else {ref, known.pinned}:
            if gone.pinned:
                self._disk.forget_digest(state_key(str(gone)))

    def _digest(self, name: str, ref: AdapterRef, listing: Listing) -> str:
        """Which content a listing is of."""
        found = listing.digest or (listing.state and self._disk.known_digest(listing.state))
        if ref.digest is not None:
            if found not in {None, ref.digest} and not self._disk.holds(ref.digest):
                raise AdapterRefused(name, f"what is at {ref.unpinned} now is {found}, not the content it is pinned to")
            return ref.digest
        if found:
            return found
        limit = self._max_bytes(ref)
        check_size(name, WEIGHTS_FILE, listing.weights_bytes or 0, limit)
        return self._download(name, listing.ref, listing.state, limit, None)[0]

    def _download(
        self, name: str, ref: AdapterRef, state: str | None, limit: int, expected: str | None
    ) -> tuple[str, CheckpointFiles]:
        key = expected or state or state_key(str(ref))
        return self._downloads.run((key, limit), lambda: self._bring(name, ref, key, state, limit, expected))

    def _bring(
        self, name: str, ref: AdapterRef, key: str, state: str | None, limit: int, expected: str | None
    ) -> tuple[str, CheckpointFiles]:
        wait_s = self._settings.limits(ref).download_timeout_s
        try:
            with self._disk.exclusive(key, wait_s) as folder:
                digest = expected or (state and self._disk.known_digest(state))
                files = self._disk.read(digest, name, limit) if digest else None
                if digest and files is not None:  # another process was faster
                    return digest, files
                state, digest, files = self._transfer(name, ref, folder, limit)
                if expected is not None and digest != expected:
                    _log.warning("what came for %s is not the content %s; fetching it again", ref, expected[:12])
                    state, digest, files = self._transfer(name, ref, folder, limit)
                if state is not None:
                    self._disk.remember_digest(state, digest)
                if expected is not None and digest != expected:
                    raise self._other_content(name, ref, digest, expected)
                self._disk.adopt(digest, folder)
                return digest, files
        except TimeoutError:
            raise AdapterUnavailable(
                name, f"another process of this machine has been fetching it for {wait_s:g} s; try again later"
            ) from None
        except OSError as error:
            raise AdapterUnavailable(name, f"it cannot be kept in cache_dir: {error.strerror or error}") from error

    def _transfer(
        self, name: str, ref: AdapterRef, folder: Path, limit: int
    ) -> tuple[str | None, str, CheckpointFiles]:
        with self._downloading.measure() as work:
            started = time.monotonic()
            state = self._client.download(name, ref, folder, limit)
            files = CheckpointFiles.read(folder, name, limit)
            digest, work.bytes = files.digest(), files.nbytes
        _log.info("fetched %s (%d bytes) in %.1f s", ref, files.nbytes, time.monotonic() - started)
        return state, digest, files

    def _other_content(self, name: str, ref: AdapterRef, digest: str, expected: str) -> AdapterError:
        if self._client.immutable:
            return AdapterRefused(
                name,
                f"what comes for {ref} is {digest[:12]}, not the content {expected[:12]} that is listed for it, twice "
                "now: publish it again",
            )
        return AdapterChanged(
            name, f"its content is now {digest[:12]}, not {expected[:12]}: it was published again in the same place"
        )

    def _remember(self, ref: AdapterRef, answer: _Answer) -> _Answer:
        with self._lock:
            self._answers[ref] = answer
            self._answers.move_to_end(ref)
            while len(self._answers) > _MAX_REMEMBERED:
                self._answers.popitem(last=False)
        return answer

    def _max_bytes(self, ref: AdapterRef) -> int:
        return self._settings.limits(ref).max_bytes
