"""The ``args`` of serve_config.yaml: parsed and checked once, here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, fields
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_type_hints

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, create_model, model_validator

from adapter_store.settings import StoreSettings
from deployments.api.service import ServiceLimits
from deployments.api.tool_formats import ToolFormatName
from deployments.routing.placement_policy import PlacementPolicy
from deployments.scaling.decision import ScalingPolicy
from engine.settings import EngineSettings
from engine.spec import ModelSpec

GATEWAY_EXTRA_SECONDS = 5.0


class _Section(BaseModel):
    """Unknown keys are mistakes, and the message names them. No message quotes what was set: it may be a password."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, hide_input_in_errors=True)


def _section_of(settings: type, name: str, without: set[str], **changed: Any) -> type[_Section]:
    """A section with the fields, types and defaults of a settings dataclass, so that there is one list of them."""
    hints = get_type_hints(settings)
    entries: dict[str, Any] = {}
    for entry in fields(settings):
        if entry.name in without:
            continue
        made = entry.default_factory() if entry.default_factory is not MISSING else entry.default
        entries[entry.name] = changed.get(entry.name, (hints[entry.name], made))
    return create_model(name, __base__=_Section, **entries)


if TYPE_CHECKING:  # a type checker cannot see into models that are made at run time

    class EngineSection(_Section):
        """Fields of ``EngineSettings``."""

    class StoreSection(_Section):
        """Fields of ``StoreSettings``."""

    class _PolicySection(_Section):
        """Fields of ``PlacementPolicy``."""

    class _LimitsSection(_Section):
        """Fields of ``ServiceLimits``."""

    class _ScalingSection(_Section):
        """Fields of ``ScalingPolicy``."""
else:
    EngineSection = _section_of(
        EngineSettings,
        "EngineSection",
        {"model", "store"},
        slots=(dict[int, int], dict(EngineSettings(model="any").slots)),
    )
    StoreSection = _section_of(StoreSettings, "StoreSection", {"root", "adapters", "folders", "allow"})
    _PolicySection = _section_of(PlacementPolicy, "_PolicySection", set())
    _LimitsSection = _section_of(ServiceLimits, "_LimitsSection", set())
    _ScalingSection = _section_of(ScalingPolicy, "_ScalingSection", set())


class RoutingSection(_PolicySection):
    """Fields of ``PlacementPolicy``, and:

    max_backoff_s: longest pause between two tries while every replica is full.
    """

    max_backoff_s: float = Field(default=0.05, gt=0)


def _on_or_off(value: Any) -> Any:
    """YAML reads on and off without quotes as true and false."""
    return {True: "on", False: "off"}[value] if isinstance(value, bool) else value


def _own_resources(resources: dict[str, float]) -> dict[str, float]:
    if taken := sorted({"CPU", "GPU", "memory", "object_store_memory"} & resources.keys()):
        raise ValueError(f"{taken[0]!r} is what Ray counts itself: resources are for names of your own")
    return resources


Resources = Annotated[dict[str, Annotated[float, Field(gt=0)]], AfterValidator(_own_resources)]


class GatewaySection(_LimitsSection):
    """Fields of ``ServiceLimits``, and how the Gateway deployment runs.

    max_ongoing_requests: requests one gateway holds open; Serve queues the rest. admin: who may use /v1/adapters and
    vLLM's load and unload endpoints: clients of the same machine, others too, nobody; where there are keys, with an
    admin key only. keys_file: the file with the hashes of API keys, and what their tenants may do; without one nobody
    needs a key. open: without keys, let everybody in who can reach the server, from other machines too.
    cors_origins: origins such as https://app.acme.com whose web pages browsers let use the server.
    metric_adapters, metric_tenants: how many have a label of their own in metrics, see ``LabelCap``. tool_format: how
    the model writes down calls of functions, see ``tool_formats``; found out from its chat template when left out.
    resources: as in ``ReplicaSection``.
    """

    num_replicas: int = Field(default=1, ge=1)
    num_cpus: float = Field(default=0.25, ge=0)
    resources: Resources = Field(default_factory=dict)
    max_ongoing_requests: int = Field(default=1024, ge=1)
    admin: Annotated[Literal["loopback", "on", "off"], BeforeValidator(_on_or_off)] = "loopback"
    metric_adapters: int = Field(default=50, ge=0)
    metric_tenants: int = Field(default=50, ge=0)
    keys_file: str | None = None
    open: bool = False
    cors_origins: list[str] = Field(default_factory=list)
    tool_format: ToolFormatName | None = None


