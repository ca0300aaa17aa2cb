"""Serve's autoscaler asks here how many replicas there should be: ``decision`` behind its ``AutoscalingPolicy``.

The policy runs in Serve's controller, which need not be able to import this package (it has no ``working_dir`` of an
application), so what it needs goes there by value.
"""

from __future__ import annotations

import logging
import warnings
from typing import Any

from ray import cloudpickle
from ray.serve.config import AutoscalingConfig, AutoscalingContext, AutoscalingPolicy

from deployments.scaling import decision as scaling
from deployments.scaling.decision import ReplicaPressure, ScalingDecision, ScalingMemory, ScalingPolicy

MEMORY = "lorafleet"
DECIDE_SECONDS = 1.0  # Serve asks ten times a second, and summing up what a thousand replicas said takes a while

logger = logging.getLogger("ray.serve")


class FleetAutoscaling:
    """Called by Serve's controller on every turn of its loop, with what replicas' ``record_autoscaling_stats`` told.

    What is around it is Serve's: limits, delays, and the way from no replica to the first one.
    """

    def __init__(self, **policy: float) -> None:
        """policy: the fields of ``ScalingPolicy``."""
        self._policy = ScalingPolicy(**policy)
        self._told: tuple[int, int] | None = None
        self._decided: tuple[tuple[int, int], float, int] | None = None  # (running, target), when, wish

    def __call__(self, context: AutoscalingContext) -> tuple[int, dict[str, Any]]:
        """The number of replicas, and the state that the next call finds in ``context.policy_state``."""
        state = context.policy_state or {}
        memory: ScalingMemory | None = state.get(MEMORY)
        sizes, now = (context.current_num_replicas, context.target_num_replicas), context.current_time or 0.0
        if self._decided is not None and self._decided[0] == sizes and 0 <= now - self._decided[1] < DECIDE_SECONDS:
            return self._decided[2], {MEMORY: memory}
        decision = scaling.decide(
            self._policy,
            reports(context),
            running=context.current_num_replicas,
            target=context.target_num_replicas,
            requests=context.total_num_requests,
            now=now,
            memory=memory,
        )
        bounds = context.capacity_adjusted_min_replicas, context.capacity_adjusted_max_replicas
        wanted = min(max(decision.replicas, bounds[0]), bounds[1])
        self._tell(context, wanted, decision)
        self._decided = sizes, now, wanted
        return wanted, {MEMORY: decision.memory}

    def _tell(self, context: AutoscalingContext, wanted: int, decision: ScalingDecision) -> None:
        """Log a wish once: what comes of it, Serve logs when it has lasted."""
        wish = (context.target_num_replicas, wanted)
        if wish != self._told and wish[0] != wish[1]:
            logger.info(
                "autoscaling %s: %s asks for %d replicas, not %d", context.app_name, decision.signal, *wish[::-1]
            )
        self._told = wish


def reports(context: AutoscalingContext) -> list[ReplicaPressure]:
    """What the replicas that run have told, each as a mean over Serve's look-back period."""
    told = context.aggregated_metrics or {}
    names = ReplicaPressure.__dataclass_fields__
    replicas = set.intersection(*(set(told.get(name, ())) for name in names))
    return [ReplicaPressure(**{name: told[name][replica] for name in names}) for replica in replicas]


def autoscaling_config(policy: dict[str, float], interval_s: float, **serve: Any) -> AutoscalingConfig:
    """Serve's settings. policy: the fields of ``ScalingPolicy``. interval_s: seconds between two words of a replica.
    serve: other fields of ``AutoscalingConfig``."""
    cloudpickle.register_pickle_by_value(scaling)
    try:
        function = f"{__name__}:{FleetAutoscaling.__name__}"
        made = AutoscalingPolicy(policy_function=function, policy_kwargs=policy)
    finally:
        cloudpickle.unregister_pickle_by_value(scaling)
    with warnings.catch_warnings():
        # Serve says that an environment variable is to replace it, but 2.60 reads this one.
        warnings.filterwarnings("ignore", message=".*metrics_interval_s.*", category=DeprecationWarning)
        return AutoscalingConfig(metrics_interval_s=interval_s, policy=made, **serve)
