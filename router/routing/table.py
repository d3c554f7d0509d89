"""What an agent publishes to its relays: the snapshot, the slot of each target, and where each pool's rings lie."""

import msgspec

from router.routing.ring import DualRing, Ring
from twofold.model.fleet import FleetSnapshot

MAX_SLOTS = 65_536
"""Slots are 16-bit numbers in the rings."""
_POINTS_PER_BUCKET_BITS = 3
"""A bucket of a ring's index holds 4 to 8 points."""


class PoolRing(msgspec.Struct, frozen=True, kw_only=True):
    """Where a pool's two rings lie in the ring bytes: 8-byte positions, 2-byte slots and a 4-byte index, of each ring.

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
    """Of the pool's part in the ring bytes: positions A, positions B, slots A, slots B, index A, index B."""

    @property
    def buckets(self) -> int:
        """Buckets of a ring's index, a power of two: entry b is the first position in bucket b or after it."""
        return 1 << max(0, self.points.bit_length() - _POINTS_PER_BUCKET_BITS)

    @property
    def size(self) -> int:
        """Bytes of the pool's part, a multiple of 8."""
        return 16 * self.points + _padded(4 * self.points) + _padded(8 * (self.buckets + 1))

    def open(self, rings: memoryview) -> DualRing:
        """The rings as views into ``rings``, which must stay mapped while they are used."""
        data = rings.cast("B")
        at, wide, narrow, index = self.offset, 8 * self.points, 2 * self.points, 4 * (self.buckets + 1)
        slots = at + 2 * wide
        indexes = slots + _padded(2 * narrow)
        return DualRing(
            self.version,
            self.members,
            Ring(data[at : at + wide], data[slots : slots + narrow], data[indexes : indexes + index]),
            Ring(
                data[at + wide : at + 2 * wide],
                data[slots + narrow : slots + 2 * narrow],
                data[indexes + index : indexes + 2 * index],
            ),
        )


def _padded(size_bytes: int) -> int:
    return -(-size_bytes // 8) * 8


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
