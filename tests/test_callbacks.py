"""What a training shows: speed, samples and the plot, none of which may change the training."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import urllib.request
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from children import forked, run_command
from conftest import tiny_model
from datasets import Dataset
from safetensors.torch import load_file
from torch.utils.flop_counter import FlopCounterMode
from transformers import TrainerControl, TrainerState
from transformers.testing_utils import CaptureLogger

from hf_nanogpt import (
    NanoGPTTrainer,
    NanoGPTTrainingArguments,
    flops,
    pack_documents,
    train,
    train_tokenizer,
)
from hf_nanogpt.analysis import plots
from hf_nanogpt.checkpoint.writing import check_output_dir
from hf_nanogpt.flops import GPU_PEAKS, count_flops, find_peak
from hf_nanogpt.training import callbacks as callbacks_module
from hf_nanogpt.training import samples as samples_module
from hf_nanogpt.training.callbacks import PlotCallback, SpeedCallback, plot_losses
from hf_nanogpt.training.lora import add_adapter
from hf_nanogpt.training.samples import SampleCallback, draw_sample

ROOT = Path(__file__).parent.parent
SMALL = {
    "data": str(ROOT / "LICENSE"),
    "tokenizer": "char",
    "n_layer": 1,
    "n_embd": 16,
    "n_head": 2,
    "block_size": 32,
    "dropout": 0.1,  # draws random numbers in each step
    "per_device_train_batch_size": 4,
    "logging_steps": 1,
    "eval_steps": 6,
    "save_steps": 4,
    "save_total_limit": 5,
    "max_steps": 12,
    "sample_prompt": "def ",
    "disable_tqdm": True,
    "num_threads": 1,
}


def _steps(folder: Path) -> list[int]:
    rows = map(json.loads, (folder / "samples.jsonl").read_text(encoding="utf-8").splitlines())
    return [row["step"] for row in rows if row["text"].startswith("def ")]


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "sampled"
    train(output_dir=str(folder), sample_steps=2, **SMALL)
    return folder


def test_training_is_the_same_to_the_bit_with_samples_and_without(run, tmp_path):
    train(output_dir=str(tmp_path / "silent"), sample_steps=0, **SMALL)
    ours, theirs = (load_file(f / "model.safetensors") for f in (run, tmp_path / "silent"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert _steps(run) == [2, 4, 6, 8, 10, 12]
    assert not (tmp_path / "silent" / "samples.jsonl").exists()


def test_the_bar_is_quiet_before_training_begins(tmp_path):
    tokenizer = train_tokenizer([], kind="byte")
    blocks = pack_documents(Dataset.from_dict({"text": ["abc"]}), tokenizer, context_length=8)
    args = NanoGPTTrainingArguments(str(tmp_path), use_cpu=True, report_to="none")
    assert not args.disable_tqdm
    parts = {"processing_class": tokenizer, "eval_dataset": blocks}
    trainer = NanoGPTTrainer(tiny_model(vocab_size=len(tokenizer)), args, **parts)
    assert trainer.evaluate()["eval_bytes"] == 3
    # This is called when a checkpoint cannot be loaded; its error must not be replaced by another.
    trainer.callback_handler.on_train_end(args, trainer.state, trainer.control)


@pytest.mark.slow
def test_samples_come_at_each_evaluation_or_at_a_share_of_the_steps(tmp_path, monkeypatch):
    monkeypatch.setattr(samples_module, "time", SimpleNamespace(perf_counter=lambda: 0.0))
    train(output_dir=str(tmp_path / "a"), **SMALL)
    assert _steps(tmp_path / "a") == [6, 12]
    train(output_dir=str(tmp_path / "b"), sample_steps=0.3, **SMALL)
    assert _steps(tmp_path / "b") == [4, 8, 12]


def test_samples_at_evaluations_take_two_percent_of_the_time(tmp_path, monkeypatch):
    clock, drawn = SimpleNamespace(now=0.0), []

    def draw(*args, **kwargs) -> str:
        drawn.append(clock.now)
        clock.now += 2  # seconds that a sample takes
        return "x"

    monkeypatch.setattr(samples_module, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    monkeypatch.setattr(samples_module, "draw_sample", draw)
    args = NanoGPTTrainingArguments(str(tmp_path), use_cpu=True, disable_tqdm=True)
    callback, state = SampleCallback("x", SpeedCallback()), TrainerState()
    given = {"model": None, "processing_class": None, "metrics": {"eval_loss": 1.0}}
    callback.on_evaluate(args, state, TrainerControl(), **given)  # before training begins
    callback.on_train_begin(args, state, TrainerControl())
    for _ in range(30):
        clock.now += 10
        callback.on_evaluate(args, state, TrainerControl(), **given)
    assert drawn == [10, 112, 214]


def test_resumed_run_continues_the_samples(run, tmp_path):
    folder = shutil.copytree(run, tmp_path / "stopped")
    expected = (folder / "samples.jsonl").read_text(encoding="utf-8")
    for name in ("checkpoint-8", "checkpoint-12"):  # as if it had been killed after step 4
        for path in (folder / name).iterdir():
            path.unlink()
        (folder / name).rmdir()
    train(output_dir=str(folder), sample_steps=2, resume=True, **SMALL)
    assert (folder / "samples.jsonl").read_text(encoding="utf-8") == expected


def test_metrics_and_log_have_speed_and_mfu(run):
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["tokens_per_second"] > 0 and 0 < metrics["mfu"] < 1
    history = json.loads((run / "checkpoint-12/trainer_state.json").read_text())["log_history"]
    rows = [row for row in history if "loss" in row]
    assert all(row["tokens_per_second"] > 0 and row["mfu"] >= 0 for row in rows)


@pytest.fixture
def clock(monkeypatch) -> SimpleNamespace:
    """The clock of training, which stands still unless a test moves it."""
    clock = SimpleNamespace(now=100.0)
    standing = SimpleNamespace(perf_counter=lambda: clock.now)
    monkeypatch.setattr(callbacks_module, "time", standing)
    return clock


def test_speed_leaves_out_what_is_not_training(clock):
    speed, state = SpeedCallback(), TrainerState(num_input_tokens_seen=10_000)
    clock.now += 1000
    with speed.paused():
        clock.now += 5000
    clock.now += 7000
    speed.on_evaluate(None, state, None)
    clock.now += 9000
    speed.on_save(None, state, None)
    assert speed.seconds == 1000
    clock.now += 1000
    assert speed.read(state)["tokens_per_second"] == 10_000 / 2000
    state.num_input_tokens_seen += 500_000
    clock.now += 1000
    assert speed.read(state)["tokens_per_second"] == 500_000 / 1000
    assert speed.summarize(state)["tokens_per_second"] == 510_000 / 3000


def test_flops_are_those_that_torch_counts(family):
    model = tiny_model(family, attn_implementation="eager", sliding_window=None, layer_types=None)
    ids = torch.ones(1, 64, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        model(ids, use_cache=False)
    assert count_flops(model) * 64 == pytest.approx(counter.get_total_flops(), rel=0.005)
    shorter = count_flops(model, context_length=32)
    config = model.config
    inner = config.num_attention_heads * config.head_dim
    assert count_flops(model) - shorter == 4 * inner * 32 * config.num_hidden_layers


@pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="needs peft")
@pytest.mark.parametrize("trained", ["all", "adapter", "adapter and embeddings"])
def test_flops_of_a_training_step_are_those_that_torch_counts(monkeypatch, trained):
    monkeypatch.setattr(callbacks_module, "find_peak", lambda device, dtype: 1.0)
    args = NanoGPTTrainingArguments(output_dir="unused", use_cpu=True)
    for family in ("nano", "gpt2"):  # untied, tied
        model = tiny_model(family, vocab_size=257, n_layer=4, attn_implementation="eager").train()
        if trained != "all":
            model = add_adapter(model, args, with_embeddings=trained != "adapter")
        ids = torch.ones(1, 64, dtype=torch.long)
        with FlopCounterMode(display=False) as counter:
            model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        flops = 64 * callbacks_module._share_per_token(args, model, 64)
        # The gradient of what comes into the first layer is not needed if only the adapter learns.
        assert flops == pytest.approx(counter.get_total_flops(), rel=0.02)


def test_sliding_layers_count_their_window():
    full, sliding = (tiny_model("gpt3", sliding_window=w) for w in (64, 5))
    assert count_flops(full) - count_flops(sliding) == 4 * 32 * (64 - 5)  # one of 3 layers slides


def test_peak_is_measured_on_a_cpu_and_not_guessed_elsewhere():
    assert find_peak(torch.device("cpu")) > 1e8
    assert find_peak(torch.device("cpu"), torch.bfloat16) > 1e7
    assert find_peak(torch.device("meta")) is None
    assert GPU_PEAKS["NVIDIA A100-SXM4-80GB"] == 312e12
    assert min(GPU_PEAKS.values()) > 1e13


def test_best_peak_ever_measured_is_kept_by_processor_threads_and_dtype(tmp_path, monkeypatch):
    monkeypatch.setattr(flops, "HF_HOME", str(tmp_path))
    path = tmp_path / "hf_nanogpt" / "peaks.json"
    measured = find_peak(torch.device("cpu"))
    [key] = json.loads(path.read_text())
    assert f"{torch.get_num_threads()} threads, torch.float32" in key
    path.write_text(json.dumps({key: 1000 * measured, "another": 1.0}))
    assert find_peak(torch.device("cpu")) == 1000 * measured
    assert find_peak(torch.device("cpu"), torch.bfloat16) < 100 * measured
    assert json.loads(path.read_text())["another"] == 1.0


@pytest.mark.parametrize("content", ["{", "[]", '{"x": 1}', None])
def test_peak_is_measured_where_none_can_be_kept(content, tmp_path, monkeypatch):
    monkeypatch.setattr(flops, "HF_HOME", str(tmp_path))
    if content is None:  # a file where the folder should be
        (tmp_path / "hf_nanogpt").write_text("")
    else:
        (tmp_path / "hf_nanogpt").mkdir()
        (tmp_path / "hf_nanogpt" / "peaks.json").write_text(content)
    assert find_peak(torch.device("cpu")) > 1e8


def test_no_utilisation_above_all_of_the_peak_is_shown(clock):
    speed, state = SpeedCallback(), TrainerState()
    speed.share = 1e-3
    state.num_input_tokens_seen = 500_000
    clock.now += 1000
    assert speed.read(state)["mfu"] == 0.5
    state.num_input_tokens_seen += 5_000_000
    clock.now += 1000
    assert "mfu" not in speed.read(state)


def test_sample_is_shortened_to_fit_the_context_and_failures_are_logged():
    model, tokenizer = tiny_model("nano", vocab_size=257).train(), train_tokenizer([], kind="byte")
    before = torch.get_rng_state()
    text = draw_sample(model, tokenizer, "x" * 60, max_new_tokens=40, seed=0)
    assert text.startswith("x" * 60) and model.training
    with CaptureLogger(samples_module.logger) as log:
        assert draw_sample(model, tokenizer, "x" * 64, max_new_tokens=40, seed=0) == ""
    assert "cannot write a sample" in log.out and "64 tokens" in log.out
    with torch.no_grad():
        model.lm_head.weight.fill_(float("nan"))
    with CaptureLogger(samples_module.logger) as log:
        assert draw_sample(model, tokenizer, "x", max_new_tokens=4, seed=0) == ""
    assert "NaN" in log.out
    assert torch.equal(torch.get_rng_state(), before)


def test_plot_appears_during_training_and_costs_little(tmp_path, clock):
    args = NanoGPTTrainingArguments(output_dir=str(tmp_path / "run"))
    plot, control = PlotCallback(SpeedCallback()), TrainerControl()
    rows = [{"loss": 5 / step, "step": step, "num_input_tokens_seen": step} for step in (1, 2)]
    state = TrainerState(log_history=rows)
    plot.on_train_begin(args, state, control)
    plot.on_log(args, state, control, logs={"loss": 1.0})
    assert not (tmp_path / "run").exists()  # not in the first seconds
    clock.now += 50 * plot.cost + 1
    plot.on_log(args, state, control, logs={"loss": 1.0})
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["loss.png"]
    (tmp_path / "run" / "loss.png").unlink()
    plot.cost = 2.0  # as if it had taken so many seconds
    clock.now += 99
    plot.on_log(args, state, control, logs={"loss": 1.0})
    assert not list((tmp_path / "run").iterdir())
    clock.now += 2
    plot.on_log(args, state, control, logs={"loss": 1.0})
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["loss.png"]


def test_plot_is_drawn_of_any_history(tmp_path):
    evaluation = {"eval_loss": 2.0, "step": 3, "eval_bits_per_byte": 1.0}
    for rows in ([], [{"loss": 1.0, "step": 1}], [evaluation], [{"loss": float("nan"), "step": 1}]):
        plot_losses(rows, tmp_path / "loss.png")
        assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_a_plot_tells_the_estimates_from_the_final_value(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(plots, "save_figure", lambda figure, path: drawn.append(figure))
    rows = [{"eval_loss": 3.0 - step, "step": step} for step in (1, 2)]
    plot_losses(rows, tmp_path / "loss.png", final=(2, 1.25))
    [axes] = drawn[0].axes
    estimates, final = axes.lines[1:]
    assert list(estimates.get_ydata()) == [2.0, 1.0] and list(final.get_ydata()) == [1.25]
    assert estimates.get_label() == "validation, estimated"
    assert final.get_label() == "validation, all of it: 1.250"
    # One unit, which the axis names; and no words in front of the curves.
    assert axes.get_ylabel() == "loss (nats per token)" and not axes.texts
    drawn[0].draw_without_rendering()
    [legend] = drawn[0].legends
    assert legend.get_window_extent().y1 < axes.get_tightbbox().y0
    assert estimates.get_markerfacecolor() == "white" != final.get_markerfacecolor()


@pytest.mark.slow
def test_a_full_disk_for_samples_and_plots_does_not_stop_training(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    for name in ("samples.jsonl.part", "loss.png.part"):
        (folder / name).symlink_to("/dev/full")
    (folder / "samples.jsonl").write_text('not JSON\n{"step": "x"}\n[]\n')
    plot, control = PlotCallback(SpeedCallback()), TrainerControl()
    args = NanoGPTTrainingArguments(output_dir=str(folder))
    plot.on_train_begin(args, TrainerState(), control)
    plot.drawn -= 50 * plot.cost
    with CaptureLogger(callbacks_module.logger) as log:
        state = TrainerState(log_history=[{"loss": 1.0, "step": 1}])
        plot.on_log(args, state, control, logs={"loss": 1.0})
        assert not (folder / "loss.png").exists()
        train(output_dir=str(folder), sample_steps=2, resume=True, **SMALL)
    for name in ("samples.jsonl", "loss.png"):
        told = f"{folder / name} could not be written; training continues: [Errno 28]"
        assert log.out.count(told) == 1
    assert _steps(folder) == [2, 4, 6, 8, 10, 12]  # there was room again
    assert (folder / "model.safetensors").is_file()


def test_the_folder_of_a_run_that_was_stopped_early_can_be_used_again(tmp_path):
    for name in ("loss.png", "loss.png.part", "samples.jsonl"):
        (tmp_path / name).touch()
    check_output_dir(tmp_path, overwrite=True)
    check_output_dir(tmp_path, resume=True)


def test_bad_settings_are_refused_before_the_data_is_read(tmp_path):
    bad = {
        ("sample_steps", -1.0): "sample_steps=-1",
        ("sample_steps", 2.5): "sample_steps=2.5",
        ("report_to", "tracio"): "Did you mean trackio",
        ("report_to", "paper"): "trackio, tensorboard or wandb",
    }
    for name, extra in (("trackio", "'hf-nanogpt[track]'"), ("wandb", "wandb")):
        if importlib.util.find_spec(name) is None:
            bad["report_to", name] = f"pip install {extra}"
    for (name, value), words in bad.items():
        with pytest.raises(ValueError, match=re.escape(words)):
            train(data="none.txt", output_dir=str(tmp_path / "run"), **{name: value})
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("trackio") is None, reason="needs trackio: hf-nanogpt[track]"
)
@forked
def test_trackio_dashboard_shows_the_run(tmp_path):
    env = os.environ | {"TRACKIO_DIR": str(tmp_path / "store"), "PYTHONUNBUFFERED": "1"}
    flags = [f"--{name}={value}" for name, value in (SMALL | {"max_steps": 3}).items()]
    flags += ["--report_to=trackio", "--project=ours", f"--output_dir={tmp_path / 'run'}"]
    done = run_command("train", *flags, env=env)
    assert done.returncode == 0, done.stderr
    command = [sys.executable, "-m", "trackio.cli", "show", "--project=ours"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env) as server:
        try:
            lines = iter(server.stdout.readline, "")
            url = next(m[1] for line in lines if (m := re.search(r"(http://[^/]+:\d+)", line)))
            assert "Trackio" in urllib.request.urlopen(url).read().decode()
            [run] = _ask(url, "get_runs_for_project", project="ours")
            rows = _ask(
                url, "get_metric_values", project="ours", run=run["name"], metric_name="train/mfu"
            )
            assert len(rows) == 3
        finally:
            server.terminate()


def _ask(url: str, api: str, **arguments) -> list:
    request = urllib.request.Request(
        f"{url}/api/{api}",
        data=json.dumps(arguments).encode(),
        headers={"content-type": "application/json"},
    )
    with urllib.request.urlopen(request) as answer:
        return json.load(answer)["data"]
