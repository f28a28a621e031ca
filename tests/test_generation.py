"""Every mode of `generate()`: the tokens of transformers' own model, with and without caches.

Each family is exported to the class of transformers that computes the same; what that class
generates is the oracle. Contrastive search, DoLa, group and constrained beam search are not tested:
transformers 5 fetches their code from the Hub.
"""

from functools import cache

import pytest
import torch
import transformers
from conftest import FAMILIES, TINY, TWO_SOON, cache_of, certain_model, soon, tiny_model
from packaging.version import parse
from test_quantization import needs_int8
from transformers import AutoModelForCausalLM, GenerationConfig, StaticCache, set_seed
from transformers.generation import BaseStreamer, ContinuousBatchingConfig

from hf_nanogpt.convert import export_checkpoint
from hf_nanogpt.generation import compiled_decoding
from hf_nanogpt.quantization import quantize_model

NEW, VOCABULARY, LIMIT = 10, TINY["vocab_size"], TINY["block_size"]
LEARNED = ["gpt1", "gpt2", "gpt3"]
GPT2_SOON = soon("gpt2", of=LEARNED)
ROTARY = [family for family in FAMILIES if family not in LEARNED]

SAMPLE = {"do_sample": True, "top_k": 0}  # 0: all of them, not the 50 of transformers
MODES = {
    "greedy": {},
    "multinomial": SAMPLE,
    "temperature": SAMPLE | {"temperature": 0.5},
    "top-k": SAMPLE | {"top_k": 5},
    "top-p": SAMPLE | {"top_p": 0.5},
    "min-p": SAMPLE | {"min_p": 0.2},
    "typical": SAMPLE | {"typical_p": 0.5},
    "beam": {"num_beams": 3, "num_return_sequences": 2},
    "beam sampling": SAMPLE | {"num_beams": 3},
    "repetition penalty": {"repetition_penalty": 1.8},
    "no repeated n-gram": {"no_repeat_ngram_size": 1},
    "bad words": {"bad_words_ids": [[i] for i in range(1, 30)] + [[40, 41]]},
    "forced end": {"forced_eos_token_id": 7},
    "several ends": {"eos_token_id": list(range(0, VOCABULARY, 3)), "min_new_tokens": 2},
}
CACHES = {
    "dynamic": {},
    "none": {"use_cache": False},
    "static": {"cache_implementation": "static"},
    "chunks": {"prefill_chunk_size": 6},
}


@pytest.fixture(scope="session")
def pairs(tmp_path_factory):
    """A function from a family to (transformers' model, ours) with the same weights."""

    @cache
    def make(family: str, **overrides):
        folder, ours = tmp_path_factory.mktemp(family), tiny_model(family, **overrides)
        ours.save_pretrained(folder / "ours")
        export_checkpoint(folder / "ours", folder / "theirs")
        theirs = AutoModelForCausalLM.from_pretrained(folder / "theirs").eval()
        assert "NanoGPT" not in type(theirs).__name__
        return theirs, ours

    return make


@pytest.fixture
def batch(tokens) -> dict[str, torch.Tensor]:
    """Two prompts, of 13 and 20 tokens, padded on the left."""
    mask = torch.ones_like(tokens)
    mask[0, :7] = 0
    return {"input_ids": tokens * mask, "attention_mask": mask}


def generate(model, inputs, **given) -> torch.Tensor:
    """Return the new tokens, NEW of them and no early end unless `given` says otherwise."""
    set_seed(0)
    given = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False} | given
    return model.generate(**inputs, **given)[:, inputs["input_ids"].shape[1] :]


# What a mode does to logits knows nothing of the family or of the kind of cache: one family has all
# modes, and each other one those that fill or reorder a cache.
@pytest.mark.parametrize("mode", MODES)
def test_every_mode_gives_the_tokens_of_the_native_equivalent(mode, pairs, batch):
    theirs, ours = pairs("nano")
    expected = generate(theirs, batch, **MODES[mode])
    greedy = generate(theirs, batch)
    assert mode == "greedy" or not torch.equal(expected, greedy), "the mode changes nothing"
    for cache_settings in ({}, CACHES["static"]):
        assert torch.equal(generate(ours, batch, **MODES[mode], **cache_settings), expected)


