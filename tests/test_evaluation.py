"""The results of `evaluate` against arithmetic by hand: one position at a time, plain Python."""

import json
import math

import pytest
import torch
from conftest import FAMILIES, tiny_model
from datasets import Dataset, IterableDataset

from hf_nanogpt import (
    PackedCollator,
    evaluate,
    evaluation,
    token_byte_counts,
    train_tokenizer,
)
from hf_nanogpt.data import documents as documents_module

ROWS = [f"Document {i}: naïve 東京 🦊,\r\nwith {'many ' * (i % 5)}words.\n" for i in range(10)]
DOCUMENTS = Dataset.from_dict({"text": ROWS})
NUM_BYTES = sum(len(row.encode()) for row in ROWS)
TOKENIZER = train_tokenizer([], kind="byte")
SIZE = len(TOKENIZER)


@pytest.fixture(scope="module")
def model():
    return tiny_model("nano", vocab_size=SIZE)


@torch.no_grad()
def nats_by_hand(model, rows: list[str], tokenizer, length: int) -> list[float]:
    """Return -log p of every token after the first, each document of each block by itself."""
    eos = tokenizer.eos_token_id
    ids = [tokenizer(row, split_special_tokens=True)["input_ids"] for row in rows]
    stream = [eos, *(token for row in ids for token in (*row, eos))]
    nats = []
    context: list[int] = []
    for i, target in enumerate(stream[1:]):
        new_block = i % (length - 1) == 0
        context = [stream[i]] if new_block or stream[i] == eos else [*context, stream[i]]
        next_is_new = (i + 1) % (length - 1) == 0 or target == eos or i + 2 == len(stream)
        if next_is_new:  # every prefix of this context at once, then the softmax by hand
            after = [*context[1:], target]
            for logits, token in zip(model(torch.tensor([context])).logits[0], after, strict=True):
                weights = [math.exp(x) for x in logits.tolist()]
                nats.append(-math.log(weights[token] / math.fsum(weights)))
    assert len(nats) == len(stream) - 1
    return nats


@pytest.mark.parametrize(
    ("family", "length"), [("nano", None), ("gpt2", None), *((name, 20) for name in FAMILIES)]
)
def test_loss_perplexity_and_bits_equal_arithmetic_by_hand(family, length):
    model = tiny_model(family, vocab_size=SIZE)
    result = evaluate(model, DOCUMENTS, tokenizer=TOKENIZER, context_length=length)
    nats = nats_by_hand(model, ROWS, TOKENIZER, length or 64)
    assert result.loss == pytest.approx(math.fsum(nats) / len(nats), rel=1e-6)
    assert result.perplexity == pytest.approx(math.exp(result.loss), rel=1e-12)
    assert result.bits_per_byte == pytest.approx(
        math.fsum(nats) / math.log(2) / NUM_BYTES, rel=1e-6
    )
    assert (result.num_tokens, result.num_bytes) == (len(nats), NUM_BYTES)


@torch.no_grad()
def nats_of_windows(model, rows: list[str], length: int, stride: int) -> tuple[list, list]:
    """Return -log p of every token, each from its own context, and the lengths of the contexts."""
    eos = TOKENIZER.eos_token_id
    stream = [eos]
    for row in rows:
        stream += [*TOKENIZER(row)["input_ids"], eos]
    nats, lengths = [], []
    for i in range(1, len(stream)):
        seen = (i - 1) % stride + length - stride  # where windows end at multiples of the stride
        context = stream[max(0, i - seen) : i]
        if eos in context:
            context = context[len(context) - 1 - context[::-1].index(eos) :]
        weights = [math.exp(x) for x in model(torch.tensor([context])).logits[0, -1].tolist()]
        nats.append(-math.log(weights[stream[i]] / math.fsum(weights)))
        lengths.append(len(context))
    return nats, lengths


@pytest.mark.parametrize(
    ("preset", "stride"), [("nano", 1), ("gpt2", 7), ("gpt2", 18), ("nano", 19)]
)
def test_with_a_stride_every_token_has_its_context(preset, stride):
    model, rows = tiny_model(preset, vocab_size=SIZE), [*ROWS[:2], "long " * 20]
    data = Dataset.from_dict({"text": rows})
    nats, lengths = nats_of_windows(model, rows, 20, stride)
    size = sum(len(row.encode()) for row in rows)
    for documents in (data, data.to_iterable_dataset()):
        result = evaluate(
            model, documents, tokenizer=TOKENIZER, context_length=20, stride=stride, batch_size=5
        )
        assert result.loss == pytest.approx(math.fsum(nats) / len(nats), rel=1e-6)
        assert result.bits_per_byte == pytest.approx(math.fsum(nats) / math.log(2) / size, rel=1e-6)
        assert (result.num_tokens, result.num_bytes) == (len(nats), size)
    assert min(lengths[-80:]) >= 20 - stride and max(lengths) <= 19


