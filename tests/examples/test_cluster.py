"""The cluster examples hold together: what KubeRay reads, what Serve reads, and what replicas ask of the pods."""

from __future__ import annotations

import json
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.scripts.scripts import start
from ray.serve.scripts import deploy

from deployments.check import mistakes
from deployments.settings import FleetSettings

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "examples" / "cluster"
MANIFESTS = sorted(FOLDER.glob("rayservice*.yaml"))
SCRIPTS = sorted(FOLDER.glob("*.sh"))

# The fields of KubeRay 1.x that an example may use: ray-operator/apis/ray/v1, and Kubernetes' own of a pod.
SERVICE = {"serveConfigV2", "rayClusterConfig", "serveService", "upgradeStrategy", "excludeHeadPodFromServeSvc"}
CLUSTER = {"headGroupSpec", "workerGroupSpecs", "rayVersion", "enableInTreeAutoscaling", "autoscalerOptions"}
AUTOSCALER = {"resources", "env", "idleTimeoutSeconds", "upscalingMode", "version"}
HEAD = {"rayStartParams", "template", "serviceType", "headService"}
WORKER = {"groupName", "replicas", "minReplicas", "maxReplicas", "rayStartParams", "template", "numOfHosts"}
POD = {"containers", "volumes", "nodeSelector", "tolerations", "affinity", "terminationGracePeriodSeconds"}
CONTAINER = {"name", "image", "env", "envFrom", "resources", "ports", "volumeMounts"}


@pytest.fixture(params=MANIFESTS, ids=lambda file: file.stem)
def manifest(request) -> Path:
    return request.param


def spec_of(file: Path) -> dict[str, Any]:
    return yaml.safe_load(file.read_text())["spec"]


def groups_of(file: Path) -> list[dict[str, Any]]:
    cluster = spec_of(file)["rayClusterConfig"]
    return [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]


def container_of(group: dict[str, Any]) -> dict[str, Any]:
    (container,) = group["template"]["spec"]["containers"]
    return container


def applications_of(file: Path) -> list[dict[str, Any]]:
    return yaml.safe_load(spec_of(file)["serveConfigV2"])["applications"]


def test_there_are_manifests_and_scripts():
    assert {file.stem for file in MANIFESTS} == {"rayservice", "rayservice-models"}
    assert {file.stem for file in SCRIPTS} == {"node_env", "head", "worker", "deploy"}


# -- what KubeRay reads --------------------------------------------------------------------------------------


def test_a_manifest_is_a_rayservice_of_known_fields(manifest):
    whole = yaml.safe_load(manifest.read_text())
    assert (whole["apiVersion"], whole["kind"]) == ("ray.io/v1", "RayService")
    assert whole.keys() == {"apiVersion", "kind", "metadata", "spec"} and whole["metadata"]["name"]
    spec = whole["spec"]
    cluster = spec["rayClusterConfig"]
    assert isinstance(spec["serveConfigV2"], str)
    assert spec.keys() <= SERVICE and cluster.keys() <= CLUSTER
    assert cluster.get("autoscalerOptions", {}).keys() <= AUTOSCALER
    assert cluster["headGroupSpec"].keys() <= HEAD
    names = [group["groupName"] for group in cluster["workerGroupSpecs"]]
    assert len(set(names)) == len(names)
    for group in cluster["workerGroupSpecs"]:
        assert group.keys() <= WORKER
        assert 0 <= group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]


def test_pods_are_whole(manifest):
    for group in groups_of(manifest):
        assert all(isinstance(value, str) for value in group["rayStartParams"].values()), (
            "options of ray start are text"
        )
        pod, container = group["template"]["spec"], container_of(group)
        assert pod.keys() <= POD and container.keys() <= CONTAINER
        assert container["name"] and container["image"]
        assert container["resources"]["limits"] == container["resources"]["requests"]
        volumes = {volume["name"] for volume in pod.get("volumes", ())}
        assert {mount["name"] for mount in container.get("volumeMounts", ())} <= volumes
    head = container_of(groups_of(manifest)[0])
    assert {8000, 8265, 6379} <= {port["containerPort"] for port in head["ports"]}


def test_every_pod_has_the_same_image_and_environment(manifest):
    containers = [container_of(group) for group in groups_of(manifest)]
    assert len({container["image"] for container in containers}) == 1
    environments = [{one["name"]: one["value"] for one in container["env"]} for container in containers]
    assert all(environment == environments[0] for environment in environments)
    assert all(isinstance(value, str) for value in environments[0].values())
    assert environments[0] == environment_of_the_scripts(), "the same as on machines without Kubernetes"


