"""Several processes on CPUs give the losses and weights of one, however the work is split."""

import json
import math
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate import FullyShardedDataParallelPlugin
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from accelerate.utils import DistributedType
from children import forked, run_ranks
from conftest import FAMILIES, ROOT, tiny_model
from distributed_checks import (
    BATCHES,
    HAS_TENSOR_PARALLEL,
    NO_TENSOR_PARALLEL,
    RECIPES,
    run_check,
    save_sharded,
    train_steps,
)
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from hf_nanogpt import NanoGPTForCausalLM, NanoGPTTrainingArguments, train
from hf_nanogpt.checkpoint.steps import find_damage
from hf_nanogpt.cli import main
from hf_nanogpt.training import trainer as trainer_module

pytestmark = [forked, pytest.mark.timeout(900)]  # processes on a busy machine

EXAMPLES = ROOT / "examples" / "accelerate"
STEPS = 7  # into the second epoch of 5


@pytest.fixture(scope="module")
def settings(tmp_path_factory) -> dict:
    """A run on a little real text: 40 blocks, one of them short, so that it has padding.

    Where 8 do not divide the blocks, processes fill up the last batch of an epoch with others.
    """
    path = tmp_path_factory.mktemp("corpus") / "text.txt"
    path.write_text((ROOT / "LICENSE").read_text(encoding="utf-8")[:1260])
    return {
        "data": str(path),
        "validation_fraction": 0.03,
        "tokenizer": "char",
        "n_layer": 2,
        "n_embd": 32,
        "n_head": 2,
        "block_size": 32,
        "max_steps": STEPS,
        "per_device_train_batch_size": 8,
        "logging_steps": 1,
        "eval_steps": STEPS,
        "save_steps": 4,
        "disable_tqdm": True,
        "num_threads": 1,
        "use_cpu": True,
    }


@pytest.fixture(scope="module")
def alone(settings, tmp_path_factory) -> dict[str, Path]:
    """One process, for each recipe of the optimizer."""
    folders = {recipe: tmp_path_factory.mktemp("alone") / recipe for recipe in RECIPES}
    for recipe, folder in folders.items():
        train(output_dir=str(folder), optim_recipe=recipe, **settings)
    return folders


def _losses(folder: Path) -> list[float]:
    state = json.loads((folder / f"checkpoint-{STEPS}" / "trainer_state.json").read_text())
    return [row.get("loss", row.get("eval_loss")) for row in state["log_history"]]


def _assert_same_run(folder: Path, expected: Path) -> None:
    state = json.loads((folder / f"checkpoint-{STEPS}" / "trainer_state.json").read_text())
    assert state["epoch"] == STEPS / 5
    assert _losses(folder) == pytest.approx(_losses(expected), abs=1e-5)
    ours, theirs = (load_file(path / "model.safetensors") for path in (folder, expected))
    assert ours.keys() == theirs.keys()
    for name, weight in theirs.items():
        # AdamW scales small gradients up, and their rounding with them.
        torch.testing.assert_close(ours[name], weight, rtol=0, atol=1e-4)
    for name in ("eval_tokens", "eval_bytes", "train_tokens"):
        metrics = [
            json.loads((path / "metrics.json").read_text())[name] for path in (folder, expected)
        ]
        assert metrics[0] == metrics[1], name


@pytest.mark.slow
def test_two_processes_give_the_losses_and_weights_of_one(settings, alone, tmp_path):
    flags = [f"--{name}={value}" for name, value in settings.items()]
    flags += ["--per_device_train_batch_size=4", f"--output_dir={tmp_path / 'two'}"]
    first, second = run_ranks(2, main, ["train", *flags])
    assert (first.returncode, second.returncode) == (0, 0), first.stderr + second.stderr
    assert "match nothing" not in first.stderr
    assert (first.stdout + second.stdout).count(" is ready:") == 1
    _assert_same_run(tmp_path / "two", alone["muon"])


