"""Which chat template an adapter ships: found where it is kept, read once for each state, never asked for in vain."""

from __future__ import annotations

import json
import os
import time
from dataclasses import replace
from pathlib import Path

import pytest

from adapter_store.catalog import Catalog
from adapter_store.errors import AdapterNotFound, AdapterRefused, AdapterUnavailable
from adapter_store.settings import StoreSettings
from adapter_store.source import ResolvedAdapter
from tests.adapter_store.hub_server import TOKEN, Fault, HubServer
from tests.adapter_store.plain_adapters import adapter_files, write_adapter

ADAPTER = adapter_files()
JINJA, CONFIG = "chat_template.jinja", "tokenizer_config.json"


def config(template: object) -> str:
    return json.dumps({"model_max_length": 5, "chat_template": template})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_adapter(tmp_path / "adapters/tenant")


def make(tmp_path: Path, hub: HubServer | None = None, **changes: object) -> Catalog:
    (tmp_path / "adapters").mkdir(exist_ok=True)
    values = {"hub_retries": 0, "negative_ttl_s": 0.0, "allow": ("hub:*", "file://*")} | changes
    settings = StoreSettings(root=tmp_path, folders=("adapters",), cache_dir="cache", **values)  # type: ignore[arg-type]
    return Catalog(settings if hub is None else replace(settings, hub_endpoint=hub.endpoint))


def read(catalog: Catalog, name: str, token: str | None = None) -> dict[str, str]:
    return dict(catalog.sources.templates.get(catalog.resolve(name), token))


def test_the_jinja_file_comes_before_the_configuration(folder: Path, tmp_path: Path) -> None:
    catalog = make(tmp_path)
    assert catalog.resolve("tenant").template is None and read(catalog, "tenant") == {}
    (folder / CONFIG).write_text(config(None))
    assert read(catalog, "tenant") == {}
    (folder / CONFIG).write_text(config("from the configuration"))
    assert read(catalog, "tenant") == {"default": "from the configuration"}
    named = [{"name": "default", "template": "a"}, {"name": "tool_use", "template": "b"}]
    (folder / CONFIG).write_text(config(named))
    assert read(catalog, "tenant") == {"default": "a", "tool_use": "b"}
    (folder / JINJA).write_text("from the file")
    assert read(catalog, "tenant") == {"default": "from the file"}


def test_a_template_is_no_part_of_what_weights_are_known_by(folder: Path, tmp_path: Path) -> None:
    catalog = make(tmp_path)
    digest = catalog.resolve("tenant").digest
    (folder / JINJA).write_text("anything")
    assert catalog.resolve("tenant").digest == digest


