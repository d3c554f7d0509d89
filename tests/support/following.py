"""The agent's side of KV events over a fleet of the test's making."""

import asyncio
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from router.kvevents.service import KvEvents
from router.routing.kv_index import KvIndexReader, ViewState
from router.routing.table import RoutingTable
from router.shm.kv_file import KvIndexFile
from twofold.model.fleet import EngineFacts, FleetSnapshot, HashAlgorithm, Health, Pool, Target

BLOCK = 16
SLOTS = 64


def target(url: str, number: int, *, rank: int | None = None, **fields: Any) -> Target:
    """A healthy target in pool "p"."""
    facts = EngineFacts(block_size_tokens=BLOCK, kv_capacity_tokens=BLOCK * 1024)
    return Target(
        **{
            "target_id": f"t-{number}",
            "worker_id": f"w-{url}",
            "pool": "p",
            "url": url,
            "profile": "h100-8b-tp1",
            "ordinal": number,
            "weight_tokens_s": 1.0,
            "data_parallel_rank": rank,
            "health": Health.HEALTHY,
            "incarnation": 1,
            "facts": facts,
            **fields,
        }
    )


def table(targets: Sequence[Target], **fields: Any) -> RoutingTable:
    """A routing table in which target n has slot n."""
    defaults = {"block_size_tokens": BLOCK, "hash_algorithm": HashAlgorithm.SHA256, "kv_events": True}
    pool = Pool(name="p", models=("m",), **{**defaults, **fields})
    snapshot = FleetSnapshot(epoch=1, version=1, pools=(pool,), targets=tuple(targets))
    return RoutingTable(snapshot=snapshot, slots={made.target_id: made.ordinal for made in targets})


class Following:
    """``KvEvents`` as an agent runs it, and a relay's hold on its index; an asynchronous context manager."""

    def __init__(self, folder: Path, *, max_blocks: int = 1 << 16, max_blocks_per_s: float = 1e9) -> None:
        folder.mkdir(exist_ok=True)
        self.service = KvEvents(folder, SLOTS, max_blocks=max_blocks, max_blocks_per_s=max_blocks_per_s)
        self._file = KvIndexFile(folder)

    async def __aenter__(self) -> "Following":
        self._task = asyncio.get_running_loop().create_task(self.service.run())
        return self

    async def __aexit__(self, *_: object) -> None:
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    @property
    def reader(self) -> KvIndexReader | None:
        """As a relay sees it now."""
        self._file.refresh(time.monotonic())
        return self._file.reader

    @property
    def targets(self) -> dict[str, int]:
        """Targets by the state of their views."""
        found: dict[str, int] = self.service.state()["targets"]
        return found

    def view(self, slot: int) -> ViewState:
        """What readers are told of a slot."""
        reader = self.reader
        return reader.view(slot)[0] if reader is not None else ViewState.NONE

    def blocks(self, slot: int) -> dict[int, int]:
        """The agent's own view of a slot."""
        subscriber = self.service._subscriber
        return subscriber.index.blocks_of(slot) if subscriber is not None else {}

    async def until(self, condition: Callable[[], Any], what: str, timeout_s: float = 30.0) -> None:
        """Wait for a condition."""
        deadline_s = time.monotonic() + timeout_s
        while not await asyncio.to_thread(condition):
            if self._task.done():
                self._task.result()
            assert time.monotonic() < deadline_s, f"{what}: {self.service.state()}"
            await asyncio.sleep(0.02)
