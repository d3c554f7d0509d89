"""A vLLM V1 engine as a pure state machine: batching, chunked prefill, KV blocks, prefix cache, preemption."""

from emulator.model.blocks import AllBlocksCleared, BlockPool, BlockRemoved, BlockStored, KvEvent
from emulator.model.engine import Counters, EngineModel, StepResult
from emulator.model.request import FinishReason, Request, Status
from emulator.model.waiting import SchedulingPolicy

__all__ = [
    "AllBlocksCleared",
    "BlockPool",
    "BlockRemoved",
    "BlockStored",
    "Counters",
    "EngineModel",
    "FinishReason",
    "KvEvent",
    "Request",
    "SchedulingPolicy",
    "Status",
    "StepResult",
]
