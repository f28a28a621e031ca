"""Requests that are written together: each gets what it gets alone, in fewer steps."""

import asyncio
import random

import pytest
import torch
from conftest import TWO_SOON
from test_chat import END, TOKENIZER, talker

from hf_nanogpt import export_checkpoint, load_checkpoint, stream_text, train_tokenizer
from hf_nanogpt.apps.batching import EndedError, StoppingDecoder, Writer
from hf_nanogpt.modeling_nanogpt import NanoGPTRotaryEmbedding
from hf_nanogpt.streaming import TextDecoder

PROMPTS = ["the cat", "a", "dogs bark at the moon", "the cat sat"]
GREEDY = {"max_new_tokens": 12, "temperature": 0, "top_k": 0, "top_p": 1.0}


def batched(family: str = "nano", **settings):
    model = talker(family, **settings)
    model.generation_config.sequence_bias = None
    model.generation_config.suppress_tokens.append(END)
    return model


def encode(prompt: str) -> list[int]:
    return TOKENIZER(prompt)["input_ids"]


async def take(writer: Writer, prompt: str, **settings) -> str:
    tokens = [token async for token in writer.write(encode(prompt), GREEDY | settings)]
    return TOKENIZER.decode(tokens, skip_special_tokens=True)


def run(model, work):
    """Return what `work(writer)` does in an event loop."""

    async def whole():
        writer = Writer(model, TOKENIZER, [END])
        try:
            return await work(writer)
        finally:
            await writer.close()

    return asyncio.run(whole())


def alone(model, prompt: str, **settings) -> str:
    return "".join(stream_text(model, TOKENIZER, prompt, **(GREEDY | settings)))


@pytest.mark.parametrize("family", TWO_SOON)
def test_texts_written_together_are_those_written_alone(family):
    model, steps = batched(family), []
    before = model.generation_config.to_dict()

    async def work(writer):
        jobs = [asyncio.ensure_future(take(writer, prompt)) for prompt in PROMPTS]
        await asyncio.sleep(0)  # the first of them has made the batch
        writer._manager.model.register_forward_hook(lambda *_: steps.append(1))
        return await asyncio.gather(*jobs)

    texts = run(model, work)
    assert texts == [alone(model, prompt) for prompt in PROMPTS]
    assert len(steps) < 2 * 12 and all(texts)
    assert model.generation_config.to_dict() == before


def test_each_has_its_own_settings():
    model = batched()

    async def work(writer):
        return await asyncio.gather(
            take(writer, "the cat"),
            take(writer, "the cat", temperature=5.0),
            take(writer, "the cat", temperature=5.0, top_k=1),
            take(writer, "the cat", temperature=0.001),
            take(writer, "the cat", temperature=5.0, top_p=1e-6, max_new_tokens=5),
        )

    greedy, hot, first, cold, short = run(model, work)
    assert greedy == first == cold == alone(model, "the cat") != hot
    assert short == greedy[:5]


def test_tokens_are_drawn_with_the_probabilities_of_the_model():
    model, count = batched(), 400

    async def work(writer):
        given = {"max_new_tokens": 1, "temperature": 0.8}
        return await asyncio.gather(*(take(writer, "a", **given) for _ in range(count)))

    torch.manual_seed(0)
    texts = run(model, work)
    with torch.no_grad():
        logits = model(torch.tensor([encode("a")])).logits[0, -1] / 0.8
    logits[model.generation_config.suppress_tokens] = -torch.inf
    for token in logits.topk(3).indices.tolist():
        share = float(logits.softmax(-1)[token])
        found = texts.count(TOKENIZER.decode([token], skip_special_tokens=True)) / count
        assert abs(found - share) < 5 * (share * (1 - share) / count) ** 0.5


