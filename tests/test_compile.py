"""A compiled training: one graph without a break, for all batches, and the same losses."""

import json

import numpy as np
import pytest
import torch
from conftest import CORPUS, tiny_model
from datasets import Dataset

from hf_nanogpt import (
    NanoGPTTrainer,
    NanoGPTTrainingArguments,
    PackedCollator,
    pack_documents,
    train,
    train_tokenizer,
)
from hf_nanogpt.training.trainer import _fill_batch

MODELS = {
    "rope": {},
    "learned": {"preset": "gpt2"},
    "sliding": {"sliding_window": 8, "position_embedding_type": "learned"},
}


@pytest.fixture(scope="module")
def settings(tmp_path_factory) -> dict:
    """Some 45 blocks of short documents in batches of 8; the last batch of an epoch is smaller."""
    path = tmp_path_factory.mktemp("corpus") / "text.jsonl"
    rows = [json.dumps({"text": line}) for line in CORPUS[:1300].splitlines() if line]
    path.write_text("\n".join(rows), encoding="utf-8")
    return {
        "data": str(path),
        "tokenizer": "char",
        "n_layer": 2,
        "n_embd": 32,
        "n_head": 2,
        "block_size": 32,
        "validation_fraction": 0.03,
        "dropout": 0.0,
        "max_steps": 9,
        "per_device_train_batch_size": 8,
        "logging_steps": 1,
        "eval_steps": 4,
        "save_steps": 100,
        "sample_steps": 4,
        "disable_tqdm": True,
        "num_threads": 1,
        "use_cpu": True,
    }


def losses_of(result) -> list[float]:
    state = json.loads((result.output_dir / "checkpoint-9" / "trainer_state.json").read_text())
    return [row.get("loss", row.get("eval_loss")) for row in state["log_history"]]


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS)
def test_one_graph_serves_the_last_batch_of_an_epoch_and_the_evaluation(model, settings, tmp_path):
    settings = settings | MODELS[model]
    expected = train(output_dir=str(tmp_path / "plain"), **settings)
    state = json.loads((tmp_path / "plain/checkpoint-9/trainer_state.json").read_text())
    assert state["epoch"] > 1 and state["num_input_tokens_seen"] < 9 * 8 * 32
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    with torch._dynamo.config.patch(error_on_recompile=True):
        found = train(
            output_dir=str(tmp_path / "compiled"),
            torch_compile=True,
            torch_compile_backend="eager",  # traces as the others do, and takes no time
            **settings,
        )
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert not torch._dynamo.utils.counters["graph_break"]
    assert losses_of(found) == pytest.approx(losses_of(expected), abs=1e-5)
    assert found.metrics["train_tokens"] == expected.metrics["train_tokens"]


@pytest.mark.slow
def test_batches_are_not_filled_beyond_the_size_that_fits_into_memory(tmp_path):
    class Small(NanoGPTTrainer):
        rows: list[int] = []

        def compute_loss(self, model, inputs, *args, **kwargs):
            self.rows.append(len(inputs["input_ids"]))
            if self.rows[-1] > 2:
                raise RuntimeError("CUDA out of memory.")
            return super().compute_loss(model, inputs, *args, **kwargs)

    tokenizer = train_tokenizer([], kind="byte")
    documents = Dataset.from_dict({"text": [CORPUS[:200]]})
    blocks = pack_documents(documents, tokenizer, context_length=16)
    args = NanoGPTTrainingArguments(
        str(tmp_path),
        use_cpu=True,
        max_steps=2,
        per_device_train_batch_size=8,
        auto_find_batch_size=True,
        torch_compile=True,
        torch_compile_backend="eager",
        save_strategy="no",
        eval_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    model = tiny_model(vocab_size=len(tokenizer))
    Small(model, args, processing_class=tokenizer, train_dataset=blocks).train()
    assert Small.rows[0] == 8 and Small.rows[-2:] == [2, 2]


def loss_and_gradients(model, inputs: dict) -> tuple[torch.Tensor, list[torch.Tensor]]:
    loss = model(**inputs).loss
    return loss.detach(), list(torch.autograd.grad(loss, list(model.parameters())))


def test_a_filled_batch_has_the_loss_and_the_gradients_of_the_batch(family):
    model = tiny_model(family)
    batch = PackedCollator(0)([{"input_ids": np.arange(n) % 7} for n in (20, 13, 20)])
    filled = _fill_batch(batch | {"use_cache": False}, 5, 24)
    assert {tuple(filled[name].shape) for name in batch} == {(5, 24)}
    found, expected = (loss_and_gradients(model, inputs) for inputs in (filled, batch))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert _fill_batch(batch, 2, 5)["input_ids"].shape == (3, 20)
