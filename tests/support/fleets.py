"""Fleet files for tests, on free ports."""

import os
import socket
from typing import Any


def free_port_base(count: int) -> int:
    """First of ``count`` neighbouring ports that are all free now, below the range of ephemeral ports.

    Each process looks from a place of its own, so that test runs side by side do not pick the same ports.
    """
    bases = range(21_000, 32_600, 100)
    start = os.getpid() * 37 % len(bases)
    for base in (*bases[start:], *bases[:start]):
        sockets = []
        try:
            for port in range(base, base + count):
                probe = socket.socket()
                sockets.append(probe)
                probe.bind(("127.0.0.1", port))
            return base
        except OSError:
            continue
        finally:
            for probe in sockets:
                probe.close()
    raise RuntimeError("no free port range")


def mapping(replicas: int = 2, relays: int = 1, engines: int = 4, **group: Any) -> dict[str, Any]:
    """A fleet of emulated engines on free ports."""
    base = free_port_base(40)
    return {
        "name": "test",
        "control_plane": {"listen": f"127.0.0.1:{base}", "metrics": f"127.0.0.1:{base + 1}"},
        "routers": {"replicas": replicas, "relays": relays, "port": base + 2, "admin_port": base + 8},
        "pools": [
            {
                "name": "llama-8b",
                "models": ["llama-3.1-8b", "default"],
                "workers": [
                    {
                        "profile": "h100-8b-tp1",
                        "engine": "emulated",
                        "replicas": engines,
                        "port_base": base + 16,
                        **group,
                    }
                ],
            }
        ],
    }


def watched_fleet(urls: list[str], model: str, profile: str = "cpu-tiny", replicas: int = 1) -> dict[str, Any]:
    """Routers in front of engines that somebody else runs."""
    base = free_port_base(16)
    return {
        "name": "watched",
        "control_plane": {"listen": f"127.0.0.1:{base}", "metrics": f"127.0.0.1:{base + 1}"},
        "routers": {"replicas": replicas, "relays": 1, "port": base + 2, "admin_port": base + 8},
        "pools": [{"name": model, "models": [model], "workers": [{"profile": profile, "urls": urls}]}],
    }
