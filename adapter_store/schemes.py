"""The schemes of references to object stores."""

from __future__ import annotations

#: The extra that brings a scheme's package.
EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gs", "gcs": "gs"}


def scheme_mistake(scheme: str) -> str | None:
    """What to say of a scheme that no reference can have, whatever is installed; None when there is nothing to say."""
    try:
        from fsspec import available_protocols  # noqa: PLC0415 - needed for references to object stores alone
        from fsspec.registry import registry  # noqa: PLC0415
    except ImportError:
        return None  # not installed: that is said when the file system is opened
    known = {*available_protocols(), *registry}
    if scheme in {"local", "hub", "merge"} or scheme in known:
        return None
    others = ", ".join(sorted(known - EXTRAS.keys() - {"local"}))
    return f"there is no scheme {scheme!r}; known are local:, hub:, s3://, gs://, and fsspec's others: {others}"


def package_remedy(scheme: str) -> str:
    """What to do where the scheme's package is not installed."""
    extra = EXTRAS.get(scheme)
    return f"pip install lorafleet[{extra}]" if extra else f"install fsspec's package for {scheme}://"


def lacks_package(scheme: str) -> bool:
    """Whether the package of a scheme cannot be imported on this machine. False for a scheme that there is not."""
    try:
        from fsspec import get_filesystem_class  # noqa: PLC0415

        get_filesystem_class(scheme)
    except ImportError:
        return True
    except ValueError:
        return False
    return False
