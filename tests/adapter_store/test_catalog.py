"""What clients may name and what they get for it."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from adapter_store.catalog import Catalog
from adapter_store.digest import CONFIG_FILE, WEIGHTS_FILE
from adapter_store.errors import AdapterNotFound
from adapter_store.settings import StoreSettings
from adapter_store.source import AdapterRef, ResolvedAdapter
from tests.adapter_store.hub_server import HubServer

FILES = {CONFIG_FILE: b'{"peft_type": "LORA"}', WEIGHTS_FILE: b"weights"}


def write(folder: Path, weights: bytes = b"weights") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG_FILE).write_bytes(FILES[CONFIG_FILE])
    (folder / WEIGHTS_FILE).write_bytes(weights)
    return folder


def test_declared_names_relative_to_the_root(tmp_path: Path) -> None:
    write(tmp_path / "adapters/shout")
    catalog = Catalog(StoreSettings(root=tmp_path, adapters={"loud": "local:adapters/shout", "far": "hub:acme/far@v1"}))
    assert catalog.names() == ["far", "loud"]
    assert catalog.find("far") == AdapterRef("hub", "acme/far", "v1")
    resolved = catalog.resolve("loud")
    assert resolved.name == "loud"
    assert resolved.ref == AdapterRef("local", str(tmp_path / "adapters/shout"))
    assert catalog.fetch(resolved).weights.numpy().tobytes() == b"weights"


def test_folders_are_looked_at_again(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    catalog = Catalog(StoreSettings(root=tmp_path, folders=("a",)))
    assert catalog.names() == []
    (tmp_path / "a/two").mkdir()
    assert catalog.names() == []
    write(tmp_path / "a/two")  # filled after the folder itself was last changed
    assert catalog.names() == ["two"]
    write(tmp_path / "a/one")
    assert catalog.names() == ["one", "two"]
    first = catalog.resolve("one").digest
    write(tmp_path / "a/one", b"published again")
    assert catalog.resolve("one").digest != first
    for file in (tmp_path / "a/one").iterdir():
        file.unlink()
    (tmp_path / "a/one").rmdir()
    assert catalog.names() == ["two"]
    with pytest.raises(AdapterNotFound, match="two"):
        catalog.resolve("one")


def test_what_comes_first(tmp_path: Path) -> None:
    for place in ("a/x", "b/x", "c/x"):
        write(tmp_path / place)
    settings = StoreSettings(root=tmp_path, folders=("a", "b"))
    assert Catalog(settings).find("x").id == str(tmp_path / "a/x")
    declared = StoreSettings(root=tmp_path, folders=("a", "b"), adapters={"x": "local:c/x"})
    assert Catalog(declared).find("x").id == str(tmp_path / "c/x")


@pytest.mark.parametrize(
    "name",
    [
        "", ".", "..", "../secret", "a/../../secret", "/etc/passwd", "good/../good", "./good", "good/", "\0", "good\0",
        "..\\secret", ".hidden", "good" * 200, "local:../secret", "local:good", "local:.", "hub:../x",
        "hub:acme/../../x", "GOOD", "go*d", "%2e%2e/secret", "file:///etc/passwd", "https://example.org/x",
    ],
)  # fmt: skip
def test_nothing_leads_out_of_the_folders(tmp_path: Path, name: str) -> None:
    write(tmp_path / "folder/good")
    write(tmp_path / "folder/.hidden")
    write(tmp_path / "secret")
    catalog = Catalog(StoreSettings(root=tmp_path, folders=("folder",), allow=("hub:acme/*",)))
    with pytest.raises(AdapterNotFound) as error:
        catalog.resolve(name)
    assert error.value.adapter == name
    assert catalog.resolve("good").digest


def test_absolute_paths_are_for_the_operator(tmp_path: Path) -> None:
    write(tmp_path / "secret")
    catalog = Catalog(StoreSettings(root=tmp_path, allow=("hub:*",)))
    for name in (str(tmp_path / "secret"), f"local:{tmp_path}/secret"):
        with pytest.raises(AdapterNotFound):
            catalog.resolve(name)


def test_links_that_leave_the_folder_do_not_exist(tmp_path: Path) -> None:
    write(tmp_path / "secret")
    write(tmp_path / "folder/good")
    (tmp_path / "folder/out").symlink_to(tmp_path / "secret")
    (tmp_path / "folder/alias").symlink_to(tmp_path / "folder/good")
    (tmp_path / "folder/mixed").mkdir()
    (tmp_path / "folder/mixed" / CONFIG_FILE).write_bytes(FILES[CONFIG_FILE])
    (tmp_path / "folder/mixed" / WEIGHTS_FILE).symlink_to(tmp_path / "secret" / WEIGHTS_FILE)
    catalog = Catalog(StoreSettings(root=tmp_path, folders=("folder",)))
    assert catalog.names() == ["alias", "good"]
    assert catalog.resolve("alias").digest == catalog.resolve("good").digest
    for name in ("out", "mixed"):
        with pytest.raises(AdapterNotFound):
            catalog.resolve(name)


def test_allowed_local_references(tmp_path: Path) -> None:
    write(tmp_path / "open/a")
    write(tmp_path / "secret")
    (tmp_path / "open/link").symlink_to(tmp_path / "secret")
    (tmp_path / "open/mixed").mkdir()
    (tmp_path / "open/mixed" / CONFIG_FILE).write_bytes(FILES[CONFIG_FILE])
    (tmp_path / "open/mixed" / WEIGHTS_FILE).symlink_to(tmp_path / "secret" / WEIGHTS_FILE)
    catalog = Catalog(StoreSettings(root=tmp_path, allow=(f"local:{tmp_path}/open/*",)))
    assert catalog.resolve(f"local:{tmp_path}/open/a").digest
    for way_out in ("open/../secret", "open/link", "open/mixed", "open"):
        with pytest.raises(AdapterNotFound, match="allow"):
            catalog.resolve(f"local:{tmp_path}/{way_out}")


def test_allowed_hub_references(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with HubServer() as hub:
        for repo in ("acme/a", "other/a", "solo/one"):
            hub.publish(repo, FILES, ref="main")
        commit = hub.publish("solo/one", {**FILES, WEIGHTS_FILE: b"v1"}, ref="v1")
        allow = ("hub:acme/*", "hub:solo/one@v1")
        catalog = Catalog(StoreSettings(root=tmp_path, cache_dir="c", hub_endpoint=hub.endpoint, allow=allow))
        assert catalog.resolve("hub:acme/a").ref.id == "acme/a"
        assert catalog.resolve("hub:acme/a@main").ref.pinned
        assert catalog.resolve("hub:solo/one@v1").ref.revision == commit
        asked = len(hub.requests())
        for name in ("hub:other/a", "hub:solo/one", "hub:acmeevil/a", "acme/a"):
            with pytest.raises(AdapterNotFound):
                catalog.resolve(name)
        assert len(hub.requests()) == asked  # what is not allowed never reaches the network


def test_an_unknown_name_is_told_what_there_is(tmp_path: Path) -> None:
    adapters = {f"a{number:02}": "hub:acme/x" for number in range(12)}
    with pytest.raises(AdapterNotFound, match=r"a00, a01.*a09, \.\.\.; declare it"):
        Catalog(StoreSettings(root=tmp_path, adapters=adapters)).resolve("b")
    with pytest.raises(AdapterNotFound, match="none"):
        Catalog(StoreSettings(root=tmp_path)).resolve("b")


def test_a_missing_folder_is_named_at_the_start(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nowhere"):
        Catalog(StoreSettings(root=tmp_path, folders=("nowhere",)))


def test_thousands_of_adapters_resolve_quickly(tmp_path: Path) -> None:
    for number in range(2000):
        folder = tmp_path / "many" / f"t{number}"
        folder.mkdir(parents=True)
        (folder / CONFIG_FILE).write_text(json.dumps({"n": number}))
        (folder / WEIGHTS_FILE).write_bytes(b"w")
    catalog = Catalog(StoreSettings(root=tmp_path, folders=("many",)))
    assert len(catalog.names()) == 2000
    catalog.resolve("t7")
    time.sleep(0.12)
    catalog.resolve("t7")
    started = time.perf_counter()
    for _ in range(200):
        catalog.resolve("t7")
    assert (time.perf_counter() - started) / 200 < 0.002
    started = time.perf_counter()
    for _ in range(20):
        catalog.names()
    assert (time.perf_counter() - started) / 20 < 0.01


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"adapters": {"x": "somewhere"}}, r"adapters\['x'\]"),
        ({"adapters": {"": "hub:a/b"}}, "empty"),
        ({"allow": ("acme/*",)}, "'acme/"),
        ({"allow": ("local:relative/*",)}, "local:/"),
        ({"host_cache_bytes": -1}, "host_cache_bytes is -1"),
        ({"hub_timeout_s": 0}, "hub_timeout_s is 0"),
        ({"hub_retries": 50}, "hub_retries is 50"),
        ({"negative_ttl_s": 1e9}, "negative_ttl_s"),
        ({"hub_endpoint": "huggingface.co"}, "hub_endpoint"),
    ],
)
def test_settings_that_cannot_be(values: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        StoreSettings(**values)  # type: ignore[arg-type]


def test_names_change_live_and_a_mistake_changes_nothing(tmp_path: Path) -> None:
    for place in ("a/one", "b/two", "c/three"):
        write(tmp_path / place)
    catalog = Catalog(StoreSettings(root=tmp_path, folders=("a",), adapters={"x": "local:c/three"}))
    assert catalog.names() == ["one", "x"]
    changed = StoreSettings(root=tmp_path, folders=("b",), adapters={"y": "local:c/three"}, allow=("hub:acme/*",))
    catalog.reconfigure(changed)
    assert catalog.names() == ["two", "y"]
    assert catalog.find("hub:acme/x").id == "acme/x"
    with pytest.raises(AdapterNotFound):
        catalog.find("x")
    with pytest.raises(ValueError, match="gone"):
        catalog.reconfigure(StoreSettings(root=tmp_path, folders=("gone",)))
    assert catalog.names() == ["two", "y"] and catalog.find("hub:acme/x").id == "acme/x"


def test_what_is_declared_at_run_time_lasts_over_a_change_and_comes_after_the_settings(tmp_path: Path) -> None:
    for place in ("a/one", "c/other", "d/third"):
        write(tmp_path / place)
    catalog = Catalog(StoreSettings(root=tmp_path, folders=("a",)))
    catalog.declare({"one": AdapterRef.parse("local:c/other"), "new": AdapterRef.parse("local:c/other")})
    assert catalog.names() == ["new", "one"]
    assert catalog.named("one").origin == "runtime" and catalog.find("one").id == str(tmp_path / "c/other")
    catalog.reconfigure(StoreSettings(root=tmp_path, folders=("a",), adapters={"new": "local:d/third"}))
    assert catalog.named("new").origin == "configured" and catalog.find("new").id == str(tmp_path / "d/third")
    catalog.declare({})
    assert catalog.names() == ["new", "one"] and catalog.named("one").origin == "folder"


def test_a_forgotten_reference_is_looked_up_again_before_its_time(tmp_path: Path) -> None:
    with HubServer() as hub:
        hub.publish("acme/x", FILES)
        settings = StoreSettings(
            root=tmp_path,
            cache_dir="cache",
            adapters={"x": "hub:acme/x"},
            hub_endpoint=hub.endpoint,
            hub_refresh_s=3600,
        )
        catalog = Catalog(settings)
        first = catalog.resolve("x")
        assert catalog.known_digest(AdapterRef("hub", "acme/x")) == first.digest
        hub.publish("acme/x", {**FILES, WEIGHTS_FILE: b"again"})
        assert catalog.resolve("x") == first
        catalog.forget(catalog.find("x"))
        second = catalog.resolve("x")
        assert second.digest != first.digest
        assert catalog.known_digest(AdapterRef("hub", "acme/x")) == second.digest
        assert catalog.known_digest(AdapterRef("hub", "acme/y")) is None


def test_allowed_object_stores(tmp_path: Path) -> None:
    for place in ("open/a", "secret/b"):
        write(tmp_path / place)
    catalog = Catalog(StoreSettings(root=tmp_path, cache_dir="c", allow=(f"file://{tmp_path}/open/*",)))
    resolved = catalog.resolve(f"file://{tmp_path}/open/a")
    assert catalog.fetch(resolved).weights.numpy().tobytes() == b"weights"
    assert catalog.resolve(str(resolved.ref)) == ResolvedAdapter(str(resolved.ref), resolved.ref, resolved.digest)
    for name in ("secret/b", "open/../secret/b", "open", "open/%2e%2e/secret/b"):
        with pytest.raises(AdapterNotFound):
            catalog.resolve(f"file://{tmp_path}/{name}")
