"""A sampling profiler inside the process it looks at; nothing runs between two profiles.

Two clocks. ``WALL``: a thread reads the stacks of all threads every few milliseconds, waiting included; no signal, no
ptrace. It needs the interpreter lock, which uvloop gives away around every callback, so callbacks shorter than some
hundred microseconds are seen too rarely in it; asking for the lock sooner than after Python's usual 5 ms makes that
better, not good. ``CPU``: a timer of the process's CPU time interrupts the main thread (SIGPROF), whose stack is then
read between two bytecodes: exact for short callbacks, blind for waiting, and meant for processes whose main thread
does the work. Either way time inside C shows as the Python function that called it, and
system calls of the event loop itself as the callback that follows.
"""

import asyncio
import contextlib
import ctypes
import enum
import os
import signal
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from types import CodeType, FrameType

import msgspec

MAX_SECONDS = 60.0
MAX_HZ = 200.0
MAX_STACKS = 10_000
"""Distinct stacks kept; further ones share ``OTHER``."""
MAX_DEPTH = 96
OTHER = "(more stacks than are kept)"
_SWITCH_INTERVAL_S = 100e-6
"""A shorter one finds more of short callbacks, but burns a core where the host is too busy to run the other thread."""
_SHORT_S = 0.01
_PR_SET_TIMERSLACK = 29
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")
_IDLE_SHARE = 0.001
"""A thread other than the main one that used less CPU than this share of the time is left out."""


class Clock(enum.StrEnum):
    """What time is sampled."""

    WALL = "wall"
    CPU = "cpu"


class BusyError(Exception):
    """A profile is being taken already."""


class ThreadProfile(msgspec.Struct, frozen=True, kw_only=True):
    """What one thread did. ``stacks``: (functions from the outermost to the innermost, ";" between, times seen)."""

    name: str
    cpu_s: float
    samples: int
    stacks: tuple[tuple[str, int], ...]


class Profile(msgspec.Struct, frozen=True, kw_only=True):
    """Samples of one process over ``seconds``. Threads that did nothing are only counted."""

    process: str
    clock: Clock
    seconds: float
    hz: float
    cpu_s: float
    """CPU time of the whole process, the sampling included."""
    idle_threads: int
    threads: tuple[ThreadProfile, ...]


class _Seen:
    """Stacks of one thread, as tuples of code object ids; the code objects are held, so that ids stay theirs."""

    def __init__(self) -> None:
        self.counts: Counter[tuple[int, ...]] = Counter()
        self.samples = 0

    def add(self, stack: tuple[int, ...]) -> None:
        self.samples += 1
        if stack not in self.counts and len(self.counts) >= MAX_STACKS:
            stack = ()
        self.counts[stack] += 1


class _Stacks:
    """Stacks seen, by thread."""

    def __init__(self) -> None:
        self._codes: dict[int, CodeType] = {}
        self._seen: dict[int, _Seen] = {}
        self._started_s = time.monotonic()
        self._cpu_before_s = time.process_time()
        self._thread_cpu_before_s = {thread.native_id: _cpu_s(thread.native_id) for thread in threading.enumerate()}

    def add(self, ident: int, innermost: FrameType | None) -> None:
        """The thread ``ident`` is in ``innermost``."""
        codes = self._codes
        stack: list[int] = []
        frame = innermost
        while frame is not None and len(stack) < MAX_DEPTH:
            code = frame.f_code
            key = id(code)
            codes[key] = code
            stack.append(key)
            frame = frame.f_back
        seen = self._seen.get(ident)
        if seen is None:
            seen = self._seen[ident] = _Seen()
        seen.add(tuple(stack))

    def profile(self, process: str, clock: Clock, hz: float) -> Profile:
        """All of it, as of now."""
        seconds = time.monotonic() - self._started_s
        names = {key: _label(code) for key, code in self._codes.items()}
        threads: list[ThreadProfile] = []
        idle = 0
        main = threading.main_thread()
        for thread in threading.enumerate():
            seen = self._seen.get(thread.ident or 0)
            used_s = max(0.0, _cpu_s(thread.native_id) - self._thread_cpu_before_s.get(thread.native_id, 0.0))
            if thread is not main and (seen is None or used_s <= _IDLE_SHARE * seconds):
                idle += seen is not None
                continue
            seen = seen or _Seen()
            stacks = tuple(
                (";".join(names[key] for key in reversed(stack)) or OTHER, count)
                for stack, count in seen.counts.most_common()
            )
            name = thread.name.replace(";", " ")
            threads.append(ThreadProfile(name=name, cpu_s=used_s, samples=seen.samples, stacks=stacks))
        threads.sort(key=lambda found: -found.cpu_s)
        return Profile(
            process=process,
            clock=clock,
            seconds=seconds,
            hz=hz,
            cpu_s=time.process_time() - self._cpu_before_s,
            idle_threads=idle,
            threads=tuple(threads),
        )


