"""Passing load on: what each replica is sent, when, and in how many messages."""

import asyncio
from collections.abc import AsyncGenerator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from controlplane.routers import hub as hub_module
from controlplane.routers.hub import RouterHub, Session
from twofold.v1 import router_pb2

EPOCH = 7


def make_hub() -> RouterHub:
    return RouterHub(lambda: EPOCH, lambda session, failures: None, lambda session: None, gone_after_s=0.0)


def connect(hub: RouterHub, name: str) -> Session:
    return hub.connect(router_pb2.RouterHello(replica_id=name))


def tick(sequence: int, rows: dict[int, int], *, hashes: int = 0) -> router_pb2.LoadTick:
    count = len(rows)
    made = router_pb2.LoadTick(
        epoch=EPOCH,
        sequence=sequence,
        ordinals=list(rows),
        inflight=list(rows.values()),
        decodes=[0] * count,
        queued_prefill_tokens=[0.0] * count,
        queued_prefill_s=[0.0] * count,
        kv_tokens=[0.0] * count,
        stored_tokens=[0.0] * count,
        failures=[0] * count,
    )
    if hashes:
        made.prefixes.add(ordinal=next(iter(rows)), hashes=range(hashes))
    return made


async def following(stream: AsyncGenerator[bytes, None]) -> router_pb2.ReportResponse:
    """The next message of a stream."""
    async with asyncio.timeout(10):
        return router_pb2.ReportResponse.FromString(await anext(stream))


async def silent(stream: AsyncGenerator[bytes, None]) -> bool:
    """Whether nothing more comes by itself. Ends the stream."""
    pending = asyncio.ensure_future(anext(stream))
    for _ in range(20):
        await asyncio.sleep(0)
    done = pending.done()
    pending.cancel()
    await asyncio.gather(pending, return_exceptions=True)
    return not done


async def test_one_message_holds_what_all_the_others_reported() -> None:
    hub = make_hub()
    reader = connect(hub, "reader")
    others = [connect(hub, f"r{i}") for i in range(5)]
    for number, session in enumerate(others):
        hub.tick(session, tick(1, {number: 10 + number}))
    hub.tick(reader, tick(1, {3: 99}))
    stream = hub.outgoing(reader)
    message = await following(stream)
    got = {peer.replica_id: dict(zip(peer.load.ordinals, peer.load.inflight, strict=True)) for peer in message.peers}
    assert got == {f"r{i}": {i: 10 + i} for i in range(5)}
    assert all(peer.full for peer in message.peers), "the first about each"
    assert hub.sent == 1
    hub.tick(others[2], tick(2, {8: 1}))
    (peer,) = (await following(stream)).peers
    assert (peer.replica_id, list(peer.load.ordinals), peer.full) == ("r2", [8], False)
    assert await silent(stream)
    hub.close()


async def test_what_a_replica_reported_is_encoded_once_for_all_readers() -> None:
    hub = make_hub()
    sender = connect(hub, "sender")
    readers = [connect(hub, f"r{i}") for i in range(4)]
    hub.tick(sender, tick(1, {1: 1}))
    pieces = {id(sender.load.since(0)) for _ in readers}
    assert len(pieces) == 1
    sent = {await anext(hub.outgoing(reader)) for reader in readers}
    assert sent == {sender.load.since(0)}
    hub.close()


async def test_readers_are_woken_in_rounds_with_a_spacing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_module, "ROUND_S", 3600.0)
    hub = make_hub()
    reader, sender = connect(hub, "reader"), connect(hub, "sender")
    stream = hub.outgoing(reader)
    hub.tick(sender, tick(1, {1: 1}))
    await following(stream)
    pending = asyncio.ensure_future(following(stream))
    hub.tick(sender, tick(2, {1: 2}))
    # The first round was long ago enough; it wakes a reader that already has the first tick and now gets the second.
    message = await pending
    assert list(message.peers[0].load.inflight) == [2]
    assert hub.rounds == 1
    for sequence in range(3, 50):
        hub.tick(sender, tick(sequence, {1: sequence}))
    assert await silent(stream), "the next round is an hour away"
    hub.close()


