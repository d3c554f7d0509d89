"""What the next control plane must know of a running engine process: ``<run dir>/engines/<unit>.json``."""

import contextlib
import logging
import os
from pathlib import Path

import msgspec

log = logging.getLogger(__name__)

MAX_STATE_BYTES = 1 << 20


class EngineFile(msgspec.Struct, frozen=True, kw_only=True):
    """A process group that serves some workers. ``pid`` leads it; ``start_ticks`` tells it from a later one."""

    pid: int
    start_ticks: int
    boot_id: str
    unit: str
    pool: str
    profile: str
    zone: str
    indices: tuple[int, ...]
    worker_ids: tuple[str, ...]
    port: int
    fingerprint: str
    incarnation: int
    """Start time, milliseconds since the Unix epoch."""


class EngineFiles:
    """The directory of these files and of the engines' logs."""

    def __init__(self, run_dir: Path) -> None:
        self.directory = run_dir / "engines"
        self.directory.mkdir(parents=True, exist_ok=True)

    def log_path(self, unit: str) -> Path:
        """File that takes what the unit's process prints."""
        return self.directory / f"{unit}.log"

    def path(self, unit: str) -> Path:
        """State file of a unit."""
        return self.directory / f"{unit}.json"

    def write(self, state: EngineFile) -> None:
        """Replace the state file in one step."""
        target = self.path(state.unit)
        temporary = target.with_suffix(".tmp")
        temporary.write_bytes(msgspec.json.format(msgspec.json.encode(state), indent=1) + b"\n")
        os.replace(temporary, target)

    def remove(self, unit: str) -> None:
        """Forget a unit."""
        self.path(unit).unlink(missing_ok=True)

    def read_all(self) -> list[EngineFile]:
        """All state files; those that cannot be read are reported and left where they are."""
        found = []
        for path in sorted(self.directory.glob("*.json")):
            try:
                if path.stat().st_size > MAX_STATE_BYTES:
                    raise ValueError("too large")
                found.append(msgspec.json.decode(path.read_bytes(), type=EngineFile))
            except (OSError, ValueError) as error:
                log.warning("unreadable engine state", extra={"path": str(path), "reason": str(error)[:200]})
        return found

    def write_profiles(self, profiles: list[dict[str, object]]) -> str:
        """A file with the fleet's own profiles for the emulator; "" when there are none."""
        path = self.directory / "profiles.yaml"
        if not profiles:
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)
            return ""
        path.write_bytes(msgspec.json.encode(profiles))
        return str(path)