@pytest.mark.parametrize("own", [{"repetition_penalty": 1.5}, {"min_p": 0.2}, {"typical_p": 0.5}])
def test_settings_that_batches_lack_are_written_alone(own):
    model = batched()
    model.generation_config.update(**own)

    async def work(writer):
        return await take(writer, "the cat", temperature=1.0, seed=1), writer._manager

    text, manager = run(model, work)
    assert manager is None and text == alone(model, "the cat", temperature=1.0, seed=1)


def test_other_requests_do_not_change_a_longrope_text():
    model = batched()
    half = model.config.head_dim // 2
    model.config.rope_parameters = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "original_max_position_embeddings": 30,
        "short_factor": [1.0] * half,
        "long_factor": [50.0 * (n + 1) for n in range(half)],
        "factor": 8.0,
    }
    model.model.rotary_emb = NanoGPTRotaryEmbedding(model.config)
    # The first ends below 30 tokens, the second begins above.
    prompts, given = ["a", "the cat sat " * 4], {"max_new_tokens": 25}

    async def work(writer):
        return await asyncio.gather(*(take(writer, prompt, **given) for prompt in prompts))

    assert run(model, work) == [alone(model, prompt, **given) for prompt in prompts]


def test_a_closed_request_leaves_the_batch():
    async def work(writer):
        for _ in range(40):  # more than are written at once, and each would take long
            tokens = writer.write(encode("a"), GREEDY | {"max_new_tokens": 19_000})
            await anext(tokens)
            await tokens.aclose()
        return await take(writer, "the cat")

    model = batched(block_size=20_000)
    assert run(model, work) == alone(model, "the cat")


@pytest.mark.parametrize("settings", [{}, pytest.param({"seed": 1}, marks=pytest.mark.slow)])
def test_all_answers_can_be_ended(settings):
    async def work(writer):
        given = {"max_new_tokens": 19_000, **settings}
        jobs = [asyncio.ensure_future(take(writer, "a", **given)) for _ in range(3)]
        await take(writer, "a", max_new_tokens=1)
        writer.abandon()
        return await asyncio.gather(*jobs, take(writer, "a"), return_exceptions=True)

    ends = run(batched(block_size=20_000), work)
    assert [type(end) for end in ends] == [EndedError] * 4


@pytest.mark.parametrize("family", ["gpt2", pytest.param("qwen3", marks=pytest.mark.slow)])
def test_native_models_are_written_together_too(family, tmp_path):
    batched(family).save_pretrained(tmp_path / "ours")
    TOKENIZER.save_pretrained(tmp_path / "ours")
    export_checkpoint(tmp_path / "ours", tmp_path / "native")
    model, _ = load_checkpoint(tmp_path / "native")
    assert "NanoGPT" not in type(model).__name__

    async def work(writer):
        return await asyncio.gather(*(take(writer, prompt) for prompt in PROMPTS))

    assert run(model, work) == [alone(model, prompt) for prompt in PROMPTS]


def test_stop_texts_cut_at_the_same_character_whatever_the_tokens_are():
    text = "naïve 東京 🦊🦊 and the end, the end"
    bpe = train_tokenizer([text] * 9, kind="bpe", vocab_size=275)
    tokenizers = [bpe, *(train_tokenizer([text], kind=kind) for kind in ("byte", "char"))]
    assert len({len(tokenizer(text).input_ids) for tokenizer in tokenizers}) == 3
    draw = random.Random(0)
    for _ in range(100):
        places = [draw.randrange(len(text)) for _ in range(draw.randrange(1, 5))]
        stops = [text[place : place + draw.randrange(1, 7)] for place in places]
        _, first = min((text.index(stop) + len(stop), text.index(stop)) for stop in stops)
        for tokenizer in tokenizers:
            decoder = StoppingDecoder(TextDecoder(tokenizer), stops)
            pieces = [
                decoder.add(token) for token in tokenizer(text).input_ids if not decoder.stopped
            ]
            assert "".join(pieces) + decoder.finish() == text[:first]
            assert decoder.stopped
