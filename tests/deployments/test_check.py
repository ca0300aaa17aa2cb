"""``python -m deployments.check``: what it says of a configuration file, and that it says so by its exit code."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from deployments.check import application_mistakes, application_warnings, mistakes, warnings

ROOT = Path(__file__).parents[2]


def config(tmp_path, port=None, application=None, **args):
    made = yaml.safe_load((ROOT / "serve_config.yaml").read_text())
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        made["http_options"]["port"] = probe.getsockname()[1] if port is None else port
    made["applications"][0]["args"] |= args
    made["applications"][0] |= application or {}
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(made))
    return file


def checked(file, *options):
    command = [sys.executable, "-m", "deployments.check", *options, str(file)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_the_shipped_configuration_has_no_mistake(tmp_path):
    assert list(mistakes(config(tmp_path))) == []


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ({"replicas": {"num_repicas": 1}}, "args.replicas.num_repicas: unknown key; known are accelerator_type, auto"),
        ({"modle": "x"}, "args.modle: unknown key; known are adapter_folders, adapters, allow, engine,"),
        ({"engine": {"max_rows": "many"}}, "args.engine.max_rows: Input should be a valid integer"),
        ({"engine": {"max_rows": 0}}, "args.engine: max_rows is 0 but must be 1 or more"),
        ({"engine": {"slots": {16: 0}}}, "args.engine: slots is {16: 0} but must be ranks and counts of 1 or more"),
        ({"replicas": {"num_gpus": 1.5}}, "args.replicas: num_gpus is 1.5"),
        ({"adapters": {"model": "hub:acme/x"}}, "args.model_name: an adapter is named 'model' like the base model"),
        (
            {"model_name": "shout", "adapter_folders": ["examples/demo/adapters"]},
            "args.model_name: an adapter is named 'shout' like the base model",
        ),
        ({"adapters": {"a": "s3:x"}}, "args.adapters['a']: "),
        (
            {"adapters": {"x": "ftpp://b/c"}},
            "args.adapters['x']: there is no scheme 'ftpp'; known are local:, hub:, s3://",
        ),
        ({"allow": ["ftpp://b/*"]}, "args.allow: there is no scheme 'ftpp'"),
        ({"store": {"sources": {"ftpp://b": {}}}}, "args.store.sources['ftpp://b']: there is no scheme 'ftpp'"),
        (
            {"store": {"sources": {"s3://b": {"options": {"endpoint_url": "https://user:pw@minio"}}}}},
            "args.store.sources.s3://b: options: 'endpoint_url' is a URL with a credential",
        ),
        ({"allow": ["acme/*"]}, "args.allow: 'acme/*' must start with"),
        ({"model": "/no/such/model"}, "args.model: "),
        ({"engine": {"max_model_len": 100_000}}, "args.engine.max_model_len: 100000 is more than the model's 512"),
        (
            {"engine": {"slots": {8: 4, 64: 1}}, "store": {"host_cache_bytes": 1000}},
            "args.store.host_cache_bytes is 1000 but one adapter of rank 64 needs ",
        ),
        ({"adapter_folders": ["/does/not/exist"]}, "args.adapter_folders: there is no folder /does/not/exist"),
        ({"adapters": {"gone": "local:/no/folder"}}, "args.adapters['gone']: there is no adapter_config.json in /no/"),
    ],
)
def test_a_mistake_is_told_in_one_line(args, said):
    found = list(application_mistakes({"model": "examples/demo/model"} | args))
    assert len(found) == 1 and found[0].startswith(said), found


@pytest.mark.parametrize(
    ("application", "said"),
    [
        ({"import_path": "deployments.app:biuld"}, ".import_path: there is no application at 'deployments.app:biuld'"),
        ({"import_path": "deployments.ap:build"}, ".import_path: there is no application at 'deployments.ap:build'"),
        ({"agrs": {"model": "x"}}, ".agrs: unknown key; known are args, autoscaling_policy, deployments, "),
        ({"import_path": "deployments.app.build", "args": {"model": "/no/such/model"}}, None),
        ({"deployments": [{"name": "Gatway"}]}, ".deployments.0.name: there is no deployment 'Gatway'"),
        (
            {"deployments": [{"name": "Gateway", "user_confg": {}}]},
            ".deployments.0.user_confg: unknown key; known are ",
        ),
        ({"import_path": None}, ".import_path: Input should be a valid string"),
        ({"args": None}, ".args: Input should be a valid dictionary"),
    ],
)
def test_a_mistake_beside_args_is_told_in_one_line(tmp_path, application, said):
    (found,) = mistakes(config(tmp_path, application=application))
    assert found.startswith(f"applications.0{said}" if said else "args.model: "), found


@pytest.mark.parametrize("application", [{"runtime_env": {}, "deployments": []}, {"import_path": "their.app:build"}])
def test_what_serve_knows_and_other_applications_are_no_mistakes(tmp_path, application):
    assert list(mistakes(config(tmp_path, application=application))) == []


@pytest.mark.parametrize("text", ["", "applications:", "- 1"])
def test_a_file_that_is_no_configuration_is_told(tmp_path, text):
    file = tmp_path / "config.yaml"
    file.write_text(text)
    found = list(mistakes(file))
    assert len(found) == 1 and "Input should be a valid" in found[0], found


def test_a_port_that_is_taken_is_told(tmp_path):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        file = config(tmp_path, port)
        (found,) = mistakes(file)
        running = checked(file, "--running")
    assert f"127.0.0.1:{port} cannot be used" in found
    assert (running.returncode, running.stderr) == (0, "")


@pytest.mark.parametrize("port", [99_999, 65_536, -1, 0])
def test_a_number_that_is_no_port_is_told_in_one_line(tmp_path, port):
    (found,) = mistakes(config(tmp_path, port))
    assert found == f"http_options.port: {port} is no port: it must be from 1 to 65535"


def test_keys_that_serve_would_pass_over_are_told(tmp_path):
    file = config(tmp_path)
    shape = yaml.safe_load(file.read_text())
    file.write_text(yaml.safe_dump(shape | {"http_option": {}, "http_options": shape["http_options"] | {"prot": 1}}))
    top, inner = mistakes(file)
    assert top.startswith("http_option: unknown key; known are applications, ")
    assert inner.startswith("http_options.prot: unknown key; known are host, ")


def test_a_key_that_is_written_twice_is_told_with_its_lines(tmp_path):
    file = config(tmp_path)
    text = file.read_text()
    file.write_text(text.replace("      max_rows:", "      max_rows: 4\n      max_rows:"))
    line = 1 + text.splitlines().index("      max_rows: 16")
    (found,) = mistakes(file)
    assert found.startswith(f"applications.0.args.engine.max_rows: written in line {line} and again in line {line + 1}")


def test_a_key_that_is_written_twice_in_one_line_is_told(tmp_path):
    file = config(tmp_path)
    file.write_text(file.read_text() + "grpc_options: {port: 9000, port: 9001}\n")
    (found,) = mistakes(file)
    assert found.startswith("grpc_options.port: written in line ")


def test_one_user_config_for_both_deployments_is_no_repetition(tmp_path):
    file = config(tmp_path)
    gateway, replica = "{name: Gateway, user_config: &live {allow: []}}", "{name: LoraReplica, user_config: *live}"
    live = f"  deployments:\n  - {gateway}\n  - {replica}\n"
    file.write_text(file.read_text().replace("  name: lorafleet\n", "  name: lorafleet\n" + live))
    assert "*live" in file.read_text()
    assert list(mistakes(file)) == []


def test_every_mistake_is_told():
    names = {"model_name": "shout", "adapter_folders": ["examples/demo/adapters", "/does/not/exist"]}
    found = list(application_mistakes({"model": "/no/such/model"} | names))
    assert [mistake.partition(": ")[0] for mistake in found] == [
        "args.model",
        "args.adapter_folders",
        "args.model_name",
    ]


@pytest.mark.parametrize(
    ("engine", "said"),
    [
        ({}, None),
        ({"num_pages": 4}, None),
        ({"num_pages": 3}, "3 pages of 16 tokens hold 48 tokens in all, less than a short prompt of 64"),
        ({"num_pages": 32, "page_size": 1}, "32 pages of 1 tokens hold 32 tokens in all, less than a short prompt"),
        ({"num_pages": 2, "max_model_len": 32}, None),
        ({"num_pages": 1, "max_model_len": 32}, "1 pages of 16 tokens hold 16 tokens in all, less than a short prompt"),
    ],
)
def test_a_cache_for_less_than_a_short_prompt_is_warned_of(engine, said):
    args = {"model": "examples/demo/model", "engine": engine}
    assert list(application_mistakes(args)) == []
    found = list(application_warnings(args))
    assert len(found) == (said is not None) and all(f"args.engine.num_pages: {said}" in one for one in found), found


@pytest.mark.parametrize("engine", [{"slots": {64: 1}}, {"slots": {64: 1}, "device": "cpu"}, {"slots": {}}])
def test_the_smallest_host_cache_without_mistake_is_what_a_store_takes(engine):
    def said(host_cache_bytes):
        store = {"host_cache_bytes": host_cache_bytes}
        args = {"model": "examples/demo/model", "engine": engine, "store": store}
        return list(application_mistakes(args)), args

    refused, _ = said(0)
    if not engine["slots"]:
        assert refused == []
        return
    least = int(refused[0].split(" needs ")[1].split()[0])
    assert len(said(least - 1)[0]) == 1
    found, args = said(least)
    assert found == []
    warned = list(application_warnings(args))  # an engine on a CPU needs more: numbers of four bytes
    assert [one.endswith("(where the engine runs on cpu)") for one in warned] == [True] * ("device" not in engine)


def test_what_sources_need_and_this_machine_lacks_is_warned_of(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gcsfs", None)  # to import it fails, as where it is not installed
    monkeypatch.setenv("CHECK_KEY", "set")
    monkeypatch.delenv("CHECK_SECRET", raising=False)
    sources = {"gs://acme": {"env": {"key": "CHECK_KEY", "secret": "CHECK_SECRET"}}}
    both = [{"name": name, "user_config": {"allow": ["gs://b/*"]}} for name in ("Gateway", "LoraReplica")]
    adapters = {"x": "gs://acme/x", "y": "gs://acme/y", "z": "memory://acme/z"}
    file = config(tmp_path, application={"deployments": both}, adapters=adapters, store={"sources": sources})
    assert list(mistakes(file)) == []
    assert [one.partition(": ")[0] for one in warnings(file)] == [
        "args.adapters['x']",
        "args.store.sources['gs://acme'].env.secret",
        "user_config.allow",
    ]
    assert "pip install lorafleet[gs]" in next(warnings(file))


def test_an_exporter_of_spans_that_is_missing_is_told(tmp_path, monkeypatch):
    file = config(tmp_path, tracing={"endpoint": "http://collector:4318"})
    before = list(warnings(file))
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    (found,) = [one for one in warnings(file) if one not in before]
    assert found.startswith("args.tracing.endpoint: ") and "lorafleet[tracing]" in found


def test_a_warning_stops_nothing(tmp_path):
    file = config(tmp_path, engine={"num_pages": 1})
    ended = checked(file)
    assert (ended.returncode, ended.stdout) == (0, "")
    assert ended.stderr.startswith(f"{file}: warning: args.engine.num_pages: 1 pages") and ended.stderr.count("\n") == 1


def test_the_exit_code_stops_a_start(tmp_path):
    file = config(tmp_path, engine={"max_row": 4})
    ended = checked(file)
    assert ended.returncode == 1
    assert ended.stderr.startswith(f"{file}: args.engine.max_row: unknown key")
    assert "Traceback" not in ended.stderr


@pytest.mark.parametrize(
    ("user_config", "said"),
    [
        ({"adapters": {"a": "nonsense"}}, "deployments.0.user_config.adapters['a']: "),
        ({"max_rows": 3}, "deployments.0.user_config.max_rows: unknown key; known are adapter_folders,"),
        (
            {"adapter_folders": ["/does/not/exist"]},
            "deployments.0.user_config.adapter_folders: there is no folder /does",
        ),
        (
            {"adapters": {"gone": "local:/no/folder"}},
            "deployments.0.user_config.adapters['gone']: there is no adapter_",
        ),
    ],
)
def test_a_mistake_in_user_config_is_told_by_its_place(tmp_path, user_config, said):
    for name in ("Gateway", "LoraReplica"):
        deployments = [{"name": name, "user_config": user_config}]
        (found,) = mistakes(config(tmp_path, application={"deployments": deployments}))
        assert found.startswith(f"applications.0.{said}")
    good = [{"name": "Gateway", "user_config": {"allow": ["hub:acme/*"], "adapter_folders": []}}]
    assert list(mistakes(config(tmp_path, application={"deployments": good}))) == []


def test_a_number_of_replicas_beside_autoscaling_is_told(tmp_path):
    scaling = {"autoscaling": {"max_replicas": 2}}
    fixed = [{"name": "Gateway", "num_replicas": 2}, {"name": "LoraReplica", "num_replicas": 2}]
    (found,) = mistakes(config(tmp_path, application={"deployments": fixed}, replicas=scaling))
    assert "deployments.1.num_replicas: args.replicas.autoscaling is set too" in found
    assert list(mistakes(config(tmp_path, application={"deployments": fixed}, replicas={}))) == []
    (found,) = mistakes(config(tmp_path, replicas=scaling | {"num_replicas": 2}))
    assert "num_replicas is 2 but autoscaling is set too: leave one of them out" in found


def test_whoever_lets_other_machines_in_says_who_has_a_key_or_that_nobody_needs_one(tmp_path):
    def found(host, **gateway):
        file = config(tmp_path, gateway=gateway)
        made = yaml.safe_load(file.read_text())
        made["http_options"].pop("host", None)
        made["http_options"] |= {} if host is None else {"host": host}
        file.write_text(yaml.safe_dump(made))
        return list(mistakes(file, running=True))

    keys = tmp_path / "keys.yaml"
    keys.write_text("tenants: {acme: {keys: []}}")
    for host in ("0.0.0.0", "::", "10.0.0.7", None):  # Serve's own default lets everybody in
        (told,) = found(host)
        assert told.startswith("args.gateway: http_options.host is") and "gateway.keys_file" in told
        assert found(host, open=True) == found(host, keys_file=str(keys)) == []
    for host in ("127.0.0.1", "localhost", "::1"):
        assert found(host) == []
    (told,) = found("127.0.0.1", keys_file="nowhere.yaml")
    assert told.startswith("args.gateway.keys_file: keys file ") and "cannot be read" in told
