"""Step-time law of a GPU x model x tensor-parallel size, as a roofline with the efficiencies of the fits (+-25 %)."""

import math

from twofold.model.profile import EngineProfile, StepLaw
from twofold.profiles import hardware as hw
from twofold.profiles.hardware import Gpu, ModelClass

_MIN_KV_TOKENS = 16_384
_LEN_QUANTUM_TOKENS = 1024


def tensor_parallel_efficiency(gpu: Gpu, tensor_parallel: int) -> float:
    """Share of ``tensor_parallel`` times one GPU's speed that the group reaches."""
    per_doubling = hw.TENSOR_PARALLEL_EFFICIENCY_NVLINK if gpu.nvlink else hw.TENSOR_PARALLEL_EFFICIENCY_PCIE
    return float(per_doubling ** math.log2(tensor_parallel))


def kv_capacity_tokens(gpu: Gpu, model: ModelClass, tensor_parallel: int) -> int:
    """Tokens of KV that fit beside the weights; zero or below where the model does not fit."""
    usable = gpu.memory_bytes * hw.MEMORY_UTILISATION - hw.RESERVED_BYTES_PER_GPU
    free = tensor_parallel * usable - model.parameters * hw.BYTES_PER_PARAMETER
    return int(free / model.kv_bytes_per_token)


def step_law(gpu: Gpu, model: ModelClass, tensor_parallel: int) -> StepLaw:
    """The law's five constants.

    - base: reading the weights once, plus a fixed overhead.
    - per KV token: reading its KV once.
    - prefill per token: 2 FLOP per parameter at the prefill MFU.
    - attention per token and context token: QK^T and AV are 2 FLOP each per unit of attention width, at the same MFU.
    """
    efficiency = tensor_parallel_efficiency(gpu, tensor_parallel)
    bandwidth = tensor_parallel * gpu.hbm_bytes_s
    flops = tensor_parallel * gpu.bf16_flops * gpu.prefill_mfu * efficiency
    weights_s = model.parameters * hw.BYTES_PER_PARAMETER / (bandwidth * hw.WEIGHT_READ_EFFICIENCY * efficiency)
    return StepLaw(
        base_s=weights_s + hw.STEP_OVERHEAD_S,
        decode_per_seq_s=hw.DECODE_PER_SEQ_S_AT_H100 * math.sqrt(hw.H100_HBM_BYTES_S / bandwidth),
        decode_per_kv_token_s=model.kv_bytes_per_token / (bandwidth * hw.KV_READ_EFFICIENCY),
        prefill_per_token_s=2 * model.parameters / flops,
        prefill_per_token_context_s=4 * model.attention_width / flops,
    )


def derive(gpu: Gpu, model: ModelClass, tensor_parallel: int) -> EngineProfile | None:
    """The profile of one combination; None where fewer than 16k tokens of KV would fit.

    The model length is what vLLM would let one start with: at most the KV capacity.
    """
    capacity = kv_capacity_tokens(gpu, model, tensor_parallel)
    if capacity < _MIN_KV_TOKENS:
        return None
    longest = capacity // _LEN_QUANTUM_TOKENS * _LEN_QUANTUM_TOKENS
    return EngineProfile(
        name=f"{gpu.key}-{model.key}-tp{tensor_parallel}",
        gpu=gpu.name,
        model_class=model.name,
        law=step_law(gpu, model, tensor_parallel),
        kv_capacity_tokens=capacity,
        tensor_parallel=tensor_parallel,
        max_num_batched_tokens=gpu.max_num_batched_tokens,
        max_num_seqs=gpu.max_num_seqs,
        max_model_len_tokens=min(model.max_model_len_tokens, longest),
        usd_per_hour=round(gpu.usd_per_hour * tensor_parallel, 4),
        source=f"roofline with the efficiencies of our fits, an estimate of +-25 %; GPU {gpu.source}; {model.source}",
    )
