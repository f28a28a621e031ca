"""Each setting is honoured, or refused in one sentence before anything is trained."""

import json
import re
from dataclasses import fields, replace
from pathlib import Path

import huggingface_hub
import pytest
from conftest import CORPUS
from transformers import TrainingArguments
from transformers.trainer_utils import SchedulerType

from hf_nanogpt import NanoGPTTrainingArguments, train
from hf_nanogpt.errors import UserError
from hf_nanogpt.training import run
from hf_nanogpt.training.checks import check_run, check_schedule
from hf_nanogpt.training.run_settings import describe_settings

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
    *("include_num_input_tokens_seen", "optim_target_modules", "tf32", "ddp_backend"),
}
# Tested elsewhere: a folder, an object of accelerate, the Hub.
ELSEWHERE = {"output_dir", "parallelism_config", "push_to_hub"}
FIELDS = [field.name for field in fields(TrainingArguments) if field.name not in ELSEWHERE]
# The others share a training by tens, as one takes a second.
ALONE = REFUSED | TOGETHER.keys() | {"max_steps", "num_train_epochs", "torch_compile_backend"}
ALONE |= {"fp16", "fp16_full_eval", "activation_checkpointing"}  # they exclude others
SHARED = [name for name in FIELDS if name not in ALONE]
GROUPS = [[name] for name in FIELDS if name in ALONE]
GROUPS += [SHARED[start : start + 10] for start in range(0, len(SHARED), 10)]


@pytest.mark.slow
@pytest.mark.parametrize("names", GROUPS, ids=" ".join)
def test_each_field_of_training_arguments_trains_or_is_refused_by_name(text, tmp_path, names):
    defaults = {field.name: field.default for field in fields(NanoGPTTrainingArguments)}
    settings = {"data": text, "output_dir": str(tmp_path / "run")} | SMALL
    for name in names:
        is_flag = isinstance(defaults[name], bool | None)
        assert name in VALUES or is_flag, f"{name} is new: add it to VALUES"
        settings |= TOGETHER.get(name, {}) | {name: VALUES.get(name, not defaults[name])}
    if names[0] in REFUSED:
        with pytest.raises(UserError, match=names[0]):
            train(**settings)
        assert not (tmp_path / "run").exists()
    else:
        result = train(**settings)
        written = json.loads((result.output_dir / "metrics.json").read_text())
        assert written["train_tokens"] > 0 and written["eval_loss"] > 0


# What would fail late, or change nothing without a word.


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"learning_rate": -0.1}, "learning_rate=-0.1 must be at least 0"),
        ({"weight_decay": -1.0}, "weight_decay=-1.0"),
        ({"adam_beta2": 1.0}, "adam_beta2=1.0 must be at least 0 and below 1"),
        ({"label_smoothing_factor": 1.5}, "label_smoothing_factor=1.5"),
        ({"max_steps": 0}, "max_steps=0"),
        ({"num_train_epochs": 0.0}, "num_train_epochs=0.0"),
        ({"eval_steps": 2.5}, "eval_steps=2.5"),
        ({"save_steps": 0}, "save_steps=0 must be a whole number of steps"),
        ({"eval_steps": 0, "eval_strategy": "steps"}, "for none, set eval_strategy=no"),
        ({"momentum_warmup_steps": 9, "optim_recipe": "adamw"}, "momentum_warmup_steps=9 has an"),
        ({"momentum_warmup_steps": 9, "optim": "sgd"}, "only with optim_recipe=muon"),
        ({"head_learning_rate": 0.1, "optim": "sgd"}, "head_learning_rate=0.1 has an effect only"),
        (
            {"min_train_tokens": 9, "max_steps": 3},
            "min_train_tokens=9 has no effect with max_steps=3",
        ),
        ({"head_learning_rate": -0.1}, "head_learning_rate=-0.1 must be at least 0"),
        ({"seed": 2**32}, "seed=4294967296 must be a whole number, at least 0 and below 2**32"),
        ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps=0"),
        ({"eval_accumulation_steps": 0}, "eval_accumulation_steps=0"),
        ({"train_sampling_strategy": "sorted"}, "train_sampling_strategy=sorted must be random"),
        ({"optim_recipe": "mion"}, "Did you mean muon?"),
        ({"optim": "sdg"}, "sdg"),
        ({"optim_args": "a=1"}, "optim_args=a=1 has no effect without --optim"),
        ({"deepspeed": "none.json"}, "deepspeed=none.json"),
        ({"accelerator_config": "none.json"}, "accelerator_config=none.json"),
        ({"accelerator_config": {"even": 1}}, "accelerator_config={'even': 1}"),
        ({"fsdp_config": "none.json", "fsdp": "full_shard"}, "fsdp_config=none.json"),
        ({"lr_scheduler_kwargs": "{power"}, "lr_scheduler_kwargs={power"),
        ({"hub_strategy": "checkpoint", "lora": True}, "hub_strategy=checkpoint"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)
