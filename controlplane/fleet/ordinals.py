"""Wire indices of targets: the smallest free number, not reused while late reports may still mean the old owner."""

from collections.abc import Iterable, Mapping

import msgspec


class Ordinals(msgspec.Struct, frozen=True, kw_only=True):
    """Which target holds which number. ``quarantined`` maps a freed number to when it may be used again (seconds)."""

    held: Mapping[str, int] = msgspec.field(default_factory=dict)
    quarantined: Mapping[int, float] = msgspec.field(default_factory=dict)

    def assign(self, targets: Iterable[str], now_s: float, quarantine_s: float) -> "Ordinals":
        """Numbers for exactly ``targets``: owners keep theirs, new ones get the smallest free ones by id."""
        wanted = set(targets)
        held = {target: number for target, number in self.held.items() if target in wanted}
        quarantined = {number: until_s for number, until_s in self.quarantined.items() if until_s > now_s}
        for target, number in self.held.items():
            if target not in wanted:
                quarantined[number] = now_s + quarantine_s
        taken = set(held.values()) | set(quarantined)
        candidate = 0
        for target in sorted(wanted - held.keys()):
            while candidate in taken:
                candidate += 1
            held[target] = candidate
            candidate += 1
        return Ordinals(held=held, quarantined=quarantined)
