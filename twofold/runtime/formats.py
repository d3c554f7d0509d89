"""A profile as text for flame graphs, as a table for people, as a file for speedscope."""

import enum
import re
from collections import Counter
from typing import Any

import msgspec

from twofold.runtime.sampler import Clock, Profile, ThreadProfile

TABLE_ROWS = 40
_PLACE = re.compile(r"(?P<name>.*) \((?P<file>.*):(?P<line>[0-9]+)\)")


class Format(enum.StrEnum):
    """How a profile is written."""

    COLLAPSED = "collapsed"
    """One stack a line with its count: what flame graph tools read."""
    TABLE = "table"
    """The functions with most samples, thread by thread."""
    SPEEDSCOPE = "speedscope"
    """JSON for the viewer of that name."""

    @property
    def content_type(self) -> str:
        """MIME type."""
        return "application/json" if self is Format.SPEEDSCOPE else "text/plain"


def write(profile: Profile, form: Format) -> bytes:
    """``profile`` in the form asked for."""
    if form is Format.COLLAPSED:
        return collapsed(profile).encode()
    if form is Format.TABLE:
        return table(profile).encode()
    return msgspec.json.encode(speedscope(profile))


def collapsed(profile: Profile) -> str:
    """Lines "process;thread;outermost;...;innermost count"."""
    return "".join(
        f"{profile.process};{thread.name};{stack} {count}\n"
        for thread in profile.threads
        for stack, count in thread.stacks
    )


def table(profile: Profile, rows: int = TABLE_ROWS) -> str:
    """Share of samples in a function itself and in it and what it called, most first; both in percent."""
    lines = [
        f"{profile.process}: {profile.seconds:.1f} s of {profile.clock.value} time at {profile.hz:g} Hz, "
        f"CPU {_percent(profile.cpu_s, profile.seconds)} of one core, {profile.idle_threads} idle threads left out"
    ]
    for thread in profile.threads:
        lines += ["", *_thread_table(thread, profile.seconds, rows)]
    return "\n".join(lines) + "\n"


def _thread_table(thread: ThreadProfile, seconds: float, rows: int) -> list[str]:
    alone: Counter[str] = Counter()
    within: Counter[str] = Counter()
    for stack, count in thread.stacks:
        functions = stack.split(";")
        alone[functions[-1]] += count
        for function in set(functions):
            within[function] += count
    lines = [
        f"{thread.name}: {thread.samples} samples, CPU {_percent(thread.cpu_s, seconds)}",
        f"{'self':>7} {'total':>7}  function",
    ]
    order = sorted(within, key=lambda function: (-alone[function], -within[function], function))
    for function in order[:rows]:
        own, total = _percent(alone[function], thread.samples), _percent(within[function], thread.samples)
        lines.append(f"{own:>7} {total:>7}  {function}")
    if len(order) > rows:
        lines.append(f"{'':>16} and {len(order) - rows} more functions")
    return lines


def speedscope(profile: Profile) -> dict[str, Any]:
    """Speedscope's "sampled" file format, a profile per thread; weights are seconds."""
    frames: dict[str, int] = {}
    profiles = []
    for thread in profile.threads:
        samples, weights = [], []
        sample_s = (profile.seconds if profile.clock is Clock.WALL else thread.cpu_s) / max(1, thread.samples)
        for stack, count in thread.stacks:
            samples.append([frames.setdefault(function, len(frames)) for function in stack.split(";")])
            weights.append(count * sample_s)
        profiles.append(
            {
                "type": "sampled",
                "name": f"{profile.process} {thread.name}",
                "unit": "seconds",
                "startValue": 0,
                "endValue": sum(weights),
                "samples": samples,
                "weights": weights,
            }
        )
    return {
        "$schema": "https://www.speedscope.app/file-format-schema.json",
        "name": profile.process,
        "exporter": "twofold",
        "shared": {"frames": [_frame(function) for function in frames]},
        "profiles": profiles,
    }


def _frame(function: str) -> dict[str, Any]:
    match = _PLACE.fullmatch(function)
    if match is None:
        return {"name": function}
    return {"name": match["name"], "file": match["file"], "line": int(match["line"])}


def _percent(part: float, whole: float) -> str:
    return f"{100.0 * part / whole:.1f}%" if whole > 0 else "-"
