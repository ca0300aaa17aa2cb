"""What may change while replicas run: Serve's ``user_config``, laid over the ``args``."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from deployments.mistakes import told
from deployments.settings import FleetSettings

logger = logging.getLogger("ray.serve")

_OF_REPLICAS = ("stream_items_per_s", "stream_max_delay_s")


class LiveSettings(BaseModel):
    """The keys of ``user_config``, the same for Gateway and LoraReplica. A key left out is as in ``args``.

    adapters, adapter_folders, allow: instead of those of ``args``, whole. stream_items_per_s, stream_max_delay_s: as
    in ``args.replicas``.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    adapters: dict[str, str] | None = None
    adapter_folders: list[str] | None = None
    allow: list[str] | None = None
    stream_items_per_s: float | None = None
    stream_max_delay_s: float | None = None

    def over(self, args: FleetSettings) -> FleetSettings:
        """``args`` with these laid over them. Raises ValidationError as ``args`` themselves would."""
        live = self.model_dump(exclude_none=True)
        replicas = {key: live.pop(key) for key in _OF_REPLICAS if key in live}
        plain = args.model_dump(mode="json")
        return FleetSettings.model_validate({**plain, **live, "replicas": {**plain["replicas"], **replicas}})


def with_live(args: FleetSettings, user_config: Mapping[str, Any] | None) -> FleetSettings:
    """``args`` with a ``user_config`` laid over them. Raises ValueError with one line a mistake."""
    try:
        live = LiveSettings.model_validate(user_config or {})
    except ValidationError as error:
        raise ValueError("; ".join(told(error, "user_config.", LiveSettings))) from None
    try:
        return live.over(args)
    except ValidationError as error:
        raise ValueError("; ".join(told(error, "user_config.", FleetSettings))) from None


class LiveConfig:
    """The settings in force. A ``user_config`` that holds a mistake changes nothing.

    Serve stops a replica whose ``reconfigure`` raises and starts another, which would fail the same way, until none is
    left: so a mistake is told in the log and in ``refused``, and never raised.
    """

    def __init__(self, args: FleetSettings) -> None:
        self._args = args
        self.settings = args
        #: Why the last user_config was refused; None when it is in force.
        self.refused: str | None = None

    def take(self, user_config: Mapping[str, Any] | None, apply: Callable[[FleetSettings], None]) -> None:
        """Put a ``user_config`` into force through ``apply``, which raises ValueError before it changes anything."""
        try:
            settings = with_live(self._args, user_config)
            apply(settings)
        except ValueError as error:
            self.refused = str(error)
            logger.error("user_config is refused, and what was in force stays: %s", error)
            return
        self.settings, self.refused = settings, None