class AutoscalingSection(_ScalingSection):
    """Fields of ``ScalingPolicy``, and between which numbers and how soon Serve follows it.

    min_replicas: 0 lets an idle fleet go away altogether; the next request waits for a replica to start.
    initial_replicas: at the first start; ``min_replicas`` when left out. upscale_delay_s, downscale_delay_s,
    downscale_to_zero_delay_s: how long a decision must have held before it is carried out; the last one is
    ``downscale_delay_s`` when left out. look_back_s: what decisions are a mean over. interval_s: how often replicas and
    gateways say what weighs on them.
    """

    min_replicas: int = Field(default=1, ge=0)
    max_replicas: int = Field(ge=1)
    initial_replicas: int | None = Field(default=None, ge=0)
    upscale_delay_s: float = Field(default=10.0, ge=0)
    downscale_delay_s: float = Field(default=300.0, ge=0)
    downscale_to_zero_delay_s: float | None = Field(default=None, ge=0)
    look_back_s: float = Field(default=20.0, gt=0)
    interval_s: float = Field(default=5.0, gt=0)

    def policy(self) -> dict[str, float]:
        """The fields of ``ScalingPolicy``."""
        return self.model_dump(include={entry.name for entry in fields(ScalingPolicy)})

    def mistakes(self) -> str | None:
        """What is wrong with these settings together."""
        if self.max_replicas < self.min_replicas:
            return f"max_replicas is {self.max_replicas} but must be at least min_replicas, {self.min_replicas}"
        initial = self.min_replicas if self.initial_replicas is None else self.initial_replicas
        if not self.min_replicas <= initial <= self.max_replicas:
            return f"initial_replicas is {initial} but must be from min_replicas to max_replicas"
        if self.look_back_s <= self.interval_s:
            return f"look_back_s is {self.look_back_s:g} but must be more than interval_s, {self.interval_s:g}"
        return None


class ReplicaSection(_Section):
    """How the LoraReplica deployment runs.

    num_replicas: how many; 1 when neither this nor ``autoscaling`` is set.
    num_gpus: GPUs of one replica, fractions allowed; "auto" is 1 where the cluster has GPUs, an equal share where it
    has fewer than replicas, and 0 where it has none; never a share with ``autoscaling``. Replicas that share a GPU
    share its memory: each takes its part of ``engine.kv_memory_fraction``.
    accelerator_type, resources: what a node must have for a replica, as Ray names it, such as "H100" and {"rack-7": 1}.
    warm_up_s: how long a new replica may spend on bringing adapters here before it takes requests; 0 does without.
    max_queued_requests: requests one gateway keeps while every replica is full or none is up; more get a 503.
    stream_items_per_s: stream items a replica sends at most, over all its streams; tokens that come faster are
    sent together. stream_max_delay_s: longest a token is held back for that. graceful_shutdown_timeout_s: how
    long running requests may go on when the replica is to stop.
    """

    num_replicas: int | None = Field(default=None, ge=1)
    autoscaling: AutoscalingSection | None = None
    num_gpus: float | Literal["auto"] = "auto"
    num_cpus: float = Field(default=0.5, ge=0)
    max_queued_requests: int = Field(default=1024, ge=0)
    stream_items_per_s: float = Field(default=1000.0, gt=0)
    stream_max_delay_s: float = Field(default=0.1, ge=0)
    graceful_shutdown_timeout_s: float = Field(default=30.0, ge=0)
    health_check_period_s: float = Field(default=5.0, gt=0)
    accelerator_type: str | None = None
    resources: Resources = Field(default_factory=dict)
    warm_up_s: float = Field(default=20.0, ge=0)

    @property
    def at_start(self) -> int:
        """Replicas that an application starts with at least."""
        return 0 if self.autoscaling is not None else self.num_replicas or 1

    def mistakes(self) -> str | None:
        """What is wrong with these settings together."""
        if self.autoscaling is not None and self.num_replicas is not None:
            return (
                f"num_replicas is {self.num_replicas} but autoscaling is set too: leave one of them out, or write "
                "autoscaling.initial_replicas for the number at the start"
            )
        gpus = self.num_gpus
        if gpus != "auto" and (gpus < 0 or (gpus > 1 and gpus != int(gpus))):
            return f"num_gpus is {gpus} but must be 0, a fraction of 1, or a whole number"
        wrong = None if self.autoscaling is None else self.autoscaling.mistakes()
        return None if wrong is None else f"autoscaling: {wrong}"


class TracingSection(_Section):
    """Where OpenTelemetry's spans go, see ``Tracing``.

    endpoint: URL of a collector that takes OTLP over HTTP, such as http://localhost:4318. sample: share of the requests
    without a traceparent that are traced.
    """

    endpoint: Annotated[str, Field(pattern="^https?://")] | None = None
    sample: float | None = Field(default=None, ge=0, le=1)


