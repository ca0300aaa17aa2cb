"""Another Ray application: a process with Ray and nothing of ours that calls the running one through its handle.

Reads one JSON object a line, ``{"method", "args", "stream", "of"}``, and answers each with one line.
"""

import json
import sys

import ray
from ray import serve

OURS = {"deployments", "engine", "adapter_store", "kernels"}
NAMES = ("status", "code", "type", "param")


def call(handle, method, args, stream):
    if not stream:
        return getattr(handle, method).remote(*args).result(timeout_s=60)
    return list(getattr(handle.options(stream=True), method).remote(*args))


def main():
    ray.init(address=sys.argv[1], log_to_driver=False, logging_level="ERROR")
    print(json.dumps("ready"), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        try:
            handle = serve.get_app_handle(request["of"])
            answer = {"result": call(handle, request["method"], request["args"], request["stream"])}
        except Exception as error:
            kinds = [kind.__name__ for kind in type(error).__mro__]
            fields = {name: getattr(error, name, None) for name in NAMES}
            answer = {"error": {"kinds": kinds, "message": str(error.cause), **fields}}
        # Nothing of the server may be needed to make or to catch its errors.
        answer["modules"] = sorted(
            m for m in sys.modules if m.split(".")[0] in {"deployments", "engine", "adapter_store"}
        )
        print(json.dumps(answer), flush=True)


main()
