"""Fine-tuning, with all weights and with LoRA: what comes out, what PEFT does with our models."""

import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import CORPUS, FAMILIES, ROOT, assert_same, tiny_model
from packaging.version import parse
from references import make_reference
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.integrations.peft import MIN_PEFT_VERSION

from hf_nanogpt import convert_checkpoint, evaluate, export_checkpoint, load_checkpoint, train
from hf_nanogpt.cli import main

# The tuned models are made once.
pytestmark = pytest.mark.xdist_group("finetune")
peft = pytest.importorskip("peft", reason="PEFT is missing: pip install 'hf-nanogpt[finetune]'")

FAST = {"disable_tqdm": True, "num_threads": 1, "use_cpu": True, "sample_steps": 0}
STEPS = {"max_steps": 8, "per_device_train_batch_size": 4, "logging_steps": 2, "save_steps": 3}


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("corpus") / "text.txt"
    path.write_text(CORPUS[:6000], encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module")
def base(text, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "base"
    shape = {"n_layer": 2, "n_embd": 32, "n_head": 2, "block_size": 64, "dropout": 0.1}
    train(data=text, output_dir=str(folder), tokenizer="char", **FAST, **shape, **STEPS)
    return folder


def tune(start: Path, text: str, folder: Path, **settings):
    settings = FAST | STEPS | {"data": text, "output_dir": str(folder)} | settings
    return train("finetune", start_from=start, **settings)


@pytest.fixture(scope="module")
def tuned(base, text, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "tuned"
    tune(base, text, folder, sample_prompt="import ")
    return folder


@pytest.fixture(scope="module")
def adapted(base, text, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "adapted"
    tune(base, text, folder, lora=True, learning_rate=1e-2)
    return folder


def lora() -> peft.LoraConfig:
    """Return README's settings, but for an adapter that starts at random: it changes the model."""
    return peft.LoraConfig(
        task_type="CAUSAL_LM", target_modules="all-linear", init_lora_weights=False
    )


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=torch.arange(3, 23)[None]).logits


# What PEFT does with our models


@pytest.mark.parametrize("family", FAMILIES)
def test_all_linear_means_every_matrix_of_the_layers_and_merges(family):
    model, plain = tiny_model(family), tiny_model(family)
    linear = {n for n, m in plain.named_modules() if isinstance(m, torch.nn.Linear)}
    adapted = peft.get_peft_model(model, lora())
    found = {n.removesuffix(".lora_A") for n, _ in model.named_modules() if n.endswith(".lora_A")}
    assert found == linear - {"lm_head"}
    changed = logits(adapted)
    assert (changed - logits(plain)).abs().max() > 1e-3
    torch.testing.assert_close(logits(adapted.merge_and_unload()), changed, atol=2e-4, rtol=1e-4)


# transformers 5.24 refuses the newest PEFT there is (0.21.2) in its own methods, of every model.
takes_peft = pytest.mark.skipif(
    parse(peft.__version__) < parse(MIN_PEFT_VERSION),
    reason=f"this transformers takes adapters from PEFT {MIN_PEFT_VERSION} on only",
)


def test_peft_is_not_told_of_our_models_behind_its_back():
    # Its table of default matrices by model type is its own: users must name `target_modules`.
    with pytest.raises(ValueError, match="specify `target_modules`"):
        peft.get_peft_model(tiny_model(), peft.LoraConfig(task_type="CAUSAL_LM"))


def test_an_adapter_loads_with_its_model_by_peft(base, tmp_path):
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), lora())
    model.save_pretrained(tmp_path / "adapter")
    loaded = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert_same(logits(loaded), logits(model))


@takes_peft
def test_an_adapter_loads_with_its_model_by_transformers(base, tmp_path):
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), lora())
    model.save_pretrained(tmp_path / "adapter")
    expected = logits(model)
    assert_same(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "adapter")), expected)
    plain = AutoModelForCausalLM.from_pretrained(base)
    plain.load_adapter(str(tmp_path / "adapter"))
    assert_same(logits(plain), expected)
    plain.disable_adapters()
    assert logits(plain).equal(logits(AutoModelForCausalLM.from_pretrained(base)))


