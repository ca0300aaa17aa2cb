"""What Serve's autoscaler makes of our policy: its own delays, limits and way from zero around ``scaling``."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from ray.serve._private.autoscaling_state import _resolve_policy_callable
from ray.serve._private.common import DeploymentID, ReplicaID
from ray.serve.autoscaling_policy import _apply_autoscaling_config
from ray.serve.config import AutoscalingContext

from deployments.app import build, number_of_replicas
from deployments.scaling.autoscaling import MEMORY
from deployments.scaling.pressure import slots_used
from deployments.settings import FleetSettings

ROOT = Path(__file__).parents[2]
DEPLOYMENT = DeploymentID("LoraReplica", "lorafleet")
CALM = {"rows": 20.0, "max_rows": 32.0, "wait_s": 0.0, "slots_used": 0.3, "loading": 0.0}
IDLE = {"rows": 0.0, "max_rows": 32.0, "wait_s": 0.0, "slots_used": 0.0, "loading": 0.0}


def config(**changes):
    scaling = {"max_replicas": 8, "upscale_delay_s": 10, "downscale_delay_s": 60} | changes
    settings = FleetSettings.model_validate({"model": "examples/demo/model", "replicas": {"autoscaling": scaling}})
    return number_of_replicas(settings.replicas)["autoscaling_config"]


class Controller:
    """As much of Serve's controller as decides: its own wrapper around our policy, a clock that the test moves."""

    def __init__(self, monkeypatch, **changes: Any) -> None:
        self.config = config(**changes)
        self.policy = _apply_autoscaling_config(_resolve_policy_callable(self.config.policy))
        self.state: dict[str, Any] = {}
        self.now = 1000.0
        self.summed_up: list[float] = []  # when the policy looked at what replicas said
        self.target = self.config.initial_replicas or self.config.min_replicas
        monkeypatch.setattr("ray.serve.autoscaling_policy.time.time", lambda: self.now)

    def turn(self, told, requests=0.0, running=None, seconds=1.0):
        """One turn of the control loop; ``told``: what each running replica says, None from one that says nothing."""
        self.now += seconds
        running = len(told) if running is None else running
        replicas = [ReplicaID(f"r{number}", DEPLOYMENT) for number in range(running)]
        metrics: dict[str, dict[ReplicaID, float]] = {}
        for replica, words in zip(replicas, told, strict=False):
            for name, value in (words or {}).items():
                metrics.setdefault(name, {})[replica] = value
        context = AutoscalingContext(
            deployment_id=DEPLOYMENT,
            deployment_name=DEPLOYMENT.name,
            app_name=DEPLOYMENT.app_name,
            current_num_replicas=running,
            target_num_replicas=self.target,
            running_replicas=replicas,
            total_num_requests=requests,
            total_queued_requests=0.0,
            aggregated_metrics=lambda: self.summed_up.append(self.now) or metrics,
            raw_metrics={},
            capacity_adjusted_min_replicas=self.config.min_replicas,
            capacity_adjusted_max_replicas=self.config.max_replicas,
            policy_state=dict(self.state),
            last_scale_up_time=None,
            last_scale_down_time=None,
            current_time=self.now,
            config=self.config,
        )
        wanted, self.state = self.policy(context)
        self.target = min(max(wanted, self.config.min_replicas), self.config.max_replicas)
        return self.target

    def turns(self, seconds, told, requests=0.0):
        for _ in range(seconds):
            self.turn(told, requests)
        return self.target


def test_a_fleet_grows_once_pressure_has_lasted_and_shrinks_once_it_has_gone(monkeypatch):
    serve = Controller(monkeypatch)
    pressed = CALM | {"rows": 64.0}
    assert serve.turns(9, [pressed]) == 1
    assert serve.turns(2, [pressed]) == 2
    assert serve.turns(200, [CALM] * 2) == 2
    assert serve.turns(59, [IDLE | {"rows": 4.0}] * 2) == 2
    assert serve.turns(3, [IDLE | {"rows": 4.0}] * 2) == 1
    assert serve.turns(300, [IDLE]) == 1, "no less than min_replicas"


def test_no_more_than_max_replicas(monkeypatch):
    serve = Controller(monkeypatch, max_replicas=3)
    for running in (1, 2, 3, 3, 3):
        serve.turns(20, [CALM | {"rows": 320.0, "wait_s": 30.0}] * running)
    assert serve.target == 3


