"""Loaders: what they read, and what they say of what they cannot read."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from twofold.replay.formats import azure, generated, open_workload
from twofold.replay.formats.lines import read_lines
from twofold.replay.formats.mooncake import detect_tick_s
from twofold.replay.formats.open import WorkloadOptions
from twofold.replay.workload import Blocks, Dialogue, Fork, Session, Step, WorkloadError


def row(timestamp: float, input_length: int, hash_ids: list[int], output_length: int = 3) -> str:
    return json.dumps(
        {"timestamp": timestamp, "input_length": input_length, "output_length": output_length, "hash_ids": hash_ids}
    )


def load(tmp_path: Path, format_: str, text: str | bytes, **options: Any) -> list[Session]:
    path = tmp_path / "workload"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return list(open_workload(WorkloadOptions(format=format_, path=str(path), **options)))


def blocks(session: Session, index: int = 0) -> Blocks:
    step = session.items[index]
    assert isinstance(step, Step)
    assert isinstance(step.prompt, Blocks)
    return step.prompt


def test_mooncake_rows_with_equal_ids_share_their_keys(tmp_path: Path) -> None:
    text = "\n".join([row(0, 600, [0, 1]), "", row(2500, 1100, [0, 2, 3])])
    first, second = load(tmp_path, "mooncake", text)
    assert (first.start_s, second.start_s) == (0.0, 2.5)
    assert blocks(first).keys[0] == blocks(second).keys[0]
    assert len({*blocks(first).keys, *blocks(second).keys}) == 4
    assert blocks(second).input_tokens == 1100


def test_gzip_is_read_as_well(tmp_path: Path) -> None:
    text = row(0, 5, [9]) + "\n"
    assert load(tmp_path, "mooncake", gzip.compress(text.encode())) == load(tmp_path, "mooncake", text)


def test_quantised_timestamps_are_spread_over_their_tick(tmp_path: Path) -> None:
    text = "\n".join(row(tick * 3000, 5, [tick * 10 + i]) for tick in range(4) for i in range(10))
    starts = [session.start_s for session in load(tmp_path, "mooncake", text)]
    assert starts == sorted(starts)
    for tick in range(4):
        mine = starts[tick * 10 : tick * 10 + 10]
        assert len(set(mine)) == 10
        assert all(tick * 3 <= start_s <= tick * 3 + 3 for start_s in mine)
    assert starts == [session.start_s for session in load(tmp_path, "mooncake", text)]
    assert starts != [session.start_s for session in load(tmp_path, "mooncake", text, seed=1)]


def test_a_tick_is_never_spread_beyond_the_next_timestamp(tmp_path: Path) -> None:
    text = "\n".join([*(row(0, 5, [i]) for i in range(20)), *(row(500, 5, [100 + i]) for i in range(20))])
    starts = [session.start_s for session in load(tmp_path, "mooncake", text, tick_s=3.0)]
    assert max(starts[:20]) <= 0.5


def test_exact_clocks_are_left_alone(tmp_path: Path) -> None:
    assert detect_tick_s([0.0, 0.0, 0.013, 0.5, 0.77]) == 0.0
    assert detect_tick_s([0.0] * 4 + [3.0] * 4 + [6.0] * 4) == 3.0
    text = "\n".join([row(0, 5, [1]), row(0, 5, [2]), row(40, 5, [3]), row(90, 5, [4])])
    assert [session.start_s for session in load(tmp_path, "mooncake", text)] == [0.0, 0.0, 0.04, 0.09]


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("{", "Input data was truncated"),
        ("[]", "Expected `object`"),
        ('{"timestamp": 0}', "missing required field `input_length`"),
        (row(0, 5, [1]).replace("5", '"five"'), "Expected `int`, got `str` - at `$.input_length`"),
        (row(0, 0, []), "input length 0"),
        (row(0, 5, [1], 0), "output length 0"),
        (row(0, -5, [1]), "input length -5"),
        (row(0, 513, [1]), "1 hash_ids, but 513 tokens are 2 blocks of 512"),
        (row(-1, 5, [1]), "goes back"),
        ("\xff\xfe", ""),
    ],
)
def test_damaged_mooncake_rows_name_file_and_line(tmp_path: Path, line: str, complaint: str) -> None:
    with pytest.raises(WorkloadError) as caught:
        load(tmp_path, "mooncake", (row(0, 5, [1]) + "\n\n" + line + "\n").encode("latin-1"))
    assert "workload: line 3: " in str(caught.value)
    assert complaint in str(caught.value)
    assert "\n" not in str(caught.value)


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    with pytest.raises(WorkloadError, match=r"absent: after line 0: No such file"):
        list(read_lines(str(tmp_path / "absent")))
    (tmp_path / "cut.gz").write_bytes(gzip.compress(b"x\n" * 5000)[:-20])
    with pytest.raises(WorkloadError, match="damaged gzip data"):
        list(read_lines(str(tmp_path / "cut.gz")))


def test_a_line_without_end_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("twofold.replay.formats.lines.MAX_LINE_BYTES", 100)
    (tmp_path / "long").write_bytes(b"short\n" + b"x" * 200)
    with pytest.raises(WorkloadError, match="line 2: longer than 100 bytes"):
        list(read_lines(str(tmp_path / "long")))


AZURE = "TIMESTAMP,ContextTokens,GeneratedTokens\n"


def test_azure_rows_are_unique_prompts_in_order(tmp_path: Path) -> None:
    text = AZURE + "2023-11-16 18:17:03.9799600,4808,10\n2023-11-16 18:17:04.0319600,3180,0"
    first, second = load(tmp_path, "azure", text)
    assert first.start_s == 0.0
    assert second.start_s == pytest.approx(0.052)
    assert not set(blocks(first).keys) & set(blocks(second).keys)
    assert blocks(first).input_tokens == 4808
    assert [step.output_tokens for step in second.steps()] == [1]


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("a,b\n", "line 1: expected the header TIMESTAMP,"),
        (AZURE + "2023-11-16 18:17:03,1\n", "line 2: expected 3 cells, got 2"),
        (AZURE + "yesterday,1,1\n", "line 2: 'yesterday' is not a timestamp"),
        (AZURE + "2023-11-16 18:17:03,x,1\n", "line 2: ContextTokens: 'x' is not a whole number"),
        (AZURE + "2023-11-16 18:17:03,0,1\n", "line 2: input length 0"),
        (
            AZURE + "2023-11-16 18:17:03,1,1\n2023-11-16 18:17:02,1,1\n",
            "line 3: timestamp 2023-11-16 18:17:02 goes back",
        ),
        (b"\x00\xff\x1f" * 40, "line 1: expected the header"),
    ],
)
def test_damaged_azure_files_name_the_line(tmp_path: Path, text: str | bytes, complaint: str) -> None:
    with pytest.raises(WorkloadError) as caught:
        load(tmp_path, "azure", text)
    assert complaint in str(caught.value)
    assert azure.HEADER[0] == "TIMESTAMP"


def agent(name: str, **changes: Any) -> dict[str, Any]:
    requests = [
        {"type": "n", "in": 200, "out": 7, "hash_ids": [1, 2, 3], "t": 0.0, "think_time": 0.0},
        {"type": "s", "in": 260, "out": 8, "hash_ids": [1, 2, 3, 4], "t": 5.0, "think_time": 2.5},
    ]
    return {"id": name, "block_size": 64, "tool_tokens": 100, "system_tokens": 30, "requests": requests} | changes


def test_agents_with_equal_tools_and_system_share_a_prefix_of_that_length(tmp_path: Path) -> None:
    lines = [json.dumps(agent("a")), json.dumps(agent("b")), json.dumps(agent("c", system_tokens=31))]
    a, b, c = load(tmp_path, "agents", "\n".join(lines))
    assert blocks(a).keys[:2] == blocks(b).keys[:2]
    assert blocks(a).keys[2] != blocks(b).keys[2]
    assert blocks(a).keys[0] != blocks(c).keys[0]
    assert [step.think_s for step in a.steps()] == [0.0, 2.5]


def test_the_tokens_behind_the_last_full_block_belong_to_one_request(tmp_path: Path) -> None:
    (session,) = load(tmp_path, "agents", json.dumps(agent("a")))
    first, second = blocks(session, 0), blocks(session, 1)
    assert (first.input_tokens, len(first.keys)) == (200, 4)
    assert first.keys[:3] == second.keys[:3]
    assert first.keys[3] not in second.keys


def test_neighbouring_sub_agents_become_one_fork(tmp_path: Path) -> None:
    inner = [{"type": "n", "in": 70, "out": 1, "hash_ids": [50], "t": 0.0}]
    sub = [{"type": "subagent", "t": t, "requests": inner, "tool_tokens": 64} for t in (10.0, 12.0)]
    main = agent("a")["requests"]
    (session,) = load(tmp_path, "agents", json.dumps(agent("a", requests=[main[0], *sub, main[1]])))
    fork = session.items[1]
    assert isinstance(fork, Fork)
    assert [child.start_s for child in fork.sessions] == [0.0, 2.0]
    assert len(list(session.steps())) == 4


def test_pauses_can_be_cut_and_starts_spread(tmp_path: Path) -> None:
    text = "\n".join(json.dumps(agent(name)) for name in "abc")
    sessions = load(tmp_path, "agents", text, max_think_s=1.0, session_gap_s=5.0, seed=4)
    assert [step.think_s for step in sessions[0].steps()] == [0.0, 1.0]
    starts = [session.start_s for session in sessions]
    assert starts[0] == 0.0
    assert starts == sorted(starts)
    assert starts[2] > 0.0


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"block_size": 0}, "block_size 0"),
        ({"requests": [{"type": "n", "in": 10, "out": 1, "hash_ids": []}]}, "request 0: no hash_ids"),
        ({"requests": [{"type": "n", "in": 0, "out": 1, "hash_ids": [1]}]}, "request 0: input length 0"),
        ({"requests": [{"type": "n", "in": 1, "out": 1, "hash_ids": [1], "think_time": -1}]}, "negative"),
        ({"requests": [{"type": "subagent", "requests": [3]}]}, "Expected `object`"),
        ({"requests": 3}, "Expected `array`"),
    ],
)
def test_damaged_agent_sessions_name_the_line(tmp_path: Path, changes: dict[str, Any], complaint: str) -> None:
    with pytest.raises(WorkloadError) as caught:
        load(tmp_path, "agents", json.dumps(agent("a")) + "\n" + json.dumps(agent("b", **changes)))
    assert "line 2: " in str(caught.value)
    assert complaint in str(caught.value)


def test_sub_agents_cannot_nest_without_end(tmp_path: Path) -> None:
    nested: dict[str, Any] = {"type": "n", "in": 1, "out": 1, "hash_ids": [1]}
    for _ in range(20):
        nested = {"type": "subagent", "requests": [nested]}
    with pytest.raises(WorkloadError, match="nested deeper"):
        load(tmp_path, "agents", json.dumps(agent("a", requests=[nested])))


def test_generated_workloads_depend_on_the_seed_alone() -> None:
    parameters = generated.Parameters(sessions=30)
    assert list(generated.load(parameters, seed=1)) == list(generated.load(parameters, seed=1))
    assert list(generated.load(parameters, seed=1)) != list(generated.load(parameters, seed=2))


def test_generated_sessions_share_system_prompts_and_tools() -> None:
    sessions = list(generated.load(generated.Parameters(sessions=100, prompts=4, agents=0.5), seed=0))
    first = [step for session in sessions for step in list(session.steps())[:1]]
    prompts = [step.prompt for step in first if isinstance(step.prompt, Dialogue)]
    assert len({prompt.messages[0].key for prompt in prompts}) == 4
    assert {prompt.messages[0].role for prompt in prompts} == {"system"}
    assert 1 <= len({prompt.tools.key for prompt in prompts if prompt.tools}) <= 3
    assert len({prompt.messages[1].key for prompt in prompts}) == 100
    assert [session.start_s for session in sessions] == sorted(session.start_s for session in sessions)


def test_generated_means_are_those_asked_for() -> None:
    parameters = generated.Parameters(sessions=4000, rate=10, agents=0.25, turns=3, max_turns=1000)
    sessions = list(generated.load(parameters, seed=7))
    chats = [session for session in sessions if session.label == "chat"]
    assert len(chats) / len(sessions) == pytest.approx(0.75, abs=0.03)
    assert sessions[-1].start_s / len(sessions) == pytest.approx(0.1, rel=0.08)
    assert sum(len(session.items) for session in chats) / len(chats) == pytest.approx(3, rel=0.08)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("rate", "expected key=value, got 'rate'"),
        ("speed=3", "unknown parameter 'speed'"),
        ("rate=0", "Expected `float` > 0.0 - at `$.rate`"),
        ("sessions=many", "Expected `int`"),
        ("agents=2", "Expected `float` <= 1.0"),
    ],
)
def test_wrong_parameters_are_named(text: str, complaint: str) -> None:
    with pytest.raises(WorkloadError) as caught:
        generated.parse_parameters(text)
    assert complaint in str(caught.value)


def test_unknown_formats_and_missing_files_are_named() -> None:
    with pytest.raises(WorkloadError, match="unknown workload format 'zip'"):
        open_workload(WorkloadOptions(format="zip", path="x"))
    with pytest.raises(WorkloadError, match="the format azure needs a file"):
        open_workload(WorkloadOptions(format="azure"))
