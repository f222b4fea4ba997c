"""What of TRL's arguments and of peft's adapters runs fast, by TRL's own path, or not at all: the one table of it.

docs/compatibility.md is written from it (`python -m benchmarks.compatibility`). A test goes through it: every field of
TRL's GRPOConfig stands in it, and where `tries` has settings or adapters, a trainer of them does what `how` says.
"""

from typing import Any, NamedTuple

FAST = "fast"  # the lean step and the engines do it
OWN = "own forward"  # so do they, but these layers compute with their own code instead of the kernels
LOSS = "TRL's loss"  # the engines write the completions, and the loss is TRL's
GENERATION = "TRL's generation"  # TRL writes the completions, and the loss is the lean step's
BOTH = "TRL's path"  # the loss is TRL's, and transformers' generate writes the completions
AS_IN_TRL = "as in TRL"  # it touches neither half: TRL or transformers does it
UNUSED = "no effect"  # the lean step decides it for each batch, or GRPO has no use for it
REFUSED = "refused"  # an error before anything is computed

MEANING = {
    FAST: "the lean step computes loss and gradients, an engine of ours writes the completions",
    OWN: "as fast, but these layers compute with their own code instead of the fused kernels",
    LOSS: "an engine of ours writes the completions, the loss is TRL's",
    GENERATION: "TRL writes the completions, the loss is the lean step's",
    BOTH: "transformers' `generate` writes the completions, the loss is TRL's",
    AS_IN_TRL: "touches neither half: what TRL or transformers does with it stays as it is",
    UNUSED: "is accepted and changes nothing",
    REFUSED: "an error that names it, before anything is computed",
}


class Entry(NamedTuple):
    """Fields or adapters of which the same is true."""

    names: str  # separated by blanks
    how: str  # a key of MEANING
    note: str = ""
    when: str = ""  # the value that this is about; "": any
    tries: tuple[dict[str, Any], ...] = ()  # ARGUMENTS: fields and values; ADAPTERS: {class of peft's: its arguments}