def assert_same_result(found, expected) -> None:
    """Compare counts exactly, and losses up to what the order of a float32 sum can change."""
    assert (found.num_tokens, found.num_bytes) == (expected.num_tokens, expected.num_bytes)
    assert found.loss == pytest.approx(expected.loss, rel=1e-6)
    assert found.bits_per_byte == pytest.approx(expected.bits_per_byte, rel=1e-6)


def test_the_widest_stride_is_that_of_blocks_without_overlap(model):
    blocks = evaluate(model, DOCUMENTS, tokenizer=TOKENIZER)
    assert_same_result(evaluate(model, DOCUMENTS, tokenizer=TOKENIZER, stride=63), blocks)


@pytest.mark.parametrize("stride", [-1, 0, 20])
def test_a_stride_out_of_range_is_refused(model, stride):
    with pytest.raises(ValueError, match=rf"stride={stride} .*1 to 19"):
        evaluate(model, DOCUMENTS, tokenizer=TOKENIZER, context_length=20, stride=stride)


def test_tokens_are_those_of_the_text_and_one_end_per_document(model):
    result = evaluate(model, DOCUMENTS, tokenizer=TOKENIZER)
    assert result.num_tokens == NUM_BYTES + len(ROWS)


@pytest.mark.parametrize(("kind", "size"), [("bpe", 280), ("char", None)])
def test_bytes_are_those_of_the_text_with_every_tokenizer(kind, size):
    tokenizer = train_tokenizer(ROWS, kind=kind, vocab_size=size or 0)
    model = tiny_model("nano", vocab_size=len(tokenizer))
    result = evaluate(model, DOCUMENTS, tokenizer=tokenizer)
    nats = nats_by_hand(model, ROWS, tokenizer, 64)
    assert result.num_bytes == NUM_BYTES
    assert result.num_tokens == len(nats) < NUM_BYTES
    assert result.bits_per_byte == pytest.approx(sum(nats) / math.log(2) / NUM_BYTES, rel=1e-6)


@pytest.mark.parametrize("batch_size", [3, 16, 1000])
def test_batch_size_does_not_change_the_result(model, batch_size):
    one = evaluate(model, DOCUMENTS, tokenizer=TOKENIZER, batch_size=1)
    many = evaluate(model, DOCUMENTS, tokenizer=TOKENIZER, batch_size=batch_size)
    assert_same_result(many, one)


def test_a_stream_gives_the_same_result(model):
    stream = DOCUMENTS.to_iterable_dataset()
    expected = evaluate(model, DOCUMENTS, tokenizer=TOKENIZER)
    assert_same_result(evaluate(model, stream, tokenizer=TOKENIZER), expected)


def test_a_uniform_model_has_the_entropy_of_its_vocabulary():
    model = tiny_model("nano", vocab_size=SIZE, initializer_range=None)  # the head is zero
    result = evaluate(model, DOCUMENTS, tokenizer=TOKENIZER)
    assert result.loss == pytest.approx(math.log(SIZE), rel=1e-6)
    assert result.perplexity == pytest.approx(SIZE, rel=1e-5)
    bits = math.log2(SIZE) * (NUM_BYTES + len(ROWS)) / NUM_BYTES
    assert result.bits_per_byte == pytest.approx(bits, rel=1e-6)


@pytest.mark.parametrize("name", ["whole.txt", "pieces.txt", "t.jsonl"])
def test_a_file_counts_the_bytes_it_has(model, tmp_path, monkeypatch, name):
    text = "\ufeff" + "".join(ROWS) + "\rno newline at the end \ue000"
    if name == "pieces.txt":
        monkeypatch.setattr(documents_module, "_PIECE", 97)
    path = tmp_path / name
    path.write_bytes((json.dumps({"body": text}) if name == "t.jsonl" else text).encode())
    result = evaluate(model, str(path), tokenizer=TOKENIZER, text_column="body")
    if name != "t.jsonl":  # a byte-order mark at the start of a file is not part of its text
        text = text.removeprefix("\ufeff")
    assert result.num_bytes == len(text.encode())
    assert result.num_tokens == result.num_bytes + 1


def test_a_folder_gives_the_same_result_as_its_model(model, tmp_path):
    model.save_pretrained(tmp_path)
    TOKENIZER.save_pretrained(tmp_path)
    expected = evaluate(model, DOCUMENTS, tokenizer=TOKENIZER)
    for folder in (tmp_path, str(tmp_path)):
        assert_same_result(evaluate(folder, DOCUMENTS), expected)


