"""`NanoGPTTrainer` does what transformers' `Trainer` does, wherever it does not promise more."""

import numpy as np
import pytest
import torch
from conftest import tiny_config, tiny_model
from datasets import Dataset
from safetensors.torch import load_file
from transformers import (
    DataCollatorForLanguageModeling,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
)

from hf_nanogpt import (
    NanoGPTForCausalLM,
    NanoGPTTrainer,
    NanoGPTTrainingArguments,
    pack_documents,
    train_tokenizer,
)
from hf_nanogpt.convert import export_checkpoint
from hf_nanogpt.modeling_nanogpt import NanoGPTForSequenceClassification

TOKENIZER = train_tokenizer([], kind="byte")
TEXTS = ["To be, or not to be: that is the question.", "Whether 'tis nobler", "in the mind"] * 3
BLOCKS = pack_documents(Dataset.from_dict({"text": TEXTS}), TOKENIZER, context_length=16)
ROWS = [{"input_ids": TOKENIZER(text)["input_ids"]} for text in TEXTS]  # of several lengths
COMMON = {
    "max_steps": 3,
    "logging_steps": 1,
    "save_strategy": "no",
    "use_cpu": True,
    "report_to": [],
}
COMMON |= {"disable_tqdm": True, "per_device_eval_batch_size": 4, "learning_rate": 1e-2}


def model(**overrides):
    return tiny_model("nano", vocab_size=257, n_layer=1, **overrides)


def ours(tmp_path, model, settings=(), **parts) -> NanoGPTTrainer:
    settings = COMMON | {"eval_strategy": "no"} | dict(settings)
    args = NanoGPTTrainingArguments(output_dir=str(tmp_path), **settings)
    return NanoGPTTrainer(model, args, **parts)


def theirs(tmp_path, model, settings=(), **parts) -> Trainer:
    args = TrainingArguments(output_dir=str(tmp_path), **COMMON | dict(settings))
    return Trainer(model, args, **parts)


def losses(trainer) -> list[float]:
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


def test_an_optimizer_of_transformers_trains_as_trainer_does(tmp_path):
    for settings in ({"optim": "sgd"}, {"optim": "adafactor", "weight_decay": 0.1}):
        parts = {
            "train_dataset": BLOCKS,
            "data_collator": DataCollatorForLanguageModeling(TOKENIZER, mlm=False),
        }
        pair = [make(tmp_path, model(), settings, **parts) for make in (ours, theirs)]
        for trainer in pair:
            trainer.train()
        assert losses(pair[0]) == losses(pair[1])
        assert type(pair[0].optimizer.optimizer) is type(pair[1].optimizer.optimizer)


def test_an_optimizer_of_the_caller_is_used(tmp_path):
    made = {"optimizer_cls_and_kwargs": (torch.optim.SGD, {"lr": 0.1})}
    trainer = ours(tmp_path, model(), train_dataset=BLOCKS, processing_class=TOKENIZER, **made)
    trainer.train()
    assert type(trainer.optimizer.optimizer) is torch.optim.SGD
    plain = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, optim="sgd")
    trainer = NanoGPTTrainer(model(), plain, train_dataset=BLOCKS, processing_class=TOKENIZER)
    assert type(trainer.create_optimizer()) is torch.optim.SGD


def test_the_standard_collator_trains_evaluates_and_predicts_as_trainer_does(tmp_path):
    collator = DataCollatorForLanguageModeling(TOKENIZER, mlm=False)
    parts = {"eval_dataset": ROWS, "processing_class": TOKENIZER, "data_collator": collator}
    mine, stock = (make(tmp_path, model(), **parts) for make in (ours, theirs))
    assert mine.evaluate()["eval_loss"] == stock.evaluate()["eval_loss"]
    found, expected = mine.predict(ROWS), stock.predict(ROWS)
    assert found.predictions.shape == expected.predictions.shape == (9, 42, 257)
    np.testing.assert_array_equal(found.predictions, expected.predictions)
    np.testing.assert_array_equal(found.label_ids, expected.label_ids)
    assert found.metrics["test_loss"] == expected.metrics["test_loss"]


