"""Keys: how they are made and kept, and who gets past the door."""

from __future__ import annotations

import asyncio
import logging
import re
import shutil

import pytest
import yaml

from deployments.tenants.__main__ import main
from deployments.tenants.key_table import KeyTable
from deployments.tenants.keys import key_hash, new_key
from deployments.tenants.live_keys import LiveKeys

from .conftest import BASE_MODEL, KEYS


def test_a_new_key_has_256_bits_and_what_is_printed_can_be_put_into_the_file(capsys, tmp_path):
    keys = {new_key() for _ in range(100)}
    assert len(keys) == 100 and all(re.fullmatch(r"lf-[A-Za-z0-9_-]{43}", key) for key in keys)
    for arguments, role in ((["new-key", "acme"], "tenant"), (["new-key", "--admin"], "admin")):
        assert main(arguments) == 0
        printed = re.fullmatch(
            r"key, shown this once: (\S+)\nin the keys file:\n\n(.*)", capsys.readouterr().out, re.DOTALL
        )
        assert printed is not None
        key, text = printed.groups()
        assert key not in text
        caller = KeyTable.parse(text).caller(key)
        assert caller is not None
        assert caller.role == role and caller.tenant.name == ("acme" if role == "tenant" else "")
    assert main(["new-key", "hub:acme"]) == 1 and "tenant's name" in capsys.readouterr().err
    (tmp_path / "keys.yaml").write_text("tenants: {acme: {keys: [plain]}}")
    assert main(["check", str(tmp_path / "keys.yaml")]) == 1 and "given as its hash" in capsys.readouterr().err


SECRET = "lf-this-is-a-key-in-clear"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (f"tenants: {{acme: {{keys: [{SECRET}]}}}}", "tenants.acme.keys.0: a key is given as its hash"),
        (f"admin: [{SECRET}\ntenants:", "it is no YAML in line 2"),
        (f"admin: {SECRET}", "admin: Input should be a valid list"),
        (f"tenants: {{acme: {{keys: [], {SECRET}: 1}}}}", "unknown key; known are adapters, base_model"),
        (f"{{tenants: {{acme: {{keys: [], weight: {SECRET}}}}}}}", "tenants.acme.weight"),
        ("tenants: {acme: {keys: [], requests_per_minute: 0}}", "tenants.acme.requests_per_minute"),
        ("tenants: {acme: {keys: []}, acme: {keys: []}}", "tenants.acme: written in line 1 and again"),
        ("tenants: {'hub:acme': {keys: []}}", "a tenant's name has"),
        ("tenants: {acme: {keys: [], adapters: ['local:relative']}}", "must start with"),
        (f"admin: ['{key_hash('k')}']\ntenants: {{acme: {{keys: ['{key_hash('k')}']}}}}", "each key is one's alone"),
    ],
)
def test_a_mistake_is_told_by_its_place_and_nothing_of_the_file_is_quoted(text, said):
    with pytest.raises(ValueError) as raised:
        KeyTable.parse(text)
    assert said in str(raised.value) and SECRET not in str(raised.value)


def test_the_file_is_taken_over_whole_or_not_at_all(tmp_path, caplog):
    file = tmp_path / "keys.yaml"
    with pytest.raises(ValueError, match="cannot be read"):
        LiveKeys(file)
    file.write_text(yaml.safe_dump({"tenants": {"acme": {"keys": [key_hash("one")]}}}))
    keys = LiveKeys(file)
    acme = keys.caller("one")
    assert acme is not None and acme.tenant.name == "acme" and keys.caller("two") is None
    for broken in ("tenants: [", "tenants: {acme: {keys: [clear]}}", b"\xff\xfe".decode("latin-1")):
        file.write_bytes(broken.encode("latin-1"))
        keys.look()
        keys.look()
        assert keys.caller("one") is not None and keys.refused
    file.unlink()
    keys.look()
    assert keys.caller("one") is not None and "cannot be read" in keys.refused
    errors = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert len(errors) == 4, "each is told once"
    replacement = tmp_path / "next"
    replacement.write_text(yaml.safe_dump({"tenants": {"acme": {"keys": [key_hash("two")]}}}))
    shutil.move(replacement, file)
    keys.look()
    assert keys.caller("one") is None and keys.caller("two") is not None and keys.refused is None