async def test_a_reader_that_was_away_for_long_is_sent_everything_and_told_so() -> None:
    hub = make_hub()
    reader, sender = connect(hub, "reader"), connect(hub, "sender")
    stream = hub.outgoing(reader)
    hub.tick(sender, tick(1, {1: 1, 2: 2}))
    await following(stream)
    for sequence in range(2, 200):
        hub.tick(sender, tick(sequence, {3: sequence}))
    (peer,) = (await following(stream)).peers
    assert peer.full
    assert dict(zip(peer.load.ordinals, peer.load.inflight, strict=True)) == {1: 1, 2: 2, 3: 199}
    assert hub.merges == 1
    hub.close()


async def test_a_replica_that_comes_back_replaces_its_rows_and_one_that_leaves_is_named() -> None:
    hub = make_hub()
    reader, sender, leaver = connect(hub, "reader"), connect(hub, "sender"), connect(hub, "leaver")
    stream = hub.outgoing(reader)
    hub.tick(sender, tick(1, {1: 1}))
    hub.tick(leaver, tick(1, {1: 1}))
    assert len((await following(stream)).peers) == 2
    hub.disconnect(sender)
    again = connect(hub, "sender")
    hub.disconnect(leaver)
    hub.tick(again, tick(1, {2: 5}))
    seen = [await following(stream)]
    if not seen[0].gone:
        seen.append(await following(stream))
    (peer,) = [peer for message in seen for peer in message.peers]
    assert (peer.replica_id, peer.full, list(peer.load.ordinals)) == ("sender", True, [2])
    assert [gone.replica_id for message in seen for gone in message.gone] == ["leaver"]
    hub.close()


async def test_a_batch_is_bounded_and_every_replica_gets_its_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_module, "MAX_BATCH_BYTES", 3000)
    hub = make_hub()
    reader = connect(hub, "reader")
    others = [connect(hub, f"r{i:02}") for i in range(20)]
    for session in others:
        hub.tick(session, tick(1, {1: 1}, hashes=100))
    stream = hub.outgoing(reader)
    sizes, names = [], []
    while len(names) < 20:
        async with asyncio.timeout(10):
            raw = await anext(stream)
        sizes.append(len(raw))
        names += [peer.replica_id for peer in router_pb2.ReportResponse.FromString(raw).peers]
        for session in others[:3]:
            # Some have news all the time; the others must not starve.
            hub.tick(session, tick(len(sizes) + 1, {1: 1}, hashes=100))
    assert set(names[:20]) >= {f"r{i:02}" for i in range(3, 20)} or len(set(names)) == 20
    assert max(sizes) < 3000 + 2000
    hub.close()


async def test_commands_do_not_wait_for_a_round(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_module, "ROUND_S", 3600.0)
    hub = make_hub()
    reader, sender = connect(hub, "reader"), connect(hub, "sender")
    stream = hub.outgoing(reader)
    hub.tick(sender, tick(1, {1: 1}))
    await following(stream)
    asked = asyncio.ensure_future(hub.command("reader", router_pb2.RouterCommand(top=router_pb2.TopCommand()), 5.0))
    message = await following(stream)
    while not message.HasField("command"):
        message = await following(stream)
    hub.result(reader, router_pb2.CommandResult(command_id=message.command.command_id))
    assert (await asked).command_id == message.command.command_id
    hub.close()


@given(
    st.lists(
        st.tuples(st.integers(0, 3), st.dictionaries(st.integers(0, 4), st.integers(0, 9), min_size=1, max_size=3)),
        max_size=80,
    ),
    st.sets(st.integers(0, 80)),
)
@settings(max_examples=40, deadline=None)
def test_whenever_it_reads_a_reader_knows_all_others_in_the_end(
    events: list[tuple[int, dict[int, int]]], reads: set[int]
) -> None:
    async def run() -> None:
        hub = make_hub()
        reader = connect(hub, "reader")
        others = [connect(hub, f"r{i}") for i in range(4)]
        stream = hub.outgoing(reader)
        expected: dict[str, dict[int, int]] = {}
        known: dict[str, dict[int, int]] = {}

        async def read() -> None:
            for peer in (await following(stream)).peers:
                rows = {} if peer.full else known[peer.replica_id]
                rows.update(zip(peer.load.ordinals, peer.load.inflight, strict=True))
                known[peer.replica_id] = rows

        unread = 0
        for number, (who, rows) in enumerate(events):
            hub.tick(others[who], tick(number, rows))
            expected.setdefault(f"r{who}", {}).update(rows)
            unread += 1
            if number in reads:
                reader.wake.set()
                await read()
                unread = 0
        if unread:
            reader.wake.set()
            await read()
        assert known == expected
        hub.close()

    asyncio.run(run())
