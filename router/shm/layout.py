"""What the routing core wants of a replica's shared memory: how much, and as which views."""

from router.routing.accounts import AccountsReader, AccountsWriter, LoadRow
from router.routing.buffers import Buffers, RelayRegions, Sizes
from router.routing.dirty_log import DirtyLog
from router.shm.replica import AGENT, Region, RegionSizes, SharedReplica

DEFAULT_SLOTS = 4096

_NOTHING = LoadRow()


def region_sizes(slots: int = DEFAULT_SLOTS) -> RegionSizes:
    """Sizes to create a replica with, and to check when attaching to one."""
    wanted = Sizes.for_slots(slots)
    return RegionSizes(
        slots=slots, accounts=wanted.accounts, dirty=wanted.dirty, prefixes=wanted.prefixes, sent=wanted.sent
    )


def regions_of(replica: SharedReplica, writer: int) -> RelayRegions:
    """The regions of ``writer`` (a relay's index or AGENT); read-only views unless they are this process's own. The
    table of prefixes is everybody's."""
    return RelayRegions(
        accounts=replica.region(writer, Region.ACCOUNTS),
        dirty=replica.region(writer, Region.DIRTY),
        prefixes=replica.prefixes,
    )


def relay_buffers(replica: SharedReplica, index: int) -> Buffers:
    """What the ``LiveFleet`` of relay ``index`` stands on."""
    return Buffers(
        slots=replica.slots,
        own=regions_of(replica, index),
        siblings=tuple(regions_of(replica, other) for other in range(replica.relays) if other != index),
        remote=regions_of(replica, AGENT),
        sent=replica.region(index, Region.SENT),
    )


def clear_accounts(replica: SharedReplica, writer: int, now_s: float) -> int:
    """Give back all work on the accounts of a relay that died; its requests died with it. Returns the number of slots.

    What it stored in caches, and its circuits, stay: they are facts about the targets. Each slot given back is marked
    in the relay's dirty log. ``now_s`` is CLOCK_MONOTONIC.
    """
    accounts = replica.region(writer, Region.ACCOUNTS)
    reader = AccountsReader((accounts,))
    out = AccountsWriter(accounts, DirtyLog(replica.region(writer, Region.DIRTY)))
    cleared = 0
    for slot in range(reader.slots):
        row = reader.row(slot)
        if row == _NOTHING:
            continue
        out.set_remote(slot, LoadRow(stored_tokens=row.stored_tokens, failures=row.failures), now_s)
        cleared += 1
    return cleared
