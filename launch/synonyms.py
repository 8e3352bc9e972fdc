"""What to set in place of keys of DeepSpeed's JSON, which is derived (`train.engine`), and of those of other trainers.

Keys that this project has by the same name (`tensorboard`, `wandb`, `compile`) need no answer: the key is named. Only
`batch_size` and `gpus`, which usually mean something else than here, have both.
Not here: finding unknown keys, and the sentence around these answers (`launch.keys`).
"""

_DEEPSPEED = {
    "set STAGE.rows_per_step": "train_batch_size",
    "set STAGE.micro_rows": "train_micro_batch_size_per_gpu",
    "set STAGE.rows_per_step, which micro_rows and ranks divide": (
        "gradient_accumulation_steps managed_gradient_accumulation"
    ),
    "set optim.clip_norm": "gradient_clipping max_grad_norm",
    "set optim.beta1, optim.beta2, optim.eps, optim.weight_decay": "optimizer",
    "set optim.beta1, optim.beta2": "betas",
    "set STAGE.peak_lr": "lr warmup_max_lr",
    "set STAGE.peak_lr, STAGE.ramp_steps, STAGE.decay_steps": "scheduler",
    "set STAGE.ramp_steps": "warmup_num_steps",
    "set STAGE.steps": "total_num_steps",
    "set engine.zero_stage": "zero_optimization stage legacy_stage1",
    "set engine.zero_stage=3, which shares the parameters among the ranks: nothing is offloaded": (
        "offload_param cpu_offload_param"
    ),
    "set engine.zero_stage, which shares the optimizer's state among the ranks: nothing is offloaded": (
        "offload_optimizer cpu_offload cpu_offload_use_pin_memory zenflow"
    ),
    "set engine.precision": "bf16 bfloat16 fp16 amp data_types torch_autocast grad_accum_dtype loss_scale",
    "set engine.num_ranks": "local_rank num_gpus",
    "set engine": "deepspeed deepspeed_config ds_config",
    "set logging.progress, logging.line_every": "steps_per_print",
    "set logging.tensorboard, logging.wandb": "monitor_config comet",
    "set logging.profile_steps": "flops_profiler comms_logger dump_state",
    "set logging.memory_snapshot, logging.profile_steps": "memory_breakdown",
    "set data.vocab_size": "vocabulary_size",
    "set saving.every_steps, saving.asynchronous": "checkpoint nebula datastates_ckpt",
    "set engine.num_ranks: a run resumes on any number of ranks": "elasticity elastic_checkpoint load_universal",
    "leave it away: metrics.jsonl has every value": "csv_monitor",
    "leave it away: metrics.jsonl splits the seconds of every step": "wall_clock_breakdown timers",
    "leave it away: the optimizer is DeepSpeed's own AdamW": (
        "zero_allow_untested_optimizer zero_force_ds_cpu_optimizer torch_adam adam_w_mode"
        " save_muon_momentum_buffer_in_memory"
    ),
    "leave it away: rows are drawn by their sources' weights, in order": (
        "curriculum_learning data_efficiency dataloader_drop_last"
    ),
    "leave it away: ranks share rows and ZeRO's parts, nothing else": (
        "pipeline tensor_parallel expert_parallel use_data_before_expert_parallelism"
        " seq_parallel_communication_data_type leaf_module"
    ),
    "leave it away: checkpoints are this project's own": (
        "gather_16bit_weights_on_model_save stage3_gather_16bit_weights_on_model_save"
        " stage3_gather_fp16_weights_on_model_save load_from_fp32_weights pipeline_loading_checkpoint"
    ),
    "leave it away: every weight is trained in full": (
        "compression_training quantize_training weight_quantization sparse_attention sparse_gradients"
        " progressive_layer_drop eigenvalue zero_quantized_weights zero_quantized_nontrainable_weights"
        " zero_quantized_gradients"
    ),
    "leave it away: DeepSpeed's default serves": (
        "aio autotuning communication_data_type disable_allgather disable_python_gc gradient_allreduce_op"
        " gradient_predivide_factor prescale_gradients graph_harvesting hybrid_engine log_level"
        " contiguous_gradients reduce_scatter reduce_bucket_size use_multi_rank_bucket_allreduce"
        " allgather_partitions allgather_bucket_size overlap_comm compute_grad_norm sub_group_size"
        " prefetch_bucket_size param_persistence_threshold model_persistence_threshold max_live_parameters"
        " max_reuse_distance module_granularity_threshold use_all_reduce_for_fetch_params allgather_sequential"
        " ignore_unused_parameters round_robin_gradients parameter_alignment zero_hpz_partition_size"
        " memory_efficient_linear override_module_apply log_trace_cache_warnings enable_sanity_checks"
        " stage3_prefetch_bucket_size stage3_param_persistence_threshold stage3_model_persistence_threshold"
        " stage3_max_live_parameters stage3_max_reuse_distance stage3_module_granularity_threshold"
        " stage3_use_all_reduce_for_fetch_params stage3_allgather_sequential"
    ),
}