ARGUMENTS = (
    # ------------------------------------------------------------------------------------------ the loss
    Entry("loss_type", FAST, "grpo, bnpo, dr_grpo, dapo, cispo, sapo, luspo, vespo",
          tries=tuple({"loss_type": kind} for kind in ("grpo", "cispo", "sapo", "luspo", "vespo"))),
    Entry("beta epsilon epsilon_high delta importance_sampling_level use_bias_correction_kl", FAST,
          tries=({"beta": 0.1, "delta": 1.5, "epsilon_high": 0.28}, {"importance_sampling_level": "sequence"})),
    Entry("sapo_temperature_neg sapo_temperature_pos vespo_k_pos vespo_lambda_pos vespo_k_neg vespo_lambda_neg", FAST),
    Entry("entropy_coef use_adaptive_entropy entropy_coef_min entropy_coef_max entropy_coef_delta entropy_target", FAST,
          "every row is computed, those without an advantage too, and the head once more in the backward",
          tries=({"entropy_coef": 0.01}, {"entropy_coef": 0.01, "use_adaptive_entropy": True})),
    Entry("top_entropy_quantile", FAST, "with a forward pass more, since the quantile is one of the whole batch",
          when="below 1", tries=({"top_entropy_quantile": 0.2},)),
    Entry("off_policy_mask_threshold", FAST, tries=({"off_policy_mask_threshold": 0.5, "num_iterations": 2},)),
    Entry("mask_truncated_completions scale_rewards multi_objective_aggregation reward_weights", FAST,
          tries=({"mask_truncated_completions": True},)),
    Entry("num_iterations steps_per_generation generation_batch_size gradient_accumulation_steps", FAST,
          tries=({"num_iterations": 2}, {"steps_per_generation": 4, "gradient_accumulation_steps": 2})),
    Entry("vllm_importance_sampling_correction vllm_importance_sampling_mode vllm_importance_sampling_clip_max "
          "vllm_importance_sampling_clip_min vllm_importance_sampling_cap", FAST,
          "of every engine, not of vLLM alone; without another forward pass"),
    Entry("sync_ref_model ref_model_mixup_alpha ref_model_sync_steps", FAST,
          "but such a run cannot be resumed: no checkpoint holds the reference model"),
    Entry("disable_dropout", FAST, tries=({"disable_dropout": True},)),
    Entry("cast_lm_head_to_fp32", LOSS, when="True", tries=({"cast_lm_head_to_fp32": True},)),
    Entry("router_aux_loss_coef", BOTH, "of mixtures of experts, whose architectures no walk knows", when="not 0"),
    Entry("neftune_noise_alpha", LOSS, "its noise depends on the padded length of a row", when="not 0",
          tries=({"neftune_noise_alpha": 5.0},)),
    Entry("use_liger_kernel liger_kernel_config", LOSS, "Liger's layers stand where ours would", when="True"),
    # ------------------------------------------------------------------------------------------ the completions
    Entry("max_completion_length num_generations num_generations_eval", FAST),
    Entry("temperature", FAST, tries=({"temperature": 0.7},)),
    Entry("temperature", REFUSED, "there is no distribution to learn from", when="0", tries=({"temperature": 0.0},)),
    Entry("top_p top_k min_p repetition_penalty", FAST,
          "the loss and the engine's correction are those of the unfiltered distribution, as TRL's loss is",
          tries=({"top_p": 0.9, "top_k": 20}, {"min_p": 0.1, "repetition_penalty": 1.1})),
    Entry("chat_template_kwargs", FAST, tries=({"chat_template_kwargs": {"enable_thinking": False}},)),
    Entry("max_tool_calling_iterations", FAST, "the results of tools and environments take no loss"),
    Entry("generation_kwargs", GENERATION, when="not empty", tries=({"generation_kwargs": {"length_penalty": 0.5}},)),
    Entry("cache_implementation", GENERATION, when="set", tries=({"cache_implementation": "dynamic"},)),
    Entry("use_transformers_continuous_batching transformers_continuous_batching_config use_transformers_paged",
          GENERATION, when="True"),
    Entry("use_vllm", GENERATION, '`engine="vllm"` is ours: it reads the very weights that are trained', when="True"),
    Entry("vllm_mode vllm_model_impl vllm_enable_sleep_mode vllm_structured_outputs_regex vllm_server_base_url "
          "vllm_server_host vllm_server_port vllm_server_timeout vllm_group_port vllm_gpu_memory_utilization "
          "vllm_max_model_length vllm_tensor_parallel_size", GENERATION, "only with `use_vllm=True`"),
    # ------------------------------------------------------------------------------------------ memory and arithmetic
    Entry("per_device_train_batch_size per_device_eval_batch_size", FAST, "cut by tokens into what the card holds"),
    Entry("gradient_checkpointing gradient_checkpointing_kwargs activation_checkpointing "
          "activation_checkpointing_kwargs", UNUSED, "the lean step decides for each layer; TRL's loss uses it",
          tries=({"gradient_checkpointing": True},)),
    Entry("pad_to_multiple_of", UNUSED, "the lean step has no padding", tries=({"pad_to_multiple_of": 16},)),
    Entry("bf16 fp16 tf32 use_cpu", FAST, "LeanGRPOConfig: what the card can"),
    Entry("bf16_full_eval fp16_full_eval full_determinism seed data_seed", AS_IN_TRL),
    Entry("optim optim_args optim_target_modules learning_rate weight_decay adam_beta1 adam_beta2 adam_epsilon "
          "max_grad_norm lr_scheduler_type lr_scheduler_kwargs warmup_steps", AS_IN_TRL,
          "an update whose gradients are not finite is skipped, in every precision"),
    Entry("optim", LOSS, "they update a parameter inside each backward, of which the lean step makes several",
          when="lomo, adalomo, or layerwise", tries=({"optim": "lomo"}, {"optim": "galore_adamw_layerwise"})),
    Entry("torch_empty_cache_steps", AS_IN_TRL),
    Entry("torch_compile torch_compile_backend torch_compile_mode", LOSS, "the walk goes past a compiled forward",
          when="True", tries=({"torch_compile": True},)),
    Entry("auto_find_batch_size", REFUSED, "by TRL; the lean step finds its own", when="True",
          tries=({"auto_find_batch_size": True},)),
    Entry("parallelism_config", REFUSED, "by TRL, for context and sequence parallelism", when="set"),
    Entry("deepspeed fsdp fsdp_config ds3_gather_for_generation", BOTH, "a model in pieces is not walked", when="set"),
    Entry("ddp_backend ddp_timeout local_rank", FAST, "one whole model on each card"),
    Entry("ddp_broadcast_buffers ddp_bucket_cap_mb ddp_find_unused_parameters ddp_static_graph", UNUSED,
          "the walk goes past DDP's forward and adds up the gradients itself"),
    # ------------------------------------------------------------------------------------------ model and data
    Entry("model_init_kwargs trust_remote_code", AS_IN_TRL, "only for a model given by its name"),
    Entry("shuffle_dataset remove_unused_columns dataloader_drop_last dataloader_in_order "
          "dataloader_multiprocessing_context dataloader_num_workers dataloader_persistent_workers "
          "dataloader_pin_memory dataloader_prefetch_factor accelerator_config ignore_data_skip", AS_IN_TRL,
          tries=({"dataloader_num_workers": 1},)),
    Entry("average_tokens_across_devices batch_eval_metrics eval_accumulation_steps eval_do_concat_batches "
          "eval_use_gather_object include_for_metrics include_num_input_tokens_seen label_names "
          "label_smoothing_factor length_column_name prediction_loss_only train_sampling_strategy use_cache", UNUSED,
          "TRL's GRPO trainer has its own loss, sampler and evaluation"),
    # ------------------------------------------------------------------------------------------ the run
    Entry("output_dir do_train do_eval do_predict max_steps num_train_epochs eval_strategy eval_steps eval_delay "
          "eval_on_start", AS_IN_TRL),
    Entry("logging_strategy logging_steps logging_first_step logging_nan_inf_filter log_level log_level_replica "
          "log_on_each_node disable_tqdm report_to run_name project trackio_bucket_id trackio_space_id "
          "trackio_static_space_id skip_memory_metrics debug", AS_IN_TRL,
          "TRL's own metric names, and ours beside them"),
    Entry("log_completions log_multimodal num_completions_to_print log_unique_prompts log_completions_hub_repo",
          AS_IN_TRL),
    Entry("save_strategy save_steps save_total_limit save_on_each_node enable_jit_checkpoint load_best_model_at_end "
          "metric_for_best_model greater_is_better restore_callback_states_from_checkpoint resume_from_checkpoint",
          AS_IN_TRL, "a checkpoint is complete or not there, and a run goes on exactly"),
    Entry("save_only_model", AS_IN_TRL, "a run goes on, but not exactly", when="True"),
    Entry("push_to_hub hub_always_push hub_model_id hub_private_repo hub_revision hub_strategy hub_token", AS_IN_TRL),
)  # fmt: skip

