"""``twofold replay`` as a process, against a server in this process."""

import asyncio
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any


async def replay(*arguments: str, env: dict[str, str] | None = None) -> tuple[int, str, str]:
    process = await start(*arguments, env=env)
    out, err = await asyncio.wait_for(process.communicate(), 60)
    assert process.returncode is not None
    return process.returncode, out.decode(), err.decode()


async def start(*arguments: str, env: dict[str, str] | None = None) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "twofold", "replay", "--plain", *arguments),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env=os.environ | (env or {}),
    )


def result(out: str) -> dict[str, Any]:
    last = out.splitlines()[-1]
    assert last.startswith("RESULT ")
    value: dict[str, Any] = json.loads(last[7:])
    return value


TRAFFIC = "sessions=8,rate=50,think_s=0.01,tool_s=0.01,system_tokens=50,tool_tokens=40,steps=2,turns=2"


async def test_a_clean_run_ends_with_a_result_line(fake: Any, tmp_path: Path) -> None:
    fake.cached_tokens = 0
    picture, document = tmp_path / "out.png", tmp_path / "out.json"
    code, out, err = await replay(
        *("--url", fake.url, "--url", fake.url, "--generate", TRAFFIC, "--max-lateness-s", "30", "--strict"),
        *("--json", str(document), "--plot", str(picture)),
    )
    assert (code, err) == (0, "")
    line = result(out)
    assert line["requests"] == len(fake.requests) - 1, "one request was the probe"
    assert (line["errors"], line["chain_violations"]) == (0, 0)
    assert line["tokens_delivered"] == line["tokens_verified"] > 0
    assert line["hit_ratio"] == 0.0
    assert 0 < line["hit_ratio_ideal"] < 1
    assert json.loads(document.read_text())["requests"] == line["requests"]
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "TTFT" in out


async def test_two_runs_of_one_seed_send_the_same_prompts(fake: Any) -> None:
    arguments = ("--url", fake.url, "--generate", TRAFFIC, "--verify", "on", "--concurrency-limit", "1", "--seed", "9")
    seen = []
    for _ in range(2):
        fake.prompts.clear()
        code, _, _ = await replay(*arguments)
        assert code == 0
        seen.append(sorted(fake.prompts))
    assert seen[0] == seen[1]


async def test_wrong_tokens_fail_a_strict_run(fake: Any) -> None:
    fake.mangle = lambda number, tokens: [*tokens[:-1], " zzz"] if number == 2 else tokens
    arguments = ("--url", fake.url, "--generate", TRAFFIC, "--verify", "on", "--max-lateness-s", "30")
    code, out, _ = await replay(*arguments, "--strict")
    assert code == 1
    assert result(out)["chain_violations"] == 1
    fake.requests.clear()
    code, out, _ = await replay(*arguments)
    assert code == 0
    assert "first violation" in out


async def test_json_on_standard_output_leaves_the_result_line_last(fake: Any) -> None:
    code, out, err = await replay("--url", fake.url, "--generate", TRAFFIC, "--json", "-")
    assert code == 0
    body, _, line = out.rstrip().rpartition("\nRESULT ")
    assert json.loads(body)["requests"] == json.loads(line)["requests"]
    assert "TTFT" in err


async def test_the_api_key_is_sent_and_never_shown(fake: Any) -> None:
    code, out, err = await replay("--url", fake.url, "--generate", TRAFFIC, env={"OPENAI_API_KEY": "sk-hidden"})
    assert code == 0
    assert "sk-hidden" not in out + err
    assert set(fake.authorizations) == {"Bearer sk-hidden"}


async def test_an_interrupt_ends_with_a_partial_report(fake: Any) -> None:
    traffic = "sessions=100,rate=5,agents=0,turns=1,system_tokens=0"
    process = await start("--url", fake.url, "--generate", traffic, "--verify", "on")
    async with asyncio.timeout(30):
        while len(fake.requests) < 3:
            await asyncio.sleep(0.01)
    process.send_signal(signal.SIGINT)
    out, err = await asyncio.wait_for(process.communicate(), 30)
    assert process.returncode == 130
    assert err == b""
    line = result(out.decode())
    assert line["interrupted"]
    assert not line["valid"]
    assert 3 <= line["requests"] < 100


async def test_what_cannot_be_done_is_one_line(fake: Any, tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text("{}\n")
    bad = str(tmp_path / "bad.jsonl")
    for arguments, code, message in (
        (("--generate", "speed=1"), 2, "unknown parameter 'speed'"),
        (("--format", "azure"), 2, "needs a file"),
        (("--format", "zip"), 2, "--format"),
        (("--url", "ftp://x"), 2, "not an http(s) URL"),
        (("--url", "http://127.0.0.1:1"), 1, "cannot connect"),
        (("--url", fake.url, "--format", "mooncake", "--trace", bad), 1, "bad.jsonl: line 1: "),
        (("--url", fake.url, "--json", str(tmp_path / "no" / "x.json"), "--generate", TRAFFIC), 1, "cannot write"),
        (("--url", fake.url, "--engine-metrics", "http://127.0.0.1:1"), 1, "http://127.0.0.1:1/metrics"),
    ):
        got, _, err = await replay(*arguments)
        assert got == code, (arguments, err)
        assert message in err
        assert err.count("\n") == 1
        assert "Traceback" not in err
