"""The answers of an engine whose KV blocks another engine may pull, as vLLM's NIXL connector gives them.

No bytes move and no time passes: an engine that is told of another one's blocks takes the whole blocks of its prompt as
computed. Blocks that were offered are not kept for the other engine; they stay in the prefix cache like any others.
"""

import uuid
from typing import Any

import msgspec

from emulator.model import FinishReason, Request

SIDE_CHANNEL_PORT = 5600
"""vLLM's default of the port over which engines tell each other of their blocks; the emulator's first engine has it."""


class KvConnector(msgspec.Struct, frozen=True, kw_only=True):
    """What one engine says of itself. ``port``: of the side channel over which another engine would ask."""

    engine_id: str
    host: str
    port: int
    tensor_parallel: int = 1

    @classmethod
    def new(cls, host: str, port: int) -> "KvConnector":
        """A connector with a random engine id."""
        return cls(engine_id=str(uuid.uuid4()), host=host, port=port)

    def offered(self, params: dict[str, Any] | None, request: Request) -> dict[str, Any] | None:
        """What the answer says where the caller wants another engine to go on; None where there is nothing to go on.

        vLLM offers the blocks of requests that ended by their length alone.
        """
        if not params or not params.get("do_remote_decode") or request.finish_reason is not FinishReason.LENGTH:
            return None
        return {
            "do_remote_prefill": True,
            "do_remote_decode": False,
            "remote_block_ids": [list(request.last_blocks)],
            "remote_engine_id": self.engine_id,
            "remote_request_id": request.request_id,
            "remote_host": self.host,
            "remote_port": self.port,
            "tp_size": self.tensor_parallel,
            "dcp_size": 1,
            "pp_size": 1,
            "remote_num_tokens": request.prompt_tokens,
            "remote_blocks_expiry_time": None,
            "transfer_mode": "pull",
            "remote_prefill_cached_tokens": request.cached_tokens or 0,
        }

    def remote_tokens(self, params: dict[str, Any] | None, prompt_tokens: int) -> int:
        """Tokens of a prompt that the engine need not compute, as the caller names an engine that has them."""
        if not params or not params.get("do_remote_prefill"):
            return 0
        held = params.get("remote_num_tokens", prompt_tokens)
        return min(held, prompt_tokens) if isinstance(held, int) and params.get("remote_block_ids") else 0
