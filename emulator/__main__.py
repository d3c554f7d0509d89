"""``python -m emulator``: emulated vLLM engines, one TCP port each."""

import asyncio
import sys
from pathlib import Path
from typing import Any

import uvloop

from emulator.server.host import Process, configured_profile
from emulator.server.settings import Settings
from twofold import log, profiles, settings

_DESCRIPTION = (
    "Emulated vLLM engines without a GPU: vLLM's HTTP surface, metrics, scheduler, prefix cache and step times of a "
    "GPU and model of your choice. Output tokens form a hash chain, so lost or doubled ones are provable."
)


def main(argv: list[str] | None = None) -> int:
    """Run the engines until SIGTERM. Returns the exit status."""
    options = settings.load(Settings, sys.argv[1:] if argv is None else argv, prog="emulator", description=_DESCRIPTION)
    if options.list_profiles:
        print_profiles()
        return 0
    log.configure(
        f"emulator{'-' + options.worker_id if options.worker_id else ''}",
        level=options.log_level,
        file=options.log_file or None,
    )
    try:
        profile = configured_profile(options, profiles.resolve(options.profile, read_profiles(options.profile_file)))
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(serve(options, profile))
    except OSError as error:
        sys.stderr.write(f"emulator: error: cannot listen: {error.strerror or error}\n")
        return 1
    except ValueError as error:
        sys.stderr.write(f"emulator: error: {error}\n")
        return 2
    return 0


async def serve(options: Settings, profile: Any) -> None:
    """Host the engines until told to stop."""
    await Process(options, profile).run()


def read_profiles(path: str) -> list[dict[str, Any]]:
    """The user's profiles in a JSON or YAML file. Raises ProfileError."""
    if not path:
        return []
    import yaml

    try:
        value = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise profiles.ProfileError(f"cannot read profiles from {path}: {' '.join(str(error).split())}") from None
    items = value if isinstance(value, list) else [value]
    if not all(isinstance(item, dict) for item in items):
        raise profiles.ProfileError(f"{path}: expected a profile or a list of profiles")
    return items


def print_profiles() -> None:
    """One line a profile: name, KV tokens, model length, prefill tokens/s, decode step."""
    for name in profiles.names():
        profile = profiles.get(name)
        step_ms = profile.law.decode_s(1, 1000) * 1e3
        sys.stdout.write(
            f"{name:22} kv={profile.kv_capacity_tokens:>8} len={profile.max_model_len_tokens:>7} "
            f"prefill={profile.capacity_tokens_s():>7.0f} tok/s  step={step_ms:6.2f} ms  {profile.gpu}\n"
        )


if __name__ == "__main__":
    sys.exit(main())
