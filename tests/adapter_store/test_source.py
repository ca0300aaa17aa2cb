"""References, digests, and the local source."""

from __future__ import annotations

import hashlib
import os
import pickle
import subprocess
import time
from pathlib import Path

import pytest

from adapter_store.digest import CONFIG_FILE, WEIGHTS_FILE, content_digest, git_blob_sha1
from adapter_store.errors import AdapterChanged, AdapterError, AdapterNotFound, AdapterRefused
from adapter_store.local_source import LocalSource
from adapter_store.source import AdapterRef

COMMIT = "0123456789abcdef0123456789abcdef01234567"
DIGEST = COMMIT + "0" * 24


@pytest.mark.parametrize(
    ("text", "ref", "pinned"),
    [
        ("local:/a/b@c", AdapterRef("local", "/a/b@c"), False),
        ("local:relative/x", AdapterRef("local", "relative/x"), False),
        ("hub:org/name", AdapterRef("hub", "org/name"), False),
        ("hub:org/name@main", AdapterRef("hub", "org/name", "main"), False),
        ("hub:org/na.me_1@refs/pr/3", AdapterRef("hub", "org/na.me_1", "refs/pr/3"), False),
        (f"hub:org/name@{COMMIT}", AdapterRef("hub", "org/name", COMMIT), True),
        ("s3://bucket/a/b", AdapterRef("s3", "bucket/a/b"), False),
        ("gs://bucket", AdapterRef("gs", "bucket"), False),
        ("file:///mnt/a", AdapterRef("file", "/mnt/a"), False),
        ("memory://acme/x", AdapterRef("memory", "acme/x"), False),
        (f"s3://bucket/a+b=c,d@{DIGEST}", AdapterRef("s3", "bucket/a+b=c,d", DIGEST), True),
    ],
)
def test_references_read_and_written(text: str, ref: AdapterRef, pinned: bool) -> None:
    assert AdapterRef.parse(text) == ref
    assert str(ref) == text
    assert ref.pinned is pinned


@pytest.mark.parametrize(
    "text",
    [
        "", "name", "s3:bucket/x", "local:", "local:/a\0b", "hub:", "hub:org", "hub:org/", "hub:/name", "hub:a/b/c",
        "hub:../../etc/passwd", "hub:org/..", "hub:org/a..b", "hub:org/a--b", "hub:org/name@", "hub:org/name@../../x",
        "hub:org/name@a b", "hub:org/na me", "hub:org/name?x=1", "hub:órg/name", "hub:.org/name", "HUB:org/name",
        "s3://", "s3:///a", "s3://b/../c", "s3://b/./c", "s3://b//c", "s3://b/a b", "s3://b/a%2e", "s3://b/*", "s3://b/a?b",
        "s3://b/a#b", "s3://b/a\\b", "s3://b/a\n", "s3://b/{a,b}", "S3://b/c", "hub://a/b", "local:///a", "s3://b/a@v1",
        "s3://b/a@", f"s3://b/a@{COMMIT}", "s3://b/a@b/c", "zip://a::s3://b/c", "s3://b:80/c", "file://",
    ],
)  # fmt: skip
def test_what_is_no_reference(text: str) -> None:
    with pytest.raises(ValueError, match="adapter reference"):
        AdapterRef.parse(text)


def test_a_trailing_slash_says_nothing() -> None:
    assert AdapterRef.parse("s3://bucket/a/") == AdapterRef("s3", "bucket/a")


@pytest.mark.parametrize(
    "text", ["s3://AKIA:pass@word/x", "s3://AKIA:pass@bucket", "https://user:pass@host/a/b", "s3://u@b/x"]
)
def test_credentials_in_a_reference_are_refused_and_not_repeated(text: str) -> None:
    with pytest.raises(ValueError, match="no credentials") as refused:
        AdapterRef.parse(text)
    assert "pass" not in str(refused.value) and "AKIA" not in str(refused.value)


@pytest.mark.parametrize(
    ("text", "owner"),
    [
        ("local:/a/b", "local"),
        ("hub:org/name@v1", "hub:org"),
        ("s3://bucket/a/b", "s3://bucket"),
        (f"gs://bucket/a@{DIGEST}", "gs://bucket"),
    ],
)
def test_owners(text: str, owner: str) -> None:
    ref = AdapterRef.parse(text)
    assert ref.owner == owner
    assert ref.unpinned == AdapterRef(ref.source, ref.id)
    assert AdapterRef.is_meant(text)


def test_errors_cross_process_borders() -> None:
    error = pickle.loads(pickle.dumps(AdapterRefused("tenant", "because")))
    assert isinstance(error, AdapterRefused)
    assert (error.adapter, error.reason, str(error)) == ("tenant", "because", "adapter 'tenant': because")
    assert type(error.named("other")) is AdapterRefused
    assert isinstance(error, AdapterError)