@pytest.mark.parametrize("mode", ["greedy", "beam"])
@pytest.mark.parametrize("family", soon("nano", "gpt3"))
def test_every_cache_gives_the_tokens_of_the_native_equivalent(family, mode, pairs, batch):
    theirs, ours = pairs(family)
    expected = generate(theirs, batch, **MODES[mode])
    for name, cache_settings in CACHES.items():
        tokens = generate(ours, batch, **MODES[mode], **cache_settings)
        assert torch.equal(tokens, expected), name


def test_forced_first_token_comes_first(pairs):
    start = {"input_ids": torch.zeros(1, 1, dtype=torch.long)}
    start["attention_mask"] = torch.ones_like(start["input_ids"])
    theirs, ours = (generate(m, start, forced_bos_token_id=9) for m in pairs("nano"))
    assert ours[0, 0] == 9 and torch.equal(ours, theirs)


def test_time_limit_ends_after_the_token_in_hand(pairs, batch):
    _, ours = pairs("nano")
    assert torch.equal(generate(ours, batch, max_time=1e-9), generate(ours, batch)[:, :1])


def test_same_seed_gives_the_same_tokens_and_another_seed_others(batch):
    model = tiny_model()
    first, second = (generate(model, batch, **SAMPLE) for _ in range(2))
    set_seed(1)
    other = model.generate(**batch, **SAMPLE, max_new_tokens=NEW, min_new_tokens=NEW)
    assert torch.equal(first, second)
    assert not torch.equal(first, other[:, -NEW:])


# assisted decoding


def draft_of(family: str, how: str) -> dict:
    full = {"layer_types": ["full_attention"], "sliding_window": None}
    kinds = full if family == "gpt3" else {}
    return {
        "draft model": lambda: {"assistant_model": tiny_model(family, seed=1, n_layer=1, **kinds)},
        "its own draft": lambda: {"assistant_model": tiny_model(family)},
        "first layer": lambda: {"assistant_early_exit": 1},
        "prompt lookup": lambda: {"prompt_lookup_num_tokens": 3},
    }[how]()


# The one draft that is often wrong, so that the cache is shortened, with every family.
DRAFTS = [(family, "draft model") for family in FAMILIES]
DRAFTS += [("gpt3", how) for how in ("its own draft", "first layer", "prompt lookup")]  # a window


