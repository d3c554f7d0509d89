"""``twofold profile`` as a process against an emulated engine, and against what is none."""

import asyncio
import contextlib
import json
import os
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from controlplane.discovery.fleet_file import fleet_file_from_mapping
from emulator.__main__ import read_profiles
from twofold import profiles
from twofold.model.profile import EngineProfile

DEADLINE_S = 60


@pytest.fixture
async def emulator(tmp_path: Path) -> AsyncIterator[str]:
    """URL of an emulated engine, a process of its own."""
    ready = tmp_path / "ready.json"
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "emulator", "--profile", "cpu-tiny", "--model", "tiny", "--port", "0"),
        *("--max-num-seqs", "24", "--max-num-batched-tokens", "512"),
        *("--ready-file", str(ready), "--log-file", str(tmp_path / "emulator.log")),
    )
    try:
        async with asyncio.timeout(DEADLINE_S):
            while not (ready.exists() and ready.read_text().strip()):
                assert process.returncode is None
                await asyncio.sleep(0.02)
        yield f"http://127.0.0.1:{json.loads(ready.read_text())['ports'][0]}"
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
        await asyncio.wait_for(process.wait(), DEADLINE_S)


async def start(*arguments: str, **env: str) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "twofold", "profile", *arguments),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env=os.environ | env,
    )


async def profile(*arguments: str, **env: str) -> tuple[int, str, str]:
    process = await start(*arguments, **env)
    out, err = await asyncio.wait_for(process.communicate(), DEADLINE_S)
    assert process.returncode is not None
    return process.returncode, out.decode(), err.decode()


def result(out: str) -> dict[str, Any]:
    last = out.splitlines()[-1]
    assert last.startswith("RESULT ")
    value: dict[str, Any] = json.loads(last[7:])
    return value


def loaded(path: Path) -> EngineProfile:
    (found,) = profiles.load_profiles(read_profiles(str(path))).values()
    return found


