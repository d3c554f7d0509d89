"""Messages between the agent and the relays of its replica, over a Unix socket in the replica's directory.

The agent listens, relays connect and say ``Hello``. Then the agent sends commands and each is answered by one
message with the same ``id``. A frame is a 4-byte big-endian length and that many bytes of msgpack. Serving never
depends on it.
"""

import struct
from typing import Generic, TypeVar

import msgspec

from router.routing.types import Decision
from twofold.runtime.sampler import Clock, Profile

MAX_FRAME_BYTES = 8 * 1024 * 1024
MAX_BODY_BYTES = 4 * 1024 * 1024

_LENGTH = struct.Struct(">I")


class ControlError(Exception):
    """A frame that is too long or no message of this channel; the connection is of no more use."""


class ExplainedTarget(msgspec.Struct, frozen=True, kw_only=True):
    """One examined target of an explained decision; codes as text."""

    target_id: str
    role: str
    ineligible: str
    cached_tokens: int
    uncached_tokens: int
    own_s: float
    own_reference_s: float
    wait_s: float
    price_s: float
    chosen: bool


class ExplainedDecision(msgspec.Struct, frozen=True, kw_only=True):
    """A decision as a relay remembers it, ready for the wire: codes are text, ``at_s`` is seconds since the Unix
    epoch."""

    request_id: str
    at_s: float
    pool: str
    policy: str
    target_id: str
    reason: str
    key: int
    key_depth: int
    ring_version: str
    prompt_tokens: int
    predicted_ttft_s: float
    observed_ttft_s: float = 0.0
    """0 while unknown."""
    snapshot_epoch: int = 0
    snapshot_version: int = 0
    examined: tuple[ExplainedTarget, ...] = ()

    @classmethod
    def of(
        cls,
        decision: Decision,
        *,
        at_s: float,
        observed_ttft_s: float = 0.0,
        snapshot_epoch: int = 0,
        snapshot_version: int = 0,
    ) -> "ExplainedDecision":
        """``decision`` with what only the relay knows of it: wall clock, observed TTFT, snapshot decided on."""
        return cls(
            request_id=decision.request_id,
            at_s=at_s,
            pool=decision.pool,
            policy=decision.policy,
            target_id=decision.target_id,
            reason=decision.reason.value,
            key=decision.key,
            key_depth=decision.key_depth,
            ring_version=decision.ring_version,
            prompt_tokens=decision.prompt_tokens,
            predicted_ttft_s=decision.predicted_ttft_s,
            observed_ttft_s=observed_ttft_s,
            snapshot_epoch=snapshot_epoch,
            snapshot_version=snapshot_version,
            examined=tuple(
                ExplainedTarget(
                    target_id=target.target_id,
                    role=target.role.value,
                    ineligible=target.ineligible.value,
                    cached_tokens=target.cached_tokens,
                    uncached_tokens=target.uncached_tokens,
                    own_s=target.own_s,
                    own_reference_s=target.own_reference_s,
                    wait_s=target.wait_s,
                    price_s=target.price_s,
                    chosen=target.slot == decision.slot,
                )
                for target in decision.examined
            ),
        )


class ExplainPast(msgspec.Struct, frozen=True, kw_only=True, tag="explain_past"):
    """Asks for the remembered decisions (first try and retries) of a request."""

    id: int
    request_id: str


class ExplainRequest(msgspec.Struct, frozen=True, kw_only=True, tag="explain_request"):
    """Asks for the decision on a request that is not sent."""

    id: int
    path: str
    headers: dict[str, str] = {}
    body: bytes


class ResolveHomes(msgspec.Struct, frozen=True, kw_only=True, tag="resolve_homes"):
    """Asks for the home targets of ring keys, as this relay would compute them now."""

    id: int
    pool: str
    keys: tuple[int, ...]


class SetLogLevel(msgspec.Struct, frozen=True, kw_only=True, tag="set_log_level"):
    """Changes the level of the relay's log."""

    id: int
    level: str