@takes_peft
def test_add_adapter_of_transformers_finds_the_matrices_too(base, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(base)
    model.add_adapter(lora())
    model.save_pretrained(tmp_path)
    assert not (tmp_path / "config.json").exists()  # the adapter alone
    again = AutoModelForCausalLM.from_pretrained(base)
    again.load_adapter(str(tmp_path))
    assert_same(logits(again), logits(model))


@pytest.mark.slow
def test_a_stranger_without_our_package_adapts_a_checkpoint(base, tmp_path):
    code = """
import sys; sys.modules["hf_nanogpt"] = None
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
from peft import LoraConfig, get_peft_model
config = LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear")
print(len(get_peft_model(model, config).targeted_module_names))
"""
    environment = os.environ | {"PYTHONPATH": "", "HF_HOME": str(tmp_path)}
    command = [sys.executable, "-c", code, str(base)]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.split() == ["14"], done.stderr[-2000:]


def test_model_and_adapter_travel_over_the_hub(hub, base, tmp_path):
    AutoModelForCausalLM.from_pretrained(base).push_to_hub("user/base")
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained("user/base"), lora())
    model.push_to_hub("user/adapter")
    files = set(hub.repos["user/adapter"].files())
    assert {"adapter_config.json", "adapter_model.safetensors"} <= files
    assert "model.safetensors" not in files
    pulled = peft.AutoPeftModelForCausalLM.from_pretrained("user/adapter")
    assert_same(logits(pulled), logits(model))


# What training makes