def test_bad_values_are_refused_by_name(settings, words):
    with pytest.raises(UserError, match=re.escape(words)):
        make(**settings)


@pytest.mark.parametrize(
    ("kind", "settings", "words"),
    [
        ("linear", {"lr_scheduler_kwargs": {"power": 2}}, "linear has no setting power"),
        ("constant", {"lr_scheduler_kwargs": {"a": 2}}, "constant has no setting a"),
        ("cosine", {"lr_scheduler_kwargs": {"num_cycle": 2}}, "Did you mean num_cycles?"),
        ("cosine", {"lr_scheduler_kwargs": "power"}, "lr_scheduler_kwargs=power must be JSON"),
        ("reduce_lr_on_plateau", {"lr_scheduler_kwargs": {"patient": 2}}, "patient"),
        ("polynomial", {"warmup_steps": 10}, "polynomial is not possible with warmup_steps=10"),
        ("polynomial", {"lr_scheduler_kwargs": {"lr_end": 1.0}}, "polynomial is not possible"),
        ("warmup_stable_decay", {}, "num_decay_steps"),
        ("cosine_with_min_lr", {}, "min_lr"),
        ("constant", {"warmup_steps": 2}, "warmup_steps=2 has no effect"),
    ],
)
def test_a_schedule_that_would_fail_at_some_step_is_refused(kind, settings, words):
    args = make(lr_scheduler_type=kind, learning_rate=0.1, **settings)
    with pytest.raises(UserError, match=re.escape(words)):
        check_schedule(args, 10)


def test_every_schedule_works_with_what_it_needs():
    needs = {"warmup_stable_decay": {"num_decay_steps": 2}, "cosine_with_min_lr": {"min_lr": 0.01}}
    needs["cosine_warmup_with_min_lr"] = {"min_lr": 0.01}
    for kind in SchedulerType:
        given = {"lr_scheduler_type": kind, "lr_scheduler_kwargs": needs.get(kind)}
        check_schedule(make(**given), 10)


def test_figures_of_an_evaluation_are_better_if_lower():
    names = ("loss", "perplexity", "bits_per_byte", "eval_bits_per_byte", "eval_wiki_perplexity")
    for name in names:
        assert make(metric_for_best_model=name).greater_is_better is False
        assert make(metric_for_best_model=name, greater_is_better=True).greater_is_better
    assert make(metric_for_best_model="accuracy").greater_is_better  # as Trainer
    assert make(save_strategy="best").metric_for_best_model == "loss"
    assert make(lr_scheduler_type="reduce_lr_on_plateau").greater_is_better is False
    again = replace(make(metric_for_best_model="perplexity"), seed=1)
    assert again.greater_is_better is False


def test_only_what_an_evaluation_measures_can_choose_the_best_model():
    for name in ("perplexity", "eval_loss", None):
        check_run(make(metric_for_best_model=name))
    with pytest.raises(UserError, match=r"metric_for_best_model=perplexty .*mean perplexity\?"):
        check_run(make(metric_for_best_model="perplexty"))


