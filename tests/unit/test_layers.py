"""The layers of the house: the contracts in ``pyproject.toml`` hold, cover all packages, and notice a breach."""

import subprocess
import sys
import textwrap
import tomllib
from pathlib import Path
from typing import Any

import pytest
from importlinter.cli import lint_imports

ROOT = Path(__file__).resolve().parents[2]
CONFIG = ROOT / "pyproject.toml"


@pytest.fixture
def project(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    # The linter puts the working directory on the path; it is the one of the tests' own copy of the project.
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "path", list(sys.path))
    tools: dict[str, Any] = tomllib.loads(CONFIG.read_text())["tool"]
    return tools


@pytest.mark.usefixtures("project")
def test_contracts_hold(capsys: pytest.CaptureFixture[str]) -> None:
    code = lint_imports(config_filename=str(CONFIG), no_cache=True)
    assert code == 0, capsys.readouterr().out


def test_contracts_cover_every_package(project: dict[str, Any]) -> None:
    packages = project["setuptools"]["packages"]["find"]["include"]
    assert {name.rstrip("*") for name in packages} == set(project["importlinter"]["root_packages"])


def test_a_breach_is_noticed(project: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "breach.toml"
    config.write_text(
        textwrap.dedent(
            """
            [tool.importlinter]
            root_packages = ["twofold"]
            include_external_packages = true

            [[tool.importlinter.contracts]]
            name = "what is not so"
            type = "forbidden"
            source_modules = ["twofold.model"]
            forbidden_modules = ["msgspec"]
            """
        )
    )
    assert lint_imports(config_filename=str(config), no_cache=True) != 0
    assert "twofold.model is not allowed to import msgspec" in capsys.readouterr().out


def loaded_by(module: str) -> set[str]:
    """Top-level modules in memory after importing ``module`` in a fresh interpreter."""
    program = f"import sys, {module}; print(*sorted({{name.partition('.')[0] for name in sys.modules}}))"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True
    )
    return set(done.stdout.split())


def test_a_relay_process_stays_small() -> None:
    """What the linter cannot see: lazily imported modules are really not in memory."""
    heavy = {"grpc", "google", "numpy", "aiohttp", "yaml", "zmq", "tokenizers", "jinja2"}
    assert not loaded_by("router.relay.__main__") & heavy


def test_routerctl_help_loads_no_grpc() -> None:
    assert "grpc" not in loaded_by("routerctl.main")
