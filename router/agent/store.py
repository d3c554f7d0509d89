"""The last snapshot on disk, so that a replica that starts without a control plane has somewhere to begin."""

import logging
import os
from pathlib import Path

import msgspec

from twofold.model.fleet import FleetSnapshot

log = logging.getLogger(__name__)

FORMAT = 1
MAX_BYTES = 64 * 1024 * 1024


class StoredSnapshot(msgspec.Struct, frozen=True, kw_only=True):
    """Content of the file. ``saved_s`` is seconds since the Unix epoch."""

    format: int
    saved_s: float
    snapshot: FleetSnapshot


class SnapshotStore:
    """One file, replaced as a whole."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / "snapshot.msgpack"
        self._decoder = msgspec.msgpack.Decoder(StoredSnapshot)
        self._encoder = msgspec.msgpack.Encoder()

    def save(self, snapshot: FleetSnapshot, now_s: float) -> None:
        """Replace the file; a reader sees the old or the new one, also after a power failure. Raises OSError."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        data = self._encoder.encode(StoredSnapshot(format=FORMAT, saved_s=now_s, snapshot=snapshot))
        temporary = self.path.with_name(f"{self.path.name}.{os.getpid()}.tmp")
        try:
            with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600), "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            temporary.rename(self.path)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise

    def load(self) -> StoredSnapshot | None:
        """The stored snapshot; None when there is none or it cannot be used (which is logged)."""
        try:
            if self.path.stat().st_size > MAX_BYTES:
                raise msgspec.DecodeError("file is too large")
            stored = self._decoder.decode(self.path.read_bytes())
        except FileNotFoundError:
            return None
        except (OSError, msgspec.MsgspecError) as error:
            log.warning("stored snapshot cannot be used", extra={"path": str(self.path), "reason": str(error)})
            return None
        if stored.format != FORMAT:
            log.warning("stored snapshot has another format", extra={"path": str(self.path), "format": stored.format})
            return None
        return stored