def test_a_wait_is_enough_and_is_remembered(monkeypatch):
    serve = Controller(monkeypatch)
    serve.turns(20, [IDLE | {"rows": 3.0, "wait_s": 2.0, "slots_used": 0.5}])
    assert serve.target == 2
    assert serve.turns(300, [IDLE | {"rows": 1.5}] * 2) == 2, "one was too few for the same requests just now"
    assert serve.state[MEMORY].too_small == 1
    assert serve.turns(700, [IDLE | {"rows": 1.5}] * 2) == 1, "it is tried again after the cool-down"


def test_to_zero_and_back(monkeypatch):
    serve = Controller(monkeypatch, min_replicas=0, initial_replicas=1, downscale_to_zero_delay_s=120)
    assert serve.turns(110, [IDLE]) == 1
    assert serve.turns(5, [IDLE], requests=0.1) == 1, "somebody asked"
    assert serve.turns(119, [IDLE]) == 1
    assert serve.turns(3, [IDLE]) == 0
    assert serve.turns(100, []) == 0
    assert serve.turn([], requests=1.0) == 1, "at once"
    assert serve.turn([], requests=0.0) == 1, "and for as long as it starts"
    assert serve.turn([None]) == 1


def test_replicas_that_have_not_reported_decide_nothing(monkeypatch):
    serve = Controller(monkeypatch, min_replicas=2)
    assert serve.turns(300, [IDLE, None]) == 2
    assert serve.turns(300, [None, None]) == 2


def test_what_replicas_said_is_summed_up_once_a_second(monkeypatch):
    serve = Controller(monkeypatch)
    for _ in range(30):
        serve.turn([CALM], seconds=0.125)
    assert len(serve.summed_up) == 4
    serve.turn([CALM] * 2, seconds=0.125)
    assert len(serve.summed_up) == 5, "a change is looked at on the spot"


def test_the_policy_runs_where_our_package_is_not(tmp_path):
    """Serve's controller has no working_dir of an application: the policy comes whole."""
    pickled = tmp_path / "policy"
    pickled.write_bytes(config(target_rows=0.5).policy.get_serialized_policy_def())
    code = f"""
import sys
from ray import cloudpickle
policy = cloudpickle.loads(open({str(pickled)!r}, "rb").read())(target_rows=0.5)
class Context:
    policy_state = {{}}; current_num_replicas = 2; target_num_replicas = 2; total_num_requests = 0; current_time = 5.0
    capacity_adjusted_min_replicas = 1; capacity_adjusted_max_replicas = 9; app_name = "a"
    aggregated_metrics = {{name: {{"r0": value, "r1": value}} for name, value in {CALM!r}.items()}}
print(policy(Context)[0])
print([name for name in sys.modules if name.startswith("deployments")])
"""
    ran = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert ran.stdout.splitlines() == ["3", "[]"]


def test_an_application_with_autoscaling_is_built():
    args = {"model": "examples/demo/model", "replicas": {"autoscaling": {"max_replicas": 3, "min_replicas": 0}}}
    assert build(FleetSettings.model_validate(args)) is not None
    told = config(min_replicas=0, look_back_s=12, interval_s=3)
    assert (told.min_replicas, told.max_replicas, told.look_back_period_s, told.metrics_interval_s) == (0, 8, 12, 3)
    fixed = FleetSettings.model_validate({"model": "examples/demo/model", "replicas": {"num_replicas": 3}})
    assert number_of_replicas(fixed.replicas) == {"num_replicas": 3}


@pytest.mark.parametrize(
    ("free", "share"),
    [
        ({16: 48, 64: 8}, 0.0),
        ({16: 0, 64: 8}, 48 / 56),
        ({16: 48, 64: 0}, 1.0),  # a large adapter finds nothing
        ({16: 24, 64: 4}, 0.5),
        ({}, 1.0),
    ],
)
def test_slots_are_as_used_as_the_rank_finds_them_that_has_least_left(free, share):
    assert slots_used({16: 48, 64: 8}, free) == pytest.approx(share)
    assert slots_used({}, {}) == 0.0


def test_pinned_adapters_are_no_reason_for_more_replicas():
    assert slots_used({16: 4, 64: 2}, {16: 0, 64: 2}, [8, 8, 16, 4]) == 0.0
    assert slots_used({16: 4, 64: 2}, {16: 0, 64: 0}, [8, 8, 16, 4]) == 1.0
    assert slots_used({16: 4}, {16: 1}, [16, 16]) == 0.5
