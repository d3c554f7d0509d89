"""Store, settings, backoff, demand, control server: the agent's small parts."""

import asyncio
import os
import random
import stat
from pathlib import Path

import msgspec
import pytest

from router.agent.backoff import Backoff
from router.agent.control_server import ControlServer, RelayGoneError
from router.agent.demand import DemandMeter, share_below
from router.agent.settings import TokenError, read_token
from router.agent.store import SnapshotStore, StoredSnapshot
from router.shm.control import Done, ExplainPast, Hello, encode_frame, relay_side
from router.shm.counters import CounterSlab
from router.shm.exposition import CounterBook
from twofold.model.fleet import FleetSnapshot, Slo


def test_the_store_replaces_its_file_as_a_whole(tmp_path: Path) -> None:
    store = SnapshotStore(tmp_path / "deep" / "er")
    assert store.load() is None
    for version in (1, 2):
        store.save(FleetSnapshot(epoch=1, version=version), 5.0)
        stored = store.load()
        assert stored is not None
        assert stored.snapshot.version == version
    assert [path.name for path in store.path.parent.iterdir()] == ["snapshot.msgpack"]
    assert stat.S_IMODE(store.path.stat().st_mode) == 0o600


@pytest.mark.parametrize(
    "content",
    [b"", b"\xc1", b"{}", msgspec.msgpack.encode({"format": 1}), msgspec.msgpack.encode([1, 2, 3])],
)
def test_a_damaged_file_counts_as_none(tmp_path: Path, content: bytes) -> None:
    store = SnapshotStore(tmp_path)
    store.path.write_bytes(content)
    assert store.load() is None


def test_a_file_of_another_format_counts_as_none(tmp_path: Path) -> None:
    store = SnapshotStore(tmp_path)
    other = StoredSnapshot(format=99, saved_s=0.0, snapshot=FleetSnapshot(epoch=1, version=1))
    store.path.write_bytes(msgspec.msgpack.encode(other))
    assert store.load() is None


def test_backoff_doubles_within_bounds_and_spreads() -> None:
    backoff = Backoff(0.1, 5.0, random.Random(1))
    delays = [backoff.next_s() for _ in range(12)]
    ceilings = [min(5.0, 0.1 * 2**n) for n in range(12)]
    assert all(max(0.1, ceiling / 2) <= delay <= ceiling for delay, ceiling in zip(delays, ceilings, strict=True))
    assert len(set(delays[6:])) == 6
    backoff.reset()
    assert backoff.next_s() == 0.1


def test_tokens_come_from_the_file_first_and_must_be_one_line(tmp_path: Path) -> None:
    path = tmp_path / "token"
    assert read_token("", " from-environment\n") == "from-environment"
    path.write_text("from-file\n")
    assert read_token(str(path), "from-environment") == "from-file"
    for content in (b"", b"\n", b"a\nb", b"\xff\xfe"):
        path.write_bytes(content)
        with pytest.raises(TokenError):
            read_token(str(path), "")
    with pytest.raises(TokenError, match="cannot read"):
        read_token(str(tmp_path / "nothing"), "")


def test_demand_is_what_changed_since_the_last_tick(tmp_path: Path) -> None:
    slab = CounterSlab.open(tmp_path / "counters.relay-0")
    requests = slab.counter("twofold_requests_total", "", ("pool", "code"))
    prompt = slab.counter("twofold_prompt_tokens_total", "", ("pool",))
    ttft = slab.histogram("twofold_ttft_seconds", "", (1.0, 2.0, 4.0), ("pool",))
    book, meter = CounterBook(tmp_path), DemandMeter()
    slos = {"a": Slo(ttft_s=2.0), "b": Slo()}
    slab.inc(requests.cell("a", "200"), 100)
    meter.add(book.totals(), 10.0)
    assert not meter.tick(slos).pools, "what happened before this agent began is not its demand"
    for code, count in (("200", 5), ("429", 2), ("503", 1), ("502", 3), ("404", 1)):
        slab.inc(requests.cell("a", code), count)
    slab.inc(prompt.cell("a"), 1000)
    for value in (0.5, 1.5, 1.5, 3.0):
        slab.observe(ttft.series("a"), value)
    meter.add(book.totals(), 11.5)
    tick = meter.tick(slos)
    assert tick.interval_s == 1.5
    (pool,) = tick.pools
    assert (pool.pool, pool.requests, pool.rejected, pool.failed) == ("a", 12, 3, 3)
    assert (pool.prompt_tokens, pool.ttft_within_slo) == (1000, 3)
    top = meter.top()
    assert top.requests_per_s == pytest.approx(8.0)
    assert top.error_ratio == pytest.approx(0.5)
    assert top.ttft_p50_s == pytest.approx(1.5)
    meter.add(book.totals(), 12.0)
    assert not meter.tick(slos).pools