def test_lora_leaves_a_whole_checkpoint_and_the_adapter_it_is_merged_from(base, adapted, text):
    names = {path.name for path in (adapted / "adapter").iterdir()}
    names -= {"tokenizer.json", "tokenizer_config.json"}
    assert names == {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    assert not (adapted / "adapter_model.safetensors").exists()
    whole, plain = load_checkpoint(adapted)[0], load_checkpoint(base)[0]
    again = peft.PeftModel.from_pretrained(plain, adapted / "adapter").merge_and_unload()
    theirs, start = whole.state_dict(), load_file(base / "model.safetensors")
    for name, tensor in again.state_dict().items():
        assert theirs[name].equal(tensor)
        assert tensor.equal(start[name]) != ("proj" in name), name
    export_checkpoint(adapted, adapted.parent / "native")
    native = AutoModelForCausalLM.from_pretrained(adapted.parent / "native")
    torch.testing.assert_close(logits(native), logits(whole), atol=1e-5, rtol=1e-5)


def test_checkpoints_of_a_lora_training_hold_the_adapter_only(adapted):
    for step in adapted.glob("checkpoint-*"):
        assert (step / "adapter_model.safetensors").is_file()
        assert not (step / "model.safetensors").exists()


@pytest.mark.parametrize("lora", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_metrics_before_and_after_are_those_that_eval_measures(lora, base, adapted, tuned, text):
    folder = adapted if lora else tuned
    metrics = json.loads((folder / "metrics.json").read_text())
    for checkpoint, told in ((base, metrics["before"]), (folder, metrics)):
        measured = evaluate(checkpoint, text, held_out=0.1)
        assert told["eval_loss"] == pytest.approx(measured.loss, abs=1e-5)
        assert told["perplexity"] == pytest.approx(measured.perplexity, abs=1e-2)
        assert told["bits_per_byte"] == pytest.approx(measured.bits_per_byte, abs=1e-5)
    assert metrics["eval_loss"] < metrics["before"]["eval_loss"] - 0.001
    assert metrics["before"]["sample"].startswith(metrics["prompt"])
    assert lora or metrics["prompt"] == "import "
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert f"(before this training {metrics['before']['eval_loss']:.4f})" in card
    # A model that knows nothing writes control characters, which a card shows as U+FFFD.
    shown = re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", "\ufffd", metrics["before"]["sample"])
    assert shown.splitlines()[0] in card
    assert ("| LoRA | rank 8, alpha 16, merged |" in card) == lora


@pytest.mark.slow
def test_the_summary_shows_before_and_after_side_by_side(base, text, tmp_path, capsys):
    argv = ["train", "finetune", "--lora", "--from", str(base), "--data", text]
    argv += [f"--{name}={value}" for name, value in (FAST | STEPS).items()]
    assert main([*argv, f"--output_dir={tmp_path / 'run'}", "--sample_prompt=def "]) == 0
    printed = capsys.readouterr().out
    metrics = json.loads((tmp_path / "run/metrics.json").read_text())
    figures = re.search(r"validation loss +([\d.]+) +([\d.]+) nats per token", printed).groups()
    before = metrics["before"]["eval_loss"]
    assert list(map(float, figures)) == pytest.approx([before, metrics["eval_loss"]], abs=1e-4)
    assert metrics["settings"]["Learning rate"] == 2e-3  # of the recipe, with --lora
    assert "Samples before and after, from 'def ':\n  | def" in printed


@pytest.mark.parametrize("lora", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_resumed_run_equals_an_uninterrupted_one(lora, base, text, adapted, tuned, tmp_path):
    whole = adapted if lora else tuned
    stopped = shutil.copytree(whole, tmp_path / "stopped")
    settings = {"lora": True, "learning_rate": 1e-2} if lora else {"sample_prompt": "import "}
    for path in stopped.iterdir():  # as if it had been killed after its first checkpoint
        if path.name != "checkpoint-6":
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    tune(base, text, stopped, resume=True, **settings)
    files = ["model.safetensors"] + ["adapter/adapter_model.safetensors"] * lora
    for name in files:
        assert (stopped / name).read_bytes() == (whole / name).read_bytes()
    ours, theirs = (json.loads((f / "metrics.json").read_text()) for f in (stopped, whole))
    assert ours["before"] == theirs["before"] and ours["eval_loss"] == theirs["eval_loss"]
    if lora:
        tune(base, text, stopped, overwrite=True, max_steps=1)
        assert not (stopped / "adapter").exists()


def test_another_adapter_or_another_start_cannot_be_resumed(base, adapted, text, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(base, other)
    model = AutoModelForCausalLM.from_pretrained(base)
    model.lm_head.weight.data[0] += 1
    model.save_pretrained(other)
    same = {"resume": True, "learning_rate": 1e-2}
    for start, settings in ((base, {}), (base, {"lora_rank": 4, "lora": True})):
        with pytest.raises(ValueError, match=r"other settings.*lora=.*was rank 8"):
            tune(start, text, adapted, **same, **settings)
    with pytest.raises(ValueError, match=r"other settings.*of weights"):
        tune(other, text, adapted, lora=True, **same)


@pytest.mark.slow
def test_the_best_adapter_is_loaded_and_merged_at_the_end(base, text, tmp_path):
    best = {"load_best_model_at_end": True, "eval_steps": 1, "save_steps": 1, "max_steps": 4}
    best["eval_tokens"] = 10_000  # all
    best["greater_is_better"] = True  # then it is an early one, as losses fall
    result = tune(base, text, tmp_path / "run", lora=True, learning_rate=1e-2, **best)
    state = json.loads((tmp_path / "run/checkpoint-4/trainer_state.json").read_text())
    losses = [row["eval_loss"] for row in state["log_history"] if "eval_loss" in row]
    assert result.metrics["eval_loss"] == pytest.approx(max(losses[1:]), abs=1e-6)
    assert max(losses[1:]) > losses[-1]
    measured = evaluate(tmp_path / "run", text, held_out=0.1)
    assert measured.loss == pytest.approx(result.metrics["eval_loss"], abs=1e-5)


@pytest.mark.slow
def test_what_is_pushed_after_lora_is_a_whole_model(hub, base, text, tmp_path):
    tune(base, text, tmp_path / "run", lora=True, push_to_hub=True, hub_model_id="user/tuned")
    files = set(hub.repos["user/tuned"].files())
    assert "model.safetensors" in files and not any("adapter" in name for name in files)
    assert len(hub.repos["user/tuned"].branches["main"]) <= 2
    loaded = load_checkpoint("user/tuned")[0]
    assert logits(loaded).equal(logits(load_checkpoint(tmp_path / "run")[0]))


# Any checkpoint that can be converted


def make_llama_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer like Llama's: spaces are marks, unknown characters are bytes, no ByteLevel."""
    letters = sorted({chr(i) for i in range(33, 127)} | {"▁"})
    words = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *letters]
    ids = {word: i for i, word in enumerate(words)}
    tokenizer = Tokenizer(models.BPE(vocab=ids, merges=[], unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "lora"), [("gpt2", True), ("llama", False), ("qwen3", True)])
def test_a_converted_model_is_tuned_and_exported_again(name, lora, text, tmp_path):
    words = make_llama_tokenizer()
    native = make_reference(name)
    native.resize_token_embeddings(len(words))
    native.config.bos_token_id, native.config.eos_token_id = 1, 2
    native.save_pretrained(tmp_path / "native")
    words.save_pretrained(tmp_path / "native")
    with pytest.raises(ValueError, match=rf"type '{name}'.*hf-nanogpt convert .*native FOLDER"):
        tune(tmp_path / "native", text, tmp_path / "run")
    convert_checkpoint(tmp_path / "native", tmp_path / "ours")
    folder = tmp_path / "run"
    metrics = tune(tmp_path / "ours", text, folder, lora=lora, learning_rate=3e-3).metrics
    assert metrics["eval_loss"] < metrics["before"]["eval_loss"] - 0.01
    assert metrics["eval_bytes"] == len(Path(text).read_bytes()[-600:])
    assert export_checkpoint(folder, tmp_path / "home", to=name).has_tokenizer


# What is refused


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"lora_rank": 0}, "lora_rank=0"),
        ({"lora_alpha": -1}, "lora_alpha=-1"),
        ({"lora_rank": 4, "lora": False}, "lora_rank=4 has no effect without --lora"),
        ({"start_from": None}, "name one by --from CHECKPOINT"),
        ({"start_from": "./nowhere"}, "no checkpoint at nowhere"),
        ({"lora_rnak": 4}, "Did you mean --lora_rank"),
    ],
)
def test_wrong_settings_are_refused_before_anything_is_written(
    settings, words, base, text, tmp_path
):
    settings = {"start_from": base, "lora": True} | settings
    with pytest.raises(ValueError, match=words):
        train("finetune", data=text, output_dir=str(tmp_path / "run"), **FAST, **settings)
    assert not (tmp_path / "run").exists()


