"""What verl, TRL, LLaMA-Factory, axolotl and ms-swift call a setting, for those who come from there."""

from __future__ import annotations

WORDS = {
    "model.path": "model_name_or_path base_model partial_pretrain model_id_or_path tokenizer_name_or_path",
    "model.revision": "model_revision",
    "model.precision": "bf16 fp16 tf32 dtype torch_dtype pure_bf16 mixed_precision",
    "model.chat_template": "template chat_template_path chat_template_jinja",
    "model.activation_checkpointing": "gradient_checkpointing enable_gradient_checkpointing",
    "model.liger": "use_liger use_liger_kernel enable_liger_kernel",
    "model.new_tokens": "add_tokens added_tokens add_special_tokens new_special_tokens",
    "model.freeze": "freeze_vision_tower freeze_multi_modal_projector freeze_language_model freeze_vit "
                    "freeze_aligner freeze_llm",
    "model.image_tokens": "image_max_pixels max_pixels",
    "data.train": "dataset dataset_name datasets train_file train_files dataset_dir dataset_path",
    "data.validation": "val_files eval_dataset val_dataset test_datasets val_size val_set_size split_dataset_ratio",
    "data.columns": "prompt_key response_key field_instruction field_output columns_mapping dataset_text_field",
    "data.messages": "messages_key chat_field messages_field",
    "data.image_root": "media_dir image_dir image_folder",
    "data.max_tokens": "max_length max_seq_length max_seq_len cutoff_len sequence_len model_max_length",
    "data.too_long": "truncation truncation_mode truncation_strategy excess_length_strategy",
    "data.supervise": "assistant_only_loss completion_only_loss train_on_prompt train_on_inputs mask_history "
                      "roles_to_train loss_scale",
    "data.workers": "preprocessing_num_workers dataset_num_proc num_proc dataset_processes",
    "data.limit": "max_samples max_train_samples",
    "directory": "output_dir default_local_dir",
    "batch.examples": "train_batch_size global_batch_size gradient_accumulation_steps",
    "batch.tokens": "per_device_train_batch_size micro_batch_size micro_batch_size_per_gpu max_token_len_per_gpu "
                    "ppo_max_token_len_per_gpu packing sample_packing use_dynamic_bsz",
    "train.epochs": "num_train_epochs num_epochs total_epochs",
    "train.steps": "max_steps total_training_steps max_train_steps",
    "train.label_smoothing": "label_smoothing_factor",
    "train.neftune": "neftune_noise_alpha neft_alpha",
    "train.balance": "router_aux_loss_coef moe_aux_loss_coeff",
    "optim.name": "optimizer optim_type",
    "optim.learning_rate": "lr",
    "optim.schedule": "lr_scheduler lr_scheduler_type lr_decay_style",
    "optim.warmup": "warmup_ratio warmup_steps lr_warmup_steps lr_warmup_steps_ratio warmup_steps_ratio",
    "optim.minimum": "min_lr min_lr_ratio cosine_min_lr_ratio",
    "optim.beta1": "adam_beta1 betas", "optim.beta2": "adam_beta2", "optim.epsilon": "adam_epsilon eps",
    "optim.clip": "max_grad_norm gradient_clipping clip_grad",
    "lora.rank": "lora_r r lora_rank adapter finetuning_type tuner_type train_type use_peft",
    "lora.alpha": "lora_alpha", "lora.dropout": "lora_dropout",
    "lora.targets": "target_modules lora_target lora_target_modules lora_target_linear",
    "lora.modules_to_save": "additional_target lora_modules_to_save",
    "lora.start": "adapter_name_or_path adapters lora_model_dir lora_adapter_path",
    "lora.rslora": "use_rslora peft_use_rslora", "lora.dora": "use_dora peft_use_dora",
    "lora.base": "load_in_4bit load_in_8bit quantization quantization_bit quant_bits",
    "validation.every": "eval_steps test_freq eval_strategy evaluation_strategy",
    "exam.grader": "metric compute_metrics",
    "exam.max_new_tokens": "generation_max_length",
    "checkpoint.every": "save_steps save_freq save_strategy saves_per_epoch",
    "checkpoint.best": "load_best_model_at_end metric_for_best_model",
    "checkpoint.keep": "save_total_limit max_ckpt_to_keep",
    "parallel.ulysses": "ulysses_sequence_parallel_size sequence_parallel_size context_parallel_size cp_size",
    "parallel.shard": "fsdp fsdp_size fsdp_config deepspeed",
    "parallel.offload": "cpu_offload offload_params param_offload fsdp_offload_params",
    "track.to": "report_to use_wandb use_tensorboard logger", "track.project": "wandb_project project_name",
    "--nproc": "n_gpus n_gpus_per_node nproc_per_node num_processes",
}
"""Our settings, and the names by which others know each."""
NAMES = {word: ours for ours, words in WORDS.items() for word in words.split()}
"""The other way round."""