def test_a_folders_template_is_read_again_when_it_changed_and_not_before(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    catalog, hour_ago, before = make(tmp_path), time.time() - 3600, 0
    reads: list[ResolvedAdapter] = []
    local = catalog.sources._local
    monkeypatch.setattr(local, "templates", lambda one, real=local.templates: reads.append(one) or real(one))
    for number, text in enumerate(("one", "two", "six")):
        (folder / JINJA).write_text(text)  # of the same length each time
        assert [read(catalog, "tenant") for _ in range(2)] == [{"default": text}] * 2, "fresh files are not trusted"
        os.utime(folder / JINJA, (hour_ago, hour_ago + number))
        before = len(reads)
        assert [read(catalog, "tenant") for _ in range(3)] == [{"default": text}] * 3
        assert len(reads) == before + 1
    catalog.forget(catalog.find("tenant"))
    read(catalog, "tenant")
    assert len(reads) == before + 2


@pytest.mark.parametrize(
    ("file", "text", "reason"),
    [
        (JINJA, "x" * (2**18 + 1), "chat_template.jinja has 262145 bytes; at most 262144"),
        (CONFIG, config("x" * (2**18 + 1)), "its chat template has 262145 bytes"),
        (CONFIG, " " * (2**22 + 1), "tokenizer_config.json has 4194305 bytes"),
        (CONFIG, "{", "tokenizer_config.json cannot be read"),
        (CONFIG, "[" * 100_000, "tokenizer_config.json cannot be read"),
        (CONFIG, config(5), "neither a text nor texts with names"),
        (CONFIG, config([{"name": "default"}]), "neither a text nor texts with names"),
        (JINJA, b"\xff", "chat_template.jinja cannot be read"),
    ],
)
def test_what_is_too_large_or_broken_is_refused_by_reason(
    folder: Path, tmp_path: Path, hub: HubServer, file: str, text: str | bytes, reason: str
) -> None:
    data = text if isinstance(text, bytes) else text.encode()
    (folder / file).write_bytes(data)
    hub.publish("acme/tenant", {**ADAPTER, file: data})
    catalog = make(tmp_path, hub)
    for name in ("tenant", "hub:acme/tenant"):
        with pytest.raises(AdapterRefused, match=reason):
            read(catalog, name)
        assert catalog.fetch(catalog.resolve(name)).config, "its weights can be had all the same"


def test_a_link_out_of_the_folder_hides_the_adapter_as_links_of_weights_do(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("secret")
    (folder / JINJA).symlink_to(tmp_path / "secret")
    with pytest.raises(AdapterNotFound):
        make(tmp_path).resolve("tenant")


def test_a_commits_template_is_read_once_on_a_machine_and_its_absence_costs_nothing(
    hub: HubServer, tmp_path: Path
) -> None:
    hub.publish("acme/without", ADAPTER)
    hub.publish("acme/tenant", {**ADAPTER, JINJA: b"first", CONFIG: config("other").encode()})
    catalog = make(tmp_path, hub, hub_refresh_s=0.0)
    assert [read(catalog, "hub:acme/without") for _ in range(2)] == [{}, {}]
    assert not hub.requests("/resolve/")
    for one in (catalog, catalog, make(tmp_path, hub)):
        assert read(one, "hub:acme/tenant") == {"default": "first"}
    assert [seen.path.rpartition("/")[2] for seen in hub.requests("/resolve/")] == [JINJA]
    hub.publish("acme/tenant", {**ADAPTER, JINJA: b"second"})
    assert read(catalog, "hub:acme/tenant") == {"default": "second"}
    hub.publish("acme/tenant", ADAPTER)
    assert read(catalog, "hub:acme/tenant") == {}


def test_a_configuration_without_a_template_is_read_once(hub: HubServer, tmp_path: Path) -> None:
    hub.publish("acme/tenant", {**ADAPTER, CONFIG: b"{}"})
    catalog = make(tmp_path, hub)
    for one in (catalog, catalog, make(tmp_path, hub)):
        assert read(one, "hub:acme/tenant") == {}
    assert len(hub.requests("/resolve/")) == 1


def test_a_process_that_starts_while_the_hub_is_down_knows_the_template_or_says_so(
    hub: HubServer, tmp_path: Path
) -> None:
    pinned = f"hub:acme/tenant@{hub.publish('acme/tenant', {**ADAPTER, JINJA: b'theirs'})}"
    first = make(tmp_path, hub)
    first.fetch(first.resolve(pinned))
    hub.fail(*[Fault(status=503)] * 99)
    with pytest.raises(AdapterUnavailable):  # never the base model's instead
        read(make(tmp_path, hub), pinned)
    hub.heal()
    read(first, pinned)
    hub.fail(*[Fault(status=503)] * 99)
    assert read(make(tmp_path, hub), pinned) == {"default": "theirs"}


def test_a_private_template_is_read_with_the_token_that_its_caller_proved_it_with(
    hub: HubServer, tmp_path: Path
) -> None:
    hub.publish("acme/private", {**ADAPTER, JINJA: b"theirs"}, access="private")
    catalog = make(tmp_path, hub, negative_ttl_s=60.0)
    ref = catalog.find("hub:acme/private")
    shown = catalog.sources.prove_on_hub("hub:acme/private", ref, TOKEN)
    for token in (None, "hf_wrong"):
        with pytest.raises(AdapterNotFound):
            catalog.sources.templates.get(shown, token)
    assert catalog.sources.templates.get(shown, TOKEN) == {"default": "theirs"}
    (read_with,) = [seen.authorization for seen in hub.requests("/resolve/")][-1:]
    assert read_with == f"Bearer {TOKEN}"


def test_an_object_stores_template_follows_the_object(tmp_path: Path) -> None:
    place = write_adapter(tmp_path / "bucket/tenant")
    catalog = make(tmp_path, hub_refresh_s=0.0)
    name = f"file://{place}"
    assert read(catalog, name) == {}
    for text in ("first", "second"):
        (place / JINJA).write_text(text)
        assert read(catalog, name) == {"default": text}
    pinned = f"{name}@{catalog.resolve(name).digest}"
    assert read(catalog, pinned) == {"default": "second"}
    (place / JINJA).write_text("x" * (2**18 + 1))
    with pytest.raises(AdapterRefused, match="at most 262144"):
        read(catalog, name)