class FleetSettings(_Section):
    """Everything an operator may set. Relative paths are taken from the folder that holds ``deployments``.

    model: folder of the base model. model_name: what clients call it, and what adapters name as the model they were
    trained for (``engine.model_name`` where that differs); the folder's name when left out.
    adapters: name -> ``local:folder``, ``hub:org/name@revision`` or ``s3://bucket/prefix``. adapter_folders: every
    sub-folder that holds an adapter is one of that name. allow: patterns of references that clients may name directly.
    A key with nothing under it has its default.
    """

    model: str
    model_name: str | None = None
    adapters: dict[str, str] = Field(default_factory=dict)
    adapter_folders: list[str] = Field(default_factory=list)
    allow: list[str] = Field(default_factory=list)
    engine: EngineSection = EngineSection()
    store: StoreSection = StoreSection()
    replicas: ReplicaSection = ReplicaSection()
    gateway: GatewaySection = GatewaySection()
    routing: RoutingSection = RoutingSection()
    tracing: TracingSection = TracingSection()

    @model_validator(mode="before")
    @classmethod
    def _empty_is_default(cls, values: Any) -> Any:
        """A key with nothing under it, which YAML reads as null, is as good as left out."""
        if not isinstance(values, Mapping):
            return values
        return {key: value for key, value in values.items() if value is not None or key not in cls.model_fields}

    @model_validator(mode="after")
    def _check(self) -> FleetSettings:
        checks = {
            "": lambda: StoreSettings(adapters=self.adapters, allow=tuple(self.allow)),  # these stand in no section
            "store": self.store_settings,
            "engine": self.engine_settings,
            "routing": lambda: PlacementPolicy(**self.policy()),
            "gateway": self.service_limits,
            "replicas: autoscaling": self.scaling_policy,
        }
        for section, make in checks.items():
            try:
                make()
            except ValueError as error:
                raise ValueError(f"{section}: {error}" if section else str(error)) from error
        if wrong := self.replicas.mistakes():
            raise ValueError(f"replicas: {wrong}")
        return self

    def resolved(self, cluster_gpus: float) -> FleetSettings:
        """These settings with "auto" decided for a cluster with this many GPUs."""
        if self.replicas.num_gpus != "auto":
            return self
        # Replicas on one GPU share it equally: 3 replicas on 2 GPUs take a half each, as 2/3 would not fit twice.
        # How many an autoscaler brings, and to how many GPUs, nobody knows yet: each has one of its own.
        gpus = 1 / max(1, ceil(self.replicas.at_start / cluster_gpus)) if cluster_gpus else 0.0
        return self.model_copy(update={"replicas": self.replicas.model_copy(update={"num_gpus": gpus})})

    @property
    def base_model_name(self) -> str:
        return self.model_name or self.model_folder().name

    def model_folder(self) -> Path:
        """The base model's folder on this machine."""
        return self.path(self.model)

    def path(self, text: str) -> Path:
        """A path of these settings on this machine."""
        return Path(app_root(), Path(text).expanduser()).absolute()

    def store_settings(self) -> StoreSettings:
        """For the catalog and the adapter store, on this machine."""
        return StoreSettings(
            root=app_root(),
            adapters=self.adapters,
            folders=tuple(self.adapter_folders),
            allow=tuple(self.allow),
            **self.store.model_dump(),
        )

    def engine_settings(self) -> EngineSettings:
        """For one replica, on this machine. A replica without a GPU of its own stays off every GPU."""
        values = self.engine.model_dump()
        if values["model_name"] is None:  # an empty name stands for "compare nothing"
            values["model_name"] = self.model_name
        gpus = self.replicas.num_gpus
        if gpus != "auto":
            if values["device"] == "auto":
                values["device"] = "cuda" if gpus > 0 else "cpu"
            if 0 < gpus < 1:
                values["kv_memory_fraction"] *= gpus
        return EngineSettings(model=str(self.model_folder()), store=self.store_settings(), **values)

    def max_model_len(self) -> int:
        """Most tokens of a prompt and its completion together. Reads the model's config.json."""
        return ModelSpec.from_dir(self.model_folder()).context(self.engine_settings().max_model_len)

    def service_limits(self) -> ServiceLimits:
        """For one gateway."""
        return ServiceLimits(**self.gateway.model_dump(include={entry.name for entry in fields(ServiceLimits)}))

    def scaling_policy(self) -> ScalingPolicy | None:
        """When to have more or fewer replicas; None for a fixed number."""
        section = self.replicas.autoscaling
        return None if section is None else ScalingPolicy(**section.policy())

    def gateway_grace_s(self) -> float:
        """How long running requests may go on when a gateway is to stop: it outlives the replicas that stop with it, so
        that it can tell its clients what became of theirs."""
        return self.replicas.graceful_shutdown_timeout_s + GATEWAY_EXTRA_SECONDS

    def policy(self) -> Mapping[str, Any]:
        """The fields of ``PlacementPolicy``."""
        return self.routing.model_dump(exclude={"max_backoff_s"})


def app_root() -> Path:
    """The folder that holds ``deployments``: a checkout, a Ray working_dir, or site-packages."""
    return Path(__file__).resolve().parent.parent
