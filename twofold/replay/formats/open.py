"""Choosing the loader of a workload by name."""

from collections.abc import Iterator

import msgspec

from twofold.replay.formats import agents, azure, generated, mooncake
from twofold.replay.workload import Session, WorkloadError

FORMATS = ("mooncake", "agents", "azure", "generate")


class WorkloadOptions(msgspec.Struct, frozen=True, kw_only=True):
    """What to load. ``path`` is a file for every format but ``generate``, whose ``parameters`` are key=value pairs."""

    format: str
    path: str = ""
    parameters: str = ""
    seed: int = 0
    block_tokens: int = 512
    """Tokens of a block of a Mooncake trace."""
    tick_s: float | None = None
    session_gap_s: float = 0.0
    max_think_s: float = float("inf")


def open_workload(options: WorkloadOptions) -> Iterator[Session]:
    """Sessions of the workload, read as they are needed. Raises WorkloadError, also while iterating."""
    if options.format == "generate":
        return generated.load(generated.parse_parameters(options.parameters), seed=options.seed)
    if options.format not in FORMATS:
        raise WorkloadError(f"unknown workload format {options.format!r}; known: {', '.join(FORMATS)}")
    if not options.path:
        raise WorkloadError(f"the format {options.format} needs a file")
    if options.format == "mooncake":
        return mooncake.load(options.path, block_tokens=options.block_tokens, tick_s=options.tick_s, seed=options.seed)
    if options.format == "agents":
        return agents.load(
            options.path,
            session_gap_s=options.session_gap_s,
            max_think_s=options.max_think_s,
            seed=options.seed,
        )
    return azure.load(options.path)
