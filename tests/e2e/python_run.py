"""An application that is run from Python, twice: only what is live differs. Prints what each run serves, and how."""

import json
import sys

import ray
from ray import serve

from deployments.app import application
from deployments.live import LiveSettings
from deployments.settings import FleetSettings

SETTINGS = {
    "model": "examples/demo/model",
    "model_name": "lorafleet-demo",
    "engine": {"cpu_threads": 1, "slots": {16: 2}, "num_pages": 64},
    "store": {"host_cache_bytes": 2**26},
}


def main() -> None:
    ray.init(address=sys.argv[1], log_to_driver=False, logging_level="ERROR")
    for adapters in ({}, {"loud": "local:examples/demo/adapters/shout"}):
        built = application(FleetSettings.model_validate(SETTINGS), LiveSettings(adapters=adapters))
        handle = serve.run(built, name="python", route_prefix="/python")
        models = [model["id"] for model in handle.models.remote().result(timeout_s=60)]
        pids = [one["pid"] for one in handle.fleet_stats.remote().result(timeout_s=60)]
        print(json.dumps({"models": models, "pids": pids}), flush=True)
        sys.stdin.readline()
    answer = handle.generate.remote({"model": "loud", "prompt": sys.argv[2], "max_tokens": 80, "temperature": 0})
    print(json.dumps(answer.result(timeout_s=60)["text"]), flush=True)
    serve.delete("python")


main()
