"""Default budgets of KV events; see docs/kv-events.md for how they were found."""

DEFAULT_INDEX_BLOCKS = 4 << 20
"""Entries of an index at most: about 44 bytes each of shared and private memory."""
DEFAULT_BLOCKS_PER_S = 100_000.0
"""Blocks stored and removed a second over all targets that one agent takes on. See docs/kv-events.md."""
