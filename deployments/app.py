"""The Serve application: ``import_path: deployments.app:build``."""

# No `from __future__ import annotations` here: Serve reads the builder's annotation as a class.
import hashlib
import json
from typing import Any

import ray
from ray import serve
from ray.serve import Application
from ray.serve.config import DeploymentActorConfig, RequestRouterConfig

from deployments.gateway import Gateway
from deployments.hub import HUB_NAME, FleetHub
from deployments.live import LiveSettings
from deployments.replica import LoraReplica
from deployments.scaling.autoscaling import autoscaling_config
from deployments.settings import FleetSettings, ReplicaSection

MARGIN = 32  # a replica's own queue must be what refuses, so Serve lets this many more through


def build(args: FleetSettings) -> Application:
    """The gateway in front of the replicas, as the settings say.

    Serve turns ``args`` of the configuration file into ``FleetSettings`` and reports what is wrong by field.
    """
    return application(args)


def application(args: FleetSettings, live: LiveSettings | None = None) -> Application:
    """The same for ``serve.run`` from Python: what ``live`` says changes without a restart when it is run again.

    serve.run(application(settings, LiveSettings(allow=["hub:acme/*"])), name="lorafleet")
    """
    settings = args.resolved(cluster_gpus())
    user_config = None if live is None else live.model_dump(exclude_none=True)
    engine = settings.engine_settings()
    router: dict[str, Any] = {
        "request_router_class": "deployments.router:AdapterRouter",
        "request_router_kwargs": dict(settings.policy()),
        "initial_backoff_s": min(0.01, settings.routing.max_backoff_s),
        "max_backoff_s": settings.routing.max_backoff_s,
    }
    hub = DeploymentActorConfig(
        name=HUB_NAME, actor_class=ray.remote(FleetHub), actor_options={"num_cpus": 0, "max_concurrency": 1000}
    )
    replica_deployment = serve.deployment(
        name="LoraReplica",
        **number_of_replicas(settings.replicas),
        max_ongoing_requests=engine.max_rows + engine.max_waiting + MARGIN,
        max_queued_requests=settings.replicas.max_queued_requests,
        graceful_shutdown_timeout_s=settings.replicas.graceful_shutdown_timeout_s,
        health_check_period_s=settings.replicas.health_check_period_s,
        ray_actor_options=actor_options(settings.replicas),
        request_router_config=RequestRouterConfig(**router),
        deployment_actors=[hub],
        user_config=user_config,
    )
    gateway_deployment = serve.deployment(
        name="Gateway",
        num_replicas=settings.gateway.num_replicas,
        max_ongoing_requests=settings.gateway.max_ongoing_requests,
        graceful_shutdown_timeout_s=settings.gateway_grace_s(),
        ray_actor_options={"num_cpus": settings.gateway.num_cpus, "resources": settings.gateway.resources},
        user_config=user_config,
    )
    plain = settings.model_dump(mode="json")
    # Serve takes every `serve.run` for new code unless it is told a version; a configuration file has its own.
    version = hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()
    replicas = replica_deployment(LoraReplica).options(version=version, _internal=True)
    gateway = gateway_deployment(serve.ingress()(Gateway)).options(version=version, _internal=True)
    return gateway.bind(replicas.bind(plain), plain)


def number_of_replicas(replicas: ReplicaSection) -> dict[str, Any]:
    """How many replicas there are, as Serve wants to be told."""
    scaling = replicas.autoscaling
    if scaling is None:
        return {"num_replicas": replicas.num_replicas or 1}
    config = autoscaling_config(
        scaling.policy(),
        scaling.interval_s,
        min_replicas=scaling.min_replicas,
        max_replicas=scaling.max_replicas,
        initial_replicas=scaling.initial_replicas,
        upscale_delay_s=scaling.upscale_delay_s,
        downscale_delay_s=scaling.downscale_delay_s,
        downscale_to_zero_delay_s=scaling.downscale_to_zero_delay_s,
        look_back_period_s=scaling.look_back_s,
    )
    return {"autoscaling_config": config}


def actor_options(replicas: ReplicaSection) -> dict[str, Any]:
    """What Ray sets aside for a replica, and where."""
    options: dict[str, Any] = {"num_cpus": replicas.num_cpus, "num_gpus": replicas.num_gpus}
    if replicas.accelerator_type is not None:
        options["accelerator_type"] = replicas.accelerator_type
    return options | ({"resources": dict(replicas.resources)} if replicas.resources else {})


def cluster_gpus() -> float:
    """GPUs of the Ray cluster this process is connected to; 0 without one."""
    return ray.cluster_resources().get("GPU", 0.0) if ray.is_initialized() else 0.0
