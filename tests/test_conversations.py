"""Conversations: what is learnt from them, and that the trained model answers and stops."""

import json

import pytest
import torch
from conftest import tiny_model
from datasets import Dataset, IterableDataset
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, pipeline

from hf_nanogpt import (
    DataArguments,
    NanoGPTConfig,
    NanoGPTForCausalLM,
    PackedCollator,
    add_chat_template,
    evaluate,
    export_checkpoint,
    load_checkpoint,
    load_preset,
    load_text,
    tokenize_corpus,
    train,
    train_tokenizer,
)
from hf_nanogpt.data.conversations import ConversationEncoder
from hf_nanogpt.data.packing import cut_blocks
from hf_nanogpt.data.stored import load_tokens

FRUIT = ["apple", "pear", "plum", "fig", "lemon", "melon", "grape", "lime", "date", "kiwi"]


def talk(question: str, answer: str, system: str = "") -> list[dict]:
    said = {"system": system, "user": question, "assistant": answer}
    return [{"role": role, "content": text} for role, text in said.items() if text]


CHATS = [talk(f"A {name}?", "Ça va.", "Be brief." if name < "g" else "") for name in FRUIT * 3]
CHATS[0] += talk("And you?", "Oui.")


def write_table(path, chats) -> str:
    path.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    return str(path)