@pytest.mark.slow
def test_two_processes_learn_no_row_twice_at_the_end_of_an_epoch(settings, tmp_path):
    text = tmp_path / "text.txt"  # of 35 blocks, of which 3 are left: one process has none of them
    text.write_text((ROOT / "LICENSE").read_text(encoding="utf-8")[:1110])
    settings = settings | {"data": str(text), "optim_recipe": "adamw"}
    train(output_dir=str(tmp_path / "one"), **settings)
    flags = [f"--{name}={value}" for name, value in settings.items()]
    flags += ["--per_device_train_batch_size=4", f"--output_dir={tmp_path / 'two'}"]
    first, second = run_ranks(2, main, ["train", *flags])
    assert (first.returncode, second.returncode) == (0, 0), first.stderr + second.stderr
    _assert_same_run(tmp_path / "two", tmp_path / "one")
    tokens = json.loads((tmp_path / "one" / "metrics.json").read_text())["train_tokens"]
    assert tokens < 7 * 8 * 32 - 4 * 32  # the last batch of an epoch is short


@pytest.mark.slow
def test_two_processes_count_the_tokens_of_a_short_block_that_one_of_them_has(settings, tmp_path):
    text = tmp_path / "text.txt"  # of 35 blocks; the last one is short, and alone in its batch
    text.write_text((ROOT / "LICENSE").read_text(encoding="utf-8")[:1110])
    settings = settings | {"data": str(text), "num_train_epochs": 1, "max_steps": -1}
    settings |= {"per_device_train_batch_size": 1, "save_steps": 1000}
    one = train(output_dir=str(tmp_path / "one"), gradient_accumulation_steps=2, **settings)
    flags = [f"--{name}={value}" for name, value in settings.items()]
    first, second = run_ranks(2, main, ["train", *flags, f"--output_dir={tmp_path / 'two'}"])
    assert (first.returncode, second.returncode) == (0, 0), first.stderr + second.stderr
    two = json.loads((tmp_path / "two" / "metrics.json").read_text())
    assert two["train_tokens"] == one.metrics["train_tokens"] < 35 * 32


def _find_commands(name: str) -> list[str]:
    """Return the commands with a launch configuration, as they are documented."""
    path = f"examples/accelerate/{name}"
    pages = [(ROOT / path).read_text(encoding="utf-8"), (ROOT / "README.md").read_text("utf-8")]
    lines = [line.lstrip("# ") for page in pages for line in page.splitlines()]
    return sorted({line for line in lines if line.startswith("accelerate ") and path in line})


@pytest.mark.slow
@pytest.mark.skipif(torch.accelerator.is_available(), reason="without a GPU it is refused")
@pytest.mark.parametrize("command", _find_commands("ddp_cpu.yaml"))
def test_the_documented_command_trains_in_two_processes_together(
    settings, alone, tmp_path, command
):
    halves = settings | {"per_device_train_batch_size": 4, "output_dir": tmp_path / "run"}
    flags = shlex.join(f"--{name}={value}" for name, value in halves.items() if name != "use_cpu")
    done = _run(f"{command} {flags}")
    assert done.stdout.count(" is ready:") == 1
    _assert_same_run(tmp_path / "run", alone["muon"])


