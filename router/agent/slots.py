"""Which slot of the shared memory belongs to which target. Pure: clock and load are arguments."""

from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping


class SlotTable:
    """Gives each target a slot and keeps it for as long as the target is known.

    A target that comes back while its slot rests gets the same one again. Slots never used are given out first;
    a used one only after ``quarantine_s`` seconds and when nothing is in flight on it, because relays may still finish
    requests of its former target. ``high_water`` (slots ever given out) and ``assigned`` restore the table of an
    earlier life.
    """

    def __init__(
        self,
        slots: int,
        *,
        quarantine_s: float,
        assigned: Mapping[str, int] | None = None,
        high_water: int = 0,
        now_s: float = 0.0,
    ) -> None:
        self._slots = slots
        self._quarantine_s = quarantine_s
        self._assigned = {target: slot for target, slot in (assigned or {}).items() if 0 <= slot < slots}
        self._high_water = min(slots, max([high_water, *(slot + 1 for slot in self._assigned.values())]))
        self._resting: OrderedDict[str, tuple[int, float]] = OrderedDict()
        """Former target -> (slot, released at), oldest first."""
        used = set(self._assigned.values())
        for slot in range(self._high_water):
            if slot not in used:
                self._resting[f"\x00{slot}"] = (slot, now_s)

    @property
    def assigned(self) -> Mapping[str, int]:
        """target_id -> slot."""
        return self._assigned

    @property
    def high_water(self) -> int:
        """Number of slots ever given out: all others are fresh."""
        return self._high_water

    @property
    def counts(self) -> tuple[int, int, int]:
        """Slots in use, resting after use, never used."""
        return len(self._assigned), len(self._resting), self._slots - self._high_water

    def update(self, targets: Iterable[str], now_s: float, is_busy: Callable[[int], bool]) -> list[str]:
        """Make the table hold just ``targets``; returns those for which no slot is free now."""
        wanted = list(targets)
        present = set(wanted)
        for target in [target for target in self._assigned if target not in present]:
            self._resting[target] = (self._assigned.pop(target), now_s)
        missing = []
        for target in wanted:
            if target in self._assigned:
                continue
            slot = self._take(target, now_s, is_busy)
            if slot is None:
                missing.append(target)
            else:
                self._assigned[target] = slot
        return missing

    def _take(self, target: str, now_s: float, is_busy: Callable[[int], bool]) -> int | None:
        own = self._resting.pop(target, None)
        if own is not None:
            return own[0]
        if self._high_water < self._slots:
            self._high_water += 1
            return self._high_water - 1
        for former, (slot, released_s) in self._resting.items():
            if now_s - released_s < self._quarantine_s:
                return None
            if not is_busy(slot):
                del self._resting[former]
                return slot
        return None
