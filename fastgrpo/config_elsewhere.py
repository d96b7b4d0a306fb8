"""What other trainers call keys of ours, and what they have that is no key here, for those who move over."""

from __future__ import annotations

# What TRL, verl, OpenRLHF, slime, prime-rl and others call keys of ours that no likeness of names leads to, or leads
# astray from; of two parts where the last one alone says too little.
ELSEWHERE = {
    other: key
    for key, others in {
        "grpo.steps": (
            "max_steps num_train_epochs total_training_steps total_epochs num_episodes num_epoch num_rollout"
        ),
        "grpo.lr": "learning_rate actor_learning_rate",
        "grpo.decay": "lr_scheduler_type lr_scheduler scheduler.type",
        "grpo.min_lr_ratio": "lr_scheduler_kwargs min_lr min_lr_rate",
        "grpo.warmup_steps": "warmup_ratio lr_warmup_ratio lr_warmup_steps lr_warmup_steps_ratio",
        "grpo.group_size": "num_generations n_samples_per_prompt rollout.n rollouts_per_example",
        "grpo.prompts_per_step": (
            "train_batch_size rollout_batch_size per_device_train_batch_size generation_batch_size batch_size"
        ),
        "grpo.max_new_tokens": "max_completion_length max_response_length generate_max_len max_completion_tokens "
        "rollout_max_response_len sampling.max_tokens",
        "grpo.temperature": "temperature rollout_temperature",
        "grpo.top_p": "rollout_top_p",
        "grpo.top_k": "rollout_top_k",
        "grpo.stop": "generation_kwargs rollout_stop",
        "grpo.epochs_per_batch": "num_iterations ppo_epochs max_epochs",
        "grpo.mini_batches": (
            "ppo_mini_batch_size steps_per_generation num_steps_per_rollout global_batch_size train.batch_size"
        ),
        "grpo.micro_batch_tokens": "ppo_max_token_len_per_gpu max_tokens_per_gpu",
        "grpo.max_lag": "max_async_level async_level async_queue_size max_off_policy_steps async_enable",
        "grpo.in_flight": "partial_rollout partial_rollout_enable",
        "grpo.max_turns": "max_tool_calling_iterations max_assistant_turns",
        "grpo.loss": "loss_type policy_loss_type loss_mode",
        "grpo.advantage": "adv_estimator advantage.estimator advantage_estimator",
        "grpo.ratio": "importance_sampling_level",
        "grpo.normaliser": "loss_agg_mode calculate_per_token_loss",
        "grpo.reward_scale": (
            "scale_rewards multi_objective_aggregation norm_adv_by_std_in_grpo no_std_norm "
            "disable_grpo_std_normalization"
        ),
        "grpo.importance_correction": "vllm_importance_sampling_mode rollout_is is_correction_type",
        "grpo.tis_cap": (
            "vllm_importance_sampling_correction vllm_importance_sampling_cap vllm_importance_sampling_clip_max "
            "rollout_is_threshold tis_clip use_tis is_correction_enable is_correction_threshold"
        ),
        "grpo.routing_replay": (
            "use_rollout_routing_replay enable_rollout_routing_replay router_replay.mode router_replay_mode "
            "router_replay.enabled enable_router_replay moe_enable_routing_replay enable_return_routed_experts"
        ),
        "grpo.clip_low": "clip_ratio_low",
        "grpo.clip_high": "epsilon_high clip_ratio_high eps_clip_high",
        "grpo.clip_dual": "delta clip_ratio_c dual_clip eps_clip_c",
        "grpo.kl_weight": "beta use_kl_loss kl_loss_coef init_kl_coef kl.init_coef kl_coef",
        "grpo.kl_estimator": (
            "kl_loss_type use_bias_correction_kl use_unbiased_kl kl.estimator kl.unbiased_gradient kl.use_loss "
            "use_kl_in_reward kl_penalty"
        ),
        "grpo.entropy_weight": "entropy_coef entropy_coeff",
        "grpo.overlong_filter": "mask_truncated_completions",
        "grpo.overlong_penalty_tokens": "overlong_buffer_len overlong_buffer.len",
        "grpo.refill": (
            "filter_groups.enable dynamic_filtering dynamic_filtering_enable max_num_gen_batches "
            "dynamic_sampling_filter_path over_sampling_batch_size online_difficulty_filtering"
        ),
        "grpo.max_grad_norm": "clip_grad grad_clip max_norm",
        "eval.samples": "num_generations_eval eval.n_samples_per_prompt val_kwargs.n n_samples_per_eval_prompt",
        "eval.temperature": "val_kwargs.temperature eval_temperature",
        "eval.every": "eval_steps eval_strategy test_freq eval.steps eval.interval eval_interval",
        "engine.dtype": "dtype bf16 fp16 param_dtype torch_dtype tf32 bf16_full_eval fp16_full_eval",
        "engine.gpu_memory_utilization": "vllm_gpu_memory_utilization sglang_mem_fraction_static engine.memory",
        "engine.max_model_len": "vllm_max_model_length max_prompt_length prompt_max_len seq_len max_len max_length "
        "rollout_max_context_len rollout_max_prompt_len",
        "engine.tensor_parallel": (
            "vllm_tensor_parallel_size tensor_model_parallel_size tensor_parallel_size tp_size parallel.tp engine.tp "
            "rollout_num_gpus_per_engine"
        ),
        "model.path": "model_name_or_path model_name model.name hf_checkpoint",
        "model.chat_template": "apply_chat_template",
        "model.lora_rank": "lora_r lora.rank use_peft peft_config",
        "model.offload_optimizer": "adam_offload optimizer_offload optim_cpu_offload",
        "checkpoint.every": "save_steps save_freq save_interval save_strategy ckpt.interval",
        "checkpoint.keep": "save_total_limit max_num max_actor_ckpt_to_keep keep_last",
        "record.tracker": "report_to logger use_wandb",
        "data.dataset": "train_files prompt_dataset prompt_data data.path data.file data.files data.name",
        "data.problems": "max_samples train_max_samples",
        "data.weights": "prompt_probs",
        "data.seed": "data_seed",
        "data.eval_dataset": "val_files eval.dataset eval_prompt_data",
        "data.reward": (
            "reward_funcs remote_rm_url remote_url custom_reward_function.path custom_reward_function.name rm_type "
            "custom_rm_path reward_manager reward_manager.name"
        ),
        "data.environment": "env env.id env_id environment_id",
        "sandbox.hosts": "sandbox_fusion.url",
        "sandbox.wall_s": "sandbox.timeout sandbox.timeout_s",
        "runs": "output_dir output_path default_local_dir ckpt.path",
        "name": "run_name experiment_name wandb.name",
    }.items()
    for other in others.split()
}
# Parts of names under which no key is one of ours, as that of a critic's model.
WHOLE_PARTS = ("critic", "muon", "reward_model")
# What has no key, and what there is instead.
NO_KEY = {
    other: instead
    for instead, others in {
        "a step is one update on grpo.prompts_per_step x grpo.group_size rollouts, cut by grpo.micro_batch_tokens": (
            "gradient_accumulation_steps ppo_micro_batch_size ppo_micro_batch_size_per_gpu micro_batch_size "
            "log_prob_micro_batch_size_per_gpu per_device_eval_batch_size use_dynamic_bsz use_dynamic_batch_size "
            "auto_find_batch_size torch_empty_cache_steps"
        ),
        "every step is logged, and every completion is in samples.jsonl": (
            "logging_steps logging_strategy logging_first_step log_completions num_completions_to_print "
            "log_val_generations log_unique_prompts log_completions_hub_repo log_multimodal"
        ),
        "each of runs/NAME/checkpoints is a Hugging Face folder, which `hf upload` sends": (
            "push_to_hub hub_model_id hub_strategy hub_token hub_private_repo hub_always_push hub_revision save_hf"
        ),
        "vLLM always decodes on the trainer's own devices and weights": (
            "use_vllm vllm_mode vllm_server_host vllm_server_port vllm_server_base_url vllm_server_timeout "
            "rollout.name vllm_num_engines num_engines colocate colocate_all rollout.mode vllm_model_impl "
            "vllm_group_port cache_implementation use_transformers_continuous_batching "
            "transformers_continuous_batching_config use_transformers_paged"
        ),
        "the memory plan says whether vLLM sleeps while the policy trains": (
            "vllm_enable_sleep_mode free_cache_engine enable_sleep"
        ),
        "it is an argument of fastgrpo.train": (
            "reward_weights eval_dataset train_dataset resume resume_mode resume_from_checkpoint"
        ),
        "the KL is to the policy at the start, and grpo.kl_weight stays as it is": (
            "sync_ref_model ref_model_sync_steps ref_model_mixup_alpha kl.target kl_target kl_ctrl.type "
            "ref_update_interval"
        ),
        "grpo.loss_function takes a loss of your own, as SAPO's and the off-policy mask in examples/losses.py": (
            "sapo_temperature_neg sapo_temperature_pos tau_pos tau_neg vespo_k_pos vespo_k_neg "
            "vespo_lambda_pos vespo_lambda_neg off_policy_mask_threshold"
        ),
        "every token of a completion is trained, whatever its entropy": "top_entropy_quantile",
        "grpo.routing_replay repeats the experts that vLLM chose, not those of the old policy's pass": (
            "use_routing_replay"
        ),
        "grpo.entropy_weight stays as it is": (
            "use_adaptive_entropy entropy_coef_min entropy_coef_max entropy_coef_delta entropy_target"
        ),
        "an importance weight has no lower bound": "vllm_importance_sampling_clip_min tis_clip_low",
        "the masks of grpo.importance_correction leave out what is above grpo.tis_cap": (
            "rollout_rs rollout_rs_threshold"
        ),
        "each bound of the ratio is set by itself, by grpo.clip_low and grpo.clip_high, 0.28 by default": (
            "epsilon clip_ratio eps_clip eps_clip_low_high"
        ),
        "the reward falls by 1 at most, over grpo.overlong_penalty_tokens": "overlong_penalty_factor penalty_factor",
        "logits are added up in fp32 in training, and engine.dtype float32 computes all so": "cast_lm_head_to_fp32",
        "tokens are drawn by grpo.temperature, top_p, top_k and min_p": "repetition_penalty do_sample",
        "nothing but grpo.stop binds what is written": (
            "vllm_structured_outputs_regex vllm_guided_decoding_regex guided_decoding_regex"
        ),
        "an environment or an agent is passed to fastgrpo.train as environment= (docs/own-task.md has TRL's tools)": (
            "tools environment_factory rollout_func agent_func_path custom_generate_function_path "
            "rollout_function_path tool_config_path multi_turn.enable"
        ),
        "what a reward needs besides, it has by itself or by functools.partial": "reward_kwargs",
        "a reward function is called once for each group": "group_rm",
        "a reward model is asked by a reward function": (
            "reward_processing_classes reward_model reward.model_name_or_path"
        ),
        "advantages are those of a group, without a critic": (
            "gamma lam lambd value_clip critic_warmup freezing_actor_steps critic"
        ),
        "files and a reward's trainer_state tell what callbacks would, and fastgrpo.stop() ends a run": "callbacks",
        "the tokenizer is the one in the model's folder": "processing_class tokenizer",
        "the model's own configuration, engine.dtype and model.revision say how it is loaded": "model_init_kwargs",
        "weights are trained as they are, not quantised": "quantization_config load_in_4bit load_in_8bit",
        "there is no dropout": "disable_dropout dropout",
        "routers get no loss of their own": "router_aux_loss_coef aux_loss_coef",
        "sequences are packed without padding": "pad_to_multiple_of packing_samples use_remove_padding",
        "this package's kernels run wherever they can": "use_liger_kernel liger_kernel_config",
        "sequences are not split over GPUs": "ulysses_sequence_parallel_size ring_attn_size context_parallel_size",
        "training is on whole weights, and with engine.tensor_parallel sharded over all ranks": (
            "deepspeed fsdp zero_stage strategy fsdp_config ds3_gather_for_generation param_offload ddp_timeout "
            "ddp_find_unused_parameters ddp_backend ddp_bucket_cap_mb"
        ),
        "columns have their own names: a prompt is in `prompt`, the rest goes to the reward": (
            "prompt_key input_key label_key reward_key metadata_key reward_fn_key remove_unused_columns"
        ),
        "AdamW is the one optimizer, by grpo.beta1, beta2 and weight_decay": (
            "optim adam_epsilon adam.eps betas optim_args optimizer optimizers muon"
        ),
        "adapters are on all linear layers of the decoder, without dropout": (
            "target_modules lora_target_modules lora_dropout lora.dropout modules_to_save"
        ),
        "the checkpoint of the best evaluation is kept beside the last ones": (
            "load_best_model_at_end metric_for_best_model greater_is_better"
        ),
        "held-out problems are evaluated before the first step and after the last": (
            "eval_on_start eval_delay val_before_train skip_eval_before_train skip_first_step"
        ),
        "the variable WANDB_PROJECT names it": "project project_name wandb_project",
        "the variable WANDB_RUN_GROUP names it": "wandb.group wandb_group",
        "TensorBoard's files are always written, in the run's folder": "use_tensorboard tensorboard_dir logging_dir",
        "torchrun starts one rank for each GPU": (
            "n_gpus_per_node nnodes num_nodes num_gpus_per_node actor_num_gpus_per_node rollout_num_gpus local_rank"
        ),
        "problems whose prompts are too long are left out": "filter_overlong_prompts truncation",
        "code that a model brings is never run": "trust_remote_code",
        "attention is FlashAttention's where the extra flash is installed": "attn_implementation attn_impl",
        "problems are drawn anew in each epoch, by seed": (
            "shuffle shuffle_dataset validation_shuffle group_by_length dataloader_num_workers dataloader_drop_last "
            "rollout_shuffle"
        ),
    }.items()
    for other in others.split()
}


def elsewhere(name: str) -> tuple[str, str]:
    """(our key, what there is instead of one) for another trainer's key: one of both is empty, for none of theirs both.

    The two last parts of a name tell more than the last one alone, and so do parts that nothing here has.
    """
    parts = name.split(".")
    for spelling in (".".join(parts[-2:]), *(part for part in parts if part in WHOLE_PARTS), parts[-1]):
        if spelling in ELSEWHERE or spelling in NO_KEY:
            return ELSEWHERE.get(spelling, ""), NO_KEY.get(spelling, "")
    return "", ""