def test_an_optimizer_of_transformers_has_its_defaults_and_ours_has_its_own():
    theirs = TrainingArguments(output_dir="unused", use_cpu=True)
    for name in ("learning_rate", "adam_beta1", "adam_beta2", "weight_decay", "max_grad_norm"):
        assert getattr(make(optim="sgd"), name) == getattr(theirs, name)
    assert make(optim="adamw_torch_fused").optim == "adamw_torch_fused"
    assert make().optim is None and make().learning_rate == 0.03
    assert replace(make(), seed=1).optim is None


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (
            {"dataloader_drop_last": True, "per_device_train_batch_size": 999},
            "dataloader_drop_last",
        ),
        ({"lr_scheduler_type": "polynomial", "warmup_steps": 2}, "polynomial is not possible"),
        ({"dataloader_persistent_workers": True}, "persistent_workers"),
        ({"optim": "galore_adamw"}, "galore"),
        ({"metric_for_best_model": "foo"}, "metric_for_best_model=foo"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)
def test_what_can_only_fail_is_refused_before_a_former_run_is_deleted(
    text, tmp_path, settings, words
):
    former = tmp_path / "run" / "checkpoint-1"
    former.mkdir(parents=True)
    with pytest.raises(UserError, match=words):
        train(data=text, output_dir=str(tmp_path / "run"), overwrite=True, **SMALL | settings)
    assert former.is_dir()


def test_a_tokenizer_cannot_be_chosen_for_a_checkpoint_that_has_one(checkpoint, text, tmp_path):
    for setting in ({"tokenizer": "char"}, {"vocab_size": 999}):
        name = next(iter(setting))
        with pytest.raises(UserError, match=f"has its own tokenizer, so {name}="):
            train("finetune", data=text, output_dir=str(tmp_path), start_from=checkpoint, **setting)


def test_the_card_describes_what_is_in_the_folder(checkpoint, text, tmp_path):
    settings = {"max_steps": 2, "sample_steps": 0, "disable_tqdm": True, "use_cpu": True}
    settings |= {"load_best_model_at_end": True, "eval_steps": 1, "save_steps": 1, "optim": "sgd"}
    result = train(
        "finetune", data=text, output_dir=str(tmp_path / "b"), start_from=checkpoint, **settings
    )
    facts = result.metrics["settings"]
    assert facts["Tokenizer"] == f"that of {checkpoint.name}, 257 tokens"
    assert facts["Optimizer"] == "sgd"
    assert re.fullmatch(r"of step [12], the best by loss", facts["Weights"])
    card = (result.output_dir / "README.md").read_text(encoding="utf-8")
    assert facts["Weights"] in card and "--optim=sgd" in card


def test_a_push_is_refused_offline_before_anything_is_trained(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"push_to_hub=True needs the Hub, and HF_HUB_OFFLINE"):
        NanoGPTTrainingArguments(output_dir=str(tmp_path), push_to_hub=True)


def test_a_model_to_start_from_goes_over_a_short_text_again(checkpoint, text, tmp_path):
    def tune(name: str, **settings) -> int:
        settings |= {"num_threads": 1, "disable_tqdm": True, "use_cpu": True, "sample_steps": 0}
        folder = str(tmp_path / name)
        result = train(data=text, output_dir=folder, start_from=checkpoint, **settings)
        return result.metrics["planned_steps"]

    # 1,800 bytes to train on, in steps of 8 blocks of 32; without a name, the recipe is `finetune`.
    assert tune("once", min_train_tokens=0) == 8
    assert tune("again", min_train_tokens=4000) == 3 * 8
    assert tune("typed", num_train_epochs=2) == 2 * 8
    assert tune("steps", max_steps=2) == 2


def test_an_older_training_that_is_resumed_goes_over_its_text_as_before(
    checkpoint, text, tmp_path, monkeypatch
):
    settings = {"num_threads": 1, "disable_tqdm": True, "use_cpu": True, "sample_steps": 0}
    settings |= {"data": text, "output_dir": str(tmp_path / "run"), "save_steps": 4}
    with monkeypatch.context() as before:
        before.setattr(run, "describe_settings", _without_passes)
        train(start_from=checkpoint, min_train_tokens=0, **settings)
    assert train(start_from=checkpoint, resume=True, **settings).metrics["planned_steps"] == 8


def _without_passes(*args) -> dict:
    return {k: v for k, v in describe_settings(*args).items() if k != "min_train_tokens"}