def test_packed_blocks_are_predicted_as_logits_and_evaluated_as_sums(tmp_path):
    trainer = ours(tmp_path, model(), eval_dataset=BLOCKS, processing_class=TOKENIZER)
    figures = trainer.evaluate()
    predicted = trainer.predict(BLOCKS)
    assert predicted.predictions.shape == (len(BLOCKS), 16, 257)
    logits = torch.tensor(predicted.predictions[:, :-1]).double()
    loss = torch.nn.functional.cross_entropy(
        logits.mT, torch.tensor(predicted.label_ids[:, 1:]), reduction="sum"
    )
    tokens = (predicted.label_ids[:, 1:] != -100).sum()
    assert figures["eval_tokens"] == tokens
    assert figures["eval_loss"] == pytest.approx(float(loss) / tokens, rel=1e-6)


@pytest.mark.parametrize(
    "settings",
    [
        {"eval_do_concat_batches": False},
        {"batch_eval_metrics": True},
        {"prediction_loss_only": True},
        {"include_for_metrics": ["inputs", "loss"]},
        {"eval_accumulation_steps": 1},
        {"eval_use_gather_object": True},
        {"label_smoothing_factor": 0.1},
        {"train_sampling_strategy": "group_by_length"},
    ],
    ids=lambda settings: " ".join(settings),
)
def test_exact_evaluation_does_not_depend_on_how_trainer_collects_it(tmp_path, settings):
    parts = {"eval_dataset": BLOCKS, "processing_class": TOKENIZER}
    expected = ours(tmp_path, model(), **parts).evaluate()
    found = ours(tmp_path, model(), settings, **parts).evaluate()
    for name in ("loss", "perplexity", "bits_per_byte", "tokens", "bytes"):
        assert found[f"eval_{name}"] == pytest.approx(expected[f"eval_{name}"], rel=1e-12)


def test_metrics_of_the_caller_get_logits_and_labels(tmp_path):
    def measure(prediction) -> dict[str, float]:
        hits = prediction.predictions[:, :-1].argmax(-1) == prediction.label_ids[:, 1:]
        return {"accuracy": float(hits.mean())}

    parts = {"eval_dataset": BLOCKS, "processing_class": TOKENIZER, "compute_metrics": measure}
    found = ours(tmp_path, model(), **parts).evaluate()
    assert 0 <= found["eval_accuracy"] <= 1 and "eval_bits_per_byte" not in found


def test_several_evaluation_sets_are_named(tmp_path):
    sets = {"a": BLOCKS, "b": BLOCKS}
    found = ours(tmp_path, model(), eval_dataset=sets, processing_class=TOKENIZER).evaluate()
    assert found["eval_a_bits_per_byte"] == found["eval_b_bits_per_byte"] > 0


def test_sequence_classification_trains_and_predicts_as_trainer_does(tmp_path):
    rows = [row | {"labels": i % 3} for i, row in enumerate(ROWS)]
    pair = []
    for make in (ours, theirs):
        torch.manual_seed(0)
        config = tiny_config("nano", vocab_size=257, n_layer=1, num_labels=3, pad_token_id=0)
        classifier = NanoGPTForSequenceClassification(config)
        parts = {"train_dataset": rows, "eval_dataset": rows, "processing_class": TOKENIZER}
        pair.append(make(tmp_path, classifier, {"optim": "sgd"}, **parts))
        pair[-1].train()
    assert losses(pair[0]) == losses(pair[1])
    assert pair[0].evaluate()["eval_loss"] == pair[1].evaluate()["eval_loss"]
    assert pair[0].predict(rows).predictions.shape == (9, 3)


def test_labels_of_rows_are_learnt_as_they_are(tmp_path):
    rows = [row | {"labels": [-100] * 4 + row["input_ids"][4:]} for row in ROWS]
    trainer = ours(tmp_path, model(), train_dataset=rows, processing_class=TOKENIZER)
    batch = next(iter(trainer.get_train_dataloader()))
    assert (batch["labels"][:, :4] == -100).all() and (batch["labels"][:, 4:8] >= 0).all()


