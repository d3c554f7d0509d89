"""Places to keep it: memory, or a JSON file in the run directory."""

import logging
import os
import time
from pathlib import Path
from typing import Protocol

import msgspec

from controlplane.store.values import Persisted

log = logging.getLogger(__name__)

MAX_BYTES = 64 << 20


class Store(Protocol):
    """Loads once at start, saves whole values."""

    def load(self) -> Persisted:
        """What was saved last; an empty value when nothing was."""

    def save(self, value: Persisted) -> None:
        """Keep ``value``. Raises OSError when it cannot be kept."""


class MemoryStore:
    """Keeps it until the process ends."""

    def __init__(self) -> None:
        self._value = Persisted()

    def load(self) -> Persisted:
        """What was saved last."""
        return self._value

    def save(self, value: Persisted) -> None:
        """Keep ``value``."""
        self._value = value


class FileStore:
    """One JSON file, replaced in one step and synced, so that a crash leaves the old or the new value."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def load(self) -> Persisted:
        """What was saved last. A file that cannot be read is set aside, with an error in the log."""
        try:
            if self._path.stat().st_size > MAX_BYTES:
                raise ValueError(f"larger than {MAX_BYTES} bytes")
            return msgspec.json.decode(self._path.read_bytes(), type=Persisted)
        except FileNotFoundError:
            return Persisted()
        except (OSError, ValueError) as error:
            aside = self._path.with_suffix(f".broken-{int(time.time())}")
            log.error(
                "stored state is unreadable and set aside",
                extra={"path": str(self._path), "aside": str(aside), "reason": str(error)[:200]},
            )
            try:
                os.replace(self._path, aside)
            except OSError:
                log.exception("cannot set it aside")
            return Persisted()

    def save(self, value: Persisted) -> None:
        """Keep ``value``. Raises OSError."""
        temporary = self._path.with_suffix(".tmp")
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o640)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(msgspec.json.encode(value))
                file.flush()
                os.fsync(file.fileno())
        except OSError:
            temporary.unlink(missing_ok=True)
            raise
        os.replace(temporary, self._path)
