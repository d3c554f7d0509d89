"""Sums of the accounts, remembered until somebody's dirty log, or this process itself, says that they changed."""

from collections import OrderedDict

from router.routing.accounts import AccountsReader, Load
from router.routing.dirty_log import DirtyLog, DirtyReader

_ALL = 1 << 30


class Loads:
    """Load of every slot over all writers. Reading an unchanged one costs a list access.

    ``readers``: the logs of the other writers. This process's own changes arrive through ``OwnLog``.
    """

    __slots__ = ("_cache", "_readers", "_sum", "stale")

    def __init__(self, accounts: AccountsReader, readers: tuple[DirtyReader, ...]) -> None:
        self._sum = accounts.load
        self._readers = readers
        self._cache: list[Load | None] = [None] * accounts.slots
        self.stale: OrderedDict[int, None] = OrderedDict.fromkeys(range(accounts.slots))
        """Slots that changed and that nobody took out yet (keys), first changed first: for who orders slots by load.
        Whoever takes one out reads it: what was not read since its last change is in here already."""

    def get(self, slot: int) -> Load:
        """Load of ``slot`` as of the last ``catch_up`` or later."""
        load = self._cache[slot]
        if load is None:
            load = self._cache[slot] = self._sum(slot)
        return load

    def changed(self, slot: int) -> None:
        """This process changed ``slot``."""
        if self._cache[slot] is not None:
            self._cache[slot] = None
            self.stale[slot] = None

    @property
    def rescans(self) -> int:
        """Times that a log had moved on too far, so that all slots were read anew."""
        return sum(reader.overruns for reader in self._readers)

    def catch_up(self) -> None:
        """Takes notice of all changes that other processes made until now."""
        for reader in self._readers:
            slots = reader.take(_ALL)
            if slots == ():
                continue
            cache, stale = self._cache, self.stale
            if slots is None:
                size = len(cache)
                cache[:] = [None] * size
                stale.update(dict.fromkeys(range(size)))
                continue
            for slot in slots:
                if cache[slot] is not None:
                    cache[slot] = None
                    stale[slot] = None


class OwnLog(DirtyLog):
    """The log of this process's own changes: its ``Loads`` hears of them at once, without reading them back."""

    __slots__ = ("_changed", "_mark")

    def __init__(self, region: memoryview, loads: Loads) -> None:
        super().__init__(region)
        self._mark = super().mark
        self._changed = loads.changed

    def mark(self, slot: int) -> None:
        """See DirtyLog."""
        self._mark(slot)
        self._changed(slot)
