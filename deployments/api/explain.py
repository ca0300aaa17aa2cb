"""What a client is told of an exception, and what the log is."""

from __future__ import annotations

import logging

from deployments.api.request_id import current_request_id
from deployments.protocol.errors import ApiError, from_exception

logger = logging.getLogger("ray.serve")


def explain(error: Exception) -> ApiError:
    """The answer to a request that ended so. What nobody foresaw goes to the log."""
    explained = from_exception(error)
    if explained.status == 500:
        logger.error("request %s failed", current_request_id(), exc_info=error)
    return explained