def test_label_smoothing_gives_the_loss_of_llama_under_trainer(tmp_path):
    source = tiny_model("llama", vocab_size=257)
    source.save_pretrained(tmp_path / "ours")
    TOKENIZER.save_pretrained(tmp_path / "ours")
    export_checkpoint(tmp_path / "ours", tmp_path / "llama")
    llama = LlamaForCausalLM.from_pretrained(tmp_path / "llama")
    ids = torch.randint(1, 257, (2, 12), generator=torch.Generator().manual_seed(1))
    batch = {"input_ids": ids, "labels": torch.where(ids % 5 == 0, -100, ids)}
    smooth = {"label_smoothing_factor": 0.1}
    for count in (None, torch.tensor(30)):
        found, expected = (
            make(tmp_path, m, smooth).compute_loss(m, dict(batch), num_items_in_batch=count)
            for make, m in ((ours, source), (theirs, llama.eval()))
        )
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)


def test_label_smoothing_learns_the_next_token(tmp_path):
    ids = [[i % 7 + 60 for i in range(start, start + 16)] for start in range(8)]
    settings = {"label_smoothing_factor": 0.1, "max_steps": 40, "learning_rate": 3e-2}
    trained = model(initializer_range=None)
    ours(
        tmp_path,
        trained,
        settings,
        train_dataset=[{"input_ids": r} for r in ids],
        processing_class=TOKENIZER,
    ).train()
    row = torch.tensor(ids[:1])
    guess = trained.eval()(input_ids=row).logits[0, 4:-1].argmax(-1)
    assert (guess == row[0, 5:]).all()


@pytest.mark.parametrize("when", ["before training", "after training"])
def test_evaluation_in_bf16_leaves_the_weights_as_they_are(tmp_path, when):
    parts = {"train_dataset": BLOCKS, "eval_dataset": BLOCKS, "processing_class": TOKENIZER}
    trainer = ours(tmp_path, model(), {"bf16_full_eval": True}, **parts)
    if when == "after training":
        trainer.train()
    before = {k: v.clone() for k, v in trainer.model.state_dict().items()}
    buffers = {k: v.clone() for k, v in trainer.model.named_buffers()}
    found = trainer.evaluate()["eval_loss"]
    for name, tensor in trainer.model.state_dict().items():
        assert torch.equal(tensor, before[name]) and tensor.dtype == torch.float32
    assert all(torch.equal(v, buffers[k]) for k, v in trainer.model.named_buffers())
    trainer.save_model(str(tmp_path / "saved"))
    saved = load_file(tmp_path / "saved/model.safetensors")
    assert {v.dtype for v in saved.values()} == {torch.float32}
    plain = ours(tmp_path, trainer.model, **parts).evaluate()["eval_loss"]
    half = ours(tmp_path, trainer.model.bfloat16(), **parts).evaluate()["eval_loss"]
    assert found == half != plain


def test_threads_are_those_of_each_run_and_building_arguments_changes_nothing(tmp_path):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        seen = []

        class Trainer(NanoGPTTrainer):
            def training_step(self, *args, **kwargs):
                seen.append(torch.get_num_threads())
                return super().training_step(*args, **kwargs)

        for count, expected in ((1, 1), (None, 2)):
            args = NanoGPTTrainingArguments(
                output_dir=str(tmp_path), num_threads=count, **COMMON | {"eval_strategy": "no"}
            )
            trainer = Trainer(model(), args, train_dataset=BLOCKS, processing_class=TOKENIZER)
            assert torch.get_num_threads() == 2
            trainer.train()
            assert seen[-1] == expected and torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_a_model_made_by_a_function_is_a_language_model_too(tmp_path):
    config = tiny_config("nano", vocab_size=257, n_layer=1)
    make = {"model_init": lambda: NanoGPTForCausalLM(config)}
    parts = {"train_dataset": BLOCKS, "eval_dataset": BLOCKS, "processing_class": TOKENIZER}
    trainer = ours(tmp_path, None, **make, **parts)
    trainer.train()
    assert trainer.evaluate()["eval_bits_per_byte"] > 0
