"""The Hugging Face Hub's protocol: the two exchanges that we need, with limits on time and size.

The Hub library's own download keeps trying for minutes, with timeouts fixed when it is imported; here a request waits
for the answer, so every exchange has the caller's timeout, a bounded number of tries, and an overall deadline. The
session, headers, URLs and model listing are the library's. Messages never hold headers or tokens.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NoReturn, TypeVar

from huggingface_hub import HfApi, hf_hub_url
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

# The base of every transport error of whichever HTTP library the installed Hub library is built on.
from huggingface_hub.errors import HTTPError as TransportError  # pyright: ignore[reportPrivateImportUsage]
from huggingface_hub.utils import build_hf_headers, get_session

from adapter_store.checkpoint_files import MAX_CONFIG_BYTES, PICKLE_FILE, PICKLE_REMEDY, check_size
from adapter_store.digest import CONFIG_FILE, WEIGHTS_FILE, content_digest
from adapter_store.errors import AdapterNotFound, AdapterRefused, AdapterUnavailable
from adapter_store.hub_tokens import HubTokens
from adapter_store.progress import Progress
from adapter_store.remote import Listing, state_key
from adapter_store.retrying import Passing, keep_trying
from adapter_store.settings import StoreSettings
from adapter_store.source import AdapterRef, TemplateFile
from adapter_store.template_files import TEMPLATE_FILES

T = TypeVar("T")

_PASSING_STATUS = frozenset({408, 409, 425, 429, 500, 502, 503, 504})
_CLOSED_STATUS = frozenset({401, 403, 404, 410})
_CHUNK_BYTES = 1 << 20


class HubClient:
    """A ``RemoteClient``. tokens: whose token an exchange is made with."""

    immutable = True  # a commit has the same files for ever

    def __init__(self, settings: StoreSettings) -> None:
        self._settings = settings
        self.tokens = HubTokens(settings)

    def listing(self, name: str, ref: AdapterRef, retries: int | None = None) -> Listing:
        """See ``RemoteClient``. The Hub lists what the digest is made of, unless the files are not kept as usual."""
        api = HfApi(endpoint=self._settings.hub_endpoint, token=self.tokens.of(ref))
        timeout = self._settings.limits(ref).timeout_s
        info = self._exchange(
            name,
            ref,
            lambda: api.model_info(ref.id, revision=ref.revision, files_metadata=True, timeout=timeout),
            retries,
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
        pinned = AdapterRef("hub", ref.id, info.sha)
        template = next((file for file in TEMPLATE_FILES if file in files), None)
        return Listing(
            pinned,
            state_key(str(pinned)),
            digest,
            weights.size,
            None if template is None else TemplateFile(template, files[template].blob_id or info.sha),
        )

    def is_lent(self, ref: AdapterRef) -> bool:
        """See ``RemoteClient``."""
        return self.tokens.is_lent(ref)

    def pin(self, listing: Listing, digest: str) -> AdapterRef:
        """Its commit."""
        del digest
        return listing.ref

    def download(self, name: str, ref: AdapterRef, folder: Path, limit: int) -> str:
        """See ``RemoteClient``."""
        assert ref.pinned
        deadline = time.monotonic() + self._settings.limits(ref).download_timeout_s
        for file, most in ((CONFIG_FILE, MAX_CONFIG_BYTES), (WEIGHTS_FILE, limit)):
            self._download(name, ref, file, folder, most, deadline)
        return state_key(str(ref))

    def read(self, name: str, ref: AdapterRef, file: str, limit: int) -> bytes:
        """See ``RemoteClient``."""
        assert ref.pinned
        deadline = time.monotonic() + self._settings.limits(ref).download_timeout_s
        with TemporaryDirectory() as folder:
            self._download(name, ref, file, Path(folder), limit, deadline)
            return (Path(folder) / file).read_bytes()

    def _download(self, name: str, ref: AdapterRef, file: str, folder: Path, limit: int, deadline: float) -> None:
        def once() -> None:
            self._download_once(name, ref, file, folder / file, limit, deadline)

        self._exchange(name, ref, once, None, deadline)

    def _download_once(self, name: str, ref: AdapterRef, file: str, target: Path, limit: int, deadline: float) -> None:
        url = hf_hub_url(ref.id, file, revision=ref.revision, endpoint=self._settings.hub_endpoint)
        headers = build_hf_headers(token=self.tokens.of(ref), library_name="lorafleet")
        limits = self._settings.limits(ref)
        # Redirects to a content network are followed without the authorization header (the session sees to it).
        with get_session().stream("GET", url, headers=headers, timeout=limits.timeout_s) as response:
            if response.status_code != 200:
                self._raise_for_status(name, ref, response.status_code, response.headers.get("Retry-After"))
            total = int(response.headers.get("Content-Length") or 0)
            check_size(name, file, total, limit)
            size = 0
            with target.open("wb") as out, Progress(f"fetching {file} of {ref}", total or None) as progress:
                for chunk in response.iter_bytes(_CHUNK_BYTES):
                    size += len(chunk)
                    check_size(name, file, size, limit)
                    out.write(chunk)
                    progress.advance(len(chunk))
                    if time.monotonic() > deadline:
                        raise AdapterUnavailable(
                            name, f"{file} of {ref} did not arrive within {limits.download_timeout_s:g} s"
                        )

    def _exchange(
        self, name: str, ref: AdapterRef, work: Callable[[], T], retries: int | None, deadline: float | None = None
    ) -> T:
        """``work``'s result, with the library's exceptions as ours and further tries after those that may pass."""

        def once() -> T:
            try:
                return work()
            except HfHubHTTPError as error:
                self._raise_for_status(name, ref, error.response.status_code, error.response.headers.get("Retry-After"))
            except OfflineModeIsEnabled:
                raise AdapterUnavailable(name, f"{ref} is not on this machine and HF_HUB_OFFLINE is set") from None
            except TransportError as error:  # timeouts, refused or broken connections, broken answers
                kind = type(error).__name__
                raise Passing(AdapterUnavailable(name, f"the Hub could not be reached for {ref} ({kind})")) from None
            except OSError as error:
                raise AdapterUnavailable(name, f"{ref} cannot be stored: {error.strerror or error}") from None

        return keep_trying(once, self._settings.limits(ref).retries if retries is None else retries, deadline)

    def _raise_for_status(self, name: str, ref: AdapterRef, status: int, retry_after: str | None) -> NoReturn:
        if status in _CLOSED_STATUS:
            raise AdapterNotFound(
                name,
                f"the Hub has no {ref} that this server may read (HTTP {status}); check the spelling, and for a "
                f"private or gated repository set the environment variable {self._settings.token_variable(ref)} to a "
                "token with access",
            ) from None
        failure = AdapterUnavailable(name, f"the Hub answered HTTP {status} for {ref}")
        if status not in _PASSING_STATUS:
            raise failure from None
        seconds = float(retry_after) if retry_after is not None and retry_after.strip().isdigit() else 0.0
        raise Passing(failure, seconds) from None