@pytest.mark.parametrize(
    ("family", "how"),
    [pytest.param(*pair, marks=[] if pair[0] == "gpt3" else pytest.mark.slow) for pair in DRAFTS],
)
def test_assisted_decoding_gives_the_greedy_tokens(family, how, tokens):
    if how == "first layer" and parse(transformers.__version__) < parse("5.20"):
        pytest.skip("transformers 5.17 cannot shorten the cache of layers that it left out (Qwen3)")
    model, ids = tiny_model(family), tokens[:1]
    greedy = generate(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    ids = torch.cat([ids, greedy, ids], dim=1)  # what was said before can be looked up
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    assert torch.equal(generate(model, inputs, **draft_of(family, how)), generate(model, inputs))


# many prompts at once


def generate_together(model, prompts: list[list[int]], new_tokens: int):
    """Return the requests of `generate_batch`, with a cache that fits on a small machine."""
    config = GenerationConfig(max_new_tokens=new_tokens, do_sample=False, eos_token_id=-1)
    small = ContinuousBatchingConfig(num_blocks=8, max_batch_tokens=16)
    return list(model.generate_batch(prompts, config, continuous_batching_config=small).values())


@pytest.mark.parametrize("family", TWO_SOON)
def test_continuous_batching_gives_each_prompt_the_tokens_it_gets_alone(family, tokens):
    model = tiny_model(family, eos_token_id=None)
    prompts = [tokens[0, :13], tokens[1], tokens[0, 3:8]]
    together = generate_together(model, [ids.tolist() for ids in prompts], NEW)
    assert model.config._attn_implementation == "sdpa"  # as before
    for ids, request in zip(prompts, together, strict=True):
        inputs = {"input_ids": ids[None], "attention_mask": torch.ones_like(ids[None])}
        assert request.generated_tokens == generate(model, inputs)[0].tolist()


# past the context


class Collector(BaseStreamer):
    """Keep each token as it comes, the prompt's included."""

    def __init__(self):
        self.tokens: list[int] = []

    def put(self, value):
        self.tokens += value.flatten().tolist()

    def end(self):
        pass


@pytest.mark.parametrize("settings", CACHES.values(), ids=CACHES)
@pytest.mark.parametrize("family", GPT2_SOON)
def test_learned_positions_end_in_a_clear_error_before_any_wrong_token(family, settings, tokens):
    model, ids = tiny_model(family, eos_token_id=None), tokens[:1]
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    seen, room = Collector(), LIMIT - ids.shape[1] + 1  # the last position has a successor
    with pytest.raises(ValueError, match=f"Position {LIMIT} does not exist.*{LIMIT} tokens"):
        model.generate(**inputs, do_sample=False, max_new_tokens=99, streamer=seen, **settings)
    allowed = model.generate(**inputs, do_sample=False, max_new_tokens=room)
    assert seen.tokens == allowed[0].tolist()


def test_learned_positions_end_continuous_batching_with_the_same_error(tokens):
    model = tiny_model("gpt2", eos_token_id=None)
    prompt = tokens.flatten().repeat(2)[: LIMIT - 2].tolist()
    [request] = generate_together(model, [prompt], NEW)
    assert f"Position {LIMIT} does not exist" in request.error


@pytest.mark.parametrize("settings", CACHES.values(), ids=CACHES)
@pytest.mark.parametrize("family", GPT2_SOON)
def test_padding_does_not_count_against_learned_positions(family, settings, tokens):
    model, ids = tiny_model(family, eos_token_id=None), tokens.repeat(1, 2)[:1]
    padded = torch.nn.functional.pad(ids, (20, 0))  # 60 of 64 positions are behind it
    inputs = {"input_ids": padded, "attention_mask": (padded != 0).long()}
    alone = generate(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    assert torch.equal(generate(model, inputs, **settings)[:, 60:], alone[:, 40:])


@torch.no_grad()
@pytest.mark.parametrize("family", LEARNED)
def test_off_the_cpu_the_length_alone_decides_about_learned_positions(family):
    # Tensors of the meta device have no values: whoever looked at one would raise another error.
    model = tiny_model(family).to("meta")
    ids = torch.ones(2, LIMIT, dtype=torch.long, device="meta")
    masks = dict.fromkeys(model.config.layer_types)  # or transformers looks for documents
    given = {"position_ids": torch.zeros_like(ids), "attention_mask": masks}
    cache = cache_of(model(ids[:, :60], use_cache=True))
    assert model(ids, **given, use_cache=False).logits.shape[:2] == (2, LIMIT)
    assert model(ids[:, :4], past_key_values=cache).logits.shape[:2] == (2, 4)  # fills it
    long = torch.empty(1, LIMIT + 1, 32, device="meta")
    for inputs in ({"input_ids": ids[:, :1], "past_key_values": cache}, {"inputs_embeds": long}):
        with pytest.raises(ValueError, match=f"Position {LIMIT} does not exist"):
            model(**inputs)


@pytest.mark.slow
@pytest.mark.parametrize("family", LEARNED)
def test_compiled_decoding_ends_at_the_last_learned_position(family, tokens):
    model = tiny_model(family, n_layer=1, layer_types=None, eos_token_id=None)
    settings = compiled_decoding()
    settings["compile_config"].backend = "eager"
    settings["compile_config"].mode = None
    inputs = {"input_ids": tokens[:1], "attention_mask": torch.ones_like(tokens[:1])}
    torch.compiler.reset()
    given = {"do_sample": False, **settings}
    assert model.generate(**inputs, max_new_tokens=45, **given).shape[1] == LIMIT + 1
    with pytest.raises(ValueError, match=f"Position {LIMIT} does not exist"):
        model.generate(**inputs, max_new_tokens=46, **given)


@pytest.mark.slow
def test_a_compiled_model_refuses_a_text_longer_than_its_learned_positions(tokens):
    compiled = torch.compile(tiny_model("gpt2", n_layer=1), backend="eager")
    with pytest.raises(ValueError, match=f"Position {LIMIT} does not exist"):
        compiled(tokens.repeat(1, 4)[:, : LIMIT + 1])


SCALED = {
    "default": {},
    "dynamic": {"factor": 2.0},
    "linear": {"factor": 4.0},
    "yarn": {"factor": 3.0, "original_max_position_embeddings": 16},
}


def beyond(tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    ids = tokens.repeat(1, 3)  # 60 tokens and 10 new ones: past 64
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


@pytest.mark.parametrize("family", ROTARY)
def test_rotary_models_continue_past_the_context_as_native_ones_do(family, pairs, tokens):
    theirs, ours = (generate(model, beyond(tokens)) for model in pairs(family))
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("kind", SCALED)
def test_rotary_scaling_goes_past_the_context_as_in_llama(kind, tmp_path, tokens):
    ours = tiny_model(
        "llama", rope_parameters={"rope_type": kind, "rope_theta": 1000.0, **SCALED[kind]}
    )
    ours.save_pretrained(tmp_path / "ours")
    export_checkpoint(tmp_path / "ours", tmp_path / "theirs", to="llama")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "theirs").eval()
    assert torch.equal(generate(ours, beyond(tokens)), generate(theirs, beyond(tokens)))


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_banded_layers_keep_a_bounded_cache_while_they_generate(kind, batch):
    model = tiny_model("gpt3", eos_token_id=None)
    window, kinds = model.config.sliding_window, model.config.layer_types
    given = {"max_new_tokens": 40, "do_sample": False, "return_dict_in_generate": True}
    cache = cache_of(model.generate(**batch, **given, cache_implementation=kind))
    for layer, name in zip(cache.layers, kinds, strict=True):
        length = layer.keys.shape[-2]
        assert length >= 59 if name == "full_attention" else length <= window


# other ways to run the model

FORMS = ["gpt1", "gpt3", "nanochat"]  # post-norm, banded, soft-capped; test_loss.py has nano


@pytest.mark.slow
@pytest.mark.parametrize("family", FORMS)
def test_exported_program_gives_the_same_logits_at_any_length(family, tokens):
    model = tiny_model(family)
    shapes = {"input_ids": {1: torch.export.Dim("length", min=2, max=LIMIT)}, "use_cache": None}
    inputs = {"input_ids": tokens, "use_cache": False}
    program = torch.export.export(model, (), inputs, dynamic_shapes=shapes).module()
    for length in (tokens.shape[1], 11):
        ids = tokens[:, :length]
        expected = model(ids, use_cache=False).logits
        logits = program(input_ids=ids, use_cache=False).logits
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("family", FORMS)
def test_compiled_model_gives_the_same_logits_without_a_graph_break(family, tokens):
    kinds = {"layer_types": ["sliding_attention"]} if family == "gpt3" else {}
    model = tiny_model(family, n_layer=1, **kinds)
    torch.compiler.reset()
    # "aot_eager" captures the graph as the default does, and spares a minute of C++ compiler
    compiled = torch.compile(model, fullgraph=True, dynamic=False, backend="aot_eager")
    expected = model(tokens, use_cache=False).logits
    logits = compiled(tokens, use_cache=False).logits
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(compiled(tokens).logits, expected, rtol=0, atol=1e-5)  # and a cache

    memory = StaticCache(config=model.config, max_cache_len=tokens.shape[1])
    model(tokens[:, :17], past_key_values=memory)
    steps = [compiled(tokens[:, [i]], past_key_values=memory).logits for i in (17, 18, 19)]
    torch.testing.assert_close(torch.cat(steps, 1), expected[:, 17:], rtol=0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("weights", ["fp32", pytest.param("int8", marks=needs_int8)])
def test_compiled_decoding_gives_the_same_tokens(weights):
    ids = torch.arange(1, 25)[None]
    model = certain_model(ids, n_layer=1)
    if weights == "int8":
        quantize_model(model)
    settings = compiled_decoding()
    settings["compile_config"].backend = "aot_eager"
    settings["compile_config"].mode = None
    given = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    compiled = model.generate(ids[:, :12], **given, **settings)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    assert compiled.tolist() == ids[:, :20].tolist()
