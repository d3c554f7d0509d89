"""What a process of a replica says about itself, in 64 bytes of shared memory: the cheapest possible health
report."""

import enum

import msgspec

HEARTBEAT_BYTES = 64


class ProcessState(enum.IntEnum):
    """Phase of life of a relay or agent."""

    ABSENT = 0
    STARTING = 1
    SERVING = 2
    DRAINING = 3
    STOPPED = 4


class Beat(msgspec.Struct, frozen=True, kw_only=True):
    """One reading. ``beat_s`` and ``started_s`` are CLOCK_MONOTONIC seconds."""

    pid: int
    state: ProcessState
    snapshot_version: int
    """Version of the board that the process works with; 0 before the first."""
    inflight: int
    """Requests or streams in progress."""
    started_s: float
    beat_s: float

    def is_fresh(self, now_s: float, max_age_s: float) -> bool:
        """Whether the process beat within the last ``max_age_s`` seconds and did not stop."""
        alive = self.state in (ProcessState.STARTING, ProcessState.SERVING, ProcessState.DRAINING)
        return alive and now_s - self.beat_s <= max_age_s


class Heartbeat:
    """A view on one heartbeat cell; the process it belongs to writes, all others read."""

    def __init__(self, buffer: memoryview) -> None:
        self._words = buffer[:HEARTBEAT_BYTES].cast("Q")
        self._seconds = buffer[:HEARTBEAT_BYTES].cast("d")

    def start(self, pid: int, now_s: float) -> None:
        """Begin a new life of the process."""
        self._words[2] = self._words[3] = 0
        self._seconds[4] = self._seconds[5] = now_s
        self._words[0] = pid
        self._words[1] = ProcessState.STARTING

    def beat(self, now_s: float, state: ProcessState, snapshot_version: int, inflight: int) -> None:
        """Say that the process lives; at least twice a second."""
        self._words[2] = snapshot_version
        self._words[3] = inflight
        self._words[1] = state
        self._seconds[5] = now_s

    def read(self) -> Beat:
        """The last reading; ABSENT when the process never started."""
        words = self._words
        state = words[1]
        return Beat(
            pid=words[0],
            state=ProcessState(state) if state <= ProcessState.STOPPED else ProcessState.ABSENT,
            snapshot_version=words[2],
            inflight=words[3],
            started_s=self._seconds[4],
            beat_s=self._seconds[5],
        )