async def test_a_profile_is_measured_and_written(emulator: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    code, out, err = await profile(
        *(emulator, "--quick", "--max-seconds", "8", "--out", str(path), "--name", "mine", "--gpu", "CPU"),
        *("--price", "0.25", "--max-num-seqs", "24", "--max-num-batched-tokens", "512"),
    )
    assert (code, err) == (0, "")
    line = result(out)
    assert {"profile", "fit_error_ttft", "fit_error_itl", "kv_capacity_tokens", "law", "r2_itl"} <= set(line)
    assert (line["profile"], line["kv_capacity_tokens"], line["block_size_tokens"]) == ("mine", 524_288, 128)
    assert all(value >= 0 for value in line["law"].values())
    found = loaded(path)
    assert (found.gpu, found.model_class, found.usd_per_hour) == ("CPU", "tiny", 0.25)
    assert (found.max_num_seqs, found.max_num_batched_tokens, found.max_model_len_tokens) == (24, 512, 2048)
    assert found.law.base_s == line["law"]["base_s"] > 0
    assert "Time to first token" in out
    assert "0.32" in path.read_text().splitlines()[0], "the head of the file says where it comes from"
    fleet = fleet_file_from_mapping(
        {
            "profiles": read_profiles(str(path)),
            "pools": [{"name": "p", "models": ["m"], "workers": [{"profile": "mine", "replicas": 1}]}],
        }
    )
    assert fleet.model_profiles()["mine"] == found


async def test_the_limits_are_found_by_flooding(emulator: str, tmp_path: Path) -> None:
    path = tmp_path / "found.json"
    code, out, err = await profile(emulator, "--max-seconds", "1", "--out", str(path), "--plain")
    assert (code, err) == (0, "")
    line = result(out)
    assert (line["max_num_batched_tokens"], line["max_num_seqs"]) == (512, 24)
    assert line["warnings"] >= 1, "one round only, which is said"
    assert "only 1 of" in out
    assert loaded(path).name == "tiny-tp1"


async def test_standard_output_gets_the_profile_alone(emulator: str) -> None:
    code, out, _ = await profile(emulator, "--quick", "--max-seconds", "1", "--out", "-", OPENAI_API_KEY="secret")
    assert code == 0
    assert out.startswith("# measured ")
    assert "secret" not in out
    assert result(out)["file"] == "-"


async def test_an_engine_in_traffic_is_left_alone(emulator: str, tmp_path: Path) -> None:
    body = {"model": "tiny", "prompt": [5], "max_tokens": 2000, "ignore_eos": True, "stream": True}
    async with aiohttp.ClientSession() as session, session.post(f"{emulator}/v1/completions", json=body) as stream:
        await stream.content.readline()
        code, out, err = await profile(emulator, "--quick", "--out", str(tmp_path / "p.yaml"))
        busy = await still_runs(session, emulator)
    # The stream lasts six seconds of emulated time: a host too slow to ask within them finds an idle engine.
    if busy:
        assert (code, out) == (1, "")
        assert "--force" in err
        assert err.count("\n") == 1
        assert not (tmp_path / "p.yaml").exists()


async def still_runs(session: aiohttp.ClientSession, url: str) -> bool:
    async with session.get(f"{url}/metrics") as page:
        text = await page.text()
    return any(line.startswith("vllm:num_requests_running") and line.endswith(" 1.0") for line in text.splitlines())


async def test_an_interrupt_ends_it(emulator: str, tmp_path: Path) -> None:
    process = await start(emulator, "--out", str(tmp_path / "p.yaml"), "--max-seconds", "600")
    assert process.stdout is not None
    await asyncio.wait_for(process.stdout.readline(), DEADLINE_S)
    process.send_signal(signal.SIGINT)
    _, err = await asyncio.wait_for(process.communicate(), DEADLINE_S)
    assert process.returncode == 130
    assert b"Traceback" not in err
    assert not (tmp_path / "p.yaml").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "URL"),
        (["ftp://host"], "not an http"),
        (["http://127.0.0.1:1"], "cannot connect"),
        (["http://127.0.0.1:1", "--out", "/no/such/folder/p.yaml"], "cannot write"),
        (["http://127.0.0.1:1", "--price", "-1"], "--price"),
        (["http://127.0.0.1:1", "--max-num-seqs", "0"], "--max-num-seqs"),
        (["http://127.0.0.1:1", "--max-seconds", "0"], "--max-seconds"),
    ],
)
async def test_wrong_usage_is_one_line(arguments: list[str], message: str) -> None:
    code, out, err = await profile(*arguments)
    assert (code, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1


@contextlib.asynccontextmanager
async def stranger(models: Any, status: int = 200) -> AsyncIterator[str]:
    """A server that is no engine: it lists ``models`` and fails every completion with ``status``."""

    async def listing(_: web.Request) -> web.Response:
        return web.json_response(models)

    async def failing(_: web.Request) -> web.Response:
        return web.Response(status=status, text="no\nno")

    app = web.Application()
    app.router.add_get("/v1/models", listing)
    app.router.add_post("/v1/completions", failing)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


@pytest.mark.parametrize(
    ("models", "arguments", "code", "message"),
    [
        ({"data": []}, [], 2, "serves no model"),
        ({"data": [{"id": "a"}]}, ["--model", "b"], 2, "does not serve 'b'; it serves a"),
        ({"data": [{"id": "a"}]}, [], 1, "--kv-capacity-tokens"),
        ({"data": [{"id": "a"}]}, ["--kv-capacity-tokens", "100000"], 1, "status 500: no no"),
    ],
)
async def test_a_server_that_is_no_engine(models: Any, arguments: list[str], code: int, message: str) -> None:
    async with stranger(models, 500) as url:
        got, out, err = await profile(url, "--plain", "--quick", "--out", "-", *arguments)
    assert got == code
    assert message in err
    assert "Traceback" not in err
    assert "RESULT" not in out
