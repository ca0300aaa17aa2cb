"""The arguments of serve_config.yaml: what is accepted, what is refused and how, what "auto" means."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from deployments.app import actor_options, build
from deployments.pacing import StreamPacing, paced, together
from deployments.settings import FleetSettings, app_root
from engine.request import GenerationChunk

ROOT = Path(__file__).parents[2]
CONFIG = yaml.safe_load((ROOT / "serve_config.yaml").read_text())["applications"][0]


def settings(**changes):
    return FleetSettings.model_validate({"model": "examples/demo/model"} | changes)


def test_the_shipped_configuration_builds_the_application():
    assert CONFIG["import_path"] == "deployments.app:build" and CONFIG["route_prefix"] == "/"
    parsed = FleetSettings.model_validate(CONFIG["args"])
    assert parsed.replicas.num_replicas == 2
    assert parsed.model_folder() == ROOT / "examples" / "demo" / "model"
    assert parsed.engine_settings().model_name == parsed.base_model_name == "lorafleet-demo"
    assert build(parsed) is not None
    # It crosses process borders as plain JSON.
    assert FleetSettings.model_validate(parsed.model_dump(mode="json")) == parsed


def test_the_autoscaling_that_the_shipped_configuration_offers_is_accepted():
    text = (ROOT / "serve_config.yaml").read_text()
    swapped = text.replace("num_replicas: 2", "").replace("# autoscaling:", "autoscaling:")
    args = yaml.safe_load(swapped)["applications"][0]["args"]
    scaling = FleetSettings.model_validate(args).replicas.autoscaling
    assert scaling is not None and (scaling.min_replicas, scaling.max_replicas) == (1, 4)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"modle": "x"}, "modle"),
        ({"engine": {"max_row": 4}}, "engine.max_row"),
        ({"engine": {"max_rows": "many"}}, "engine.max_rows"),
        ({"engine": {"max_rows": 0}}, "engine: max_rows is 0"),
        ({"engine": {"slots": {16: 0}}}, "engine: slots is {16: 0} but must"),
        ({"store": {"hub_retries": 99}}, "store: hub_retries is 99"),
        ({"adapters": {"a": "s3:x"}}, "Value error, adapters['a']"),
        ({"allow": ["acme/*"]}, "Value error, allow"),
        ({"routing": {"spread_at": 0}}, "routing: spread_at is 0"),
        ({"replicas": {"num_replicas": 0}}, "replicas.num_replicas"),
        ({"replicas": {"num_gpus": 1.5}}, "replicas: num_gpus is 1.5"),
        ({"replicas": {"num_gpus": "all"}}, "replicas.num_gpus"),
        ({"replicas": {"resources": {"GPU": 1}}}, "'GPU' is what Ray counts itself"),
        ({"gateway": {"resources": {"CPU": 1}}}, "'CPU' is what Ray counts itself"),
        ({"replicas": {"resources": {"rack-7": 0}}}, "replicas.resources.rack-7"),
        ({"replicas": {"autoscaling": {}}}, "replicas.autoscaling.max_replicas"),
        ({"replicas": {"autoscaling": {"max_replicas": 0}}}, "replicas.autoscaling.max_replicas"),
        ({"replicas": {"autoscaling": {"max_replicas": 2, "min_replicas": -1}}}, "replicas.autoscaling.min_replicas"),
        ({"replicas": {"autoscaling": {"max_replicas": 2, "target_ongoing_requests": 9}}}, "target_ongoing_requests"),
        (
            {"replicas": {"autoscaling": {"max_replicas": 2, "min_replicas": 3}}},
            "replicas: autoscaling: max_replicas is 2 but must be at least min_replicas, 3",
        ),
        (
            {"replicas": {"autoscaling": {"max_replicas": 4, "initial_replicas": 0}}},
            "replicas: autoscaling: initial_replicas is 0 but must be from min_replicas to max_replicas",
        ),
        (
            {"replicas": {"autoscaling": {"max_replicas": 4, "interval_s": 20}}},
            "replicas: autoscaling: look_back_s is 20 but must be more than interval_s, 20",
        ),
        (
            {"replicas": {"autoscaling": {"max_replicas": 4, "target_slots": 0}}},
            "replicas: autoscaling: target_slots is 0.0 but must be more than 0",
        ),
        (
            {"replicas": {"num_replicas": 2, "autoscaling": {"max_replicas": 4}}},
            "replicas: num_replicas is 2 but autoscaling is set too: leave one of them out, or write "
            "autoscaling.initial_replicas",
        ),
        ({"gateway": {"threads": "x"}}, "gateway.threads"),
        ({"gateway": {"threads": 0}}, "gateway: threads is 0"),
        ({"gateway": {"max_body_bytes": 0}}, "gateway: max_body_bytes is 0"),
        ({"gateway": {"admin": "everybody"}}, "gateway.admin"),
        ({"gateway": {"metric_adapters": -1}}, "gateway.metric_adapters"),
        ({"gateway": {"metric_tenants": -1}}, "gateway.metric_tenants"),
        ({"tracing": {"endpoint": "collector:4318"}}, "tracing.endpoint"),
        ({"tracing": {"sample": 1.5}}, "tracing.sample"),
    ],
)
def test_a_mistake_is_refused_by_name(changes, said):
    with pytest.raises(ValidationError) as caught:
        settings(**changes)
    assert said in str(caught.value)


@pytest.mark.parametrize("args", [{}, {"model": None}])
def test_the_model_is_required(args):
    with pytest.raises(ValidationError, match="model\n  Field required"):
        FleetSettings.model_validate(args)


def test_a_key_with_nothing_under_it_has_its_default():
    keys = [key for key in FleetSettings.model_fields if key != "model"]
    written = yaml.safe_load("\n".join(["model: examples/demo/model", *(f"{key}:" for key in keys)]))
    assert set(written.values()) == {"examples/demo/model", None}
    assert FleetSettings.model_validate(written) == settings()
    with pytest.raises(ValidationError, match="modle"):
        settings(modle=None)


@pytest.mark.parametrize(
    ("gpus", "replicas", "expected", "device"),
    [
        (0, 2, 0.0, "cpu"),
        (8, 2, 1.0, "cuda"),
        (2, 2, 1.0, "cuda"),
        (1, 2, 0.5, "cuda"),
        (2, 3, 0.5, "cuda"),
        (1, 1, 1.0, "cuda"),
    ],
)
def test_auto_is_one_gpu_where_the_cluster_has_enough_and_a_share_where_not(gpus, replicas, expected, device):
    resolved = settings(replicas={"num_replicas": replicas}, engine={"kv_memory_fraction": 0.8}).resolved(gpus)
    assert resolved.replicas.num_gpus == expected
    engine = resolved.engine_settings()
    assert engine.device == device
    assert engine.kv_memory_fraction == pytest.approx(0.8 * (expected or 1.0))


def test_a_fleet_that_scales_never_shares_a_gpu():
    """How many GPUs there will be, nobody knows yet."""
    scaling = settings(replicas={"autoscaling": {"max_replicas": 16}})
    assert scaling.resolved(2).replicas.num_gpus == 1.0
    assert scaling.resolved(0).replicas.num_gpus == 0.0


def test_replicas_go_where_the_settings_say():
    gpus = {"num_gpus": 1, "num_cpus": 4}
    assert actor_options(settings(replicas=gpus).replicas) == gpus
    told = settings(replicas=gpus | {"accelerator_type": "H100", "resources": {"rack-7": 0.1}}).replicas
    assert actor_options(told) == gpus | {"accelerator_type": "H100", "resources": {"rack-7": 0.1}}


def test_on_and_off_need_no_quotes_in_yaml():
    for written, read in (("on", "on"), ("off", "off"), ("loopback", "loopback"), ('"off"', "off")):
        assert settings(gateway=yaml.safe_load(f"admin: {written}")).gateway.admin == read


def test_an_empty_engine_model_name_compares_nothing():
    named = {"model_name": "served", "engine": {"model_name": ""}}
    assert settings(**named).engine_settings().model_name == ""
    assert settings(model_name="served").engine_settings().model_name == "served"
    assert settings().engine_settings().model_name is None


def test_a_number_of_gpus_and_a_device_are_taken_as_they_are():
    assert settings(replicas={"num_gpus": 0.5}).resolved(8).replicas.num_gpus == 0.5
    assert settings(replicas={"num_gpus": 0}).resolved(8).engine_settings().device == "cpu"
    assert settings(engine={"device": "cpu"}).resolved(8).engine_settings().device == "cpu"


def test_relative_paths_are_taken_from_the_application_not_the_working_directory(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert app_root() == ROOT
    assert settings().model_folder() == ROOT / "examples/demo/model"
    assert settings(model="/models/x").model_folder() == Path("/models/x")
    assert settings().store_settings().root == ROOT


def test_pacing_spaces_items_by_open_streams_up_to_the_longest_delay():
    pacing = StreamPacing(items_per_s=1000, max_delay_s=0.1)
    assert pacing.delay_s(1) == 0.001 and pacing.delay_s(50) == 0.05 and pacing.delay_s(1000) == 0.1


async def test_a_paced_stream_is_read_slowly_and_ends_without_delay():
    taken = []

    async def source():
        for i in range(3):
            taken.append(asyncio.get_running_loop().time())
            yield GenerationChunk("r", str(i), (i,), 1, i + 1, finish_reason="stop" if i == 2 else None)

    started = asyncio.get_running_loop().time()
    texts = [chunk.text async for chunk in paced(source(), lambda: 0.05)]
    ended = asyncio.get_running_loop().time()
    assert texts == ["0", "1", "2"]
    assert taken[1] - taken[0] >= 0.045 and taken[2] - taken[1] >= 0.045
    assert ended - taken[2] < 0.045 and taken[0] - started < 0.045
    assert [chunk.text async for chunk in together(source())] == ["012"]


def test_sources_are_settings_of_the_store_and_hold_no_credentials():
    sources = {"s3://acme": {"options": {"endpoint_url": "http://minio:9000"}, "env": {"secret": "ACME_SECRET"}}}
    made = settings(store={"sources": sources}, adapters={"x": "s3://acme/x"}, allow=["s3://acme/*"])
    source = made.store_settings().sources["s3://acme"]
    assert (source.options, source.env) == (sources["s3://acme"]["options"], {"secret": "ACME_SECRET"})
    assert FleetSettings.model_validate(made.model_dump(mode="json")) == made
    for mistake in (
        {"store": {"sources": {"s3://acme": {"options": {"secret": "hunter2"}}}}},
        {"store": {"sources": {"s3://acme": {"timeout_s": "hunter2"}}}},
        {"store": {"sources": {"s3://acme": {"secret": "hunter2"}}}},
        {"adapters": {"x": "s3://key:hunter2@acme/x"}},
    ):
        with pytest.raises(ValidationError) as refused:
            settings(**mistake)
        assert "hunter2" not in str(refused.value)
