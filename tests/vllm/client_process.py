"""Load generators run as users run them: as a command, in their own interpreter, without this project's packages."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

_NO_SNAPSHOT = "0" * 40


def offline_env(home: Path, extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """Environment for a client: nothing is fetched from a model hub, caches live below `home`."""
    return {
        **{name: value for name, value in os.environ.items() if not name.startswith("PYTHON")},
        "HF_HOME": str(home / "hub-cache"),
        "HF_HUB_OFFLINE": "1",
        "XDG_CACHE_HOME": str(home / "cache"),
        "VLLM_NO_USAGE_STATS": "1",
        "OMP_NUM_THREADS": "1",
        "NO_PROXY": "127.0.0.1,localhost",
        "no_proxy": "127.0.0.1,localhost",
        "COLUMNS": "160",
        **(extra or {}),
    }


def put_in_hub_cache(home: Path, repository: str, model: Path) -> None:
    """Makes `model` the cached snapshot of `repository` ("owner/name") for clients with `offline_env(home)`.

    Offline, aiperf takes a tokenizer only by the name of a cached repository, not as a folder.
    """
    entry = home / "hub-cache" / "hub" / f"models--{repository.replace('/', '--')}"
    snapshot = entry / "snapshots" / _NO_SNAPSHOT
    snapshot.mkdir(parents=True)
    (entry / "refs").mkdir()
    (entry / "refs" / "main").write_text(_NO_SNAPSHOT)
    for file in model.iterdir():
        (snapshot / file.name).symlink_to(file)


def run_client(command: Sequence[str | Path], *, folder: Path, env: Mapping[str, str], timeout_s: float) -> str:
    """Runs a command in a process group of its own and returns what it printed.

    Raises:
        AssertionError: it failed or ran past `timeout_s`; the group is gone then, the message has its output.
    """
    log = folder / "client.log"
    with log.open("wb") as out:
        process = subprocess.Popen(
            [str(part) for part in command],
            cwd=folder,
            env=dict(env),
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
            start_new_session=True,
        )
    try:
        status: int | str = process.wait(timeout_s)
    except subprocess.TimeoutExpired:
        status = f"running after {timeout_s:.0f} s"
    finally:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        process.wait(30)
    printed = log.read_text(errors="replace")
    assert status == 0, f"{command[0]}: {status}\n{printed[-6000:]}"
    return printed
