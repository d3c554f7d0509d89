"""From desired state to processes, purely: which engine processes should run, with which workers and commands."""

import hashlib
import json
import sys
from collections.abc import Iterable, Mapping

import msgspec

from controlplane.discovery.fleet_file import FAULT_PORT_OFFSET, Engine
from controlplane.plan import Desired, LaunchGroup

HOST = "127.0.0.1"
DEFAULT_VLLM_ENV = {"VLLM_NO_USAGE_STATS": "1"}
_KV_EVENTS_FLAG = "--kv-events-config"
_KV_EVENTS = json.dumps(
    {
        "enable_kv_cache_events": True,
        "publisher": "zmq",
        # Any free port: routers ask each engine where it publishes.
        "endpoint": "tcp://*:0",
        "replay_endpoint": "tcp://*:0",
    }
)


class Unit(msgspec.Struct, frozen=True, kw_only=True):
    """One engine process and the workers it serves, on neighbouring ports."""

    name: str
    launch: LaunchGroup
    indices: tuple[int, ...]
    """Indices of its workers within their group."""

    @property
    def worker_ids(self) -> tuple[str, ...]:
        """Ids of its workers."""
        return tuple(worker_id(self.launch, index) for index in self.indices)

    @property
    def port(self) -> int:
        """First port; 0 when any free one will do."""
        base = self.launch.group.port_base
        return base + self.indices[0] if base else 0


def worker_id(launch: LaunchGroup, index: int) -> str:
    """Id of the worker at an index of its group."""
    return f"{_stem(launch)}-{index}"


def _stem(launch: LaunchGroup) -> str:
    parts = [launch.pool, launch.profile.replace("@", "-"), *([launch.group.zone] if launch.group.zone else [])]
    stem = "".join(c if (c.isalnum() and c.isascii()) or c in "._-" else "-" for c in "-".join(parts))
    if len(stem) <= 96 and stem == "-".join(parts):
        return stem
    # Long or unusual names are cut; a digest keeps two of them apart.
    return f"{stem[:80]}-{hashlib.sha256('|'.join(launch.key).encode()).hexdigest()[:8]}"


def desired_units(launch: LaunchGroup, desired: Desired, present: Iterable[int]) -> tuple[Unit, ...]:
    """The processes for ``desired.replicas`` workers, keeping ``present`` indices where possible.

    Shrinking takes the victims first, then the highest indices; growing fills the lowest free indices. Where several
    engines share a process, workers are numbered without gaps and victims cannot be honoured.
    """
    size = launch.group.engines_per_process
    if size > 1:
        numbers = list(range(desired.replicas))
        chunks = [tuple(numbers[at : at + size]) for at in range(0, len(numbers), size)]
    else:
        chunks = [(index,) for index in _indices(launch, desired, set(present))]
    return tuple(Unit(name=worker_id(launch, chunk[0]), launch=launch, indices=chunk) for chunk in chunks)


def _indices(launch: LaunchGroup, desired: Desired, present: set[int]) -> list[int]:
    victims = set(desired.victims)
    keep = sorted(present, key=lambda index: (worker_id(launch, index) in victims, index))[: desired.replicas]
    chosen, candidate = set(keep), 0
    while len(chosen) < desired.replicas:
        if candidate not in chosen:
            chosen.add(candidate)
        candidate += 1
    return sorted(chosen)


def command(unit: Unit, port: int, profile_file: str) -> tuple[list[str], dict[str, str]]:
    """Arguments of the unit's process and the variables added to its environment."""
    group = unit.launch.group
    publishes = unit.launch.kv_events and not any(_KV_EVENTS_FLAG in arg for arg in group.engine_args)
    kv_events = (_KV_EVENTS_FLAG, _KV_EVENTS) if publishes else ()
    if group.engine is Engine.VLLM:
        argv = [
            *(group.python or sys.executable, "-m", "vllm.entrypoints.openai.api_server"),
            *("--host", HOST, "--port", str(port)),
            *("--served-model-name", unit.launch.model),
            *kv_events,
            *group.engine_args,
        ]
        # vLLM binds port 0 at its node's address; that is the one that routers reach it by.
        host = {"VLLM_HOST_IP": HOST} if kv_events else {}
        return argv, {**DEFAULT_VLLM_ENV, **host, **group.env}
    argv = [
        *(group.python or sys.executable, "-m", "emulator"),
        *("--profile", group.profile, "--model", unit.launch.model),
        *("--host", HOST, "--port", str(port), "--engines", str(len(unit.indices))),
        *("--worker-id", unit.name, "--shutdown-timeout", f"{group.stop_grace_s:g}"),
    ]
    if group.time_scale != 1.0:
        argv += ["--time-scale", f"{group.time_scale:g}"]
    if profile_file:
        argv += ["--profile-file", profile_file]
    if group.fault_injection:
        argv += ["--admin-port", str(port + FAULT_PORT_OFFSET), "--enable-fault-injection"]
    return [*argv, *kv_events, *group.engine_args], dict(group.env)


def fingerprint(unit: Unit, profiles: Iterable[Mapping[str, object]]) -> str:
    """Digest of everything that decides how the unit's process runs; another one means it must be replaced."""
    argv, env = command(unit, unit.port, "")
    facts = [argv, sorted(env.items()), unit.worker_ids, list(profiles)]
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:16]
