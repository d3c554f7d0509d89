"""KV events over ZMQ, as vLLM 0.32 publishes them: a PUB socket, a replay buffer behind a ROUTER socket.

Frames of a batch: topic, sequence number (8 bytes, big-endian, from 0), msgpack of ``[time, [events], rank]``. Events
are maps that leave out fields at their defaults. Replay: a DEALER sends ``["", first sequence number]`` and gets
``["", topic, sequence, payload]`` for each batch still in the buffer, then ``["", "", ff*8, ""]``; older batches are
silently missing. As vLLM's publisher, this one looks for replay requests every 100 ms.
"""

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import msgspec
import zmq

from emulator.model import AllBlocksCleared, BlockRemoved, BlockStored, KvEvent
from emulator.server.engine import RealTimeEngine

log = logging.getLogger(__name__)

REPLAY_POLL_S = 0.1
END_SEQUENCE = b"\xff" * 8
_MEDIUM = "GPU"
_REPLAYS_PER_POLL = 64


class KvEventsConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """vLLM's ``--kv-events-config``, as ``GET /kv_event_sources`` shows it."""

    enable_kv_cache_events: bool = False
    publisher: str | None = None
    endpoint: str = "tcp://*:5557"
    replay_endpoint: str | None = None
    buffer_steps: int = 10_000
    hwm: int = 100_000
    max_queue_size: int = 100_000
    topic: str = ""

    @property
    def publishes(self) -> bool:
        """Whether events go out at all."""
        return self.enable_kv_cache_events and self.publisher != "null"


def read_config(text: str) -> KvEventsConfig:
    """The configuration in a flag's JSON; the default for "". Raises ValueError."""
    if not text:
        return KvEventsConfig()
    try:
        config = msgspec.json.decode(text, type=KvEventsConfig)
    except msgspec.MsgspecError as error:
        raise ValueError(f"kv-events-config: {error}") from None
    if config.publisher not in (None, "null", "zmq"):
        raise ValueError(f"kv-events-config: unknown publisher {config.publisher!r}")
    for endpoint in (config.endpoint, config.replay_endpoint):
        if endpoint is not None and not endpoint.startswith("tcp://"):
            raise ValueError(f"kv-events-config: {endpoint!r} is not tcp://host:port")
    publisher = config.publisher or ("zmq" if config.enable_kv_cache_events else "null")
    return msgspec.structs.replace(config, publisher=publisher)


def offset_endpoint(endpoint: str, offset: int) -> str:
    """``endpoint`` with its port raised by ``offset``; port 0 stays, the system picks it. Raises ValueError."""
    base, _, port = endpoint.rpartition(":")
    if not port.isdigit() or int(port) + offset > 65_535:
        raise ValueError(f"kv-events-config: {endpoint!r} has no usable port")
    return endpoint if port == "0" else f"{base}:{int(port) + offset}"


_encode = msgspec.msgpack.Encoder().encode


def encode_batch(events: Sequence[KvEvent], at_s: float, rank: int) -> bytes:
    """The payload of one batch. ``at_s``: Unix time."""
    return _encode([at_s, [_event(event) for event in events], rank])


def _event(event: KvEvent) -> dict[str, Any]:
    if isinstance(event, BlockRemoved):
        return {"type": "BlockRemoved", "block_hashes": [event.block_hash], "medium": _MEDIUM, "group_idx": 0}
    if isinstance(event, AllBlocksCleared):
        return {"type": "AllBlocksCleared"}
    return {
        "type": "BlockStored",
        "block_hashes": event.block_hashes,
        "parent_block_hash": event.parent_block_hash,
        "token_ids": event.token_ids,
        "block_size": event.block_size_tokens,
        "lora_id": event.adapter.adapter_id if event.adapter else None,
        "medium": _MEDIUM,
        "lora_name": event.adapter.name if event.adapter else None,
        "extra_keys": _extra_keys(event),
        "group_idx": 0,
        "kv_cache_spec_kind": "full_attention",
    }


def _extra_keys(event: BlockStored) -> list[list[str] | None]:
    every = [event.adapter.name] if event.adapter else []
    keys: list[list[str] | None] = [every or None] * len(event.block_hashes)
    if event.cache_salt and event.parent_block_hash is None:
        keys[0] = [*every, event.cache_salt]
    return keys


