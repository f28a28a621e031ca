"""Every setting of a training is honoured, or refused in one sentence before anything is trained."""

import json
from dataclasses import fields
from pathlib import Path

import pytest
from conftest import CORPUS
from transformers import TrainingArguments

from hf_nanogpt import NanoGPTTrainingArguments, train
from hf_nanogpt.errors import UserError

SMALL = {
    "tokenizer": "byte",
    "n_layer": 1,
    "n_embd": 16,
    "n_head": 2,
    "block_size": 32,
    "per_device_train_batch_size": 4,
    "max_steps": 2,
    "sample_steps": 0,
    "disable_tqdm": True,
    "num_threads": 1,
    "use_cpu": True,
}


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("corpus") / "text.txt"
    path.write_text(CORPUS[:2000], encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module")
def checkpoint(text, tmp_path_factory) -> Path:
    return train(
        data=text, output_dir=str(tmp_path_factory.mktemp("runs") / "a"), **SMALL
    ).output_dir


def make(**settings) -> NanoGPTTrainingArguments:
    return NanoGPTTrainingArguments(**({"output_dir": "unused", "use_cpu": True} | settings))


# A value for each field that says more than its default; the rest are flags, which are turned
# around. A new field of transformers is missing here until somebody has decided what it does.
VALUES = {
    "per_device_train_batch_size": 3,
    "per_device_eval_batch_size": 3,
    "num_train_epochs": 1.0,
    "max_steps": 1,
    "learning_rate": 0.1,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 1,
    "lr_scheduler_kwargs": {"num_cycles": 0.25},
    "optim": "sgd",
    "optim_args": "momentum=0.9",
    "weight_decay": 0.1,
    "adam_beta1": 0.5,
    "adam_beta2": 0.5,
    "adam_epsilon": 1e-3,
    "optim_target_modules": "all-linear",
    "gradient_accumulation_steps": 2,
    "max_grad_norm": 0.1,
    "label_smoothing_factor": 0.1,
    "neftune_noise_alpha": 1.0,
    "activation_checkpointing_kwargs": {"use_reentrant": False},
    "gradient_checkpointing_kwargs": {"use_reentrant": False},
    "torch_compile_backend": "eager",
    "torch_compile_mode": "default",
    "liger_kernel_config": {"rope": True},
    "torch_empty_cache_steps": 1,
    "logging_strategy": "no",
    "logging_steps": 1,
    "include_num_input_tokens_seen": "no",
    "log_level": "error",
    "log_level_replica": "error",
    "report_to": "none",
    "run_name": "a",
    "project": "a",
    "trackio_space_id": "a",
    "trackio_bucket_id": "a",
    "trackio_static_space_id": "a",
    "eval_strategy": "epoch",
    "eval_steps": 1,
    "eval_delay": 1,
    "eval_accumulation_steps": 1,
    "include_for_metrics": ["inputs", "loss"],
    "save_strategy": "best",
    "save_steps": 1,
    "save_total_limit": 1,
    "hub_token": "hf_x",
    "hub_model_id": "a/b",
    "hub_strategy": "end",
    "hub_revision": "main",
    "metric_for_best_model": "perplexity",
    "seed": 1,
    "data_seed": 1,
    "accelerator_config": {"even_batches": False},
    "ddp_static_graph": True,
    "dataloader_num_workers": 1,
    "dataloader_prefetch_factor": 2,
    "label_names": ["labels"],
    "dataloader_multiprocessing_context": "fork",
    "train_sampling_strategy": "sequential",
    "length_column_name": "size",
    "ddp_bucket_cap_mb": 1,
    "ddp_backend": "gloo",
    "ddp_timeout": 60,
    "fsdp": "full_shard",
    "fsdp_config": {"min_num_params": 1},
    "deepspeed": "none.json",
    "debug": "underflow_overflow",
    "resume_from_checkpoint": "a",
    "local_rank": 0,
    "greater_is_better": True,
    "use_cpu": True,
    "disable_tqdm": True,
}
TOGETHER = {
    "lr_scheduler_kwargs": {"lr_scheduler_type": "cosine"},
    "optim_args": {"optim": "sgd"},
    "greater_is_better": {"metric_for_best_model": "loss"},
    "activation_checkpointing_kwargs": {"activation_checkpointing": True},
    "gradient_checkpointing_kwargs": {"gradient_checkpointing": True},
    "dataloader_prefetch_factor": {"dataloader_num_workers": 1},
    "dataloader_persistent_workers": {"dataloader_num_workers": 1},
    "dataloader_multiprocessing_context": {"dataloader_num_workers": 1},
    "torch_compile": {"torch_compile_backend": "eager"},
    "torch_compile_mode": {"torch_compile_backend": "eager"},
    "load_best_model_at_end": {"eval_steps": 1, "save_steps": 1},
}
REFUSED = {
    *("use_liger_kernel", "liger_kernel_config", "enable_jit_checkpoint", "label_names"),
    *("resume_from_checkpoint", "do_predict", "length_column_name", "deepspeed", "fsdp"),
    *("include_num_input_tokens_seen", "optim_target_modules", "tf32", "fp16"),
}
# Tested elsewhere: a folder, an object of accelerate, the Hub.
ELSEWHERE = {"output_dir", "parallelism_config", "push_to_hub"}
FIELDS = [field.name for field in fields(TrainingArguments) if field.name not in ELSEWHERE]


@pytest.mark.slow
@pytest.mark.parametrize("name", FIELDS)
def test_each_field_of_training_arguments_trains_or_is_refused_by_name(text, tmp_path, name):
    default = next(f.default for f in fields(NanoGPTTrainingArguments) if f.name == name)
    assert name in VALUES or isinstance(default, bool | None), f"{name} is new: add it to VALUES"
    settings = {"data": text, "output_dir": str(tmp_path / "run")} | SMALL
    settings |= TOGETHER.get(name, {}) | {name: VALUES.get(name, not default)}
    if name in REFUSED:
        with pytest.raises(UserError, match=name):
            train(**settings)
        assert not (tmp_path / "run").exists()
    else:
        result = train(**settings)
        written = json.loads((result.output_dir / "metrics.json").read_text())
        assert written["train_tokens"] > 0 and written["eval_loss"] > 0
