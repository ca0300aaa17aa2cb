"""The two exchanges with the Hugging Face Hub that we need, with limits on time and size.

The Hub library's own download keeps trying for minutes, with timeouts fixed when it is imported; here a request waits
for the answer, so every exchange has the caller's timeout, a bounded number of tries, and an overall deadline. The
session, headers, URLs and model listing are the library's. Messages never hold headers or tokens.
"""

from __future__ import annotations

import logging
import os
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn, TypeVar

from huggingface_hub import HfApi, hf_hub_url
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

# The base of every transport error of whichever HTTP library the installed Hub library is built on.
from huggingface_hub.errors import HTTPError as TransportError  # pyright: ignore[reportPrivateImportUsage]
from huggingface_hub.utils import build_hf_headers, get_session

from adapter_store.checkpoint_files import PICKLE_FILE, PICKLE_REMEDY, check_size
from adapter_store.digest import CONFIG_FILE, WEIGHTS_FILE, content_digest
from adapter_store.errors import AdapterError, AdapterNotFound, AdapterRefused, AdapterUnavailable
from adapter_store.settings import StoreSettings
from adapter_store.source import AdapterRef

_log = logging.getLogger(__name__)
T = TypeVar("T")

_PASSING_STATUS = frozenset({408, 409, 425, 429, 500, 502, 503, 504})
_CLOSED_STATUS = frozenset({401, 403, 404, 410})
_FIRST_PAUSE_S = 0.2
_LONGEST_PAUSE_S = 5.0
_CHUNK_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class HubListing:
    """What the Hub says about a repository at one commit.

    digest: the content digest, None when the Hub does not list the weights' sha256. weights_bytes: None when unknown.
    """

    commit: str
    digest: str | None
    weights_bytes: int | None


class HubClient:
    """Thread-safe. The token is read from the environment at each exchange, so it can be rotated, and kept nowhere."""

    def __init__(self, settings: StoreSettings) -> None:
        self._settings = settings

    def listing(self, name: str, ref: AdapterRef) -> HubListing:
        """What ``ref`` is now. Raises AdapterNotFound, AdapterRefused (no adapter in it) or AdapterUnavailable."""
        api = HfApi(endpoint=self._settings.hub_endpoint, token=self._token())
        info = self._retrying(
            name,
            ref,
            lambda: api.model_info(
                ref.id, revision=ref.revision, files_metadata=True, timeout=self._settings.hub_timeout_s
            ),
        )
        files = {sibling.rfilename: sibling for sibling in info.siblings or []}
        if CONFIG_FILE not in files:
            raise AdapterRefused(name, f"the repository {ref.id!r} has no {CONFIG_FILE}, so it is no PEFT adapter")
        if WEIGHTS_FILE not in files:
            pickle = PICKLE_FILE in files
            raise AdapterRefused(name, PICKLE_REMEDY if pickle else f"the repository {ref.id!r} has no {WEIGHTS_FILE}")
        config, weights = files[CONFIG_FILE], files[WEIGHTS_FILE]
        if not info.sha:
            raise AdapterUnavailable(name, f"the Hub named no commit for {ref}")
        digest = None
        if config.blob_id and config.lfs is None and weights.lfs is not None:
            digest = content_digest(config.blob_id, weights.lfs.sha256)
        return HubListing(info.sha, digest, weights.size)

    def download(self, name: str, ref: AdapterRef, file: str, target: Path, limit: int | None) -> None:
        """Write one file of a pinned reference to ``target``.

        Raises what ``listing`` raises, and AdapterRefused when the file is larger than ``limit`` bytes.
        """
        assert ref.pinned
        deadline = time.monotonic() + self._settings.hub_download_timeout_s
        self._retrying(name, ref, lambda: self._download_once(name, ref, file, target, limit, deadline), deadline)

    def _download_once(
        self, name: str, ref: AdapterRef, file: str, target: Path, limit: int | None, deadline: float
    ) -> None:
        url = hf_hub_url(ref.id, file, revision=ref.revision, endpoint=self._settings.hub_endpoint)
        headers = build_hf_headers(token=self._token(), library_name="lorafleet")
        # Redirects to a content network are followed without the authorization header (the session sees to it).
        with get_session().stream("GET", url, headers=headers, timeout=self._settings.hub_timeout_s) as response:
            if response.status_code != 200:
                self._raise_for_status(name, ref, response.status_code, response.headers.get("Retry-After"))
            check_size(name, file, int(response.headers.get("Content-Length") or 0), limit)
            size = 0
            with target.open("wb") as out:
                for chunk in response.iter_bytes(_CHUNK_BYTES):
                    size += len(chunk)
                    check_size(name, file, size, limit)
                    out.write(chunk)
                    if time.monotonic() > deadline:
                        limit_s = self._settings.hub_download_timeout_s
                        raise AdapterUnavailable(name, f"{file} of {ref} did not arrive within {limit_s:g} s")

    def _token(self) -> str | bool:
        # False keeps the library from sending a token saved on this machine for something else.
        return os.environ.get(self._settings.hub_token_env) or False

    def _retrying(self, name: str, ref: AdapterRef, work: Callable[[], T], deadline: float | None = None) -> T:
        """``work``'s result, trying again after failures that may pass."""
        pause = _FIRST_PAUSE_S
        for attempt in range(self._settings.hub_retries + 1):
            try:
                return work()
            except _Passing as passing:
                failure, asked_pause = passing.failure, passing.retry_after_s
            except HfHubHTTPError as error:
                try:
                    status = error.response.status_code
                    self._raise_for_status(name, ref, status, error.response.headers.get("Retry-After"))
                except _Passing as passing:
                    failure, asked_pause = passing.failure, passing.retry_after_s
            except OfflineModeIsEnabled:
                raise AdapterUnavailable(name, f"{ref} is not on this machine and HF_HUB_OFFLINE is set") from None
            except TransportError as error:  # timeouts, refused or broken connections, broken answers
                failure = AdapterUnavailable(name, f"the Hub could not be reached for {ref} ({type(error).__name__})")
                asked_pause = 0.0
            except OSError as error:
                raise AdapterUnavailable(name, f"{ref} cannot be stored: {error.strerror or error}") from None
            wait = min(max(asked_pause, pause * random.uniform(0.5, 1.0)), _LONGEST_PAUSE_S)  # noqa: S311 - jitter
            last = attempt == self._settings.hub_retries
            if last or (deadline is not None and time.monotonic() + wait > deadline):
                raise failure from None
            _log.info("%s; trying again in %.1f s", failure.reason, wait)
            time.sleep(wait)
            pause *= 2
        raise AssertionError("the loop returns or raises")

    def _raise_for_status(self, name: str, ref: AdapterRef, status: int, retry_after: str | None) -> NoReturn:
        if status in _CLOSED_STATUS:
            raise AdapterNotFound(
                name,
                f"the Hub has no {ref} that this server may read (HTTP {status}); check the spelling, and for a "
                f"private or gated repository set the environment variable {self._settings.hub_token_env} to a token "
                "with access",
            ) from None
        failure = AdapterUnavailable(name, f"the Hub answered HTTP {status} for {ref}")
        if status not in _PASSING_STATUS:
            raise failure from None
        seconds = float(retry_after) if retry_after is not None and retry_after.strip().isdigit() else 0.0
        raise _Passing(failure, seconds) from None


class _Passing(Exception):
    """A failure that may pass."""

    def __init__(self, failure: AdapterError, retry_after_s: float) -> None:
        super().__init__(failure.reason)
        self.failure = failure
        self.retry_after_s = retry_after_s
