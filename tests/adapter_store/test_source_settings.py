"""How sources are reached: which entry counts, and that no credential is in a setting, a message or a repr."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from adapter_store.settings import StoreSettings
from adapter_store.source import AdapterRef
from adapter_store.source_settings import SourceSettings

SETTINGS = StoreSettings(
    sources={
        "s3://": {"timeout_s": 1.0, "env": {"key": "ALL_KEY"}},
        "s3://acme": {"timeout_s": 2.0, "retries": 0},
        "s3://acme/private/": {"timeout_s": 3.0, "max_bytes": 5, "refresh_s": 0.5, "download_timeout_s": 7.0},
        "hub:acme": {"env": {"token": "ACME_TOKEN"}, "timeout_s": 4.0},
    },
    hub_timeout_s=9.0,
)


@pytest.mark.parametrize(
    ("reference", "timeout_s"),
    [
        ("s3://other/x", 1.0),
        ("s3://acme/x", 2.0),
        ("s3://acme", 2.0),
        ("s3://acme-evil/x", 1.0),
        ("s3://acme/private/x", 3.0),
        ("s3://acme/privateer", 2.0),
        ("gs://acme/x", 9.0),
        ("hub:acme/x@v1", 4.0),
        ("hub:acme-evil/x", 9.0),
        ("local:/acme", 9.0),
    ],
)
def test_the_longest_beginning_counts(reference: str, timeout_s: float) -> None:
    assert SETTINGS.limits(AdapterRef.parse(reference)).timeout_s == timeout_s


def test_what_a_source_does_not_say_is_as_for_the_hub() -> None:
    private, acme = (SETTINGS.limits(AdapterRef.parse(f"s3://acme/{name}")) for name in ("private/x", "x"))
    assert (private.retries, private.download_timeout_s, private.max_bytes, private.refresh_s) == (3, 7.0, 5, 0.5)
    assert (acme.retries, acme.download_timeout_s, acme.max_bytes, acme.refresh_s) == (0, 300.0, 4 << 30, 60.0)
    assert SETTINGS.token_variable(AdapterRef.parse("hub:acme/x")) == "ACME_TOKEN"
    assert SETTINGS.token_variable(AdapterRef.parse("hub:globex/x")) == "HF_TOKEN"


def test_settings_can_be_made_again_from_settings() -> None:
    assert replace(SETTINGS, hub_retries=1).sources == SETTINGS.sources


@pytest.mark.parametrize(
    "options",
    [
        {"secret": "hunter2"},
        {"key": "hunter2"},
        {"token": "hunter2"},
        {"password": "hunter2"},
        {"account_key": "hunter2"},
        {"client_kwargs": {"aws_secret_access_key": "hunter2"}},
        {"CLIENT_SECRET": "hunter2"},
        {"connection_string": "hunter2"},
        {"token": {"client_secret": "hunter2"}},
    ],
)
def test_credentials_are_no_options(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"is a credential.*environment variable") as refused:
        StoreSettings(sources={"s3://acme": {"options": options}})
    assert "hunter2" not in str(refused.value)
    assert "sources['s3://acme']" in str(refused.value)


@pytest.mark.parametrize(
    ("options", "place"),
    [
        ({"endpoint_url": "https://user:hunter2@minio:9000"}, "endpoint_url"),
        ({"endpoint_url": "http://hunter2@minio"}, "endpoint_url"),
        ({"client_kwargs": {"config": ["http://a", "http://u:hunter2@b/x"]}}, "client_kwargs.config.1"),
    ],
)
def test_a_url_in_the_options_holds_no_credentials(options: dict[str, Any], place: str) -> None:
    with pytest.raises(ValueError, match=f"'{place}' is a URL with a credential") as refused:
        StoreSettings(sources={"s3://acme": {"options": options}})
    assert "hunter2" not in str(refused.value)
    assert StoreSettings(sources={"s3://acme": {"options": {"endpoint_url": "https://minio:9000/a@b"}}}).sources


def test_what_is_no_credential_is_an_option() -> None:
    options = {"endpoint_url": "http://localhost:9000", "anon": False, "client_kwargs": {"region_name": "eu"}}
    assert SourceSettings(options={**options, "token": "google_default"}).options["anon"] is False


@pytest.mark.parametrize(
    ("sources", "said"),
    [
        ({"acme": {}}, "'acme' must be the beginning of references"),
        ({"local:/x": {}}, "must be the beginning of references"),
        ({"s3://a": {"retries": 99}}, r"sources\['s3://a'\]: retries is 99"),
        ({"s3://a": {"timeout_s": 0}}, "timeout_s is 0"),
        ({"s3://a": {"download_timeout_s": -1}}, "download_timeout_s is -1"),
        ({"s3://a": {"max_bytes": 0}}, "max_bytes is 0"),
        ({"s3://a": {"refresh_s": -1}}, "refresh_s is -1"),
        ({"s3://a": {"endpoint_url": "http://x"}}, "some of download_timeout_s, env, max_bytes, options"),
        ({"s3://a": "http://x"}, "must be a mapping"),
        ({"s3://a": {"env": {"secret": "hunter2"}}}, "env: 'secret' must name an environment variable"),
        ({"s3://a": {"env": {"anon": "A"}, "options": {"anon": True}}}, "'anon' is in options too"),
        ({"s3://a": {"env": ["A"]}}, "must each be a mapping"),
        ({"hub:a": {"options": {"endpoint": "x"}}}, "of the Hub only env"),
        ({"hub:a": {"env": {"key": "A"}}}, "of the Hub only env"),
    ],
)
def test_mistakes_are_told_by_place(sources: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said) as refused:
        StoreSettings(sources=sources)
    assert "hunter2" not in str(refused.value)


def test_neither_options_nor_variables_are_in_a_repr() -> None:
    text = repr(StoreSettings(sources={"s3://a": {"options": {"x": "hunter2"}, "env": {"secret": "HUNTER2"}}}))
    assert "hunter2" not in text.lower()


def test_object_stores_can_be_allowed() -> None:
    assert StoreSettings(allow=("s3://acme/*", "hub:acme/*", "local:/x/*")).allow
    with pytest.raises(ValueError, match="must start with"):
        StoreSettings(allow=("s3:acme/*",))
