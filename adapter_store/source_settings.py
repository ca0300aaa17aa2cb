"""How one place that keeps adapters is reached, as an operator may set it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

# What file systems call their credentials; these come from the environment alone.
_CREDENTIALS = ("key", "token", "password", "passwd", "credential", "credentials", "username", "connection_string")
# Between the scheme and the first slash, as in https://user:password@host.
_URL_CREDENTIAL = re.compile(r"://[^/?#\s]*@")
_VARIABLE = re.compile(r"[A-Z_][A-Z0-9_]*")
# gcsfs's ways of finding a token, which are no secrets.
_WAYS = frozenset({"anon", "google_default", "cloud"})


@dataclass(frozen=True, slots=True)
class SourceSettings:
    """For the references that begin with one text, such as ``s3://acme-adapters``.

    options: arguments of the fsspec file system (``endpoint_url``, ``anon``, ``client_kwargs``); never credentials.
    env: argument -> name of the environment variable that holds its value (``{"key": "ACME_KEY", "secret":
    "ACME_SECRET"}``); for the Hub ``{"token": "ACME_HF_TOKEN"}``. Read at each use, so values can be rotated.
    The limits are those of ``StoreSettings`` called ``hub_...``, and as there where they are None.

    Raises ValueError naming the field, never a value that may be a credential.
    """

    options: Mapping[str, Any] = field(default_factory=dict, repr=False)
    env: Mapping[str, str] = field(default_factory=dict, repr=False)
    timeout_s: float | None = None
    retries: int | None = None
    download_timeout_s: float | None = None
    max_bytes: int | None = None
    refresh_s: float | None = None

    __pydantic_config__: ClassVar[Mapping[str, Any]] = {"extra": "forbid"}  # for the sections made of this class

    def __post_init__(self) -> None:
        if not isinstance(self.options, Mapping) or not isinstance(self.env, Mapping):
            raise ValueError("options and env must each be a mapping")
        for name in _credentials_in_urls(self.options):
            raise ValueError(
                f"options: {name!r} is a URL with a credential before the '@'; take it out, put it in an environment "
                "variable and name that under env"
            )
        for name in _credentials_in(self.options):
            raise ValueError(
                f"options: {name!r} is a credential; put it in an environment variable and name that under env: "
                f"{{{name.rsplit('.', 1)[-1]}: MY_VARIABLE}}"
            )
        for option, variable in self.env.items():
            if not isinstance(variable, str) or not _VARIABLE.fullmatch(variable):  # it may be the secret itself
                raise ValueError(f"env: {option!r} must name an environment variable, in capitals such as ACME_SECRET")
            if option in self.options:
                raise ValueError(f"env: {option!r} is in options too")
        limits = (
            ("timeout_s", lambda value: value > 0, "above 0"),
            ("retries", lambda value: 0 <= value <= 10, "between 0 and 10"),
            ("download_timeout_s", lambda value: value > 0, "above 0"),
            ("max_bytes", lambda value: value > 0, "above 0"),
            ("refresh_s", lambda value: value >= 0, "0 or more"),
        )
        for name, fits, allowed in limits:
            value = getattr(self, name)
            if value is not None and not fits(value):
                raise ValueError(f"{name} is {value!r} but must be {allowed}")

    @classmethod
    def of(cls, value: SourceSettings | Mapping[str, Any]) -> SourceSettings:
        """From a mapping of the fields, as configuration files have it. Raises ValueError."""
        if isinstance(value, SourceSettings):
            return value
        known = {entry.name for entry in fields(cls)}
        if not isinstance(value, Mapping) or not value.keys() <= known:
            raise ValueError(f"it must be a mapping with some of {', '.join(sorted(known))}")
        return cls(**value)


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds on one source's exchanges; see ``StoreSettings`` for what each means."""

    timeout_s: float
    retries: int
    download_timeout_s: float
    max_bytes: int
    refresh_s: float


def _credentials_in(options: Mapping[str, Any], before: str = "") -> list[str]:
    """Dotted names of the arguments that hold a credential."""
    found: list[str] = []
    for name, value in options.items():
        text = str(name).lower()
        if isinstance(value, Mapping):
            found += _credentials_in(value, f"{before}{name}.")
        elif "secret" in text or text.endswith(_CREDENTIALS):
            found += [] if str(value) in _WAYS else [f"{before}{name}"]
    return found


def _credentials_in_urls(value: Any, place: str = "") -> list[str]:
    """Dotted names of the arguments that hold a URL with a user or a password in it."""
    if isinstance(value, str):
        return [place] if _URL_CREDENTIAL.search(value) else []
    if isinstance(value, Mapping):
        inner = [(str(name), one) for name, one in value.items()]
    elif isinstance(value, list | tuple):
        inner = [(str(index), one) for index, one in enumerate(value)]
    else:
        return []
    before = f"{place}." if place else ""
    return [found for name, one in inner for found in _credentials_in_urls(one, f"{before}{name}")]
