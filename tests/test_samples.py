"""The prompt of the samples: whole words, or whole characters, that leave room to write."""

import pytest
import torch
from conftest import CORPUS, tiny_model
from datasets import Dataset

from hf_nanogpt import (
    DataArguments,
    NanoGPTTrainingArguments,
    add_chat_template,
    generate_text,
    train_tokenizer,
)
from hf_nanogpt.data.packing import pack_documents
from hf_nanogpt.training.samples import choose_prompt, draw_sample, read_prompt

STORY = "Once upon a time there was a model. " * 9


def choose(rows: dict, tokenizer, block_size: int, data: str = "my.txt", **settings) -> str:
    args = NanoGPTTrainingArguments(output_dir="unused", use_cpu=True, **settings)
    blocks = pack_documents(Dataset.from_dict(rows), tokenizer, context_length=block_size)
    first = blocks[0]["input_ids"]
    return choose_prompt(
        args, DataArguments(data=data), tokenizer, first, context_length=block_size
    )


@pytest.mark.parametrize(
    ("text", "block_size", "expected"),
    [
        (STORY, 128, "Once upon a"),
        (STORY, 40, "Once upon"),
        ("Donaudampfschiffahrt " * 9, 20, "Donau"),  # the word does not fit
        ("Привет, мир! " * 40, 256, "Привет, мир! Привет,"),
        ("नमस्ते दुनिया " * 40, 160, "नमस्ते दुनिया"),
        ("吾輩は猫である。名前はまだ無い。" * 9, 64, "吾輩は猫で"),  # 3 bytes each
        ("e\u0301" * 300, 44, "e\u0301" * 3),  # a letter and an accent have 3 bytes
        ("\U0001f469\u200d\U0001f4bb" * 90, 100, "\U0001f469\u200d\U0001f4bb" * 2),  # 11 bytes
        ("猫" * 90, 8, ""),  # not even one fits
    ],
)
def test_a_prompt_is_whole_words_or_characters_in_a_quarter_of_the_block(
    text, block_size, expected
):
    tokenizer = train_tokenizer([text], kind="byte")
    assert choose({"text": [text]}, tokenizer, block_size) == expected
    assert len(expected.encode()) <= block_size // 4


@pytest.mark.parametrize("block_size", [32, 64, 512])
def test_a_prompt_of_a_trained_tokenizer_takes_a_quarter_at_most(block_size):
    tokenizer = train_tokenizer([CORPUS], kind="bpe", vocab_size=400)
    prompt = choose({"text": [CORPUS]}, tokenizer, block_size)
    assert 0 < len(tokenizer(prompt)["input_ids"]) <= block_size // 4 and len(prompt) <= 40
    # The first line, or the next if there is more of it in the block.
    lines = [" ".join(text.split()) for text in (CORPUS, CORPUS.lstrip().partition("\n")[2])]
    assert lines[block_size > 32].startswith(prompt)


def test_a_prompt_is_not_the_rest_of_a_word_where_a_text_was_cut():
    text = "rit there was a word\nand another line of them " + "x " * 99
    assert choose({"text": [text]}, train_tokenizer([], kind="byte"), 256) == "and another line"


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        (["Anna has two.", "Ben has 3 pears here."], "Ben has"),  # of the second: half of five
        (["Anna has two.", "Ben runs."], "Anna"),
        (["Yes.", "No."], "Ye"),
        (["吾輩は猫である。", "猫"], "吾輩は猫"),
    ],
)
def test_a_prompt_is_at_most_half_of_a_document(rows, expected):
    """After a whole one, a model has learnt to end the text, and the sample would be empty."""
    assert choose({"text": rows}, train_tokenizer([], kind="byte"), 256) == expected


def test_a_sample_has_a_token_although_the_model_would_end_at_once():
    tokenizer = train_tokenizer([], kind="byte")
    add_chat_template(tokenizer)
    model = tiny_model(vocab_size=len(tokenizer))
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, len(tokenizer) - 1]
    with torch.no_grad():  # an end gets all the probability
        model.get_output_embeddings().weight.zero_()
    ends = torch.zeros(len(tokenizer))
    ends[model.generation_config.eos_token_id] = 1e4

    def add(module, args, output):
        output.logits += ends

    model.register_forward_hook(add)
    assert generate_text(model, tokenizer, "a", max_new_tokens=9) == ["a"]
    sample = draw_sample(model, tokenizer, "a", max_new_tokens=9, seed=1)
    ids = tokenizer(sample)["input_ids"]
    assert sample.startswith("a") and len(sample) == 2 and len(ids) == 2


def test_the_prompt_of_a_chat_is_read_without_special_tokens():
    tokenizer = train_tokenizer([], kind="byte")
    assert read_prompt("<|endoftext|>Who?", tokenizer) == "<|endoftext|>Who?"
    add_chat_template(tokenizer)
    prompt = "<|endoftext|><|im_start|>user\nWho?<|im_end|>\n<|im_start|>assistant\n"
    assert read_prompt(prompt, tokenizer) == "user\nWho?\nassistant\n"


def test_a_prompt_that_is_given_stays_and_that_of_code_fits():
    tokenizer = train_tokenizer([], kind="byte")
    assert choose({"text": [STORY]}, tokenizer, 8, sample_prompt="a" * 50) == "a" * 50
    assert choose({"text": [STORY]}, tokenizer, 256, data="python-stdlib") == "def main("
    assert choose({"text": [STORY]}, tokenizer, 16, data="python-stdlib") == "def"


@pytest.mark.parametrize(
    ("block_size", "asked"), [(2000, "Why why"), (300, "Who?"), (130, "Why why")]
)
def test_the_prompt_of_a_chat_is_a_whole_question(block_size, asked):
    # Questions of 116 and 24 tokens; in a block of 130 only the first has an answer.
    tokenizer = train_tokenizer([], kind="byte")
    add_chat_template(tokenizer)
    chats = [
        [{"role": "user", "content": question}, {"role": "assistant", "content": "I."}]
        for question in ("Why why " * 12, "Who?")
    ]
    prompt = choose({"messages": chats}, tokenizer, block_size)
    assert prompt.endswith("<|im_start|>assistant\n") and asked in prompt
