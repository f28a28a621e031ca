"""TRL trains our checkpoints, with the scripts in examples/trl."""

import importlib.util
import itertools
import json
import runpy

import pytest
import torch
from conftest import ROOT, tiny_model
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from hf_nanogpt import add_chat_template, load_checkpoint, train_tokenizer

# Its import takes long: one worker does it, when it runs the tests.
pytestmark = [
    pytest.mark.slow,
    pytest.mark.xdist_group("trl"),
    pytest.mark.skipif(
        importlib.util.find_spec("trl") is None,
        reason="TRL is missing: pip install 'hf-nanogpt[finetune]'",
    ),
]
TINY = {"disable_tqdm": True, "use_cpu": True, "logging_steps": 1}


def run_example(name: str, *args, **settings):
    return runpy.run_path(str(ROOT / "examples/trl" / f"{name}.py"))["main"](
        *map(str, args), **(TINY | settings)
    )


def series(trainer, key: str) -> list[float]:
    return [row[key] for row in trainer.state.log_history if key in row]


@pytest.fixture(scope="module", params=["nano", "gpt2"], ids=["untied", "tied"])
def checkpoint(request, tmp_path_factory):
    """A checkpoint as `hf-nanogpt train` saves them, without a chat template."""
    folder = tmp_path_factory.mktemp(request.param)
    shape = {"vocab_size": 257, "block_size": 128, "n_layer": 2, "initializer_range": None}
    tiny_model(request.param, **shape).save_pretrained(folder)
    train_tokenizer([], kind="byte").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def chat(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chat")
    model, tokenizer = tiny_model(vocab_size=257, block_size=128), train_tokenizer([], kind="byte")
    add_chat_template(tokenizer, model=model)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_sft_learns_the_answers_only(checkpoint, lora, tmp_path):
    settings = {"num_train_epochs": 2, "learning_rate": 1e-2}
    trainer = run_example("sft", checkpoint, tmp_path, lora=lora, **settings)
    losses = series(trainer, "loss")
    assert losses[-1] < 0.6 * losses[0]
    batch, tokenizer = next(iter(trainer.get_train_dataloader())), trainer.processing_class
    learnt = tokenizer.decode(batch["labels"][batch["labels"] != -100])
    answers = learnt.split("<|im_end|>")
    assert len(answers) > 5 and all(a.startswith("It is ") for a in answers[:-1] if a)
    model, tokenizer = load_checkpoint(tmp_path)
    assert tokenizer.chat_template and model.generation_config.eos_token_id == [0, 258]
    assert type(model).__name__ == "NanoGPTForCausalLM" and len(tokenizer) == 259
    tied = load_checkpoint(checkpoint)[0].config.tie_word_embeddings
    assert tied == model.config.tie_word_embeddings
    rows = model.get_input_embeddings().weight[257:]
    assert not rows[0].equal(rows[1])  # the new tokens were trained, by adapters as well


def test_packed_conversations_have_the_loss_that_each_has_alone(checkpoint, tmp_path):
    trainer = run_example("sft", checkpoint, tmp_path, max_steps=1)
    batch, model = next(iter(trainer.get_train_dataloader())), trainer.model.eval()
    ids, labels, positions = (batch[k][0] for k in ("input_ids", "labels", "position_ids"))
    starts = [*(positions == 0).nonzero().flatten().tolist(), len(ids)]
    total = count = 0
    with torch.no_grad():
        packed = model(**{k: batch[k] for k in ("input_ids", "labels", "position_ids")})
        for start, end in itertools.pairwise(starts):
            targets = labels[None, start:end]
            learnt = (targets[:, 1:] != -100).sum()
            if learnt:
                total += model(ids[None, start:end], labels=targets).loss * learnt
                count += learnt
    assert len(starts) > 10
    torch.testing.assert_close(packed.loss, total / count, rtol=1e-4, atol=1e-4)


def test_dpo_prefers_the_chosen_answers_more_than_before(chat, tmp_path):
    trainer = run_example("dpo", chat, tmp_path, num_train_epochs=5, learning_rate=1e-3)
    margins = series(trainer, "rewards/margins")
    assert abs(margins[0]) < 1e-3 < 0.5 < margins[-1]
    assert series(trainer, "rewards/accuracies")[-1] == 1
    assert load_checkpoint(tmp_path)[1].chat_template


def test_dpo_makes_its_reference_from_a_saved_checkpoint(chat, tmp_path):
    # TRL looks for `auto_map` in the configuration, because our class is not one of transformers'.
    assert "AutoModelForCausalLM" in json.loads((chat / "config.json").read_text())["auto_map"]
    settings = {"precompute_ref_log_probs": False, "max_steps": 1}
    trainer = run_example("dpo", chat, tmp_path, **settings)
    assert type(trainer.ref_model).__name__ == "NanoGPTForCausalLM"
    assert series(trainer, "rewards/margins")[0] == pytest.approx(0, abs=1e-3)


def test_grpo_raises_the_reward(chat, tmp_path):
    before = AutoModelForCausalLM.from_pretrained(chat).lm_head.weight
    # This rate is high enough for every seed tried: the reward rises from -2.7 to nearly 0.
    trainer = run_example("grpo", chat, tmp_path, max_steps=20, learning_rate=1e-2)
    rewards = series(trainer, "reward")
    assert sum(rewards[-4:]) > sum(rewards[:4]) + 4
    after = load_checkpoint(tmp_path)[0].lm_head.weight
    assert not after.equal(before)


def test_reward_model_scores_chosen_answers_higher(chat, tmp_path):
    trainer = run_example("reward", chat, tmp_path, num_train_epochs=5, learning_rate=1e-3)
    assert series(trainer, "accuracy")[-1] == 1
    assert series(trainer, "margin")[-1] > series(trainer, "margin")[0] + 0.1
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    row = trainer.train_dataset[0]
    chosen, rejected = (model(torch.tensor([row[f"{k}_ids"]])) for k in ("chosen", "rejected"))
    assert tokenizer.chat_template and chosen.logits.item() > rejected.logits.item()