_taking = threading.Lock()


async def record(process: str, *, seconds: float, hz: float = MAX_HZ, clock: Clock = Clock.WALL) -> Profile:
    """Profile this process for ``seconds`` (at most MAX_SECONDS) at ``hz`` samples a second (at most MAX_HZ).

    ``process`` is the name in the result. Call it on the main thread. Cancelling ends the profile. Raises ValueError
    for figures out of bounds, BusyError while another profile is taken.
    """
    if not 0.0 < seconds <= MAX_SECONDS or not 1.0 <= hz <= MAX_HZ:
        raise ValueError(f"seconds must be above 0 and at most {MAX_SECONDS:g}, hz 1..{MAX_HZ:g}")
    if not _taking.acquire(blocking=False):
        raise BusyError("a profile is being taken already")
    try:
        stacks = _Stacks()
        if clock is Clock.CPU:
            await _on_cpu_time(stacks, seconds, hz)
        else:
            await _on_wall_time(stacks, seconds, hz)
        return stacks.profile(process, clock, hz)
    finally:
        _taking.release()


async def _on_cpu_time(stacks: _Stacks, seconds: float, hz: float) -> None:
    main = threading.main_thread().ident or 0

    def sample(_number: int, frame: FrameType | None) -> None:
        stacks.add(main, frame)

    signal.signal(signal.SIGPROF, sample)
    signal.siginterrupt(signal.SIGPROF, False)
    signal.setitimer(signal.ITIMER_PROF, 1.0 / hz, 1.0 / hz)
    try:
        await asyncio.sleep(seconds)
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0.0)
        # Not the default: a signal that is still on its way would end the process.
        signal.signal(signal.SIGPROF, signal.SIG_IGN)


async def _on_wall_time(stacks: _Stacks, seconds: float, hz: float) -> None:
    loop = asyncio.get_running_loop()
    done: asyncio.Future[None] = loop.create_future()
    stopping = threading.Event()

    def work() -> None:
        error: BaseException | None = None
        try:
            _sample_all(stacks, seconds, hz, stopping)
        except BaseException as raised:
            error = raised
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
            loop.call_soon_threadsafe(_settle, done, error)

    thread = threading.Thread(target=work, name="profiler", daemon=True)
    thread.start()
    try:
        await done
    finally:
        stopping.set()
        # It is at most one sampling interval away from its end, and must be over before the next profile begins.
        thread.join()


def _sample_all(stacks: _Stacks, seconds: float, hz: float, stopping: threading.Event) -> None:
    _wake_exactly()
    own = threading.get_ident()
    interval_s, usual_s = 1.0 / hz, sys.getswitchinterval()
    started_s = due_s = time.monotonic()
    sys.setswitchinterval(_SWITCH_INTERVAL_S)
    try:
        while not stopping.is_set() and time.monotonic() - started_s < seconds:
            _look(stacks, own)
            # Samples that come too late are left out, so that there is always a pause between two.
            now_s = time.monotonic()
            due_s = due_s + interval_s if due_s + interval_s > now_s else now_s + interval_s
            pause_s = due_s - now_s
            if pause_s <= _SHORT_S:
                time.sleep(pause_s)  # cheaper, and whoever cancels can wait for so long
            else:
                stopping.wait(pause_s)
    finally:
        sys.setswitchinterval(usual_s)


def _look(stacks: _Stacks, own: int) -> None:
    """One sample; a function of its own, so that no frame is held between two."""
    for ident, frame in sys._current_frames().items():
        if ident != own:
            stacks.add(ident, frame)


def _settle(done: "asyncio.Future[None]", error: BaseException | None) -> None:
    if done.done():
        return
    if error is not None:
        done.set_exception(error)
    else:
        done.set_result(None)


def _label(code: CodeType) -> str:
    """A function as "Class.method (package/module.py:line)", free of the separators of stacks."""
    path = Path(code.co_filename)
    parts = path.parts
    place = "/".join(parts[parts.index("site-packages") + 1 :] if "site-packages" in parts else parts[-3:])
    return f"{code.co_qualname} ({place}:{code.co_firstlineno})".replace(";", ",")


def _cpu_s(native_id: int | None) -> float:
    """CPU seconds that a thread of this process has used, 0 where the system does not tell."""
    try:
        text = Path(f"/proc/self/task/{native_id}/stat").read_bytes()
    except OSError:
        return 0.0
    fields = text[text.rfind(b")") + 2 :].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS_PER_S


def _wake_exactly() -> None:
    """Let short sleeps of this thread end on time, not up to 50 us later. Linux only, elsewhere without effect."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_TIMERSLACK, 1, 0, 0, 0)