def test_shares_below_a_bound_interpolate(tmp_path: Path) -> None:
    slab = CounterSlab.open(tmp_path / "counters.a")
    histogram = slab.histogram("twofold_s", "", (1.0, 2.0, 4.0)).series()
    book = CounterBook(tmp_path)

    def share(bound: float) -> float:
        (item,) = [series for series in book.totals() if series.family.name == "twofold_s"]
        return share_below(item, bound)

    assert share(1.0) == 1.0
    for value in (0.5, 1.5, 3.0, 9.0):
        slab.observe(histogram, value)
    assert [share(bound) for bound in (0.5, 1.0, 1.5, 2.0, 4.0, 100.0)] == [0.125, 0.25, 0.375, 0.5, 0.75, 0.75]


async def test_the_control_server_asks_relays_and_survives_their_ends(tmp_path: Path) -> None:
    async with ControlServer(tmp_path / "agent.sock") as server:
        with pytest.raises(RelayGoneError, match="not connected"):
            await server.ask(0, ExplainPast(id=1, request_id="r"), 1.0)
        reader, writer = await asyncio.open_unix_connection(str(tmp_path / "agent.sock"))
        writer.write(encode_frame(Hello(relay=0, pid=1)))
        async with asyncio.timeout(5):
            while server.relays != [0]:
                await asyncio.sleep(0.01)
        decoder = relay_side()
        first = asyncio.create_task(server.ask(0, ExplainPast(id=1, request_id="r"), 5.0))
        second = asyncio.create_task(server.ask(0, ExplainPast(id=2, request_id="s"), 5.0))
        got = []
        while len(got) < 2:
            got += decoder.feed(await reader.read(1000))
        writer.write(encode_frame(Done(id=99)) + encode_frame(Done(id=2)) + encode_frame(Done(id=1)))
        assert await first == Done(id=1)
        assert await second == Done(id=2)
        with pytest.raises(TimeoutError):
            await server.ask(0, ExplainPast(id=3, request_id="r"), 0.05)
        last = asyncio.create_task(server.ask(0, ExplainPast(id=4, request_id="r"), 5.0))
        await reader.read(1000)
        writer.close()
        with pytest.raises(RelayGoneError):
            await last
        await writer.wait_closed()
    assert not (tmp_path / "agent.sock").exists()


@pytest.mark.parametrize("garbage", [b"\xff\xff\xff\xff", encode_frame(Done(id=1)), b"\x00\x00\x00\x01\x00"])
async def test_garbage_on_the_control_channel_ends_only_that_connection(tmp_path: Path, garbage: bytes) -> None:
    async with ControlServer(tmp_path / "agent.sock") as server:
        reader, writer = await asyncio.open_unix_connection(str(tmp_path / "agent.sock"))
        writer.write(garbage)
        assert await asyncio.wait_for(reader.read(10), 5) == b""
        writer.close()
        _, writer = await asyncio.open_unix_connection(str(tmp_path / "agent.sock"))
        writer.write(encode_frame(Hello(relay=3, pid=os.getpid())))
        async with asyncio.timeout(5):
            while server.relays != [3]:
                await asyncio.sleep(0.01)
        writer.close()