def test_the_start_is_never_overwritten(base, text):
    with pytest.raises(ValueError, match=r"holds .* the model to start from"):
        tune(base, text, base, overwrite=True)
    assert (base / "model.safetensors").exists()


def test_an_adapter_alone_is_refused_as_a_checkpoint(adapted, capsys):
    for folder in (adapted / "adapter", adapted / "checkpoint-6"):
        assert main(["generate", str(folder), "def "]) == 2
        assert "has an adapter, not a whole model" in capsys.readouterr().err


def test_lora_without_peft_says_what_to_install(base, text, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "peft", None)
    argv = ["train", "finetune", "--lora", f"--from={base}", f"--data={text}"]
    assert main([*argv, f"--output_dir={tmp_path / 'run'}"]) == 2
    assert "pip install 'hf-nanogpt[finetune]'" in capsys.readouterr().err


# The example


def test_the_example_trains_an_adapter_and_merges_it(base, text, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["lora.py", str(base), text, str(tmp_path)])
    runpy.run_path(str(ROOT / "examples/lora.py"), run_name="__main__")
    printed = capsys.readouterr().out
    losses = [float(loss) for loss in re.findall(r"step \d+: loss ([\d.]+)", printed)]
    assert len(losses) > 9 and sum(losses[-3:]) < sum(losses[:3])
    assert printed.splitlines()[0].startswith("trainable params: ")
    assert "\nThe " in printed and (tmp_path / "adapter_config.json").is_file()
