"""The connection to a Ray cluster, and errors on their way from its nodes; torch is not imported."""

from __future__ import annotations

import json
import logging
import os
import socket
import traceback
from typing import Any, Final

from fp8pipe.core.errors import ConfigurationError, Fp8PipeError, MissingCapabilityError, one_line

__all__ = ["connect", "describe", "described_error"]

_INSTALL: Final = "python -m pip install 'fp8pipe[ray]'"
_CONNECT_S: Final = 10.0
_SHOWN: Final = 300  # characters of a cause, from its end


def describe(error: Exception) -> str:
    """An error as JSON, for `described_error` in another process."""
    if isinstance(error, Fp8PipeError):
        return json.dumps([type(error).__name__, error.what, error.why, error.fix])
    trace = "".join(traceback.format_exception(error)).strip()[-_SHOWN:]
    return json.dumps(["", f"{type(error).__name__}: {error}", trace, ""])


def described_error(described: str | bytes, where: str) -> Fp8PipeError:
    """The error that `describe` was given, of the same class if it is one of fp8pipe's; `where` names the process."""
    kind, what, why, fix = json.loads(described)
    kinds = {known.__name__: known for known in Fp8PipeError.__subclasses__()}
    return kinds.get(kind, Fp8PipeError)(f"{what} (on {where})", why=why, fix=fix)


def connect(address: str, *, quiet: bool = False) -> Any:
    """Connect to a Ray cluster.

    Args:
        address: `auto` for the cluster that this machine belongs to, `local` for one that is started on this machine,
            or `ray://HOST:PORT`.
        quiet: whether what workers print is not shown here.

    Returns:
        The package `ray`; its `shutdown` ends the connection, and a `local` cluster.

    Raises:
        ConfigurationError: the address is not one.
        MissingCapabilityError: Ray is not installed, or the cluster cannot be reached.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # a local cluster would report to Ray's authors
    try:
        import ray
    except ImportError as error:
        raise MissingCapabilityError("Ray is not installed", why=str(error), fix=_INSTALL) from error
    _require_reachable(address)
    started: dict[str, Any] = {"include_dashboard": False} if address == "local" else {}
    try:
        ray.init(address, logging_level=logging.WARNING, log_to_driver=not quiet, **started)
    except ValueError as error:
        raise ConfigurationError(
            f"there is no Ray cluster at {address!r}", why=str(error), fix="give auto, local, or ray://HOST:PORT"
        ) from error
    except ConnectionError as error:
        raise _unreachable(address, error) from error
    return ray


def _require_reachable(address: str) -> None:
    """Raise an error if nothing listens at `HOST:PORT`, as Ray itself would go on trying for minutes."""
    host, colon, port = address.rpartition("://")[2].rpartition(":")
    if not colon or not port.isdecimal():
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_S).close()
    except (OSError, OverflowError) as error:
        raise _unreachable(address, error) from error


def _unreachable(address: str, error: Exception) -> MissingCapabilityError:
    return MissingCapabilityError(
        f"the Ray cluster at {address!r} cannot be reached",
        why=one_line(error),
        fix="start one with `ray start --head`, or use --ray local; if it has tokens, set RAY_AUTH_MODE=token",
    )
