"""What to set in place of the keys of DeepSpeed's JSON, which is derived (`train.engine`): nobody writes it.

Keys that this project has by the same name (`tensorboard`, `wandb`, `compile`) are not here: the nearest key is named.
Not here: finding unknown keys, and the sentence around these answers (`launch.explain`).
"""

_KEYS = {
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

DEEPSPEED = {key: answer for answer, keys in _KEYS.items() for key in keys.split()}
"""An answer for each key; STAGE stands for the stage, or for both."""
