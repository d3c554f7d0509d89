"""The memory a replica's processes share, as plain views: files mapped by relays and agent, bytearrays in tests."""

import msgspec

from router.routing import accounts, dirty_log, prefix_table, sent_prefixes


class RelayRegions(msgspec.Struct, frozen=True, kw_only=True):
    """What one process writes and the others of its replica read. All views are bytes ('B'). ``prefixes`` is one and
    the same memory for all processes of the replica, and writable for all."""

    accounts: memoryview
    dirty: memoryview
    prefixes: memoryview


class Buffers(msgspec.Struct, frozen=True, kw_only=True):
    """Everything a relay's ``LiveFleet`` stands on.

    ``own`` is written by this relay alone, ``siblings`` by the other relays of the replica, ``remote`` by the agent
    (the sum over the other replicas). ``sent`` is this relay's ring of dispatched prefixes, read by the agent.
    """

    slots: int
    own: RelayRegions
    siblings: tuple[RelayRegions, ...]
    remote: RelayRegions
    sent: memoryview


class Sizes(msgspec.Struct, frozen=True, kw_only=True):
    """Bytes of each region for a number of target slots: what to allocate, per relay and once more for the remote;
    ``prefixes`` once for the replica."""

    accounts: int
    dirty: int
    prefixes: int
    sent: int

    @classmethod
    def for_slots(cls, slots: int, prefix_entries: int = prefix_table.DEFAULT_ENTRIES) -> "Sizes":
        """Sizes for ``slots`` targets and ``prefix_entries`` (a power of two) of the prefix table."""
        return cls(
            accounts=accounts.region_bytes(slots),
            dirty=dirty_log.region_bytes(),
            prefixes=prefix_table.region_bytes(prefix_entries),
            sent=sent_prefixes.region_bytes(),
        )


def _regions(sizes: Sizes, prefixes: memoryview) -> RelayRegions:
    return RelayRegions(
        accounts=memoryview(bytearray(sizes.accounts)),
        dirty=memoryview(bytearray(sizes.dirty)),
        prefixes=prefixes,
    )


def in_memory(slots: int, relays: int = 1, prefix_entries: int = prefix_table.DEFAULT_ENTRIES) -> tuple[Buffers, ...]:
    """Buffers of ``relays`` relays of one replica over process memory, for simulation and tests."""
    sizes = Sizes.for_slots(slots, prefix_entries)
    prefixes = memoryview(bytearray(sizes.prefixes))
    own = [_regions(sizes, prefixes) for _ in range(relays)]
    remote = _regions(sizes, prefixes)
    return tuple(
        Buffers(
            slots=slots,
            own=own[i],
            siblings=tuple(own[:i] + own[i + 1 :]),
            remote=remote,
            sent=memoryview(bytearray(sizes.sent)),
        )
        for i in range(relays)
    )