_OTHERS = {
    "set STAGE.steps": (
        "max_steps num_steps num_train_steps train_steps training_steps total_steps max_train_steps iterations"
        " max_iters train_iters num_iterations updates"
    ),
    "set STAGE.steps; a step reads rows_per_step rows of model.row_tokens tokens": (
        "max_tokens num_tokens train_tokens epochs num_epochs num_train_epochs max_epochs"
    ),
    "set STAGE.rows_per_step": "batch_size global_batch_size train_batch total_batch_size batch_tokens",
    "set STAGE.micro_rows": (
        "micro_batch_size local_batch_size device_batch_size per_device_train_batch_size batch_size_per_gpu micro_batch"
    ),
    "set STAGE.rows_per_step, which micro_rows and ranks divide": "grad_accum grad_acc_steps accumulate_grad_batches",
    "set STAGE.peak_lr": "learning_rate learn_rate max_lr base_lr lr_max lr_peak init_lr initial_lr",
    "set STAGE.final_lr": "min_lr lr_min end_lr lr_end learning_rate_end min_learning_rate eta_min min_lr_ratio",
    "set STAGE.ramp_steps": "warmup_steps warmup_iters num_warmup_steps lr_warmup_steps warmup_ratio warmup_fraction",
    "set STAGE.decay_steps": "lr_decay_iters lr_decay_steps cooldown_steps num_decay_steps decay_ratio",
    "set STAGE.peak_lr, STAGE.ramp_steps, STAGE.decay_steps": "lr_scheduler lr_scheduler_type schedule lr_schedule",
    "set optim.clip_norm": "grad_clip clip_grad clip_grad_norm gradient_clip gradient_clip_val max_norm",
    "set optim.beta1": "adam_beta1 beta_1",
    "set optim.beta2": "adam_beta2 beta_2",
    "set optim.eps": "adam_eps adam_epsilon epsilon",
    "set optim.weight_decay": "wd adam_weight_decay",
    "set engine.precision": "dtype torch_dtype mixed_precision half",
    "set engine.num_ranks": "world_size nproc_per_node num_processes gpus num_devices devices n_gpus",
    "set engine.threads_per_rank": "num_threads threads omp_num_threads cpus_per_task",
    "set engine.zero_stage": "zero fsdp sharding_strategy",
    "set launcher.slurm.nodes": "num_nodes nnodes",
    "set launcher.slurm.time": "walltime time_limit",
    "set launcher.slurm.options": "partition account qos constraint gres",
    "set model.width": "d_model hidden_size hidden_dim n_embd dim embed_dim embedding_size model_dim emb_dim",
    "set model.num_layers": "n_layer n_layers num_hidden_layers depth layers num_blocks",
    "set model.num_heads": "n_head n_heads num_attention_heads heads attention_heads",
    "set model.num_kv_heads": "n_kv_head n_kv_heads num_key_value_heads kv_heads num_query_groups",
    "set model.head_size": "head_dim d_head head_width kv_channels",
    "set model.ffn_width": "intermediate_size d_ff ffn_dim ffn_hidden_size mlp_dim ffn_size",
    "set model.num_memory_layers": "memory_layers n_memory_layers",
    "set model.row_tokens": (
        "context_length context_size seq_len seq_length sequence_length max_seq_len max_seq_length block_size"
        " max_position_embeddings max_length n_ctx"
    ),
    "set model.rope_base": "rope_theta theta rotary_base",
    "set model.norm_eps": "rms_norm_eps layer_norm_eps layernorm_epsilon",
    "set model.init_std": "initializer_range initializer_std",
    "set model.activation_checkpointing": "gradient_checkpointing recompute activation_checkpoint grad_checkpointing",
    "set model.compile": "torch_compile use_compile",
    "set data.vocab_size": "n_vocab num_embeddings",
    "set data.path": "data_path data_dir dataset_path train_file train_files train_data input_file corpus",
    "choose data=NAME, or set data.sources": "dataset datasets dataset_name",
    "set data.tokenizer_model": "tokenizer tokenizer_path tokenizer_name",
    "set retrieval.fresh": "top_k num_references num_neighbors num_neighbours",
    "set paths.root": "output_dir out_dir save_dir log_dir work_dir output_path checkpoint_dir",
    "set run": "run_name exp_name experiment_name job_name",
    "set seed": "random_seed manual_seed rng_seed",
    "set resume": "resume_from resume_from_checkpoint init_from auto_resume",
    "set saving.every_steps": "save_steps save_every save_interval save_freq checkpoint_interval checkpoint_every",
    "set saving.keep_last": "save_total_limit keep_last_n max_checkpoints",
    "set logging.validate_every": "eval_steps eval_interval eval_every eval_freq val_every val_interval",
    "set logging.line_every": "logging_steps log_interval log_every log_freq",
    "set logging.wandb": "use_wandb wandb_log report_to",
    "set logging.wandb_project": "project project_name",
    "set logging.profile_steps": "profile profiler profiling",
}


def _by_key(table: dict[str, str]) -> dict[str, str]:
    return {key: answer for answer, keys in table.items() for key in keys.split()}


DEEPSPEED = _by_key(_DEEPSPEED)
"""An answer for each key of DeepSpeed; STAGE stands for the stage, or for both."""
OTHERS = _by_key(_OTHERS)
"""The same for keys of other trainers."""