def write(folder: Path, config: bytes = b"{}", weights: bytes = b"w") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG_FILE).write_bytes(config)
    (folder / WEIGHTS_FILE).write_bytes(weights)
    return folder


def test_the_digest_is_made_of_gits_and_the_hubs_hashes(tmp_path: Path) -> None:
    folder = write(tmp_path / "a", b'{"r": 8}\n', b"some weights")
    blob = subprocess.run(
        ["git", "hash-object", "--no-filters", CONFIG_FILE], cwd=folder, capture_output=True, text=True, check=True
    ).stdout.strip()
    assert git_blob_sha1(b'{"r": 8}\n') == blob
    weights = hashlib.sha256(b"some weights").hexdigest()
    text = f"adapter_config.json {blob}\nadapter_model.safetensors {weights}\n"
    assert content_digest(blob, weights) == hashlib.sha256(text.encode()).hexdigest()
    resolved = LocalSource().resolve("a", AdapterRef("local", str(folder)))
    assert resolved.digest == content_digest(blob, weights)


def settle() -> None:
    """Let the files written so far become old enough for their hashes to be remembered."""
    time.sleep(0.12)


def test_resolve_reads_a_file_once(tmp_path: Path) -> None:
    folder = write(tmp_path / "a", weights=b"x" * 4096)
    settle()
    source, ref = LocalSource(), AdapterRef("local", str(folder))
    first = source.resolve("a", ref)
    (folder / WEIGHTS_FILE).chmod(0)
    status = (folder / WEIGHTS_FILE).stat()
    # Rewritten in place with everything restored that is looked at: only a second reading would notice.
    (folder / WEIGHTS_FILE).chmod(0o644)
    with (folder / WEIGHTS_FILE).open("r+b") as file:
        file.write(b"y")
    os.utime(folder / WEIGHTS_FILE, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert source.resolve("a", ref) == first


@pytest.mark.parametrize("change", ["weights", "config", "same size", "replaced", "older"])
def test_a_new_publication_is_a_new_digest(tmp_path: Path, change: str) -> None:
    folder = write(tmp_path / "a", weights=b"aaaa")
    settle()
    source, ref = LocalSource(), AdapterRef("local", str(folder))
    before = source.resolve("a", ref)
    if change == "weights":
        (folder / WEIGHTS_FILE).write_bytes(b"longer than before")
    elif change == "config":
        (folder / CONFIG_FILE).write_bytes(b'{"r": 2}')
    elif change == "same size":
        (folder / WEIGHTS_FILE).write_bytes(b"bbbb")
    elif change == "replaced":
        (folder / "new").write_bytes(b"cccc")
        (folder / "new").replace(folder / WEIGHTS_FILE)
    else:  # restored from a backup
        (folder / WEIGHTS_FILE).write_bytes(b"dddd")
        os.utime(folder / WEIGHTS_FILE, (1, 1))
    after = source.resolve("a", ref)
    assert after.digest != before.digest
    with pytest.raises(AdapterChanged, match=before.digest[:12]):
        source.fetch(before)
    assert source.fetch(after).digest() == after.digest


def test_quick_rewrites_of_the_same_size_are_never_missed(tmp_path: Path) -> None:
    """Within one tick of the file system's clock a rewrite changes neither size nor time."""
    folder = write(tmp_path / "a")
    source, ref = LocalSource(), AdapterRef("local", str(folder))
    for number in range(200):
        (folder / WEIGHTS_FILE).write_bytes(b"%08d" % number)
        expected = content_digest(git_blob_sha1(b"{}"), hashlib.sha256(b"%08d" % number).hexdigest())
        assert source.resolve("a", ref).digest == expected


def test_folders_that_hold_no_adapter(tmp_path: Path) -> None:
    source = LocalSource()
    with pytest.raises(AdapterNotFound, match=CONFIG_FILE):
        source.resolve("a", AdapterRef("local", str(tmp_path / "nothing")))
    folder = write(tmp_path / "a")
    (folder / WEIGHTS_FILE).rename(folder / "adapter_model.bin")
    with pytest.raises(AdapterRefused, match="pickle"):
        source.resolve("a", AdapterRef("local", str(folder)))
    (folder / "adapter_model.bin").unlink()
    with pytest.raises(AdapterRefused, match=WEIGHTS_FILE):
        source.resolve("a", AdapterRef("local", str(folder)))
    with pytest.raises(AdapterNotFound):
        source.resolve("a", AdapterRef("local", str(folder / CONFIG_FILE)))
    (folder / WEIGHTS_FILE).mkdir()
    with pytest.raises(AdapterRefused, match="cannot be read"):
        source.resolve("a", AdapterRef("local", str(folder)))
