"""Orders from a gateway to replicas, over a Serve handle."""

from __future__ import annotations

from typing import Any, Protocol

from ray.exceptions import RayError
from ray.serve.exceptions import DeploymentUnavailableError, RayServeException

from deployments import wire
from deployments.protocol.errors import ReplicaLost


class Replicas(Protocol):
    """All replicas, as an operator's orders reach them. Errors are an AdapterError or ReplicaLost."""

    async def home(self, method: str, model: str, digest: str, *args: Any) -> Any:
        """Ask the replica that requests for this content go to. model: what messages call the adapter."""
        ...

    async def every(self, method: str, *args: Any, timeout_s: float = 10.0) -> list[dict[str, Any]]:
        """Ask every replica: their answers, each with ``replica`` and ``result`` or ``error``."""
        ...


class ServedReplicas:
    """All LoraReplicas behind a Serve handle; their ``order`` method answers."""

    def __init__(self, handle: Any) -> None:
        self._handle = handle.options(method_name="order")

    async def home(self, method: str, model: str, digest: str, *args: Any) -> Any:
        """See ``Replicas``."""
        handle = self._handle.options(multiplexed_model_id=digest)
        try:
            answer = await handle.remote(method, *args)
        except (RayError, RayServeException) as error:
            raise ReplicaLost(f"no replica could do it: {str(error).splitlines()[0]}", started=False) from error
        wire.raise_error(answer, model)
        return answer["result"]

    async def every(self, method: str, *args: Any, timeout_s: float = 10.0) -> list[dict[str, Any]]:
        """See ``Replicas``. A replica that died meanwhile is left out."""
        return await ask_every(self._handle, "order", method, *args, timeout_s=timeout_s)


async def ask_every(handle: Any, method: str, *args: Any, timeout_s: float = 10.0) -> list[dict[str, Any]]:
    """What the method of every replica answers that runs; nothing where the fleet has been scaled to zero.

    Raises ReplicaLost when one does not answer in time.
    """
    response = handle.broadcast(method, *args)
    try:
        answers = await response.results_async(timeout_s=timeout_s, return_exceptions=True)
    except DeploymentUnavailableError:  # Serve's word for a deployment without a replica
        return []
    except TimeoutError as error:
        message = f"a replica did not answer within {timeout_s:g} s: try again in a moment"
        raise ReplicaLost(message, started=False) from error
    return [answer for answer in answers if isinstance(answer, dict)]