def test_the_ray_of_the_pods_is_the_ray_that_is_pinned(manifest):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pinned = next(one for one in project["dependencies"] if one.startswith("ray[serve]"))
    version = spec_of(manifest)["rayClusterConfig"]["rayVersion"]
    assert pinned.replace(" ", "").endswith(f"=={version.rsplit('.', 1)[0]}.*")
    assert f"FROM rayproject/ray:{version}-" in (FOLDER / "Dockerfile").read_text()


# -- what Serve reads ----------------------------------------------------------------------------------------


def test_our_check_finds_nothing_once_the_models_are_there(manifest, tmp_path):
    """The folders of a cluster are not on this machine: the demo's take their place, and nothing else does."""
    text = manifest.read_text()
    missing = list(mistakes(manifest))
    assert missing and all("model" in line for line in missing)
    models = {application["args"]["model"] for application in applications_of(manifest)}
    for model in models:
        text = text.replace(model, str(ROOT / "examples" / "demo" / "model"))
    there = tmp_path / "manifest.yaml"
    there.write_text(text)
    assert list(mistakes(there)) == []
    there.write_text(text.replace("num_gpus: 1", "num_gpu: 1"))
    assert any("num_gpu" in line for line in mistakes(there)), "it does look"


def test_applications_have_names_and_prefixes_of_their_own(manifest):
    applications = applications_of(manifest)
    for key in ("name", "route_prefix"):
        assert len({application[key] for application in applications}) == len(applications)


def test_pods_offer_what_replicas_and_gateways_ask_for(manifest):
    """Each replica fits into a pod of some group, and there may be as many such pods as there may be replicas."""
    wanted: dict[str, int] = {}
    for application in applications_of(manifest):
        settings = FleetSettings.model_validate(application["args"])
        replicas, gateway = settings.replicas, settings.gateway
        need = {"GPU": replicas.num_gpus, "CPU": replicas.num_cpus} | replicas.resources
        group = next(name for name, offer in offers(manifest).items() if fits(need, offer))
        assert replicas.autoscaling is not None
        wanted[group] = wanted.get(group, 0) + replicas.autoscaling.max_replicas
        front = {"CPU": gateway.num_cpus} | gateway.resources
        assert any(fits(front, offer) for offer in offers(manifest).values())
    most = {group["groupName"]: group["maxReplicas"] for group in groups_of(manifest)[1:]}
    assert all(most[group] >= count for group, count in wanted.items()), (most, wanted)


def offers(manifest: Path) -> dict[str, dict[str, float]]:
    found = {}
    for group in groups_of(manifest)[1:]:
        limits = container_of(group)["resources"]["limits"]
        named = json.loads(json.loads(group["rayStartParams"].get("resources", "'\"{}\"'").strip("'")))
        found[group["groupName"]] = {
            "CPU": float(limits["cpu"]),
            "GPU": float(limits.get("nvidia.com/gpu", 0)),
        } | named
    return found


def fits(need: dict[str, Any], offer: dict[str, float]) -> bool:
    return all(amount <= offer.get(name, 0) for name, amount in need.items())


# -- what machines without Kubernetes run --------------------------------------------------------------------


def environment_of_the_scripts() -> dict[str, str]:
    code = f"source {FOLDER / 'node_env.sh'}; env"
    ran = subprocess.run(
        ["bash", "-c", code], capture_output=True, text=True, check=True, env={"PATH": "/usr/bin:/bin"}
    )
    told = dict(line.split("=", 1) for line in ran.stdout.splitlines() if "=" in line)
    return {name: value for name, value in told.items() if name.startswith("RAY_")}


def test_the_scripts_set_what_make_serve_sets():
    text = (ROOT / "Makefile").read_text()
    lines = [line.removeprefix("serve: export ").split(" ?= ") for line in text.splitlines() if "serve: export" in line]
    assert environment_of_the_scripts() == dict(lines)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda file: file.stem)
def test_scripts_are_bash_and_say_what_is_missing(script):
    subprocess.run(["bash", "-n", str(script)], check=True)
    if script.stem in ("worker", "deploy"):
        ran = subprocess.run([str(script)], capture_output=True, text=True, check=False)
        assert ran.returncode != 0 and "is missing, such as" in ran.stderr


def test_scripts_use_options_that_ray_has():
    known = {option for command in (start, deploy) for one in command.params for option in one.opts}
    for script in ("head", "worker", "deploy"):
        line = next(line for line in (FOLDER / f"{script}.sh").read_text().splitlines() if line.startswith("exec "))
        used = {word.split("=")[0] for word in line.split() if word.startswith("--")}
        assert used <= known, script
