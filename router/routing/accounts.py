"""Live load of every target over shared memory: each process writes a region of its own, everybody sums all.

A region is one row of doubles per slot. Seconds are kept as multiples of 2^-20 and tokens as integers, so that sums are
exact and an account that took on and gave back the same work is exactly zero again.
"""

from collections import deque
from struct import Struct

import msgspec

from router.routing.dirty_log import DirtyLog

(
    INFLIGHT,
    DECODES,
    QUEUED_REQUESTS,
    QUEUED_PREFILL_TOKENS,
    QUEUED_PREFILL_S,
    KV_TOKENS,
    STORED_TOKENS,
    HEAD_SENT_S,
    HEAD_WORK_S,
    FIRST_TOKEN_S,
    FAILURES,
    CIRCUIT_UNTIL_S,
) = range(12)
"""Columns of a row. HEAD_*: the oldest request of this region whose first token has not come: when it was sent and how
much prefill it is. FIRST_TOKEN_S: when a first token last came. Times are CLOCK_MONOTONIC."""
ROW = 12
_ROW_BYTES = 8 * ROW
_UNPACK = Struct(f"={ROW}d").unpack_from
_QUANTUM = float(1 << 20)
_LATE_CAP_S = 60.0


def region_bytes(slots: int) -> int:
    """Bytes of one writer's region for ``slots`` targets."""
    return slots * _ROW_BYTES


def quantise_s(seconds: float) -> float:
    """``seconds`` as the nearest multiple of 2^-20 s, so that sums of many are exact."""
    return round(seconds * _QUANTUM) / _QUANTUM


class Load(msgspec.Struct, frozen=True, gc=False):
    """Load of one target, summed over all writers."""

    inflight: float = 0.0
    decodes: float = 0.0
    queued_requests: float = 0.0
    queued_tokens: float = 0.0
    queued_s: float = 0.0
    kv_tokens: float = 0.0
    stored_tokens: float = 0.0
    head_sent_s: float = 0.0
    head_work_s: float = 0.0
    first_token_s: float = 0.0
    failures: float = 0.0
    circuit_until_s: float = 0.0

    def remaining(self, now_s: float) -> tuple[float, float]:
        """(seconds of prefill work still queued, share of the queued tokens still to do) at ``now_s``.

        The engine serves first come first served, so the time since the head of the queue began to be worked on is
        work done, up to the head's own work. A head that takes longer than it should is expected to take as long again
        as it is late: an engine that hangs looks worse by the second, without any time-out.
        """
        queued_s = self.queued_s
        if queued_s <= 0.0:
            return 0.0, 0.0
        since_s = max(self.first_token_s, self.head_sent_s)
        elapsed_s = now_s - since_s
        head_s = self.head_work_s
        if elapsed_s <= 0.0:
            return queued_s, 1.0
        if elapsed_s < head_s:
            left_s = queued_s - elapsed_s
            return left_s, left_s / queued_s
        late_s = elapsed_s - head_s
        left_s = queued_s - head_s + (min(_LATE_CAP_S, late_s))
        share = (queued_s - head_s) / queued_s
        return left_s, share


class LoadRow(msgspec.Struct, frozen=True, kw_only=True):
    """The figures of one target that travel between replicas (``twofold.v1.LoadTick``)."""

    inflight: int = 0
    decodes: int = 0
    queued_prefill_tokens: float = 0.0
    queued_prefill_s: float = 0.0
    kv_tokens: float = 0.0
    stored_tokens: float = 0.0
    failures: int = 0


class AccountsReader:
    """Sums rows over the regions of several writers."""

    __slots__ = ("_regions", "slots")

    def __init__(self, regions: tuple[memoryview, ...]) -> None:
        self._regions = regions
        self.slots = min(len(region) for region in regions) // _ROW_BYTES

    def load(self, slot: int) -> Load:
        """Sum over all writers. Of the head columns the oldest head counts, of the times the latest."""
        offset = slot * _ROW_BYTES
        regions = self._regions
        inflight, decodes, requests, tokens, work, kv, stored, sent, head, first, failures, circuit = _UNPACK(
            regions[0], offset
        )
        for region in regions[1:]:
            row = _UNPACK(region, offset)
            if not (row[STORED_TOKENS] or row[INFLIGHT] or row[FAILURES] or row[CIRCUIT_UNTIL_S]):
                continue
            inflight2, decodes2, requests2, tokens2, work2, kv2, stored2, sent2, head2, first2, failures2, circuit2 = (
                row
            )
            if requests2 and (not requests or sent2 < sent):
                sent, head = sent2, head2
            inflight += inflight2
            decodes += decodes2
            requests += requests2
            tokens += tokens2
            work += work2
            kv += kv2
            stored += stored2
            failures += failures2
            if first2 > first:
                first = first2
            if circuit2 > circuit:
                circuit = circuit2
        return Load(inflight, decodes, requests, tokens, work, kv, stored, sent, head, first, failures, circuit)

    def row(self, slot: int) -> LoadRow:
        """The sum as it travels between replicas."""
        load = self.load(slot)
        return LoadRow(
            inflight=int(load.inflight),
            decodes=int(load.decodes),
            queued_prefill_tokens=load.queued_tokens,
            queued_prefill_s=load.queued_s,
            kv_tokens=load.kv_tokens,
            stored_tokens=load.stored_tokens,
            failures=int(load.failures),
        )


