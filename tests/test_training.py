"""Training end to end on a small real text: same losses as the plain loop, artifacts, resuming."""

import importlib.util
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import CORPUS, tiny_config, tiny_model
from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainingArguments,
    pipeline,
)

from hf_nanogpt import (
    DataArguments,
    NanoGPTForCausalLM,
    NanoGPTTrainer,
    NanoGPTTrainingArguments,
    evaluate,
    load_text,
    pack_documents,
    train,
    train_tokenizer,
)
from hf_nanogpt.cli import main
from hf_nanogpt.training.preparing import load_start, prepare_config
from hf_nanogpt.training.samples import SAMPLING

ROOT = Path(__file__).parent.parent
SMALL = {
    "tokenizer": "char",
    "n_layer": 2,
    "n_embd": 32,
    "n_head": 2,
    "block_size": 32,
    "per_device_train_batch_size": 4,
    "logging_steps": 1,
    "disable_tqdm": True,
    "num_threads": 1,
}
# Checkpoints between two logs, so that the losses since the last log have to be kept.
OFTEN = SMALL | {"logging_steps": 3, "save_steps": 4, "save_total_limit": 5}


@pytest.fixture(scope="module")
def text_file(tmp_path_factory) -> Path:
    """Real text in one document."""
    path = tmp_path_factory.mktemp("corpus") / "text.txt"
    path.write_text(CORPUS, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def checkpoint(text_file, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "small"
    train(data=str(text_file), output_dir=str(folder), max_steps=12, **OFTEN)
    return folder


def _history(folder: Path) -> list[float]:
    last = max(folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    state = json.loads((last / "trainer_state.json").read_text())
    return [row["loss"] for row in state["log_history"] if "loss" in row]


def test_plain_loop_gives_the_same_losses_as_the_trainer(tmp_path):
    spec = importlib.util.spec_from_file_location("plain_loop", ROOT / "examples/plain_loop.py")
    plain_loop = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(plain_loop)
    documents = Dataset.from_dict({"text": [CORPUS[:3000]]})
    tokenizer = train_tokenizer((row["text"] for row in documents), kind="char")
    blocks = pack_documents(documents, tokenizer, context_length=32)
    config = tiny_config("nano", vocab_size=len(tokenizer), initializer_range=None)
    steps = len(blocks) // 8 + 5  # into the second epoch
    plain = list(plain_loop.train(config, blocks, tokenizer, steps=steps, batch_size=8))

    args = NanoGPTTrainingArguments(
        output_dir=str(tmp_path),
        max_steps=steps,
        per_device_train_batch_size=8,
        logging_steps=1,
        eval_strategy="no",
        save_strategy="no",
        disable_tqdm=True,
    )
    torch.manual_seed(args.seed)
    trainer = NanoGPTTrainer(
        model_init=lambda: NanoGPTForCausalLM(config),
        args=args,
        train_dataset=blocks,
        processing_class=tokenizer,
    )
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert len(plain) == len(losses) == steps
    assert losses == pytest.approx(plain, abs=1e-6)


@pytest.fixture(scope="module")
def long(tmp_path_factory) -> Path:
    """A checkpoint with a context of 3,000 tokens."""
    folder, tokenizer = tmp_path_factory.mktemp("long"), train_tokenizer([CORPUS], kind="char")
    sizes = {"n_layer": 1, "n_embd": 16, "n_head": 2, "vocab_size": len(tokenizer)}
    tiny_model(block_size=3000, **sizes).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_fine_tuning_takes_blocks_of_1024_tokens_unless_more_are_asked_for(long):
    start = load_start(long, {})
    for asked, length in ((None, 1024), (64, 64), (2000, 2000)):
        config, found = prepare_config({}, DataArguments(context_length=asked), start)
        assert (config.max_position_embeddings, found) == (3000, length)
    short = replace(start, model=tiny_model(block_size=64))
    assert prepare_config({}, DataArguments(), short)[1] == 64


@pytest.mark.slow
def test_short_blocks_are_in_the_plan_and_the_card_repeats_their_figure(
    long, text_file, tmp_path, capsys
):
    result = train(
        "finetune",
        start_from=long,
        data=str(text_file),
        output_dir=str(tmp_path / "tuned"),
        max_steps=1,
        per_device_train_batch_size=1,
        num_threads=1,
        sample_steps=0,
        disable_tqdm=False,
    )
    plan = capsys.readouterr().out
    said = r"^model .*; blocks of 1,024 tokens of its 3,000 \(--context_length\)$"
    assert re.search(said, plan, re.MULTILINE)
    config = json.loads((result.output_dir / "config.json").read_text())
    assert config["max_position_embeddings"] == 3000
    command = ["eval", str(result.output_dir), *result.metrics["eval_command"]]
    assert command[-2:] == ["--context_length", "1024"]
    command[command.index("--data") + 1] = str(text_file)
    assert main(command) == 0
    assert f"{result.metrics['eval_loss']:.4f}" in capsys.readouterr().out


def test_folder_has_every_artifact_and_no_leftover(checkpoint):
    names = {path.name for path in checkpoint.iterdir() if not path.name.startswith("checkpoint-")}
    assert names == {
        "README.md",
        "config.json",
        "configuration_nanogpt.py",
        "generation_config.json",
        "loss.png",
        "metrics.json",
        "model.safetensors",
        "modeling_nanogpt.py",
        "chosen_recipe.yaml",
        "samples.jsonl",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert (checkpoint / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_no_file_of_a_training_is_a_pickle_of_settings_or_has_a_token(text_file, tmp_path):
    folder = tmp_path / "run"
    train(data=str(text_file), output_dir=str(folder), max_steps=2, hub_token="hf_Secret", **SMALL)
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert {path.name for path in files} >= {"trainer_state.json", "optimizer.pt", "config.json"}
    assert not [path for path in files if path.name == "training_args.bin"]
    assert not [path for path in files if b"hf_Secret" in path.read_bytes()]


def test_metrics_are_those_of_the_saved_model(checkpoint, text_file):
    metrics = json.loads((checkpoint / "metrics.json").read_text())
    text = text_file.read_text(encoding="utf-8")
    held_out = text_file.parent / "held_out.txt"
    held_out.write_text(text[int(len(text) * 0.9) :], encoding="utf-8")  # a tenth
    result = evaluate(checkpoint, str(held_out))
    assert result.num_bytes == metrics["eval_bytes"]
    assert result.loss == pytest.approx(metrics["eval_loss"], abs=1e-6)
    assert result.bits_per_byte == pytest.approx(metrics["bits_per_byte"], abs=1e-6)
    assert metrics["train_tokens"] == 12 * 4 * 32
    assert (
        metrics["num_parameters"]
        == AutoModelForCausalLM.from_pretrained(checkpoint).num_parameters()
    )


def test_checkpoint_works_with_the_usual_tools(checkpoint):
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    assert tokenizer.model_max_length == 32
    inputs = tokenizer(["def ", "import"], return_tensors="pt", padding=True)
    assert model.generate(**inputs, max_new_tokens=4, do_sample=False).shape[0] == 2
    write = pipeline("text-generation", str(checkpoint))
    [text] = write("def ", max_new_tokens=5)
    assert text["generated_text"].startswith("def ")
    # By default it samples, as `train` does, and stays within the context.
    settings = model.generation_config
    assert settings.do_sample and settings.temperature == SAMPLING["temperature"]
    [row] = write("def " * 4, return_tensors=True)
    assert 16 < len(row["generated_token_ids"]) <= 32


def test_stock_trainer_trains_our_model(text_file, tmp_path):
    documents = load_text(str(text_file))
    tokenizer = train_tokenizer([], kind="byte")
    blocks = pack_documents(documents, tokenizer, context_length=32)
    rows = [
        {"input_ids": r["input_ids"].tolist(), "labels": r["input_ids"].tolist()} for r in blocks
    ]
    args = TrainingArguments(
        output_dir=str(tmp_path), max_steps=3, save_strategy="no", disable_tqdm=True, use_cpu=True
    )
    model = NanoGPTForCausalLM(tiny_config("nano", vocab_size=len(tokenizer)))
    result = Trainer(model=model, args=args, train_dataset=rows[:-1]).train()
    assert result.training_loss > 0


def test_resumed_run_equals_uninterrupted_run(checkpoint, text_file, tmp_path):
    stopped = shutil.copytree(checkpoint, tmp_path / "stopped")
    for name in ("checkpoint-8", "checkpoint-12"):  # as if it had been killed after step 4
        for path in (stopped / name).iterdir():
            path.unlink()
        (stopped / name).rmdir()
    train(data=str(text_file), output_dir=str(stopped), max_steps=12, resume=True, **OFTEN)
    assert len(_history(checkpoint)) == 4
    assert _history(stopped) == _history(checkpoint)
    ours, theirs = (
        AutoModelForCausalLM.from_pretrained(f).state_dict() for f in (stopped, checkpoint)
    )
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_run_of_several_passes_over_the_text_resumes_exactly(text_file, tmp_path):
    many = {"per_device_train_batch_size": 64, "save_steps": 4, "save_total_limit": 5}
    settings = {"data": str(text_file), "max_steps": 12} | SMALL | many
    whole = tmp_path / "whole"
    assert train(output_dir=str(whole), **settings).metrics["train_tokens"] > 1.8 * len(CORPUS)
    for step in (4, 8):  # in the first pass, and in the second
        stopped = shutil.copytree(whole, tmp_path / str(step))
        for later in range(step + 4, 13, 4):
            shutil.rmtree(stopped / f"checkpoint-{later}")
        train(output_dir=str(stopped), resume=True, **settings)
        assert _history(stopped) == _history(whole)


def test_same_seed_gives_the_same_model_and_another_seed_another(checkpoint, text_file, tmp_path):
    folders = tmp_path / "same", tmp_path / "other"
    for folder, seed in zip(folders, (42, 43), strict=True):
        train(data=str(text_file), output_dir=str(folder), max_steps=12, seed=seed, **OFTEN)
    assert _history(folders[0]) == _history(checkpoint)
    assert _history(folders[1]) != _history(checkpoint)


def test_best_model_is_loaded_and_measured_at_the_end(text_file, tmp_path):
    result = train(
        data=str(text_file),
        output_dir=str(tmp_path / "best"),
        max_steps=8,
        eval_steps=2,
        save_steps=2,
        eval_tokens=10_000,  # all of the held-out text
        load_best_model_at_end=True,
        metric_for_best_model="bits_per_byte",
        greater_is_better=True,  # then it is an early one, as losses fall
        **SMALL,
    )
    [state] = sorted((tmp_path / "best").glob("checkpoint-8/trainer_state.json"))
    history = json.loads(state.read_text())["log_history"]
    bits = [row["eval_bits_per_byte"] for row in history if "eval_bits_per_byte" in row]
    assert max(bits) > bits[-1] + 0.01
    assert result.metrics["bits_per_byte"] == pytest.approx(max(bits), abs=1e-6)


def test_loss_falls_for_both_optimizers(text_file, tmp_path):
    for recipe in ("muon", "adamw"):
        folder = tmp_path / recipe
        train(
            data=str(text_file), output_dir=str(folder), max_steps=40, optim_recipe=recipe, **SMALL
        )
        losses = _history(folder)
        assert sum(losses[-5:]) / 5 < losses[0] - 0.3


def test_evaluation_in_the_trainer_is_independent_of_batch_size(checkpoint, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    blocks = pack_documents(
        Dataset.from_dict({"text": [CORPUS[:2500]]}), tokenizer, context_length=32
    )
    losses = []
    for size in (1, 7, 64):
        args = NanoGPTTrainingArguments(
            output_dir=str(tmp_path), per_device_eval_batch_size=size, disable_tqdm=True
        )
        model = AutoModelForCausalLM.from_pretrained(checkpoint)
        trainer = NanoGPTTrainer(model, args, eval_dataset=blocks, processing_class=tokenizer)
        losses.append(trainer.evaluate()["eval_loss"])
    assert max(losses) - min(losses) < 1e-6


def test_training_from_a_stream_works(text_file, tmp_path):
    rows = tmp_path / "rows.jsonl"
    parts = text_file.read_text(encoding="utf-8").split("\n\n")
    rows.write_text("\n".join(json.dumps({"text": part}) for part in parts), encoding="utf-8")
    result = train(
        data=str(rows),
        streaming=True,
        validation_fraction=0.2,
        output_dir=str(tmp_path / "stream"),
        max_steps=4,
        **SMALL,
    )
    assert result.metrics["train_steps"] == 4


def test_training_continues_from_a_checkpoint(checkpoint, text_file, tmp_path):
    settings = {name: SMALL[name] for name in ("disable_tqdm", "logging_steps", "num_threads")}
    settings |= {"data": str(text_file), "max_steps": 3, "learning_rate": 1e-9}
    result = train("finetune", start_from=checkpoint, output_dir=str(tmp_path / "a"), **settings)
    before, after = (AutoModelForCausalLM.from_pretrained(f) for f in (checkpoint, tmp_path / "a"))
    for name, tensor in before.state_dict().items():
        torch.testing.assert_close(after.state_dict()[name], tensor, atol=1e-6, rtol=0)
    assert (tmp_path / "a/tokenizer.json").read_text() == (
        checkpoint / "tokenizer.json"
    ).read_text()
    assert result.metrics["train_steps"] == 3
    with pytest.raises(ValueError, match=r"n_layer|num_hidden_layers"):
        train("finetune", start_from=checkpoint, output_dir=str(tmp_path / "b"), n_layer=3)
    with pytest.raises(ValueError, match="no-such-folder"):
        train("finetune", start_from="./no-such-folder", output_dir=str(tmp_path / "b"))
    assert not (tmp_path / "b").exists()


def test_evaluation_is_whole_when_training_drops_its_last_batch(text_file, tmp_path):
    result = train(
        data=str(text_file),
        output_dir=str(tmp_path / "run"),
        max_steps=1,
        dataloader_drop_last=True,
        per_device_eval_batch_size=64,  # more than there are blocks to validate on
        **SMALL,
    )
    assert result.metrics["eval_bytes"] > 0


def test_a_stock_collator_that_never_learns_the_end_is_warned_of(tmp_path, caplog):
    tokenizer = train_tokenizer([], kind="byte")
    settings = {"max_steps": 1, "use_cpu": True, "eval_strategy": "no"}
    args = NanoGPTTrainingArguments(output_dir=str(tmp_path), **settings)
    model = tiny_model("nano", vocab_size=len(tokenizer))

    def make_trainer() -> None:
        collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
        NanoGPTTrainer(model, args, processing_class=tokenizer, data_collator=collator)

    make_trainer()
    assert "never learns" not in caplog.text
    tokenizer.pad_token = tokenizer.eos_token
    make_trainer()
    assert "never learns where a text ends" in caplog.text
