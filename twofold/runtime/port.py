"""``GET /debug/profile`` of an admin or metrics port: who may ask, for what, and the answer."""

import hmac
import ipaddress
import logging
from collections.abc import Awaitable, Callable, Sequence

import msgspec
from aiohttp import web

from twofold.runtime import formats
from twofold.runtime.sampler import MAX_HZ, MAX_SECONDS, BusyError, Clock, Profile

log = logging.getLogger(__name__)

PATH = "/debug/profile"
DEFAULT_SECONDS = 10.0


class Wanted(msgspec.Struct, frozen=True, kw_only=True):
    """What is asked for."""

    process: str
    seconds: float
    hz: float
    clock: Clock


Record = Callable[[Wanted], Awaitable[Profile]]
"""Takes a profile. Raises BusyError, TimeoutError, ProcessGoneError."""


class ProcessGoneError(Exception):
    """The process to be profiled cannot be reached."""


class ProfilePort:
    """Answers requests for profiles, one at a time, when the operator switched it on.

    Query: ``process`` (default: the first of ``processes()``), ``seconds``, ``hz``, ``clock``, ``format``. Clients on
    other hosts need ``authorization: Bearer <token>``; without a token they are refused.
    """

    def __init__(self, record: Record, processes: Callable[[], Sequence[str]], *, enabled: bool, token: str) -> None:
        self._record = record
        self._processes = processes
        self._enabled = enabled
        self._token = token.encode()
        self._busy = False

    async def get(self, request: web.Request) -> web.Response:
        """The handler."""
        if not self._enabled:
            return _error(403, "profiling is switched off; start the process with --debug-profile")
        if not _is_local(request.remote) and not self._has_token(request):
            return _error(403, "profiles are given to clients on this host, or to those with the token")
        processes = self._processes()
        process = request.query.get("process") or next(iter(processes), "")
        if process not in processes:
            return _error(404, f"process must be one of: {', '.join(processes)}")
        try:
            wanted = Wanted(
                process=process,
                seconds=_number(request, "seconds", DEFAULT_SECONDS, 0.1, MAX_SECONDS),
                hz=_number(request, "hz", MAX_HZ, 1.0, MAX_HZ),
                clock=Clock(request.query.get("clock", Clock.WALL.value)),
            )
            form = formats.Format(request.query.get("format", formats.Format.TABLE.value))
        except ValueError as error:
            return _error(400, str(error))
        if self._busy:
            return _error(409, "a profile is being taken already")
        self._busy = True
        try:
            extra = {"profiled": process, "seconds": wanted.seconds, "hz": wanted.hz, "clock": wanted.clock.value}
            log.info("taking a profile", extra=extra)
            profile = await self._record(wanted)
        except BusyError as error:
            return _error(409, str(error))
        except (ProcessGoneError, TimeoutError) as error:
            return _error(503, str(error) or f"no answer from {process}")
        finally:
            self._busy = False
        return web.Response(body=formats.write(profile, form), content_type=form.content_type, charset="utf-8")

    def _has_token(self, request: web.Request) -> bool:
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        return bool(self._token) and scheme.lower() == "bearer" and hmac.compare_digest(given.encode(), self._token)


def _is_local(remote: str | None) -> bool:
    try:
        address = ipaddress.ip_address((remote or "").partition("%")[0])
    except ValueError:
        return False
    mapped = getattr(address, "ipv4_mapped", None)
    return (mapped or address).is_loopback


def _number(request: web.Request, name: str, default: float, low: float, high: float) -> float:
    text = request.query.get(name)
    try:
        value = default if text is None else float(text)
    except ValueError:
        value = -1.0
    if not low <= value <= high:
        raise ValueError(f"{name} must be {low:g}..{high:g}")
    return value


def _error(status: int, message: str) -> web.Response:
    body = msgspec.json.encode({"error": {"message": message}})
    return web.Response(status=status, body=body, content_type="application/json")