async def test_without_a_key_that_exists_nothing_is_answered(door):
    wrong = [None, "lf-guess", key_hash(KEYS["acme"]), KEYS["acme"] + "x", KEYS["acme"][:-1]]
    for path in ("/v1/models", "/v1/adapters", "/v1/models/shout", "/nothing", "/docs", "/metrics", "/"):
        for key in wrong:
            answered = await door.get(path, key)
            assert answered.status_code == 401, path
            assert answered.headers["www-authenticate"] == "Bearer"
            error = answered.json()["error"]
            assert (error["type"], error["code"]) == ("invalid_request_error", "invalid_api_key")
            assert key is None or key not in answered.text
    assert (await door.get("/health", None)).status_code == 200
    basic = await door.http.get("/v1/models", headers={"authorization": f"Basic {KEYS['acme']}"})
    assert basic.status_code == 401
    for headers in ({"x-api-key": KEYS["acme"]}, {"authorization": f"bearer  {KEYS['acme']} "}):
        assert (await door.http.get("/v1/models", headers=headers)).status_code == 200


async def test_a_key_that_is_taken_away_ends_and_a_new_one_begins_without_a_restart(door, monkeypatch):
    assert (await door.get("/v1/models", "acme")).status_code == 200
    del door.tenants["acme"]
    door.write()
    door.keys.look()
    assert (await door.get("/v1/models", "acme")).status_code == 401
    door.tenants["acme"] = {}
    door.write()
    monkeypatch.setattr("deployments.tenants.live_keys.LOOK_SECONDS", 0.01)
    door.keys.start()
    for _ in range(500):
        if (await door.get("/v1/models", "acme")).status_code == 200:
            break
        await asyncio.sleep(0.01)
    else:
        raise AssertionError("the file was not read again")
    await door.keys.close()


async def test_adapters_are_administered_with_an_admin_key_only(door, fleet):
    assert [one["name"] for one in (await door.get("/v1/adapters", "admin")).json()["data"]] == [
        "json",
        "mirror",
        "shout",
        "spanish",
    ]
    for method, path in (("GET", "/v1/adapters"), ("POST", "/v1/adapters"), ("DELETE", "/v1/adapters/shout")):
        refused = await door.http.request(method, path, headers={"authorization": f"Bearer {KEYS['acme']}"})
        assert (refused.status_code, refused.json()["error"]["code"]) == (403, "admin_key_required")
    models = (await door.get("/v1/models", "admin")).json()["data"]
    assert [one["id"] for one in models] == [BASE_MODEL, "json", "mirror", "shout", "spanish"]
    assert (await door.complete("admin", "spanish")).status_code == 200


async def test_web_pages_of_listed_origins_alone_may_ask(door):
    asks = {"access-control-request-method": "POST", "access-control-request-headers": "authorization,content-type"}
    allowed = await door.http.options("/v1/completions", headers={"origin": "https://app.acme.com"} | asks)
    assert allowed.status_code == 200
    assert allowed.headers["access-control-allow-origin"] == "https://app.acme.com"
    assert "access-control-allow-credentials" not in allowed.headers
    other = await door.http.options("/v1/completions", headers={"origin": "https://evil.example"} | asks)
    assert "access-control-allow-origin" not in other.headers
    answered = await door.get("/v1/models", "acme", origin="https://app.acme.com")
    assert answered.headers["access-control-allow-origin"] == "https://app.acme.com"
    refused = await door.get("/v1/models", None, origin="https://app.acme.com")
    assert refused.headers["access-control-allow-origin"] == "https://app.acme.com", "a page can read why"