_LINEAR = {"target_modules": ["q_proj", "v_proj", "up_proj"]}
_PROMPT = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 4}

ADAPTERS = (
    Entry("LoRA", FAST, "rsLoRA, PiSSA, `rank_pattern`, `alpha_pattern`, `layers_to_transform` too", tries=(
        {"LoraConfig": {**_LINEAR, "use_rslora": True, "rank_pattern": {"q_proj": 2}}},
        {"LoraConfig": {**_LINEAR, "layers_to_transform": [1], "init_lora_weights": "pissa"}})),
    Entry("LoRA", OWN, "a prompt's mask is one for all of its completions; they are written without dropout",
          when="`lora_dropout` above 0",
          tries=({"LoraConfig": {**_LINEAR, "lora_dropout": 0.1}},)),
    Entry("LoRA", OWN, when="DoRA, `lora_bias`, `bias`", tries=(
        {"LoraConfig": {**_LINEAR, "use_dora": True}}, {"LoraConfig": {**_LINEAR, "lora_bias": True}})),
    Entry("LoRA", OWN, when="`modules_to_save` of norms or MLPs",
          tries=({"LoraConfig": {"target_modules": ["q_proj"], "modules_to_save": ["norm", "mlp"]}},)),
    Entry("LoRA", LOSS, when="`modules_to_save` of the head",
          tries=({"LoraConfig": {**_LINEAR, "modules_to_save": ["lm_head"]}},)),
    Entry("LoRA", BOTH, when="on the embedding, `modules_to_save` of it, `trainable_token_indices`", tries=(
        {"LoraConfig": {"target_modules": ["q_proj", "embed_tokens"]}},
        {"LoraConfig": {**_LINEAR, "modules_to_save": ["embed_tokens"]}},
        {"LoraConfig": {**_LINEAR, "trainable_token_indices": [3, 4]}})),
    Entry("IA3 VeRA LoKr LoHa OFT BOFT AdaLoRA", OWN, "their dropout too", tries=(
        {"IA3Config": {"target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"]}},
        {"LoKrConfig": {**_LINEAR, "r": 2, "rank_dropout": 0.1}}, {"LoHaConfig": {**_LINEAR, "r": 2}},
        {"OFTConfig": {**_LINEAR, "oft_block_size": 2, "r": 0}},
        {"AdaLoraConfig": {**_LINEAR, "init_r": 4, "target_r": 2, "total_step": 100}})),
    Entry("prompt-tuning P-tuning", BOTH, "their virtual tokens stand outside the layers that are walked", tries=(
        {"PromptTuningConfig": _PROMPT}, {"PromptEncoderConfig": {**_PROMPT, "encoder_hidden_size": 8}})),
    Entry("prefix-tuning", BOTH, "and TRL's own generation fails with it (peft 0.21)",
          tries=({"PrefixTuningConfig": _PROMPT},)),
    Entry("LN-tuning", BOTH, "it trains the norms, which the walks compute themselves",
          tries=({"LNTuningConfig": {"target_modules": ["input_layernorm", "norm"]}},)),
    Entry("adaption-prompt", BOTH, "for Llama and Mistral alone, and TRL's own loss fails with it (peft 0.21)",
          tries=({"AdaptionPromptConfig": {"task_type": "CAUSAL_LM", "adapter_len": 4, "adapter_layers": 1}},)),
)  # fmt: skip


def fields() -> list[str]:
    """The names of all fields in ARGUMENTS, each as often as it stands there."""
    return [name for entry in ARGUMENTS for name in entry.names.split()]
