"""Fleets that need no file: what ``twofold up`` and ``twofold demo`` run by themselves."""

import os
import sys
from typing import Any

from controlplane.discovery.fleet_file import FleetFile, FleetFileError, fleet_file_from_mapping

EMULATED_MODEL = "llama-3.1-8b"
VLLM_MODEL = "tiny"


def default_fleet(engine: str = "emulated", vllm_python: str = "", vllm_model: str = "") -> FleetFile:
    """Two router replicas before eight emulated engines of two GPU types, or before two real vLLM engines (CPU build).

    Raises FleetFileError when ``engine`` is "vllm" and its interpreter or model is not given.
    """
    return fleet_file_from_mapping(_vllm(vllm_python, vllm_model) if engine == "vllm" else _emulated())


def _emulated() -> dict[str, Any]:
    return {
        "name": "default",
        "routers": {"replicas": 2},
        "pools": [
            {
                "name": "llama-8b",
                "models": [EMULATED_MODEL, "default"],
                "slo": {"ttft_s": 2.0, "tpot_s": 0.1, "percentile": 0.9},
                "workers": [
                    {"profile": "a100-80gb-8b-tp1", "engine": "emulated", "replicas": 4, "port_base": 9100},
                    {"profile": "l40s-8b-tp1", "engine": "emulated", "replicas": 4, "port_base": 9120},
                ],
            }
        ],
    }


def _vllm(python: str, model: str) -> dict[str, Any]:
    python = python or os.environ.get("TWOFOLD_VLLM_PYTHON", "")
    model = model or os.environ.get("TWOFOLD_VLLM_MODEL", "")
    if not python or not model:
        raise FleetFileError(
            "engine vllm needs --vllm-python (an interpreter with vLLM) and --vllm-model; "
            f"`make up ENGINE=vllm` installs both (running under {sys.executable})"
        )
    return {
        "name": "vllm",
        "routers": {"replicas": 2},
        "pools": [
            {
                "name": VLLM_MODEL,
                "models": [VLLM_MODEL],
                "slo": {"ttft_s": 2.0, "tpot_s": 0.1, "percentile": 0.9},
                "workers": [
                    {
                        "profile": "cpu-tiny",
                        "engine": "vllm",
                        "replicas": 2,
                        "port_base": 9200,
                        "python": python,
                        "engine_args": vllm_engine_args(model),
                        "env": vllm_environment(),
                    }
                ],
            }
        ],
    }


def vllm_engine_args(model: str) -> list[str]:
    """Arguments of vLLM's API server for a small model on CPU; host, port and served name are the provider's."""
    return [
        *("--model", model),
        *("--dtype", "float32"),
        *("--max-model-len", "2048"),
        "--enforce-eager",
        "--enable-prefix-caching",
        "--enable-prompt-tokens-details",
    ]


def vllm_environment() -> dict[str, str]:
    """Environment in which two CPU engines share a small machine: no spinning threads, no network, 1 GiB of KV each."""
    return {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": "1",
        "KMP_BLOCKTIME": "0",
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
    }
