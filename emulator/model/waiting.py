"""The waiting queue: first come first served, or a heap by (priority, arrival)."""

import enum
import heapq
from collections import deque

from emulator.model.request import Request, Status


class SchedulingPolicy(enum.StrEnum):
    """vLLM's ``--scheduling-policy``."""

    FCFS = "fcfs"
    PRIORITY = "priority"


class WaitingQueue:
    """Requests not running. Aborted ones are dropped lazily, when they come to the front."""

    def __init__(self, policy: SchedulingPolicy) -> None:
        self._policy = policy
        self._queue: deque[Request] = deque()
        self._heap: list[tuple[int, float, int, Request]] = []
        self._sequence = 0
        self._size = 0
        self._tokens = 0
        self._skipped: list[Request] = []
        self.num_deferred = 0
        """Requests among those that wait that a scheduling pass had to skip (see ``skip``)."""

    def __len__(self) -> int:
        return self._size

    @property
    def tokens(self) -> int:
        """Prompt tokens (and outputs of preempted requests) that wait."""
        return self._tokens

    def append(self, request: Request) -> None:
        """Add a new request."""
        self._count(request, 1)
        if self._policy is SchedulingPolicy.FCFS:
            self._queue.append(request)
        else:
            self._push(request)

    def give_back(self, request: Request) -> None:
        """Add a preempted request: to the front, or to its place in the heap."""
        self._count(request, 1)
        if self._policy is SchedulingPolicy.FCFS:
            self._queue.appendleft(request)
        else:
            self._push(request)

    def peek(self) -> Request | None:
        """The next request, or None."""
        while self._queue:
            if self._queue[0].status is not Status.FINISHED:
                return self._queue[0]
            self._queue.popleft()
        while self._heap:
            if self._heap[0][3].status is not Status.FINISHED:
                return self._heap[0][3]
            heapq.heappop(self._heap)
        return None

    def pop(self) -> None:
        """Remove what ``peek`` returned."""
        request = self._queue.popleft() if self._policy is SchedulingPolicy.FCFS else heapq.heappop(self._heap)[3]
        self._count(request, -1)

    def skip(self) -> None:
        """Set what ``peek`` returned aside until ``restore``, and count it as deferred until it is popped."""
        skipped = self._queue.popleft() if self._policy is SchedulingPolicy.FCFS else heapq.heappop(self._heap)[3]
        self._skipped.append(skipped)
        if not skipped.deferred:
            skipped.deferred = True
            self.num_deferred += 1

    def restore(self) -> None:
        """Put the skipped requests back: to the front in their order, or to their places in the heap."""
        while self._skipped:
            request = self._skipped.pop()
            if self._policy is SchedulingPolicy.FCFS:
                self._queue.appendleft(request)
            else:
                self._push(request)

    def dropped(self, request: Request) -> None:
        """A waiting request was marked finished: stop counting it."""
        self._count(request, -1)
        if len(self._queue) + len(self._heap) > 2 * self._size + 64:
            self._queue = deque(item for item in self._queue if item.status is not Status.FINISHED)
            self._heap = [item for item in self._heap if item[3].status is not Status.FINISHED]
            heapq.heapify(self._heap)

    def _count(self, request: Request, sign: int) -> None:
        if sign < 0 and request.deferred:
            request.deferred = False
            self.num_deferred -= 1
        self._size += sign
        self._tokens += sign * len(request.ids)

    def _push(self, request: Request) -> None:
        self._sequence += 1
        heapq.heappush(self._heap, (request.priority, request.arrival_s, self._sequence, request))