@pytest.fixture(scope="module")
def table(tmp_path_factory) -> str:
    return write_table(tmp_path_factory.mktemp("data") / "chat.jsonl", CHATS)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> str:
    """A checkpoint without a chat template."""
    folder = tmp_path_factory.mktemp("base")
    tokenizer = train_tokenizer([], kind="byte")
    shape = {"n_layer": 1, "n_embd": 32, "n_head": 2, "block_size": 96, "vocab_size": 257}
    torch.manual_seed(0)
    ids = {f"{name}_token_id": tokenizer.eos_token_id for name in ("bos", "eos", "pad")}
    NanoGPTForCausalLM(load_preset("nano", **shape, **ids)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def chat(tmp_path_factory, base, table):
    """`base` fine-tuned on the table: the result of its training."""
    return train(
        "finetune",
        start_from=base,
        data=table,
        chat_template="chatml",
        output_dir=str(tmp_path_factory.mktemp("runs") / "chat"),
        max_steps=80,
        learning_rate=1e-2,
        per_device_train_batch_size=4,
        eval_steps=80,
        save_strategy="no",
        disable_tqdm=True,
    )


def collate(args: DataArguments):
    tokenizer, tokens, _ = load_tokens(args)
    blocks = cut_blocks(tokens, context_length=64, eos_token_id=tokenizer.eos_token_id)
    return tokenizer, PackedCollator(tokenizer.eos_token_id)(list(iter(blocks)))


@pytest.mark.parametrize("kind", ["byte", "char", "bpe"])
def test_only_answers_are_learnt_and_conversations_stay_apart(kind, table):
    args = DataArguments(
        data=table, validation_data=table, tokenizer=kind, vocab_size=280, chat_template="chatml"
    )
    tokenizer, batch = collate(args)
    # The last token of a block is the first of the next.
    ids = torch.cat([batch["input_ids"][0, :1], batch["input_ids"][:, 1:].flatten()])
    labels = torch.cat([batch["labels"][0, :1], batch["labels"][:, 1:].flatten()])
    texts = [tokenizer.apply_chat_template(chat, tokenize=False) for chat in CHATS]
    found = tokenizer.decode(ids).split("<|endoftext|>")
    assert sorted(filter(None, found)) == sorted(text[len("<|endoftext|>") :] for text in texts)
    answers = [m["content"] for chat in CHATS for m in chat if m["role"] == "assistant"]
    learnt = tokenizer.decode(labels[labels >= 0]).split("<|im_end|>")
    assert sorted(learnt) == sorted(["", *answers])
    starts = (batch["input_ids"] == tokenizer.eos_token_id).nonzero(as_tuple=True)
    assert not batch["position_ids"][starts].any()


def test_a_stream_of_conversations_gives_the_same_tokens(table):
    given = {"data": table, "validation_data": table, "tokenizer": "byte"}
    whole = collate(DataArguments(**given, chat_template="chatml"))[1]
    streamed = collate(DataArguments(**given, chat_template="chatml", streaming=True))[1]
    assert all(whole[name].equal(streamed[name]) for name in whole)


@pytest.mark.parametrize(("family", "size"), [("nano", 257), ("gpt2", 257), ("nano", 320)])
def test_new_tokens_begin_as_the_mean_of_the_others(family, size):
    tokenizer = train_tokenizer([], kind="byte")
    model = tiny_model(family, vocab_size=size)
    before = model.get_output_embeddings().weight.clone(), model.model.embed_tokens.weight.clone()
    add_chat_template(tokenizer, model=model)
    assert len(tokenizer) == 259 and model.config.vocab_size == max(size, 259)
    after = model.get_output_embeddings().weight, model.model.embed_tokens.weight
    assert (after[0] is after[1]) == model.config.tie_word_embeddings
    for old, new in zip(before, after, strict=True):
        torch.testing.assert_close(new[257:259], old[:257].mean(dim=0).expand(2, -1))
        assert new[:257].equal(old[:257])
    assert model.generation_config.eos_token_id == [0, 258]
    once_more = [weight.clone() for weight in after]
    add_chat_template(tokenizer, model=model)
    assert len(tokenizer) == 259 and all(map(torch.equal, once_more, after))


def test_trained_on_conversations_the_model_answers_and_stops(chat):
    folder = str(chat.output_dir)
    assert GenerationConfig.from_pretrained(folder).eos_token_id == [0, 258]
    answer = pipeline("text-generation", folder, device="cpu")
    said = answer(talk("A nut?", ""), do_sample=False, max_new_tokens=30)[0]["generated_text"]
    assert said[-1] == {"role": "assistant", "content": "Ça va."}
    assert chat.prompt.endswith("<|im_start|>assistant\n") and "Ça va." in chat.sample
    assert "hf-nanogpt chat" in (chat.output_dir / "README.md").read_text()


@pytest.mark.parametrize("tied", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_an_adapter_brings_the_rows_of_new_tokens(tied, base, table, tmp_path):
    peft = pytest.importorskip("peft", reason="pip install 'hf-nanogpt[finetune]'")
    start, run = tmp_path / "start", tmp_path / "run"
    tokenizer = load_checkpoint(base)[1]
    config = load_checkpoint(base)[0].config.to_dict() | {"tie_word_embeddings": tied}
    NanoGPTForCausalLM(NanoGPTConfig(**config)).save_pretrained(start)
    tokenizer.save_pretrained(start)
    train(
        "finetune",
        start_from=start,
        data=table,
        chat_template="chatml",
        lora=True,
        output_dir=str(run),
        max_steps=3,
        sample_steps=0,
        disable_tqdm=True,
    )
    merged, _ = load_checkpoint(run)
    assert merged.config.tie_word_embeddings == tied
    again = peft.AutoPeftModelForCausalLM.from_pretrained(run / "adapter").merge_and_unload()
    known, found = merged.state_dict(), again.state_dict()
    assert known["lm_head.weight"].shape[0] == len(tokenizer) + 2
    for name in known:
        torch.testing.assert_close(found[name], known[name])


def test_evaluation_repeats_what_training_measured_on_answers(chat, table):
    found = evaluate(str(chat.output_dir), data=table, held_out=0.1)
    assert found.num_tokens == chat.metrics["eval_tokens"]
    assert found.loss == pytest.approx(chat.metrics["eval_loss"], rel=1e-5)
    assert chat.metrics["eval_loss"] < 0.1 and chat.metrics["learnt_answers"] is True


def test_the_exported_model_keeps_the_template_and_the_end(chat, tmp_path):
    export_checkpoint(chat.output_dir, tmp_path / "native")
    ours, native = (
        AutoTokenizer.from_pretrained(f) for f in (chat.output_dir, tmp_path / "native")
    )
    assert native.chat_template == ours.chat_template and "generation" in native.chat_template
    settings = GenerationConfig.from_pretrained(tmp_path / "native")
    assert settings.eos_token_id == [0, 258]
    answer = pipeline("text-generation", str(tmp_path / "native"), device="cpu")
    said = answer(talk("A nut?", ""), do_sample=False, max_new_tokens=30)[0]["generated_text"]
    assert said[-1]["content"] == "Ça va."


def test_a_template_that_the_tokenizer_has_is_kept(chat, base, table, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = "{% for m in messages %}{{ m.role + ': ' + m.content }}\n{% endfor %}"
    AutoModelForCausalLM.from_pretrained(base).save_pretrained(tmp_path / "own")
    tokenizer.save_pretrained(tmp_path / "own")
    args = DataArguments(data=table, tokenizer=str(tmp_path / "own"), chat_template="chatml")
    kept, batch = collate(args)
    assert (len(kept), kept.chat_template) == (257, tokenizer.chat_template)
    answers = [m["content"] for chat in CHATS for m in chat if m["role"] == "assistant"]
    learnt = kept.decode(batch["labels"][:, 1:][batch["labels"][:, 1:] >= 0])
    # It marks none, and they are found. It has no prompt either, so the role is to be written too.
    assert set(learnt.split("\n")) == {"", *(f"assistant: {a}" for a in answers)}
    again = train(
        "finetune",
        start_from=chat.output_dir,
        data=table,
        output_dir=str(tmp_path / "again"),
        max_steps=1,
        disable_tqdm=True,
    )
    assert AutoTokenizer.from_pretrained(again.output_dir).chat_template
    assert GenerationConfig.from_pretrained(again.output_dir).eos_token_id == [0, 258]


BAD = {
    "unknown role": (
        [{"role": "robot", "content": "hi"}],
        "role='robot': it must be one of system",
    ),
    "no role": ([{"content": "hi"}], "row 2 has a message with role=None"),
    "no content": ([{"role": "user"}], "row 2 has a message with content=None"),
    "weight": (
        [{"role": "user", "content": "hi", "weight": 0.5}],
        "row 2 has a message with weight=0.5: give 0",
    ),
    "tool_calls": (
        [{"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f"}}]}],
        "row 2 has a message with tool_calls=.* which is not read",
    ),
    "reasoning": (
        [{"role": "assistant", "content": "4.", "reasoning_content": "2 + 2"}],
        "row 2 has a message with reasoning_content='2 . 2', which is not read",
    ),
    "images": (
        [{"role": "user", "content": "What is it?", "images": ["cat.png"]}],
        "row 2 has a message with images=.* which is not read",
    ),
    "empty": ([], "row 2 has messages=\\[\\]: give a list of messages"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_conversations_are_refused_by_row(case, tmp_path):
    messages, reason = BAD[case]
    path = write_table(tmp_path / "bad.jsonl", [CHATS[0], messages])
    with pytest.raises(ValueError, match=reason):
        load_tokens(DataArguments(data=path, tokenizer="byte", chat_template="chatml"))


def test_tools_that_are_not_read_are_named(tmp_path, caplog):
    rows = [{"messages": chat, "tools": [{"name": "f"}]} for chat in CHATS]
    path = tmp_path / "tools.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    load_text(str(path))
    assert "The column tools is not read" in caplog.text


def test_a_template_that_refuses_is_named(base):
    tokenizer = load_checkpoint(base)[1]
    tokenizer.chat_template = "{{ raise_exception('No system messages') }}"
    with pytest.raises(ValueError, match=r"refuses the conversation .*No system messages"):
        ConversationEncoder(tokenizer)({"messages": CHATS[:1]})


def test_a_table_with_texts_and_conversations_is_read_as_text_and_says_so(tmp_path, caplog):
    path, count = tmp_path / "both.jsonl", 30
    rows = [{"messages": CHATS[i], "text": f"plain {i} " * 9} for i in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer = load_tokens(DataArguments(data=str(path), tokenizer="byte"))[0]
    assert "set text_column=messages" in caplog.text
    caplog.clear()
    add_chat_template(tokenizer)
    model = tiny_model(vocab_size=len(tokenizer))

    def measure(data, **settings) -> int:
        return evaluate(model, data, tokenizer=tokenizer, **settings).num_tokens

    table = Dataset.from_json(str(path))
    texts = sum(len(row["text"]) for row in rows) + count  # and an eos after each
    for data in (str(path), table, table.to_iterable_dataset()):
        assert measure(data) == texts
        assert "set text_column=messages" in caplog.text
        caplog.clear()
    answers = sum(m["role"] == "assistant" for row in rows for m in row["messages"])
    said = "".join(m["content"] for r in rows for m in r["messages"] if m["role"] == "assistant")
    for data, settings in (
        (str(path), {"text_column": "messages"}),
        (table.select_columns("messages"), {}),
        (load_text(str(path), text_column="messages"), {}),
        (IterableDataset.from_generator(lambda: ({"messages": r["messages"]} for r in rows)), {}),
    ):
        assert measure(data, **settings) == len(said.encode()) + answers
    assert not caplog.text
    with pytest.raises(ValueError, match="have the columns body: rename one to text, or to mess"):
        measure(Dataset.from_dict({"body": ["x"]}))


def test_validation_without_a_token_to_predict_is_refused(base, table, tmp_path):
    questions = write_table(tmp_path / "questions.jsonl", [talk("Who?", "")] * 30)
    (tmp_path / "empty.jsonl").write_text('{"text": ""}\n' * 30)
    (tmp_path / "text.txt").write_text("some words to learn " * 30)
    run = {"output_dir": str(tmp_path / "run"), "max_steps": 1, "start_from": base}
    for data, validation, settings in (
        (table, questions, {"chat_template": "chatml"}),
        (str(tmp_path / "text.txt"), str(tmp_path / "empty.jsonl"), {}),
    ):
        with pytest.raises(ValueError, match="so there is nothing to measure"):
            train("finetune", data=data, validation_data=validation, **settings, **run)
    assert not (tmp_path / "run").exists()


def test_the_weights_of_a_table_are_honoured(tmp_path):
    chats = [[*talk("A?", "no"), *talk("B?", "yes")] for _ in range(3)]
    chats[0][1]["weight"] = 0
    path = write_table(tmp_path / "weights.jsonl", chats)
    given = {"data": path, "validation_data": path, "tokenizer": "byte"}
    for streaming in (False, True):
        args = DataArguments(**given, chat_template="chatml", streaming=streaming)
        tokenizer, batch = collate(args)
        labels = torch.cat([batch["labels"][0, :1], batch["labels"][:, 1:].flatten()])
        learnt = tokenizer.decode(labels[labels >= 0])
        assert learnt == "".join(f"{a}<|im_end|>" for a in ("yes", "no", "yes", "no", "yes"))


@pytest.mark.slow
def test_questions_alone_teach_nothing(base, tmp_path):
    questions = [talk(f"{i}?" * 60, "") for i in range(30)]
    alone = write_table(tmp_path / "alone.jsonl", questions)
    given = {"start_from": base, "chat_template": "chatml", "output_dir": str(tmp_path / "run")}
    with pytest.raises(ValueError, match="nothing to learn"):
        train("finetune", data=alone, max_steps=2, **given)
    assert not (tmp_path / "run").exists()
    mixed = write_table(tmp_path / "mixed.jsonl", [*questions, *CHATS])
    quiet = {"disable_tqdm": True, "sample_steps": 0, "eval_strategy": "no"}
    one = {"per_device_train_batch_size": 1, "num_train_epochs": 1, "eval_on_start": False}
    answered = write_table(tmp_path / "answered.jsonl", CHATS)
    result = train("finetune", data=mixed, validation_data=answered, **given, **quiet, **one)
    assert result.metrics["train_steps"] > 10


def test_settings_that_do_not_fit_are_refused_in_a_sentence(table, tmp_path):
    with pytest.raises(ValueError, match="chat_template='alpaca' is unknown: give chatml"):
        DataArguments(chat_template="alpaca")
    with pytest.raises(ValueError, match=r"tokenizer has no chat template: .*--chat_template"):
        load_tokens(DataArguments(data=table, tokenizer="byte"))
    with pytest.raises(
        ValueError, match=r"holds conversations .messages., which cannot be tokenised"
    ):
        tokenize_corpus(DataArguments(data=table, tokenizer="byte"), tmp_path / "tokens")
    (tmp_path / "strings.jsonl").write_text('{"messages": ["hi", "ho"]}\n' * 3)
    with pytest.raises(ValueError, match=r"row 1 has messages=.'hi', 'ho'.: give a list"):
        load_tokens(DataArguments(data=str(tmp_path / "strings.jsonl"), chat_template="chatml"))
