"""The peer's whole GRPO step, for --trl: stock TRL, with vLLM in the same process.

QLoRA as TRL's own arguments give it: base in NF4 with double quantisation through bitsandbytes, LoRA of rank 16 on all
linear layers, bf16, gradient checkpointing (TRL's default). TRL sees a bitsandbytes model and has vLLM make an NF4 copy
of the same bf16 checkpoint; each step it merges the adapter into the trained 4-bit weights, pushes those packed numbers
into vLLM without their scales (upstream trl #4973) and unmerges. How far apart the two policies are is in the row.
"""

import math
import statistics
import tempfile
import time
from typing import Any

import torch

from benchmarks.harness import GB, Job, checkpoint, driver_gb, kv_token_bytes, peak_driver, shape
from nbhelpers import presets

from .cases import RowWriter
from .grpo import logged, watch, workload

WORK = 2.5  # GB of vLLM's share beside weights, keys and values: activations of 4096 tokens, its modules, some room
QUICK = {"use_cpu": True, "bf16": False}  # no vLLM, no NF4: proves the rest
KEPT = {  # of the first step's log
    "loss": "first_loss",
    "sampling/sampling_logp_difference/mean": "logp_difference",
    "completions/mean_length": "completion",
}


def steps(job: Job, row: RowWriter) -> None:
    """Four whole steps of GRPOTrainer, the workload of the `grpo` case, without a cap. Every completion has its full
    length: vLLM ignores the end of sequence. It makes no text either: TRL does not read it, and with a tokenizer of 259
    words it costs 0.2 s a step.

    step_time: median without the first. generating_s: of the last step, the weights' way to vLLM (syncing_s) included.
    loading_s: from the checkpoint to a trainer that can train, imports before it. Peak: while training, not loading."""
    from peft import LoraConfig
    from transformers import BitsAndBytesConfig
    from trl import GRPOConfig, GRPOTrainer

    quick, context = job["quick"], job["context"]
    settings, parts, times = workload(quick, context)
    settings |= {"max_steps": 4, "logging_steps": 1} | (QUICK if quick else vllm_settings(job))
    nf4 = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )  # fmt: skip
    parts |= {"quantization_config": None if quick else nf4}
    parts |= {
        "peft_config": LoraConfig(r=16, lora_alpha=16, target_modules=list(presets.get(job["model"]).lora_targets))
    }
    with checkpoint(job) as model, tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        trainer = GRPOTrainer(model, args=GRPOConfig(folder, **settings), **parts)
        more: dict[str, Any] = {
            "loading_s": round(time.perf_counter() - start, 1),
            "loaded_driver": round(driver_gb(), 3),
        }
        # TRL's own and private: it has no public name for its generation alone
        generated, synced = watch(trainer, "_generate_single_turn"), []
        if not quick:
            vllm = trainer.vllm_generation
            synced = watch(vllm, "sync_weights")
            more |= described(vllm.llm.llm_engine.vllm_config, job)
        with peak_driver() as peak:  # not before: it would ask the driver while vLLM captures CUDA graphs
            trainer.train()
    seconds = {"generating_s": round(generated[-1], 3), "first_step_s": round(times[0], 2)}
    seconds |= {"syncing_s": round(synced[-1], 3)} if synced else {}
    seconds |= logged(trainer.state.log_history[0], KEPT)
    row(f"{context // 1024}K/step_time", statistics.median(times[1:]), "s", "trl", **seconds, **more)
    row(f"{context // 1024}K/step_peak_driver", peak[0], "GB", "trl", **more)


def vllm_settings(job: Job) -> dict[str, Any]:
    """GRPOConfig's arguments for vLLM, with the smallest share of this card that the workload needs."""
    length = job["context"] + 8
    need = shape(job).weight_bytes("nf4") + 8 * length * kv_token_bytes(shape(job), torch.bfloat16) + WORK * GB
    share = need / torch.cuda.mem_get_info()[1]
    return {
        "use_vllm": True, "vllm_mode": "colocate", "vllm_gpu_memory_utilization": math.ceil(1000 * share) / 1000,
        "vllm_max_model_length": length, "model_init_kwargs": {"dtype": "bfloat16"},
        "generation_kwargs": {"ignore_eos": True, "detokenize": False},
    }  # fmt: skip


def described(config: Any, job: Job) -> dict[str, Any]:
    """What vLLM made of it, from its VllmConfig: its quantization, its share of the card, GB of keys and values."""
    cache, token = config.cache_config, kv_token_bytes(shape(job), torch.bfloat16)
    return {
        "vllm_quantization": config.model_config.quantization,
        "gpu_memory_utilization": cache.gpu_memory_utilization,
        "kv": round(cache.num_gpu_blocks * cache.block_size * token / GB, 3),
        "kv_needed": round(8 * job["context"] * token / GB, 3),
    }
