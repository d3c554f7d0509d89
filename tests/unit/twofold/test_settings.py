"""Settings: order of the sources, precise refusals, round trip through YAML and flags."""

import enum
from pathlib import Path
from typing import Annotated

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from twofold import settings as subject


class Colour(enum.StrEnum):
    RED = "red"
    BLUE = "blue"


class Example(msgspec.Struct, frozen=True, kw_only=True):
    host: Annotated[str, msgspec.Meta(description="address to listen on")] = "127.0.0.1"
    port: Annotated[int, msgspec.Meta(ge=0, le=65535, description="port, 100% yours")] = 8000
    ratio: float = 0.5
    verbose: bool = False
    colour: Colour = Colour.RED
    seeds: tuple[str, ...] = ()
    token_file: str | None = None


def load(*argv: str, environ: dict[str, str] | None = None) -> Example:
    return subject.load(Example, argv, prog="example", environ=environ or {})


def test_defaults_without_any_source() -> None:
    assert load() == Example()


def test_flags_beat_environment_beats_file(tmp_path: Path) -> None:
    config = tmp_path / "c.yaml"
    config.write_text("host: file\nport: 1\nratio: 0.1\n")
    got = load("--config", str(config), "--host", "flag", environ={"TWOFOLD_HOST": "env", "TWOFOLD_PORT": "2"})
    assert (got.host, got.port, got.ratio) == ("flag", 2, 0.1)


def test_booleans_enums_and_lists() -> None:
    got = load("--verbose", "--colour", "blue", "--seeds", "a", "--seeds", "b")
    assert (got.verbose, got.colour, got.seeds) == (True, Colour.BLUE, ("a", "b"))
    assert load(environ={"TWOFOLD_SEEDS": "a,b", "TWOFOLD_VERBOSE": "true"}).seeds == ("a", "b")
    assert load("--no-verbose", environ={"TWOFOLD_VERBOSE": "1"}).verbose is False


@pytest.mark.parametrize(
    ("argv", "environ", "needle"),
    [
        (("--port", "many"), {}, "--port"),
        (("--port", "70000"), {}, "--port"),
        ((), {"TWOFOLD_RATIO": "x"}, "TWOFOLD_RATIO"),
        (("--colour", "green"), {}, "colour"),
        (("--nope",), {}, "--nope"),
        (("--config", "/nonexistent"), {}, "cannot read"),
    ],
)
def test_bad_values_are_one_line_and_exit_2(
    argv: tuple[str, ...], environ: dict[str, str], needle: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        load(*argv, environ=environ)
    assert caught.value.code == 2
    assert needle in capsys.readouterr().err.splitlines()[-1]


def test_unknown_key_in_file_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "c.yaml"
    config.write_text("hots: x\n")
    with pytest.raises(SystemExit) as caught:
        load("--config", str(config))
    assert caught.value.code == 2
    assert "unknown key 'hots'" in capsys.readouterr().err


def test_print_config_is_accepted_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        load("--port", "9", "--seeds", "a", "--print-config")
    assert caught.value.code == 0
    config = tmp_path / "c.yaml"
    config.write_text(capsys.readouterr().out)
    assert load("--config", str(config)) == Example(port=9, seeds=("a",))


@given(
    host=st.text(st.characters(codec="ascii", categories=("L", "N")), min_size=1),
    port=st.integers(0, 65535),
    ratio=st.floats(allow_nan=False, allow_infinity=False),
    verbose=st.booleans(),
    seeds=st.lists(st.text(st.characters(codec="ascii", categories=("L",)), min_size=1), max_size=3),
)
def test_flags_of_a_value_give_the_value_back(
    host: str, port: int, ratio: float, verbose: bool, seeds: list[str]
) -> None:
    value = Example(host=host, port=port, ratio=ratio, verbose=verbose, seeds=tuple(seeds))
    joined: list[str] = []
    for part in subject.to_argv(value):
        if joined and not part.startswith("--") and joined[-1].startswith("--") and "=" not in joined[-1]:
            joined[-1] = f"{joined[-1]}={part}"
        else:
            joined.append(part)
    assert load(*joined) == value
