"""What the usual keys of other tools are called here: where no nearest name would find it.

Keys of transformers' TrainingArguments, of Axolotl and of LLaMA-Factory.
"""

__all__ = ["HINTS"]

_MICRO = "train.micro_batch_size (rows of a forward; train.batch_size counts the whole step)"
_ACCUMULATION = (
    "train.batch_size (rows of the whole step) and train.micro_batch_size: accumulation follows from them"
)
_LENGTH = "data.max_length"
_EPOCHS = "train.epochs"
_STEPS = "train.steps"
_WARMUP = "optim.warmup (below 1 a share of all steps, else a number of steps)"
_MODEL = "model=org/name or model=DIRECTORY"
_DATA = "data=FILE, data=DIRECTORY, or data=hub data.path=org/name"
_SPLIT = "data.split=[0.8,0.1,0.1]"
_LIMIT = "data.limit.train, data.limit.validation, data.limit.test"
_DIRECTORY = "name=NAME (the directory is runs/NAME/...), or hydra.run.dir=DIRECTORY"
_EVAL = "train.eval_every (steps; null is once an epoch)"
_SAVE = "train.save_every (steps; null is once an epoch)"
_KEEP = "train.keep_last"
_BEST = "task.metric (validation data picks the best weights by it; '-' before it: smaller is better)"
_STOP = "train.early_stop"
_CHECKPOINTING = "train.gradient_checkpointing=true"
_RESUME = "`ftcore resume RUN`; the same command again resumes too"
_TASK = "task=classify, task=causal_lm or task=seq2seq"

HINTS = {
    # optimiser
    "learning_rate": "optim.lr",
    "lr": "optim.lr",
    "adam_beta1": "optim.betas=[0.9,0.999]",
    "adam_beta2": "optim.betas=[0.9,0.999]",
    "adam_epsilon": "optim.eps",
    "lr_scheduler": "optim.schedule",
    "lr_scheduler_type": "optim.schedule",
    "warmup_ratio": _WARMUP,
    "warmup_steps": _WARMUP,
    "num_warmup_steps": _WARMUP,
    "gradient_clipping": "train.max_grad_norm",
    "label_smoothing_factor": "task.label_smoothing",
    "wd": "optim.weight_decay",
    # length of training, sizes
    "num_train_epochs": _EPOCHS,
    "num_epochs": _EPOCHS,
    "n_epochs": _EPOCHS,
    "max_steps": _STEPS,
    "per_device_train_batch_size": _MICRO,
    "per_device_eval_batch_size": _MICRO,
    "per_gpu_train_batch_size": _MICRO,
    "eval_batch_size": _MICRO,
    "gradient_accumulation_steps": _ACCUMULATION,
    "grad_accum": _ACCUMULATION,
    "global_batch_size": "train.batch_size",
    "train_batch_size": "train.batch_size",
    # precision and memory
    "bf16": "train.precision=bf16",
    "fp16": "train.precision=fp16",
    "fp32": "train.precision=fp32",
    "dtype": "train.precision",
    "torch_dtype": "train.precision",
    "mixed_precision": "train.precision",
    "gradient_checkpoint": _CHECKPOINTING,
    "use_gradient_checkpointing": _CHECKPOINTING,
    # model
    "model_name_or_path": _MODEL,
    "model_name": _MODEL,
    "base_model": _MODEL,
    "model_id": _MODEL,
    "pretrained_model_name_or_path": _MODEL,
    "model_revision": "model.revision",
    "revision_of_model": "model.revision",
    "new_special_tokens": "model.add_tokens",
    "hidden_dropout_prob": "model.dropout",
    "attention_dropout": "model.dropout",
    # data
    "dataset": _DATA,
    "datasets": _DATA,
    "dataset_name": _DATA,
    "dataset_dir": _DATA,
    "dataset_path": _DATA,
    "data_path": _DATA,
    "train_file": "data=files data.train=FILE",
    "validation_file": "data.validation=FILE",
    "test_file": "data.test=FILE",
    "eval_dataset": "data.validation=FILE",
    "test_datasets": "data.validation=FILE",
    "dataset_config_name": "data.name",
    "val_size": _SPLIT,
    "val_set_size": _SPLIT,
    "validation_split": _SPLIT,
    "test_size": _SPLIT,
    "max_samples": _LIMIT,
    "max_train_samples": _LIMIT,
    "max_eval_samples": _LIMIT,
    "cutoff_len": _LENGTH,
    "sequence_len": _LENGTH,
    "max_seq_length": _LENGTH,
    "max_seq_len": _LENGTH,
    "max_source_length": _LENGTH,
    "model_max_length": _LENGTH,
    "block_size": _LENGTH,
    "text_column": "data.columns.text",
    "text_column_name": "data.columns.text",
    "dataset_text_field": "data.columns.text",
    "label_column": "data.columns.label",
    "label_column_name": "data.columns.label",
    "overwrite_cache": "no key: the cache goes by content, so a changed file is read anew",
    "preprocessing_num_workers": "data.workers",
    "dataset_num_proc": "data.workers",
    # the run
    "output_dir": _DIRECTORY,
    "run_name": "name",
    "logging_dir": _DIRECTORY,
    "overwrite_output_dir": "force=true",
    "logging_steps": "train.log_every",
    "eval_steps": _EVAL,
    "eval_strategy": _EVAL,
    "evaluation_strategy": _EVAL,
    "evals_per_epoch": _EVAL,
    "save_steps": _SAVE,
    "save_strategy": _SAVE,
    "saves_per_epoch": _SAVE,
    "save_total_limit": _KEEP,
    "load_best_model_at_end": _BEST,
    "metric_for_best_model": _BEST,
    "greater_is_better": _BEST,
    "early_stopping_patience": _STOP,
    "patience": _STOP,
    "resume_from_checkpoint": _RESUME,
    "auto_resume_from_checkpoints": _RESUME,
    "do_train": "no key: `ftcore` trains",
    "do_eval": "no key: validation data are evaluated where there are any",
    "do_predict": "no key: test data are scored at the end; `ftcore predict` for others",
    "data_seed": "data.split_seed (the split), seed (the order of rows)",
    "random_seed": "seed",
    "report_to": "no key: each run writes metrics.jsonl; a plugin may report elsewhere (on_log)",
    "use_cpu": "trainer.device=cpu",
    "no_cuda": "trainer.device=cpu",
    "ddp_backend": "trainer=ddp",
    "num_gpus": "trainer=ddp trainer.devices=N",
    "n_gpu": "trainer=ddp trainer.devices=N",
    "stage": _TASK,
    "task_type": _TASK,
    "generation_max_length": "task.max_new_tokens",
    "predict_with_generate": "no key: task=seq2seq generates at evaluation",
    "deepspeed": "trainer=deepspeed (plugin ftcore-deepspeed)",
    "hub_model_id": "no key: `ftcore export RUN --to hub`",
    "push_to_hub": "no key: `ftcore export RUN --to hub`",
}
"""Key of another tool: what to write instead. A value that starts with `no key` has no like here."""