class RecordProfile(msgspec.Struct, frozen=True, kw_only=True, tag="record_profile"):
    """Asks for a profile of the relay; the answer comes after ``seconds``, others may come before it."""

    id: int
    seconds: float
    hz: float
    clock: Clock


class Stop(msgspec.Struct, frozen=True, kw_only=True, tag="stop"):
    """Asks for a graceful stop, as SIGTERM does; the launcher starts a new relay."""

    id: int
    grace_s: float


class Hello(msgspec.Struct, frozen=True, kw_only=True, tag="hello"):
    """First message of a relay."""

    relay: int
    pid: int


class Explained(msgspec.Struct, frozen=True, kw_only=True, tag="explained"):
    """Answer to both ways of asking for an explanation; empty when the relay does not know the request."""

    id: int
    decisions: tuple[ExplainedDecision, ...] = ()


class Homes(msgspec.Struct, frozen=True, kw_only=True, tag="homes"):
    """Answer to ResolveHomes: target ids per key, in the order asked; empty for an unknown pool."""

    id: int
    ring_version: str = ""
    homes: tuple[tuple[str, ...], ...] = ()


class Recorded(msgspec.Struct, frozen=True, kw_only=True, tag="recorded"):
    """Answer to RecordProfile; no profile when one was being taken already."""

    id: int
    profile: Profile | None = None


class Done(msgspec.Struct, frozen=True, kw_only=True, tag="done"):
    """Answer to commands without a value."""

    id: int


class Failed(msgspec.Struct, frozen=True, kw_only=True, tag="failed"):
    """Answer to a command that could not be done. ``invalid``: because of what it asked for."""

    id: int
    message: str
    invalid: bool = False


AgentMessage = ExplainPast | ExplainRequest | ResolveHomes | SetLogLevel | RecordProfile | Stop
"""What the agent sends."""
RelayMessage = Hello | Explained | Homes | Recorded | Done | Failed
"""What a relay sends."""

M = TypeVar("M")

_ENCODER = msgspec.msgpack.Encoder()


def encode_frame(message: AgentMessage | RelayMessage) -> bytes:
    """A message as a frame. Raises ControlError when it is too long."""
    body = _ENCODER.encode(message)
    if len(body) > MAX_FRAME_BYTES:
        raise ControlError(f"message of {len(body)} bytes exceeds {MAX_FRAME_BYTES}")
    return _LENGTH.pack(len(body)) + body


class FrameDecoder(Generic[M]):
    """Cuts a byte stream into messages; holds at most one incomplete frame."""

    def __init__(self, decoder: "msgspec.msgpack.Decoder[M]") -> None:
        self._decoder = decoder
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[M]:
        """Messages completed by ``data``. Raises ControlError on a frame that is too long or does not decode."""
        buffer = self._buffer
        buffer += data
        messages: list[M] = []
        at = 0
        while len(buffer) - at >= _LENGTH.size:
            (size,) = _LENGTH.unpack_from(buffer, at)
            if size > MAX_FRAME_BYTES:
                raise ControlError(f"frame of {size} bytes exceeds {MAX_FRAME_BYTES}")
            start = at + _LENGTH.size
            if len(buffer) < start + size:
                break
            try:
                messages.append(self._decoder.decode(bytes(buffer[start : start + size])))
            except msgspec.MsgspecError as error:
                raise ControlError(f"not a message of this channel: {error}") from None
            at = start + size
        del buffer[:at]
        return messages


def relay_side() -> FrameDecoder[AgentMessage]:
    """Decoder of what a relay receives."""
    return FrameDecoder(msgspec.msgpack.Decoder(AgentMessage))


def agent_side() -> FrameDecoder[RelayMessage]:
    """Decoder of what the agent receives."""
    return FrameDecoder(msgspec.msgpack.Decoder(RelayMessage))
