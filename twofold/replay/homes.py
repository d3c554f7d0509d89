"""Whether all relay processes agree on the homes of every ring key met.

The keys and the homes they had come from remembered decisions; then every relay is asked for the homes of every key.
"""

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

import aiohttp
import msgspec

CONCURRENCY = 8
CALL_TIMEOUT_S = 5.0
KEYS_PER_CALL = 1000


class Agreement(msgspec.Struct, frozen=True, kw_only=True):
    """What the relays said. A key counts as shared when two relays or more named its homes."""

    relays: int = 0
    decisions: int = 0
    keys: int = 0
    keys_shared: int = 0
    disagreements: int = 0

    @property
    def agreed(self) -> bool:
        """Whether every key had one set of homes wherever it was met, and some relays met the same keys."""
        return self.disagreements == 0 and self.keys_shared > 0


async def check_homes(admin_urls: Sequence[str], request_ids: Sequence[str]) -> Agreement:
    """Ask every replica's admin port about every request; a replica that does not remember one is passed over."""
    gate = asyncio.Semaphore(CONCURRENCY)
    timeout = aiohttp.ClientTimeout(total=CALL_TIMEOUT_S)
    async with aiohttp.ClientSession(timeout=timeout) as session:

        async def ask(url: str, request_id: str) -> list[dict[str, Any]]:
            async with gate:
                try:
                    async with session.post(f"{url}/explain", json={"request_id": request_id}) as reply:
                        answer = await reply.json() if reply.status == 200 else {}
                except (aiohttp.ClientError, TimeoutError, ValueError):
                    return []
            return list(answer.get("decisions", ()))

        answers = await asyncio.gather(*(ask(url, name) for url in admin_urls for name in request_ids))
        decisions = [decision for answer in answers for decision in answer]
        asked = await asyncio.gather(*(_homes_of(session, url, decisions) for url in admin_urls))
    return agreement(decisions + [decision for answer in asked for decision in answer])


async def _homes_of(
    session: aiohttp.ClientSession, url: str, decisions: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """What each relay of a replica computes for every key of ``decisions``, in the form of decisions."""
    keys: dict[str, dict[str, None]] = {}
    for decision in decisions:
        if any(target.get("role", "").startswith("home") for target in decision.get("examined", ())):
            keys.setdefault(decision.get("pool", ""), {})[decision.get("ring_key", "")] = None
    found: list[dict[str, Any]] = []
    for pool, wanted in keys.items():
        names = list(wanted)
        for start in range(0, len(names), KEYS_PER_CALL):
            part = names[start : start + KEYS_PER_CALL]
            try:
                async with session.post(f"{url}/homes", json={"pool": pool, "keys": part}) as reply:
                    answer = await reply.json() if reply.status == 200 else {}
            except (aiohttp.ClientError, TimeoutError, ValueError):
                continue
            for relay, told in answer.get("relays", {}).items():
                shared = {
                    "pool": pool,
                    "ring_version": told["ring_version"],
                    "replica_id": answer["replica_id"],
                    "relay": int(relay),
                }
                found += [
                    {**shared, "ring_key": key, "examined": [{"target_id": name, "role": "home"} for name in homes]}
                    for key, homes in zip(part, told["homes"], strict=False)
                ]
    return found


def agreement(decisions: Sequence[Mapping[str, Any]]) -> Agreement:
    """Compare decisions (as JSON of twofold.v1.Decision): equal pool, ring version and key must mean equal homes."""
    homes: dict[tuple[str, str, str], set[tuple[str, ...]]] = {}
    deciders: dict[tuple[str, str, str], set[tuple[str, int]]] = {}
    for decision in decisions:
        named = tuple(
            target["target_id"] for target in decision.get("examined", ()) if target.get("role", "").startswith("home")
        )
        if not named:
            continue
        key = (decision.get("pool", ""), decision.get("ring_version", ""), decision.get("ring_key", ""))
        homes.setdefault(key, set()).add(named)
        deciders.setdefault(key, set()).add((decision.get("replica_id", ""), int(decision.get("relay", 0))))
    return Agreement(
        relays=len({relay for relays in deciders.values() for relay in relays}),
        decisions=len(decisions),
        keys=len(homes),
        keys_shared=sum(len(relays) > 1 for relays in deciders.values()),
        disagreements=sum(len(sets) > 1 for sets in homes.values()),
    )