class Entry:
    """One request on the accounts, from dispatch to its end. ``work_s`` is kept quantised."""

    __slots__ = ("decoding", "done", "kv_tokens", "prompt_tokens", "sent_s", "slot", "uncached_tokens", "work_s")

    def __init__(self, slot: int, uncached_tokens: int, prompt_tokens: int, work_s: float, sent_s: float) -> None:
        self.slot = slot
        self.uncached_tokens = uncached_tokens
        self.prompt_tokens = prompt_tokens
        self.work_s = quantise_s(work_s)
        self.sent_s = sent_s
        self.kv_tokens = 0
        self.decoding = False
        self.done = False


class AccountsWriter:
    """The one writer of a region. Every change is marked in the dirty log after it is made."""

    __slots__ = ("_dirty", "_queues", "_values")

    def __init__(self, region: memoryview, dirty: DirtyLog) -> None:
        self._values = region.cast("d")
        self._dirty = dirty
        self._queues: dict[int, deque[Entry]] = {}

    def dispatch(self, slot: int, uncached_tokens: int, prompt_tokens: int, work_s: float, now_s: float) -> Entry:
        """Takes a request on: it is queued for prefill until ``first_token`` or ``finish``."""
        entry = Entry(slot, uncached_tokens, prompt_tokens, work_s, now_s)
        self.enter(entry)
        return entry

    def enter(self, entry: Entry) -> None:
        """Takes a request on, as ``dispatch``, by an entry that was not entered before."""
        slot = entry.slot
        values, at = self._values, slot * ROW
        queue = self._queues.get(slot)
        if queue is None:
            queue = self._queues[slot] = deque()
        queue.append(entry)
        if len(queue) == 1:
            values[at + HEAD_SENT_S] = entry.sent_s
            values[at + HEAD_WORK_S] = entry.work_s
        values[at + INFLIGHT] += 1
        values[at + QUEUED_REQUESTS] += 1
        values[at + QUEUED_PREFILL_TOKENS] += entry.uncached_tokens
        values[at + QUEUED_PREFILL_S] += entry.work_s
        values[at + STORED_TOKENS] += entry.uncached_tokens
        self._dirty.mark(slot)

    def first_token(self, entry: Entry, now_s: float) -> None:
        """The prefill is over; the request decodes from now on. No effect after the first call or the end."""
        if entry.done or entry.decoding:
            return
        entry.decoding = True
        entry.kv_tokens = entry.prompt_tokens
        values, at = self._values, entry.slot * ROW
        self._unqueue(entry)
        values[at + FIRST_TOKEN_S] = now_s
        values[at + DECODES] += 1
        values[at + KV_TOKENS] += entry.kv_tokens
        self._dirty.mark(entry.slot)

    def tokens(self, entry: Entry, count: int) -> None:
        """``count`` more output tokens. Not marked as a change: it moves the price little, and comes often."""
        if entry.done or not entry.decoding:
            return
        values, at = self._values, entry.slot * ROW
        entry.kv_tokens += count
        values[at + KV_TOKENS] += count
        values[at + STORED_TOKENS] += count

    def finish(self, entry: Entry) -> None:
        """Gives back all the request still holds. Any number of calls, the first one counts."""
        if entry.done:
            return
        entry.done = True
        values, at = self._values, entry.slot * ROW
        if entry.decoding:
            values[at + DECODES] -= 1
            values[at + KV_TOKENS] -= entry.kv_tokens
        else:
            self._unqueue(entry)
        values[at + INFLIGHT] -= 1
        self._dirty.mark(entry.slot)

    def _unqueue(self, entry: Entry) -> None:
        values, at = self._values, entry.slot * ROW
        values[at + QUEUED_REQUESTS] -= 1
        values[at + QUEUED_PREFILL_TOKENS] -= entry.uncached_tokens
        values[at + QUEUED_PREFILL_S] -= entry.work_s
        queue = self._queues[entry.slot]
        while queue and (queue[0].done or queue[0].decoding):
            queue.popleft()
        if queue:
            values[at + HEAD_SENT_S] = queue[0].sent_s
            values[at + HEAD_WORK_S] = queue[0].work_s
        else:
            del self._queues[entry.slot]
            values[at + HEAD_SENT_S] = 0.0
            values[at + HEAD_WORK_S] = 0.0

    def set_circuit(self, slot: int, failures: int, until_s: float) -> None:
        """Consecutive failures seen by this writer, and until when it lets nothing through (0: open for all)."""
        values, at = self._values, slot * ROW
        values[at + FAILURES] = failures
        values[at + CIRCUIT_UNTIL_S] = until_s
        self._dirty.mark(slot)

    def failures(self, slot: int) -> int:
        """Consecutive failures this writer has recorded."""
        return int(self._values[slot * ROW + FAILURES])

    def set_remote(self, slot: int, row: LoadRow, now_s: float) -> None:
        """Replaces the row by the sum over other replicas (agent). ``now_s`` dates the changes seen in it."""
        values, at = self._values, slot * ROW
        queued = max(0, row.inflight - row.decodes)
        had = values[at + QUEUED_REQUESTS]
        if queued and (not had or queued < had):
            values[at + HEAD_SENT_S] = now_s
        elif not queued:
            values[at + HEAD_SENT_S] = 0.0
        if queued < had:
            values[at + FIRST_TOKEN_S] = now_s
        values[at + INFLIGHT] = row.inflight
        values[at + DECODES] = row.decodes
        values[at + QUEUED_REQUESTS] = queued
        values[at + QUEUED_PREFILL_TOKENS] = row.queued_prefill_tokens
        values[at + QUEUED_PREFILL_S] = row.queued_prefill_s
        values[at + HEAD_WORK_S] = row.queued_prefill_s / queued if queued else 0.0
        values[at + KV_TOKENS] = row.kv_tokens
        values[at + STORED_TOKENS] = row.stored_tokens
        values[at + FAILURES] = row.failures
        self._dirty.mark(slot)
