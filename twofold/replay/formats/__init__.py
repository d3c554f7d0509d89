"""One module per workload format; each yields sessions in order of their start, reading as it goes."""

from twofold.replay.formats.open import FORMATS, open_workload

__all__ = ["FORMATS", "open_workload"]
