"""Sums of the accounts, remembered until a dirty log says that they changed."""

from router.routing.accounts import AccountsReader, Load
from router.routing.dirty_log import DirtyReader

_ALL = 1 << 30


class Loads:
    """Load of every slot over all writers. Reading an unchanged one costs a list access."""

    __slots__ = ("_cache", "_readers", "_sum", "stale")

    def __init__(self, accounts: AccountsReader, readers: tuple[DirtyReader, ...]) -> None:
        self._sum = accounts.load
        self._readers = readers
        self._cache: list[Load | None] = [None] * accounts.slots
        self.stale: dict[int, None] = dict.fromkeys(range(accounts.slots))
        """Slots that changed and that nobody took out yet (keys; an ordered set): for who orders slots by load."""

    def get(self, slot: int) -> Load:
        """Load of ``slot`` as of the last ``catch_up`` or later."""
        load = self._cache[slot]
        if load is None:
            load = self._cache[slot] = self._sum(slot)
        return load

    def catch_up(self) -> None:
        """Takes notice of all changes made until now, by any process."""
        for reader in self._readers:
            if not reader.pending:
                continue
            changed = reader.take(_ALL)
            cache = self._cache
            if changed is None:
                size = len(cache)
                cache[:] = [None] * size
                self.stale.update(dict.fromkeys(range(size)))
                continue
            for slot in changed:
                cache[slot] = None
            self.stale.update(dict.fromkeys(changed))