class KvPublisher:
    """The sockets and the replay buffer of one engine. Raises OSError when a port cannot be had.

    ``offset`` is added to the configured ports: one more for each engine and data-parallel rank of the process.
    """

    def __init__(
        self, config: KvEventsConfig, *, rank: int = 0, offset: int = 0, clock: Callable[[], float] = time.time
    ) -> None:
        self._rank = rank
        self._clock = clock
        self._topic = config.topic.encode()
        self._buffer: deque[tuple[int, bytes]] = deque(maxlen=max(0, config.buffer_steps))
        self._sequence = 0
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context.instance()
        self._publisher = context.socket(zmq.PUB)
        self._publisher.set_hwm(config.hwm)
        self._replay: zmq.Socket[bytes] | None = None
        try:
            endpoint = _bind(self._publisher, offset_endpoint(config.endpoint, offset))
            replay_endpoint = config.replay_endpoint
            if replay_endpoint is not None:
                self._replay = context.socket(zmq.ROUTER)
                replay_endpoint = _bind(self._replay, offset_endpoint(replay_endpoint, offset))
        except zmq.ZMQError as error:
            self.close()
            raise OSError(error.errno, f"{config.endpoint}: {error.strerror}") from None
        self.config = msgspec.structs.replace(config, endpoint=endpoint, replay_endpoint=replay_endpoint)
        """With the endpoints as they were bound."""

    @property
    def next_sequence(self) -> int:
        """Sequence number that the next batch will bear."""
        return self._sequence

    def publish(self, events: Sequence[KvEvent]) -> None:
        """Send one step's events. Never waits: a subscriber that lags by ``hwm`` batches loses some, as with vLLM."""
        payload = encode_batch(events, self._clock(), self._rank)
        sequence = self._sequence
        self._sequence += 1
        self._publisher.send_multipart((self._topic, sequence.to_bytes(8, "big"), payload), flags=zmq.NOBLOCK)
        self._buffer.append((sequence, payload))

    def serve_replays(self) -> None:
        """Answer the replay requests that wait."""
        replay = self._replay
        if replay is None:
            return
        for _ in range(_REPLAYS_PER_POLL):
            if not replay.poll(0):
                return
            frames = replay.recv_multipart(flags=zmq.NOBLOCK)
            if len(frames) != 3:
                log.warning("invalid replay request", extra={"frames": len(frames)})
                continue
            client, start = frames[0], int.from_bytes(frames[2], "big")
            try:
                for sequence, payload in self._buffer:
                    if sequence >= start:
                        answer = (client, b"", self._topic, sequence.to_bytes(8, "big"), payload)
                        replay.send_multipart(answer, flags=zmq.NOBLOCK)
                replay.send_multipart((client, b"", b"", END_SEQUENCE, b""), flags=zmq.NOBLOCK)
            except zmq.ZMQError as error:
                log.warning("replay broken off", extra={"cause": error.strerror})

    def close(self) -> None:
        """Close the sockets. Idempotent."""
        self._publisher.close(linger=0)
        if self._replay is not None:
            self._replay.close(linger=0)


def _bind(socket: "zmq.Socket[bytes]", endpoint: str) -> str:
    """Bind and return the endpoint with the port that it got; a wildcard host stays one, as vLLM shows it."""
    socket.bind(endpoint)
    if not endpoint.endswith(":0"):
        return endpoint
    bound = socket.getsockopt_string(zmq.LAST_ENDPOINT)
    return f"{endpoint[:-1]}{bound.rpartition(':')[2]}"


class KvFeeds:
    """The publishers of one port, one a data-parallel rank, and the timer that looks for replay requests."""

    def __init__(self, config: KvEventsConfig, loop: asyncio.AbstractEventLoop) -> None:
        self._config = config
        self._loop = loop
        self._publishers: dict[int, KvPublisher] = {}
        self._timer: asyncio.TimerHandle | None = None

    @property
    def publishes(self) -> bool:
        """Whether events go out at all."""
        return self._config.publishes

    def attach(self, engine: RealTimeEngine, *, rank: int = 0, offset: int = 0) -> None:
        """Publish the events of ``engine`` from now on; see KvPublisher for ``offset``. Raises OSError."""
        if not self.publishes:
            return
        before = self._publishers.pop(rank, None)
        if before is not None:
            before.close()
        publisher = KvPublisher(self._config, rank=rank, offset=offset)
        self._publishers[rank] = publisher
        engine.on_events = publisher.publish
        if self._timer is None:
            self._timer = self._loop.call_later(REPLAY_POLL_S, self._serve_replays)

    def detach(self, engine: RealTimeEngine, rank: int) -> None:
        """Publish no more of ``engine`` and close its sockets."""
        engine.on_events = None
        publisher = self._publishers.pop(rank, None)
        if publisher is not None:
            publisher.close()

    def sources(self) -> dict[str, KvEventsConfig]:
        """What ``GET /kv_event_sources`` answers: the configuration by rank."""
        return {str(rank): publisher.config for rank, publisher in sorted(self._publishers.items())}

    def next_sequences(self) -> dict[int, int]:
        """By rank, the sequence number that its next batch will bear."""
        return {rank: publisher.next_sequence for rank, publisher in self._publishers.items()}

    def close(self) -> None:
        """Close all sockets. Idempotent."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        for publisher in self._publishers.values():
            publisher.close()
        self._publishers.clear()

    def _serve_replays(self) -> None:
        self._timer = self._loop.call_later(REPLAY_POLL_S, self._serve_replays)
        for publisher in self._publishers.values():
            publisher.serve_replays()
