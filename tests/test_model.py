"""The parts against independent formulas, and the interface that transformers expects."""

import math
import re

import pytest
import torch
from conftest import native_equivalent, tiny_config, tiny_model
from torch import nn
from transformers import (
    AttentionInterface,
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    StaticCache,
)

from hf_nanogpt.modeling_nanogpt import (
    CACHE,
    NanoGPTAttention,
    NanoGPTForCausalLM,
    NanoGPTForTokenClassification,
    NanoGPTModel,
    NanoGPTRMSNorm,
    NanoGPTRotaryEmbedding,
    apply_rotary_pos_emb,
    build_norm,
    eager_attention_forward,
)

# The parts.


def test_attention_equals_torch_with_scores_over_root_of_head_dim(tokens):
    model = tiny_model("gpt2", n_layer=1, head_dim=5)  # 4 heads of 5 in a width of 32
    attention, x = model.model.layers[0].self_attn, torch.randn(2, 6, 32)
    q, k, v = (
        nn.functional.linear(x, proj.weight, proj.bias).reshape(2, 6, 4, 5).transpose(1, 2)
        for proj in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    scores = torch.einsum("bhtd,bhsd->bhts", q, k) / math.sqrt(5)
    scores = scores.masked_fill(torch.ones(6, 6, dtype=torch.bool).triu(1), -math.inf)
    heads = torch.einsum("bhts,bhsd->bthd", scores.softmax(-1), v).reshape(2, 6, 20)
    expected = heads @ attention.o_proj.weight.T + attention.o_proj.bias
    torch.testing.assert_close(attention(x)[0], expected, rtol=0, atol=1e-5)


def test_query_and_key_norm_make_attention_blind_to_their_scale():
    torch.manual_seed(0)
    config = tiny_config("nano", norm_eps=1e-12)
    attention, x = NanoGPTAttention(config, 0), torch.randn(2, 6, 32)
    config._attn_implementation = "sdpa"
    before = attention(x)[0]
    with torch.no_grad():
        attention.q_proj.weight *= 8
        attention.k_proj.weight *= 0.1
    torch.testing.assert_close(attention(x)[0], before, rtol=0, atol=1e-5)


def test_rotation_equals_complex_multiplication():
    config = tiny_config("nano", rope_parameters={"rope_type": "default", "rope_theta": 500.0})
    D, positions = config.head_dim, torch.tensor([[0, 1, 5, 40], [3, 2, 2, 9]])
    q, k = torch.randn(2, 4, 4, D), torch.randn(2, 2, 4, D)
    rotated = apply_rotary_pos_emb(q, k, *NanoGPTRotaryEmbedding(config)(q, positions))
    frequencies = 500.0 ** (-torch.arange(0, D, 2) / D)
    turn = torch.exp(1j * positions[:, None, :, None] * frequencies)  # (B, 1, T, D / 2)
    for given, found in zip((q, k), rotated, strict=True):
        pairs = torch.complex(given[..., : D // 2], given[..., D // 2 :]) * turn
        expected = torch.cat((pairs.real, pairs.imag), dim=-1)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", ["nano", "llama", "qwen3", "nanochat"])
def test_rotary_models_see_only_distances(family, tokens):
    model = tiny_model(family)
    here, far = (model(tokens, position_ids=torch.arange(20)[None] + n).logits for n in (0, 1000))
    torch.testing.assert_close(far, here, rtol=0, atol=5e-4)


@pytest.mark.parametrize("norm_type", ["rmsnorm", "rmsnorm_unweighted", "layernorm"])
def test_norm_equals_its_formula(norm_type):
    norm = build_norm(tiny_config("nano", norm_type=norm_type, norm_eps=0.3), 32)
    weight, bias, x = torch.randn(32), torch.randn(32), torch.randn(2, 5, 32) + 1
    state = {"rmsnorm": {"weight": weight}, "layernorm": {"weight": weight, "bias": bias}}
    norm.load_state_dict(state.get(norm_type, {}))
    if norm_type == "layernorm":
        x0 = x - x.mean(-1, keepdim=True)
        expected = x0 / (x0.square().mean(-1, keepdim=True) + 0.3).sqrt() * weight + bias
    else:
        expected = x / (x.square().mean(-1, keepdim=True) + 0.3).sqrt()
        expected = expected * weight if norm_type == "rmsnorm" else expected
    torch.testing.assert_close(norm(x), expected, rtol=0, atol=1e-5)
    assert isinstance(norm, nn.LayerNorm if norm_type == "layernorm" else NanoGPTRMSNorm)


def test_gated_and_plain_mlp_equal_their_formulas():
    x = torch.randn(2, 5, 32)
    glu = tiny_model("llama").model.layers[0].mlp
    gate, up = x @ glu.gate_proj.weight.T, x @ glu.up_proj.weight.T
    expected = (gate * gate.sigmoid() * up) @ glu.down_proj.weight.T
    torch.testing.assert_close(glu(x), expected, rtol=0, atol=1e-5)
    mlp = tiny_model("nanochat").model.layers[0].mlp
    expected = (x @ mlp.up_proj.weight.T).relu().square() @ mlp.down_proj.weight.T
    torch.testing.assert_close(mlp(x), expected, rtol=0, atol=1e-5)


def test_soft_capping_bounds_the_logits_and_only_them(tokens):
    capped = tiny_model("nanochat", final_logit_softcapping=0.5)(tokens).logits
    free = tiny_model("nanochat", final_logit_softcapping=None)(tokens).logits
    torch.testing.assert_close(capped, 0.5 * torch.tanh(free / 0.5), rtol=0, atol=1e-6)
    assert capped.abs().max() <= 0.5 < free.abs().max()


ROPE = {
    "default": {},
    "linear": {"factor": 2.0},
    "dynamic": {"factor": 2.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 16},
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
}


@pytest.mark.parametrize("rope_type", ROPE)
def test_llama_equals_transformers_llama(rope_type, tokens):
    rope = {"rope_type": rope_type, "rope_theta": 10000.0} | ROPE[rope_type]
    model = tiny_model("llama", rope_parameters=rope, block_size=16)  # shorter than the text
    native = native_equivalent(model, LlamaConfig, LlamaForCausalLM)
    torch.testing.assert_close(model(tokens).logits, native(tokens).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", ["nano", "qwen3"])
def test_nano_and_qwen3_equal_transformers_qwen3(family, tokens):
    model = tiny_model(family)
    native = native_equivalent(model, Qwen3Config, Qwen3ForCausalLM)
    torch.testing.assert_close(model(tokens).logits, native(tokens).logits, rtol=0, atol=1e-5)


# The interface.


def test_embeddings_as_input_equal_token_ids(family, tokens):
    model = tiny_model(family)
    embeds = model.get_input_embeddings()(tokens)
    assert torch.equal(model(inputs_embeds=embeds).logits, model(tokens).logits)


@pytest.mark.parametrize("given", [{}, {"inputs_embeds": torch.zeros(2, 20, 32)}])
def test_input_must_be_ids_or_embeddings(given, tokens):
    ids = {"input_ids": tokens} if given else {}
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        tiny_model()(**ids, **given)


def test_hidden_states_and_attentions_have_their_shapes(family, tokens):
    model = tiny_model(family, attn_implementation="eager")
    out = model(tokens, output_hidden_states=True, output_attentions=True)
    assert [tuple(h.shape) for h in out.hidden_states] == [(2, 20, 32)] * 4
    assert [tuple(a.shape) for a in out.attentions] == [(2, 4, 20, 20)] * 3
    for weights in out.attentions:
        torch.testing.assert_close(weights.sum(-1), torch.ones(2, 4, 20))
        assert weights.triu(1).abs().max() == 0.0
    assert torch.equal(model.lm_head(out.hidden_states[-1]), model.lm_head(model.model(tokens)[0]))
    assert model(tokens, return_dict=False)[0].shape == (2, 20, 61)


def test_learned_positions_end_with_our_message():
    model = tiny_model("gpt2", block_size=8)
    assert model(torch.ones(1, 8, dtype=torch.long)).logits.shape == (1, 8, 61)
    with pytest.raises(ValueError, match=r"Position 8 .*\(block_size\)=8 .*Shorten the text"):
        model(torch.ones(1, 9, dtype=torch.long))
    with pytest.raises(ValueError, match="Position 8 "):
        model.generate(torch.ones(1, 6, dtype=torch.long), max_new_tokens=9, eos_token_id=None)


def test_rotary_positions_go_past_the_block_size(tokens):
    assert tiny_model("nano", block_size=8)(tokens).logits.isfinite().all()


def test_resized_vocabulary_keeps_the_old_logits(family, tokens):
    model = tiny_model(family)
    before = model(tokens).logits
    model.resize_token_embeddings(80)
    assert model.config.vocab_size == 80
    assert model.lm_head.weight.shape == model.get_input_embeddings().weight.shape == (80, 32)
    tied = model.lm_head.weight is model.get_input_embeddings().weight
    assert tied is model.config.tie_word_embeddings
    after = model(tokens, labels=tokens)
    torch.testing.assert_close(after.logits[..., :61], before, rtol=0, atol=1e-6)
    assert after.loss.isfinite()


def test_every_parallel_plan_entry_names_a_module(family):
    model = tiny_model(family)
    plans = [model.config.base_model_tp_plan, model.config.base_model_pp_plan]
    base = {f"model.{key}" for plan in plans for key in plan}
    keys = base | {*model._tp_plan, *model._pp_plan, *model._fsdp_plan}
    names = [name for name, _ in model.named_modules()] + [n for n, _ in model.named_parameters()]
    patterns = {key: re.escape(key).replace(r"\*", r"\d+") for key in keys}
    unmatched = {k for k, p in patterns.items() if not any(re.fullmatch(p, n) for n in names)}
    assert unmatched == set()


def test_tensor_parallel_plan_splits_every_matrix_of_a_layer(family):
    model = tiny_model(family)
    linears = {
        name.replace("layers.0", "layers.*")
        for name, module in model.model.named_modules()
        if isinstance(module, nn.Linear) and name.startswith("layers.0.")
    }
    assert linears <= set(model.config.base_model_tp_plan)
    assert "base_model_tp_plan" not in model.config.to_dict()


def test_attention_implementation_can_be_changed(family, tokens):
    model = tiny_model(family)
    assert model.config._attn_implementation == "sdpa"
    assert model._can_set_attn_implementation()
    sdpa = model(tokens).logits
    model.set_attn_implementation("eager")
    assert model.config._attn_implementation == "eager"
    torch.testing.assert_close(model(tokens).logits, sdpa, rtol=0, atol=1e-5)
    assert model(tokens, output_attentions=True).attentions[0] is not None


def test_attention_backend_is_told_all_it_needs(tokens):
    # What flash attention and vLLM rely on: the window, the scale, key-value heads not repeated,
    # and whatever keyword the caller gave to the model.
    calls = []

    def backend(module, query, key, value, attention_mask, **kwargs):
        calls.append((module, key.shape[1], kwargs))
        return eager_attention_forward(module, query, key, value, attention_mask, **kwargs)

    AttentionInterface.register("recorder", backend)
    model = tiny_model("gpt3", num_key_value_heads=2, attn_implementation="recorder")
    model(tokens, attention_instances="from the caller")
    windows = [None, model.config.sliding_window, None]
    assert [kwargs["sliding_window"] for _, _, kwargs in calls] == windows
    for layer_idx, (module, key_heads, kwargs) in enumerate(calls):
        assert (module.layer_idx, module.is_causal, key_heads) == (layer_idx, True, 2)
        assert kwargs["scaling"] == model.config.head_dim**-0.5
        assert kwargs["attention_instances"] == "from the caller"
        assert kwargs["position_ids"].tolist() == [list(range(20))]


KEYWORDS = {
    "token_type_ids": torch.zeros(2, 20, dtype=torch.long),
    "something": None,
    "num_items_in_batch": torch.tensor(7),
    "attention_instances": {},
    "output_router_logits": False,
    "tokenizer": object(),
}


@pytest.mark.parametrize("name", KEYWORDS)
def test_keywords_that_other_models_take_change_nothing(name, tokens):
    model = tiny_model()
    given = {name: KEYWORDS[name]}
    assert torch.equal(model(tokens, **given).logits, model(tokens).logits)


@pytest.mark.parametrize("head", [NanoGPTModel, NanoGPTForCausalLM, NanoGPTForTokenClassification])
def test_a_keyword_that_nothing_reads_is_refused(head, tokens):
    with pytest.raises(TypeError, match="unexpected keyword argument 'atention_mask'"):
        head(tiny_config("nano"))(tokens, atention_mask=torch.ones_like(tokens))


@pytest.mark.parametrize("name", ["past_key_values", "cache"])
def test_a_cache_is_taken_by_both_of_its_names_and_returned_by_the_installed_one(name, tokens):
    model = tiny_model()
    given = DynamicCache(config=model.config)
    first = model(tokens[:, :12], **{name: given})
    assert getattr(first, CACHE) is given
    rest = model(tokens[:, 12:], **{name: given}).logits
    torch.testing.assert_close(rest, model(tokens).logits[:, 12:], atol=1e-5, rtol=0)


def test_two_caches_are_refused(tokens):
    caches = {name: DynamicCache() for name in ("past_key_values", "cache")}
    with pytest.raises(TypeError, match="two caches"):
        tiny_model()(tokens, **caches)


def test_gradient_checkpointing_takes_an_empty_cache_and_refuses_a_filled_one(tokens):
    model = tiny_model().train()
    model.gradient_checkpointing_enable()
    cache = DynamicCache(config=model.config)
    expected = model(tokens, labels=tokens).loss
    assert model(tokens, labels=tokens, past_key_values=cache).loss == expected
    assert cache.get_seq_length() == 0
    with torch.no_grad():
        model.eval()(tokens, past_key_values=cache)
    model.train()
    with pytest.raises(ValueError, match="Gradient checkpointing cannot continue a cache"):
        model(tokens, past_key_values=cache)


@pytest.mark.parametrize("shape", ["last", "index", "rows", "mask"])
def test_logits_are_kept_at_the_positions_asked_for(shape, tokens):
    model = tiny_model()
    logits = model(tokens).logits
    rows = torch.tensor([[3, 5], [0, 19]])
    mask = torch.zeros(2, 20, dtype=torch.bool)
    mask[0, 4] = mask[1, 7] = mask[1, 8] = True
    keep, expected = {
        "last": (3, logits[:, -3:]),
        "index": (torch.tensor([2, 9]), logits[:, [2, 9]]),
        "rows": (rows, torch.stack([logits[0, rows[0]], logits[1, rows[1]]])),
        "mask": (mask, logits[mask]),
    }[shape]
    found = model(tokens, logits_to_keep=keep).logits
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)


PACKED = torch.tensor([[*range(8), *range(12)]])


def test_packed_documents_are_apart_with_the_default_cache(family, tokens):
    model = tiny_model(family)
    changed = tokens.clone()
    changed[:, :8] = (tokens[:, :8] + 1) % model.config.vocab_size
    packed = [model(ids, position_ids=PACKED).logits for ids in (tokens, changed)]
    assert torch.equal(packed[0][:, 8:], packed[1][:, 8:])
    assert not torch.allclose(packed[0][:, :8], packed[1][:, :8], atol=0.1)
    alone = torch.cat([model(tokens[:, :8]).logits, model(tokens[:, 8:]).logits], dim=1)
    torch.testing.assert_close(packed[0], alone, atol=1e-5, rtol=1e-4)


def test_packed_documents_are_refused_by_flash_attention_of_several_rows(tokens):
    # transformers looks for them in a batch of one row only. No kernel is needed to be told so.
    model = tiny_model()
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match=r"packed documents.*attn_implementation='sdpa'"):
        model(tokens, position_ids=PACKED.expand(2, -1), use_cache=False)


@pytest.mark.parametrize("kind", ["static", "filled"])
def test_packed_documents_are_refused_where_a_cache_would_mix_them(kind, tokens):
    model = tiny_model()
    cache = StaticCache(model.config, max_cache_len=40)
    if kind == "filled":
        cache = DynamicCache(config=model.config)
        model(tokens, past_key_values=cache)
    with pytest.raises(ValueError, match=r"packed documents.*use_cache=False"):
        model(tokens, position_ids=PACKED, past_key_values=cache)
