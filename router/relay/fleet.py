"""The relay's hold on the fleet: the routing core's live view, and where each of its slots can be reached."""

import hashlib
import hmac
import logging

import msgspec

from router.relay.upstream import Address, parse_url
from router.routing.kv_index import KvIndexReader
from router.routing.live import LiveFleet
from router.routing.table import RoutingTable
from twofold.model.fleet import Pool, RoutingPolicy, Target

log = logging.getLogger(__name__)

_decode_table = msgspec.msgpack.Decoder(RoutingTable).decode


class RelayTarget(msgspec.Struct, frozen=True, kw_only=True):
    """A target as the relay dials it. ``public_id`` tells clients workers apart without telling which they are."""

    slot: int
    target_id: str
    address: Address
    data_parallel_rank: int | None
    public_id: bytes


def public_id(key: bytes, target_id: str) -> bytes:
    """Opaque id of a target: 12 hexadecimal digits of a keyed hash."""
    return hmac.digest(key, target_id.encode(), hashlib.sha256).hex()[:12].encode()


class RelayFleet:
    """Live view plus addresses; replaced as a whole by each snapshot."""

    def __init__(self, live: LiveFleet, *, worker_id_key: str) -> None:
        self.live = live
        self._key = worker_id_key.encode()
        self._targets: dict[int, RelayTarget] = {}
        self.policy = RoutingPolicy()
        self.pools: tuple[Pool, ...] = ()
        self.epoch = 0
        self.version = 0
        self.ready = False
        """Whether there is a snapshot and in it a target that takes work."""
        self.installed = False
        self.kv: KvIndexReader | None = None
        """What the engines' KV events tell of their caches."""

    def install(self, encoded_table: bytes, rings: memoryview) -> None:
        """Work with a published table from now on. Raises msgspec.DecodeError when it is none."""
        table = _decode_table(encoded_table)
        self.live.install(table, rings)
        snapshot = table.snapshot
        targets: dict[int, RelayTarget] = {}
        for target in snapshot.targets:
            slot = table.slots.get(target.target_id)
            if slot is None:
                continue
            known = self._targets.get(slot)
            made = self._relay_target(slot, target)
            if made is not None:
                targets[slot] = known if known == made and known is not None else made
        self._targets = targets
        self.policy = snapshot.policy
        self.pools = snapshot.pools
        self.epoch, self.version = snapshot.epoch, snapshot.version
        self.ready = any(target.takes_work for target in snapshot.targets)
        self.installed = True

    def show_caches(self, reader: KvIndexReader | None) -> None:
        """Decide by these reports of the engines' caches from now on; None without any."""
        self.kv = self.live.kv = reader

    def target(self, slot: int) -> RelayTarget | None:
        """Where ``slot`` is; None when it left the fleet or its URL is unusable."""
        return self._targets.get(slot)

    def addresses(self) -> set[Address]:
        """All workers of the snapshot."""
        return {target.address for target in self._targets.values()}

    def _relay_target(self, slot: int, target: Target) -> RelayTarget | None:
        try:
            address = parse_url(target.url)
        except ValueError as error:
            log.error("unusable worker URL", extra={"target_id": target.target_id, "cause": str(error)})
            return None
        return RelayTarget(
            slot=slot,
            target_id=target.target_id,
            address=address,
            data_parallel_rank=target.data_parallel_rank,
            public_id=public_id(self._key, target.target_id),
        )
