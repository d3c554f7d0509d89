"""The agent's side of the shared accounts: what its relays did, summed, and what other replicas report, written."""

from collections.abc import Sequence

from router.routing.accounts import AccountsReader, AccountsWriter, LoadRow
from router.routing.buffers import RelayRegions
from router.routing.dirty_log import DirtyLog, DirtyReader
from router.routing.prefix import split_broadcast
from router.routing.prefix_table import PrefixWriter, target_salt
from router.routing.sent_prefixes import SentPrefixReader


class ReplicaLoad:
    """Load of this replica, to be broadcast: the sum over its relays' regions, changed slots only."""

    def __init__(self, relays: Sequence[RelayRegions], sent: Sequence[memoryview]) -> None:
        self._reader = AccountsReader(tuple(region.accounts for region in relays))
        self._logs = [DirtyReader(region.dirty) for region in relays]
        self._sent = [SentPrefixReader(ring) for ring in sent]

    def changed(self) -> set[int] | None:
        """Slots that changed since the last call; None when changes were missed: then send every slot in use."""
        slots: set[int] = set()
        missed = False
        for log in self._logs:
            taken = log.take(1 << 20)
            if taken is None:
                missed = True
            else:
                slots.update(taken)
        return None if missed else slots

    def row(self, slot: int) -> LoadRow:
        """Load that this replica has put on ``slot``."""
        return self._reader.row(slot)

    def drain_sent(self, limit: int = 1024) -> list[tuple[int, list[int]]]:
        """(slot, hashes) of prompts dispatched since the last call, at most ``limit`` per relay."""
        return [record for ring in self._sent for record in ring.drain(limit)]


class RemoteLoad:
    """Load of the other replicas, as the relays of this one see it. The agent is the one writer of the region."""

    def __init__(self, relays: Sequence[RelayRegions], remote: RelayRegions) -> None:
        self._writer = AccountsWriter(remote.accounts, DirtyLog(remote.dirty))
        self._prefixes = PrefixWriter(remote.prefixes)
        self._total = AccountsReader((remote.accounts, *(region.accounts for region in relays)))

    def set_row(self, slot: int, row: LoadRow, now_s: float) -> None:
        """Replaces the load of ``slot`` by the sum over all other replicas. ``now_s``: CLOCK_MONOTONIC."""
        self._writer.set_remote(slot, row, now_s)

    def prefix_sent(self, slot: int, target_id: str, incarnation: int, told: Sequence[int], now_s: float) -> None:
        """Another replica sent a prompt with these hashes (``prefix.broadcast_hashes``) to the target at ``slot``."""
        parts = split_broadcast(told)
        if parts is None:
            return
        hashes, deepest = parts
        stored_tokens = self._total.load(slot).stored_tokens
        self._prefixes.insert(target_salt(target_id, incarnation), hashes, deepest, stored_tokens, now_s)
