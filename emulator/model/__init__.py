"""A vLLM V1 engine as a pure state machine: batching, chunked prefill, KV blocks, prefix cache, preemption."""

from emulator.model.blocks import AllBlocksCleared, BlockPool, BlockRemoved, BlockStored, KvEvent
from emulator.model.engine import Counters, EngineModel, Load, Pause, StepResult
from emulator.model.request import Adapter, FinishReason, Request, Status
from emulator.model.waiting import SchedulingPolicy

__all__ = [
    "Adapter",
    "AllBlocksCleared",
    "BlockPool",
    "BlockRemoved",
    "BlockStored",
    "Counters",
    "EngineModel",
    "FinishReason",
    "KvEvent",
    "Load",
    "Pause",
    "Request",
    "SchedulingPolicy",
    "Status",
    "StepResult",
]