def _run(command: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    done = subprocess.run(
        command,
        shell=True,
        capture_output=True,
        text=True,
        timeout=600,
        cwd=ROOT,
        env=environment,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "match nothing" not in done.stderr
    return done


@pytest.mark.skipif(torch.accelerator.is_available(), reason="without a GPU it is refused")
def test_processes_that_would_train_apart_are_refused(settings, tmp_path, monkeypatch):
    apart = {name: value for name, value in settings.items() if name != "use_cpu"}
    monkeypatch.setenv("WORLD_SIZE", "2")
    for make in (train, NanoGPTTrainingArguments):
        with pytest.raises(ValueError, match=r"WORLD_SIZE=2 .* add --use_cpu to the flags"):
            make(**(apart if make is train else {}), output_dir=str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


@pytest.fixture(scope="module")
def checked(settings, tmp_path_factory) -> tuple[Path, dict]:
    folder = tmp_path_factory.mktemp("ddp")
    for family in FAMILIES:
        tiny_model(family).save_pretrained(folder / "models" / family)
    quarters = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    arguments = settings | quarters | {"optim_recipe": "adamw"}
    (folder / "check_all.json").write_text(json.dumps(arguments))
    for done in run_ranks(2, run_check, "check_all", str(folder)):
        assert done.returncode == 0, done.stderr[-3000:]
    return folder, json.loads((folder / "figures.json").read_text())


@pytest.mark.slow
def test_two_processes_that_accumulate_gradients_give_the_losses_of_one(checked, alone):
    folder, figures = checked
    assert figures["processes"] == 2
    _assert_same_run(folder / "ddp", alone["adamw"])


@pytest.mark.slow
def test_model_initialised_in_shards_starts_at_the_entropy_of_the_vocabulary(checked):
    assert checked[1]["first_loss"] == pytest.approx(math.log(61), abs=1e-5)


@pytest.mark.slow
@pytest.mark.skipif(not HAS_TENSOR_PARALLEL, reason=NO_TENSOR_PARALLEL)
def test_tensor_parallel_model_gives_the_logits_of_the_whole_one(checked, family):
    with torch.no_grad():
        expected = tiny_model(family)(input_ids=BATCHES[0]).logits
    logits = torch.tensor(checked[1]["logits"][family])
    torch.testing.assert_close(logits, expected, rtol=0, atol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["fully_sharded", "tensor_parallel"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_sharded_model_trains_like_the_whole_one(checked, kind, recipe):
    if kind == "tensor_parallel" and not HAS_TENSOR_PARALLEL:
        pytest.skip(NO_TENSOR_PARALLEL)
    for family, losses in checked[1][kind].items():
        expected = train_steps(tiny_model(family), recipe)
        assert losses[recipe] == pytest.approx(expected, abs=1e-5), family


@pytest.fixture(scope="module")
def sharded(settings, tmp_path_factory) -> Path:
    """Runs by FSDP2 that write shards, and that write whole weights, into their checkpoints."""
    folder = tmp_path_factory.mktemp("fsdp")
    halves = settings | {"per_device_train_batch_size": 4}
    (folder / "train_by_fsdp.json").write_text(json.dumps(halves))
    flags = "--num_processes 2 --mixed_precision no --main_process_port 0"
    script = f"tests/distributed_checks.py train_by_fsdp {shlex.quote(str(folder))}"
    _run(f"accelerate launch --config_file examples/accelerate/fsdp2.yaml {flags} {script}")
    assert json.loads((folder / "figures.json").read_text())["processes"] == 2
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", ["shards", "whole"])
def test_fsdp_through_the_trainer_gives_the_run_of_one_process(sharded, alone, name):
    for folder in (sharded / name, sharded / f"uninterrupted {name}"):
        _assert_same_run(folder, alone["muon"])
        assert not list(folder.glob("*_fsdp*"))
        model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
        assert model.config.auto_map["AutoModelForCausalLM"].endswith(".NanoGPTForCausalLM")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["shards", "whole"])
def test_fsdp_resumes_from_its_checkpoints_to_the_bit(sharded, name):
    weights = [
        (sharded / folder / "model.safetensors").read_bytes()
        for folder in (name, f"uninterrupted {name}", "uninterrupted whole")
    ]
    assert weights[0] == weights[1] == weights[2]


@pytest.mark.slow
def test_each_process_writes_its_shards_into_a_checkpoint(sharded):
    for name in ("shards", "uninterrupted shards"):
        step = sharded / name / f"checkpoint-{STEPS}"
        for part in ("pytorch_model_fsdp_0", "optimizer_0"):
            written = {path.name for path in (step / part).iterdir()}
            assert written == {".metadata", "__0_0.distcp", "__1_0.distcp"}
        assert (step / "tokenizer.json").exists()  # to resume
        # Without a config.json nobody takes it for a model.
        assert not list(step.glob("*.safetensors")) and not (step / "config.json").exists()
        assert find_damage(step) is None
        (step / "optimizer_0" / "__1_0.distcp").write_bytes(b"")
        assert find_damage(step) == "optimizer_0/__1_0.distcp"


@pytest.mark.slow
@pytest.mark.parametrize("family", ["nano", "gpt2"])  # an untied head, a tied one
def test_sharded_model_is_saved_by_our_names_and_files(family, tmp_path):
    tiny_model(family).save_pretrained(tmp_path / "whole")
    [done] = run_ranks(1, save_sharded, tmp_path / "whole", tmp_path / "sharded")
    assert done.returncode == 0, done.stderr[-3000:]
    folders = tmp_path / "whole", tmp_path / "sharded"
    whole, sharded = ({p.name: p.read_bytes() for p in f.iterdir()} for f in folders)
    assert sharded == whole


def test_first_version_of_fsdp_is_refused_by_name_of_the_second():
    plugin = FullyShardedDataParallelPlugin(fsdp_version=1)
    with pytest.raises(ValueError, match=r"fsdp_version=1 .* set fsdp_version to 2"):
        trainer_module._prepare_fsdp(plugin)


def test_fsdp_in_bf16_keeps_losses_and_sums_of_gradients_in_float32():
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2)
    plugin.set_mixed_precision("bf16")
    trainer_module._prepare_fsdp(plugin)
    policy = plugin.mixed_precision_policy
    assert policy.param_dtype == torch.bfloat16
    assert policy.reduce_dtype == torch.float32
    assert policy.output_dtype is None


def test_accumulated_gradients_equal_the_large_batch(settings, alone, tmp_path):
    parts = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    train(output_dir=str(tmp_path / "parts"), **(settings | parts))
    _assert_same_run(tmp_path / "parts", alone["muon"])


def test_gradient_checkpointing_changes_no_loss(settings, alone, tmp_path):
    train(output_dir=str(tmp_path / "run"), gradient_checkpointing=True, **settings)
    assert _losses(tmp_path / "run") == pytest.approx(_losses(alone["muon"]), abs=1e-6)


@pytest.mark.slow
def test_compiled_model_is_compiled_once_and_gives_the_same_losses(settings, alone, tmp_path):
    torch.compiler.reset()  # what an earlier test compiled
    with torch._dynamo.config.patch(error_on_recompile=True):
        train(
            output_dir=str(tmp_path / "run"),
            torch_compile=True,
            torch_compile_backend="aot_eager",
            **settings,
        )
    assert _losses(tmp_path / "run") == pytest.approx(_losses(alone["muon"]), abs=1e-5)


@pytest.mark.slow
def test_bf16_is_close_to_float32_and_keeps_float32_weights(settings, alone, tmp_path):
    train(output_dir=str(tmp_path / "run"), bf16=True, **settings)
    losses = _losses(tmp_path / "run")
    assert losses != _losses(alone["muon"])
    assert losses == pytest.approx(_losses(alone["muon"]), abs=0.02)
    weights = load_file(tmp_path / "run" / "model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.float32}


@pytest.mark.parametrize("recipe", RECIPES)
def test_bfloat16_weights_learn(recipe):
    model = tiny_model(initializer_range=None).bfloat16()
    first, _, last = (sum(train_steps(model, recipe)) for _ in range(3))
    assert last < first - 0.02


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.yaml")), ids=lambda path: path.stem)
def test_launch_configuration_has_only_keys_that_accelerate_knows(path):
    config = load_config_from_file(str(path))  # raises on an unknown key
    parser = launch_command_parser()
    known = {action.dest for action in parser._actions}
    assert set(config.fsdp_config) <= known
    assert config.num_processes >= 2
    assert f"examples/accelerate/{path.name} " in path.read_text(encoding="utf-8")


def test_fsdp_configuration_wraps_our_layers_by_version_2():
    config = load_config_from_file(str(EXAMPLES / "fsdp2.yaml"))
    assert config.distributed_type == DistributedType.FSDP
    assert config.fsdp_config["fsdp_version"] == 2
    wrapped = config.fsdp_config["fsdp_transformer_layer_cls_to_wrap"]
    assert [wrapped] == NanoGPTForCausalLM._no_split_modules
