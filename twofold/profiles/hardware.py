"""The constants behind the built-in profiles: GPUs, model classes, efficiencies. Every row names its source.

Sources
- [aic]: ai-dynamo/aiconfigurator, ``systems/*.yaml`` (Apache-2.0): memory, dense TFLOPS, HBM bandwidth.
- [sheet]: the vendor's published data sheet, for GPUs that [aic] does not hold.
- [aws]: AWS us-west-2 on-demand list price of the named instance divided by its GPUs, 2026. Prices age: override them.
- [mfu]: inference-sim/inference-sim ``hardware_config.json`` (Apache-2.0): calibrated prefill MFU under vLLM.
- [fit]: our weighted least squares over 5,221 measured TPOT points of aiconfigurator's ``silicon_sample.csv``; for
  example Llama-3.1-8B on one H100: 6.42 ms + 0.0499 ms per 1,000 KV tokens, against 6.69 and 0.0502 by the law here.
"""

import msgspec


class Gpu(msgspec.Struct, frozen=True, kw_only=True):
    """One GPU type. Bandwidth in bytes/s, compute in dense bf16 FLOP/s, memory in bytes."""

    key: str
    name: str
    memory_bytes: float
    bf16_flops: float
    hbm_bytes_s: float
    prefill_mfu: float
    nvlink: bool
    usd_per_hour: float
    max_num_batched_tokens: int
    max_num_seqs: int
    source: str


class ModelClass(msgspec.Struct, frozen=True, kw_only=True):
    """A model size. ``attention_width`` = layers x heads x head size."""

    key: str
    name: str
    parameters: float
    kv_bytes_per_token: float
    attention_width: float
    max_model_len_tokens: int
    tensor_parallel_sizes: tuple[int, ...]
    source: str


BYTES_PER_PARAMETER = 2.0
"""bf16 weights."""
MEMORY_UTILISATION = 0.9
"""vLLM's default ``--gpu-memory-utilization``."""
RESERVED_BYTES_PER_GPU = 2.5e9
"""Activations, CUDA graphs and context per GPU: what vLLM's profile run takes for these models, an estimate."""
WEIGHT_READ_EFFICIENCY = 0.75
"""Share of peak HBM bandwidth reached when reading weights in a decode step [fit]."""
KV_READ_EFFICIENCY = 0.78
"""Share of peak HBM bandwidth reached when reading KV in a decode step [fit]."""
STEP_OVERHEAD_S = 0.3e-3
"""Scheduling and launch time of a step that does not shrink with the GPU [fit]."""
DECODE_PER_SEQ_S_AT_H100 = 0.02e-3
"""Cost of one more sequence in a step on one H100; goes with 1/sqrt(bandwidth x GPUs) over the fitted engines [fit]."""
H100_HBM_BYTES_S = 3350e9
TENSOR_PARALLEL_EFFICIENCY_NVLINK = 0.93
"""Speed kept per doubling of the tensor-parallel size over NVLink [fit]."""
TENSOR_PARALLEL_EFFICIENCY_PCIE = 0.85
"""The same over PCIe: an estimate."""

GPUS: tuple[Gpu, ...] = (
    Gpu(
        key="l4",
        name="L4",
        memory_bytes=24e9,
        bf16_flops=121e12,
        hbm_bytes_s=300e9,
        prefill_mfu=0.30,
        nvlink=False,
        usd_per_hour=0.8048,
        max_num_batched_tokens=2048,
        max_num_seqs=256,
        source="[aic]; MFU estimated from L40S in [mfu]; [aws] g6.xlarge",
    ),
    Gpu(
        key="a10g",
        name="A10G",
        memory_bytes=24e9,
        bf16_flops=70e12,
        hbm_bytes_s=600e9,
        prefill_mfu=0.45,
        nvlink=False,
        usd_per_hour=1.006,
        max_num_batched_tokens=2048,
        max_num_seqs=256,
        source="[sheet]; MFU estimated, as its compute is low against its bandwidth; [aws] g5.xlarge",
    ),
    Gpu(
        key="l40s",
        name="L40S",
        memory_bytes=48e9,
        bf16_flops=362.05e12,
        hbm_bytes_s=864e9,
        prefill_mfu=0.32,
        nvlink=False,
        usd_per_hour=1.861,
        max_num_batched_tokens=2048,
        max_num_seqs=256,
        source="[aic]; [mfu]; [aws] g6e.xlarge",
    ),
    Gpu(
        key="a100-80gb",
        name="A100-80GB-SXM",
        memory_bytes=80e9,
        bf16_flops=312e12,
        hbm_bytes_s=2039e9,
        prefill_mfu=0.38,
        nvlink=True,
        usd_per_hour=3.4309,
        max_num_batched_tokens=2048,
        max_num_seqs=256,
        source="[aic]; [mfu]; [aws] p4de.24xlarge",
    ),
    Gpu(
        key="h100",
        name="H100-SXM",
        memory_bytes=80e9,
        bf16_flops=989e12,
        hbm_bytes_s=H100_HBM_BYTES_S,
        prefill_mfu=0.45,
        nvlink=True,
        usd_per_hour=6.88,
        max_num_batched_tokens=8192,
        max_num_seqs=1024,
        source="[aic]; [mfu]; [aws] p5.48xlarge",
    ),
    Gpu(
        key="h200",
        name="H200-SXM",
        memory_bytes=141e9,
        bf16_flops=989e12,
        hbm_bytes_s=4800e9,
        prefill_mfu=0.45,
        nvlink=True,
        usd_per_hour=7.912,
        max_num_batched_tokens=8192,
        max_num_seqs=1024,
        source="[aic]; MFU of H100 in [mfu] (same compute); [aws] p5en.48xlarge",
    ),
)
"""``max_num_batched_tokens`` and ``max_num_seqs`` are vLLM 0.32's API server defaults for the GPU type."""

MODEL_CLASSES: tuple[ModelClass, ...] = (
    ModelClass(
        key="8b",
        name="Llama-3.1-8B",
        parameters=8.03e9,
        kv_bytes_per_token=131_072.0,
        attention_width=32 * 32 * 128,
        max_model_len_tokens=131_072,
        tensor_parallel_sizes=(1, 2, 4),
        source="model card: 32 layers, 32 heads, 8 KV heads of 128, bf16",
    ),
    ModelClass(
        key="70b",
        name="Llama-3.1-70B",
        parameters=70.6e9,
        kv_bytes_per_token=327_680.0,
        attention_width=80 * 64 * 128,
        max_model_len_tokens=131_072,
        tensor_parallel_sizes=(2, 4, 8),
        source="model card: 80 layers, 64 heads, 8 KV heads of 128, bf16",
    ),
)