@pytest.mark.parametrize("training", [False, True])
def test_evaluating_leaves_the_model_as_it_was(training):
    model = tiny_model("gpt2", vocab_size=SIZE, dropout=0.5).train(training)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    first, again = (evaluate(model, DOCUMENTS, tokenizer=TOKENIZER) for _ in range(2))
    assert first == again  # no dropout
    assert model.training is training
    assert all(m.training is training for m in model.modules())
    assert all(tensor.equal(before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_failed_evaluation_leaves_the_model_in_training():
    def break_off():
        yield {"text": "word " * 200}
        raise RuntimeError("the disk is gone")

    model = tiny_model("nano", vocab_size=SIZE).train()
    with pytest.raises(RuntimeError, match="the disk is gone"):
        stream = IterableDataset.from_generator(break_off)
        evaluate(model, stream, tokenizer=TOKENIZER, batch_size=1)
    assert model.training


@pytest.mark.parametrize("length", [-1, 0, 1, 65])
def test_a_context_length_out_of_range_is_refused(model, length):
    with pytest.raises(ValueError, match=rf"context_length={length} .*2 to 64"):
        evaluate(model, DOCUMENTS, tokenizer=TOKENIZER, context_length=length)


def test_a_model_without_its_tokenizer_is_refused(model):
    with pytest.raises(ValueError, match="tokenizer=None"):
        evaluate(model, DOCUMENTS)


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused():
    with pytest.raises(ValueError, match=f"{SIZE}.*61|61.*{SIZE}"):
        evaluate(tiny_model("nano"), DOCUMENTS, tokenizer=TOKENIZER)


def test_a_table_without_text_is_refused(model, tmp_path):
    path = tmp_path / "empty.jsonl"
    path.write_text('{"text": ""}\n{"text": null}\n')
    with pytest.raises(ValueError, match="data="):
        evaluate(model, str(path), tokenizer=TOKENIZER)


# With a large vocabulary


def _largest_logits(model, monkeypatch, limit: int, **settings) -> tuple[object, list[int]]:
    monkeypatch.setattr(evaluation, "LOGITS_AT_ONCE", limit)
    sizes: list[int] = []
    head = model.get_output_embeddings()
    hook = head.register_forward_hook(lambda module, inputs, output: sizes.append(output.numel()))
    result = evaluate(model, DOCUMENTS, tokenizer=TOKENIZER, **settings)
    hook.remove()
    return result, sizes


@pytest.mark.parametrize(
    ("family", "batch_size"), [("nano", 1), ("nano", 16), *((name, 3) for name in FAMILIES)]
)
def test_logits_stay_within_their_limit_and_the_figures_the_same(family, batch_size, monkeypatch):
    model = tiny_model(family, vocab_size=SIZE)
    whole, sizes = _largest_logits(model, monkeypatch, 2**40, batch_size=batch_size)
    limit = 20 * SIZE  # less than a row of 64 where there is one only
    again, smaller = _largest_logits(model, monkeypatch, limit, batch_size=batch_size)
    assert max(sizes) > limit >= max(smaller) and len(smaller) > 3 * len(sizes)
    assert again.loss == pytest.approx(whole.loss, rel=1e-7)
    assert (again.num_tokens, again.num_bytes) == (whole.num_tokens, whole.num_bytes)
    assert "forward" not in vars(model.base_model)


def test_the_trunk_runs_once_for_all_pieces_and_answers_normally_afterwards(monkeypatch):
    model = tiny_model("nano", vocab_size=SIZE)
    runs: list[int] = []
    monkeypatch.setattr(evaluation, "LOGITS_AT_ONCE", 5 * SIZE)
    model.model.layers[0].register_forward_hook(lambda *_: runs.append(1))
    evaluate(model, DOCUMENTS, tokenizer=TOKENIZER, batch_size=100)
    assert len(runs) == 1
    first, second = (model(torch.tensor([[i]])).logits for i in (1, 2))
    assert not first.equal(second)


def test_an_adapter_is_measured_in_pieces_as_whole(monkeypatch):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(
        tiny_model("nano", vocab_size=SIZE),
        peft.LoraConfig(target_modules="all-linear", init_lora_weights=False),
    )
    batch = PackedCollator(TOKENIZER.eos_token_id)(
        [{"input_ids": row} for row in torch.randint(1, SIZE, (3, 40)).numpy()]
    )
    counts = token_byte_counts(TOKENIZER)
    with torch.no_grad():
        whole = evaluation.sum_losses(model, batch, counts)
        monkeypatch.setattr(evaluation, "LOGITS_AT_ONCE", 10 * SIZE)
        torch.testing.assert_close(evaluation.sum_losses(model, batch, counts), whole)


@pytest.mark.parametrize("limit", [2**26, 10 * SIZE])
def test_a_prompt_that_was_learnt_is_refused_as_it_moves_all_positions(limit, monkeypatch):
    peft = pytest.importorskip("peft")
    settings = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model = peft.get_peft_model(tiny_model("nano", vocab_size=SIZE), settings)
    rows = [{"input_ids": row} for row in torch.randint(1, SIZE, (3, 40)).numpy()]
    batch = PackedCollator(TOKENIZER.eos_token_id)(rows)
    monkeypatch.setattr(evaluation, "LOGITS_AT_ONCE", limit)
    with pytest.raises(ValueError, match="43 logits for 40 tokens"):
        evaluation.sum_losses(model, batch, token_byte_counts(TOKENIZER))
