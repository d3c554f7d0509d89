"""The fleets that ``twofold demo`` runs, on ports that nobody else uses."""

import socket
from typing import Any

import msgspec

from controlplane.discovery.fleet_file import FAULT_PORT_OFFSET, FleetFile, fleet_file_from_mapping
from twofold.cli.defaults import default_fleet

PORTS = 64
FIRST_PORT, LAST_PORT = 20_000, 30_000
DEMO_PROFILES = ("l40s-8b-tp1", "l4-8b-tp2")


class PortError(OSError):
    """No range of free ports; one line."""


def demo_fleet(engine: str, vllm_python: str = "", vllm_model: str = "") -> FleetFile:
    """Two replicas before eight emulated engines of two GPU types, or two vLLM engines. Raises FleetFileError."""
    mapping = msgspec.to_builtins(default_fleet(engine, vllm_python, vllm_model))
    mapping["name"] = "demo"
    mapping["routers"]["replicas"] = 2
    if engine == "emulated":
        # Engines with long steps, so that a small host can keep eight of them on time.
        shared = {"engine": "emulated", "replicas": 4, "engines_per_process": 1, "fault_injection": True}
        mapping["pools"][0]["workers"] = [{"profile": profile} | shared for profile in DEMO_PROFILES]
    return on_free_ports(mapping)


def mooncake_fleet() -> FleetFile:
    """Two replicas of two relays each before sixteen emulated engines.

    Their prefill is fast enough for the trace under any policy, and their steps are long enough for a small host.
    """
    mapping = {
        "name": "mooncake",
        "routers": {"replicas": 2, "relays": 2},
        "pools": [
            {
                "name": "llama-70b",
                "models": ["llama-3.1-70b"],
                "slo": {"ttft_s": 5.0, "tpot_s": 0.1, "percentile": 0.9},
                "workers": [
                    {
                        "profile": "h100-70b-tp8",
                        "engine": "emulated",
                        "replicas": 16,
                        "engines_per_process": 1,
                        "fault_injection": True,
                        # An event for each of 1.4 million tokens would fill a small host; every token is verified.
                        "engine_args": ["--stream-interval", "8"],
                    }
                ],
            }
        ],
    }
    return on_free_ports(mapping)


def on_free_ports(mapping: dict[str, Any]) -> FleetFile:
    """The fleet file of ``mapping`` with every port moved to a free range. Raises FleetFileError, PortError."""
    base = free_port_base(PORTS)
    mapping["control_plane"] = {"listen": f"127.0.0.1:{base}", "metrics": f"127.0.0.1:{base + 1}"}
    mapping["routers"] |= {"host": "127.0.0.1", "port": base + 2, "admin_port": base + 10}
    port = base + 18
    for pool in mapping["pools"]:
        for group in pool["workers"]:
            group["port_base"] = port
            port += group["replicas"]
    assert port <= base + PORTS
    return fleet_file_from_mapping(mapping)


def engine_admin_urls(file: FleetFile) -> list[str]:
    """Admin port of each emulator process of a fleet that has fixed ports and fault injection."""
    urls = []
    for pool in file.pools:
        for group in pool.workers:
            if group.fault_injection and group.port_base:
                first = range(group.port_base, group.port_base + group.replicas, group.engines_per_process)
                urls += [f"http://127.0.0.1:{port + FAULT_PORT_OFFSET}" for port in first]
    return urls


def engine_urls(file: FleetFile) -> list[str]:
    """Base URL of each engine of a fleet with fixed ports."""
    groups = [group for pool in file.pools for group in pool.workers]
    return [f"http://127.0.0.1:{group.port_base + index}" for group in groups for index in range(group.replicas)]


def free_port_base(count: int) -> int:
    """First of ``count`` neighbouring ports that are free now, and whose fault ports are. Raises PortError."""
    for base in range(FIRST_PORT, LAST_PORT, count):
        if all(_free(port) and _free(port + FAULT_PORT_OFFSET) for port in range(base, base + count)):
            return base
    raise PortError(f"no {count} neighbouring free ports between {FIRST_PORT} and {LAST_PORT}")


def _free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True
