"""What an agent publishes to its relays: the snapshot, the slot of each target, and where each pool's rings lie."""

import msgspec

from router.routing.ring import DualRing, Ring
from twofold.model.fleet import FleetSnapshot

MAX_SLOTS = 65_536
"""Slots are 16-bit numbers in the rings."""


class PoolRing(msgspec.Struct, frozen=True, kw_only=True):
    """Where a pool's two rings lie in the ring bytes: 8-byte positions, then 2-byte slots, of each ring.

    ``version`` is a digest of members and weights: what homes depend on, equal on all routers. ``layout`` also covers
    the slots, which are this replica's own: bytes may be taken over when it is unchanged.
    """

    pool: str
    version: str
    layout: str
    members: int
    points: int
    """Points of each of the two rings."""
    offset: int
    """Of the pool's part in the ring bytes: positions A, positions B, slots A, slots B."""

    @property
    def size(self) -> int:
        """Bytes of the pool's part, a multiple of 8."""
        return 16 * self.points + -(-4 * self.points // 8) * 8

    def open(self, rings: memoryview) -> DualRing:
        """The rings as views into ``rings``, which must stay mapped while they are used."""
        data = rings.cast("B")
        at, wide, narrow = self.offset, 8 * self.points, 2 * self.points
        return DualRing(
            self.version,
            self.members,
            Ring(data[at : at + wide], data[at + 2 * wide : at + 2 * wide + narrow]),
            Ring(data[at + wide : at + 2 * wide], data[at + 2 * wide + narrow : at + 2 * wide + 2 * narrow]),
        )


class RoutingTable(msgspec.Struct, frozen=True, kw_only=True):
    """A snapshot made ready for routing. ``slots``: target_id to slot, for every target of the snapshot.

    The snapshot bears no engine loads: relays go by their own accounts.
    """

    snapshot: FleetSnapshot
    slots: dict[str, int]
    rings: tuple[PoolRing, ...] = ()


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(RoutingTable)


def encode(table: RoutingTable) -> bytes:
    """The table as msgpack."""
    return _encoder.encode(table)


def decode(data: bytes | memoryview) -> RoutingTable:
    """The table of ``data``. Raises msgspec.DecodeError."""
    return _decoder.decode(data)
