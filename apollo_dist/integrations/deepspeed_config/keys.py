"""The keys of DeepSpeed 0.19.8's configuration, so that ``lint`` needs no DeepSpeed.

``tests/integrations/test_lint.py`` compares every table with what the installed DeepSpeed and transformers read.
"""

from __future__ import annotations

TOP_LEVEL = frozenset(
    """
    activation_checkpointing aio autotuning bf16 checkpoint comet comms_logger communication_data_type compile
    csv_monitor data_efficiency data_types dataloader_drop_last datastates_ckpt disable_allgather disable_python_gc
    dump_state expert_parallel flops_profiler fp16 gradient_accumulation_steps gradient_allreduce_op gradient_clipping
    gradient_predivide_factor hybrid_engine log_level managed_gradient_accumulation memory_breakdown optimizer pipeline
    prescale_gradients scheduler seq_parallel_communication_data_type steps_per_print tensor_parallel tensorboard timers
    torch_autocast train_batch_size train_micro_batch_size_per_gpu use_data_before_expert_parallelism vocabulary_size
    wall_clock_breakdown wandb weight_quantization zero_allow_untested_optimizer zero_force_ds_cpu_optimizer
    zero_optimization
    """.split()
)
# Read by ``deepspeed.initialize`` before the configuration is parsed.
MESH = frozenset({"data_parallel_size", "sequence_parallel_size"})

# Sections that DeepSpeed reads key by key, so that it ignores others without a word, as at the top level.
LENIENT = {
    "optimizer": frozenset({"type", "params", "legacy_fusion"}),
    "scheduler": frozenset({"type", "params"}),
    "data_types": frozenset({"grad_accum_dtype", "param_dtype", "buffer_dtype", "keep_in_fp32_modules"}),
    "torch_autocast": frozenset({"enabled", "dtype", "lower_precision_safe_modules"}),
    "activation_checkpointing": frozenset(
        """
        partition_activations contiguous_memory_optimization cpu_checkpointing number_checkpoints profile
        synchronize_checkpoint_boundary
        """.split()
    ),
    "aio": frozenset("block_size queue_depth intra_op_parallelism single_submit overlap_events use_gds".split()),
}

# Sections whose unknown keys DeepSpeed refuses. Some keys of stage 3 go with and without their prefix.
STRICT = {
    "zero_optimization": frozenset(
        """
        stage contiguous_gradients reduce_scatter reduce_bucket_size use_multi_rank_bucket_allreduce
        allgather_partitions allgather_bucket_size overlap_comm compute_grad_norm load_from_fp32_weights
        elastic_checkpoint offload_param offload_optimizer zenflow sub_group_size stage3_prefetch_bucket_size
        stage3_param_persistence_threshold stage3_model_persistence_threshold stage3_max_live_parameters
        stage3_max_reuse_distance stage3_gather_16bit_weights_on_model_save stage3_module_granularity_threshold
        stage3_use_all_reduce_for_fetch_params stage3_allgather_sequential ignore_unused_parameters
        round_robin_gradients parameter_alignment zero_hpz_partition_size zero_quantized_weights
        zero_quantized_nontrainable_weights zero_quantized_gradients memory_efficient_linear
        pipeline_loading_checkpoint override_module_apply log_trace_cache_warnings enable_sanity_checks
        save_muon_momentum_buffer_in_memory leaf_module
        prefetch_bucket_size param_persistence_threshold model_persistence_threshold max_live_parameters
        max_reuse_distance gather_16bit_weights_on_model_save module_granularity_threshold
        use_all_reduce_for_fetch_params allgather_sequential
        """.split()
    ),
    "zero_optimization.offload_param": frozenset(
        "device nvme_path buffer_count buffer_size max_in_cpu pin_memory".split()
    ),
    "zero_optimization.offload_optimizer": frozenset(
        """
        device nvme_path buffer_count pin_memory pipeline_read pipeline_write fast_init ratio super_offload
        cpuadam_cores_perc
        """.split()
    ),
    "bf16": frozenset(
        "enabled immediate_grad_update check_grad_overflow bf16_master_weights_and_grads bf16_optimizer_states".split()
    ),
    "fp16": frozenset(
        """
        enabled auto_cast loss_scale initial_scale_power loss_scale_window hysteresis consecutive_hysteresis
        min_loss_scale fp16_master_weights_and_grads
        """.split()
    ),
}

# Old keys -> what to write. The second half DeepSpeed 0.19.8 refuses itself.
OUTDATED = {
    "bfloat16": "bf16",
    "zero_optimization.cpu_offload": 'zero_optimization.offload_optimizer: {"device": "cpu"}',
    "zero_optimization.cpu_offload_param": 'zero_optimization.offload_param: {"device": "cpu"}',
    "zero_optimization.cpu_offload_use_pin_memory": "pin_memory in offload_optimizer or offload_param",
    "zero_optimization.stage3_gather_fp16_weights_on_model_save": "stage3_gather_16bit_weights_on_model_save",
    "zero_optimization.legacy_stage1": "nothing: it is gone",
    "allgather_size": "zero_optimization.allgather_bucket_size",
    "amp": "bf16, fp16 or torch_autocast",
    "compression_training": "nothing: it is gone",
    "curriculum_learning": "data_efficiency.data_sampling.curriculum_learning",
    "eigenvalue": "nothing: it is gone",
    "elasticity": "train_batch_size, train_micro_batch_size_per_gpu and gradient_accumulation_steps",
    "graph_harvesting": "nothing: it is gone",
    "nebula": "nothing: it is gone",
    "progressive_layer_drop": "nothing: it is gone",
    "quantize_training": "nothing: it is gone",
    "sparse_attention": "nothing: it is gone",
    "sparse_gradients": "nothing: it is gone",
    "zero_optimization.mics_hierarchical_params_gather": "nothing: it is gone",
    "zero_optimization.mics_shard_size": "nothing: it is gone",
    "zero_optimization.zeropp_loco_param": "nothing: it is gone",
}

# Where "auto" is filled in by the Hugging Face Trainer, or by Accelerate below it.
HUGGING_FACE_AUTO = frozenset(
    """
    train_batch_size train_micro_batch_size_per_gpu gradient_accumulation_steps gradient_clipping
    bf16.enabled fp16.enabled
    optimizer.params.lr optimizer.params.betas optimizer.params.eps optimizer.params.weight_decay
    scheduler.params.warmup_min_lr scheduler.params.warmup_max_lr scheduler.params.warmup_num_steps
    scheduler.params.total_num_steps
    zero_optimization.reduce_bucket_size zero_optimization.stage3_prefetch_bucket_size
    zero_optimization.stage3_param_persistence_threshold zero_optimization.stage3_gather_16bit_weights_on_model_save
    """.split()
)
# Where "auto" is a word of DeepSpeed's own.
DEEPSPEED_AUTO = frozenset({"pipeline.stages", "data_types.keep_in_fp32_modules"})
