"""Foreign checkpoints become ours with the same logits, tokens, loss and gradients, and go back."""

import json
import math
import shutil
from functools import cache
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from conftest import ROOT, cache_of
from huggingface_hub import HfApi
from references import IDS, LENGTH, NEO, REFERENCES, make_reference, make_tokens
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPT2Tokenizer,
    GPTNeoConfig,
    GPTNeoForCausalLM,
    PreTrainedModel,
)

from hf_nanogpt import NanoGPTForCausalLM, load_checkpoint, train_tokenizer
from hf_nanogpt.checkpoint.loading import local_folder
from hf_nanogpt.convert import convert_checkpoint, export_checkpoint

TOLERANCE = 1e-5
ENDS = ("bos_token_id", "eos_token_id")


@pytest.fixture(scope="session")
def pairs(tmp_path_factory):
    """A function from a reference's name to (their folder, our folder), converted once."""
    root = tmp_path_factory.mktemp("references")

    @cache
    def convert(name: str) -> tuple[Path, Path]:
        place = root / str(list(REFERENCES).index(name))
        make_reference(name).save_pretrained(place / "theirs")
        convert_checkpoint(place / "theirs", place / "ours")
        return place / "theirs", place / "ours"

    return convert


@pytest.fixture(params=REFERENCES)
def name(request) -> str:
    return request.param


def read_config(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text(encoding="utf-8"))


def load(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder).eval()


@pytest.fixture
def models(name, pairs) -> tuple[PreTrainedModel, NanoGPTForCausalLM]:
    theirs, ours = map(load, pairs(name))
    assert type(theirs).__name__ == REFERENCES[name].architecture
    assert type(ours) is NanoGPTForCausalLM
    return theirs, ours


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max())


def pad_left(tokens: torch.Tensor, pad: int = 7) -> dict[str, torch.Tensor]:
    """Return the model's inputs with the first row's beginning masked."""
    mask = torch.ones_like(tokens)
    mask[0, :pad] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    return {"input_ids": tokens * mask, "attention_mask": mask, "position_ids": positions}


@torch.no_grad()
def test_logits_are_the_same(models):
    theirs, ours = models
    tokens = make_tokens()
    expected = theirs(tokens).logits
    assert expected.std() > 1
    assert difference(ours(tokens).logits, expected) <= TOLERANCE


@torch.no_grad()
def test_logits_are_the_same_with_left_padding(models):
    inputs = pad_left(make_tokens())
    seen = inputs["attention_mask"].bool()
    theirs, ours = (model(**inputs).logits[seen] for model in models)
    assert difference(ours, theirs) <= TOLERANCE


@torch.no_grad()
def cached_logits(model: PreTrainedModel, tokens: torch.Tensor) -> torch.Tensor:
    """Return the logits of a text that is read in pieces of 16, 1, 1 ... tokens."""
    cuts = [0, *range(16, LENGTH + 1)]
    pieces, cache = [], None
    for start, end in pairwise(cuts):
        output = model(tokens[:, start:end], past_key_values=cache, use_cache=True)
        pieces.append(output.logits)
        cache = cache_of(output)
    return torch.cat(pieces, dim=1)


def test_logits_are_the_same_with_a_cache(models):
    theirs, ours = models
    tokens = make_tokens()
    has_cache = hasattr(theirs.config, "use_cache")  # GPT-1 has none
    with torch.no_grad():
        expected = cached_logits(theirs, tokens) if has_cache else theirs(tokens).logits
    assert difference(cached_logits(ours, tokens), expected) <= TOLERANCE


def test_greedy_tokens_are_the_same_with_left_padding(models):
    inputs = pad_left(make_tokens())
    del inputs["position_ids"]  # generate makes them from the mask
    theirs, ours = (
        model.generate(**inputs, do_sample=False, max_new_tokens=12, min_new_tokens=12)
        for model in models
    )
    assert ours.shape == (2, LENGTH + 12)
    assert ours.equal(theirs)


def gradient_norm(model: PreTrainedModel, format: str) -> float:
    """Return the norm over the tensors of the foreign model, for each of the two.

    Ours has the factor sqrt(head_dim) in GPT-Neo's queries, whose gradient is smaller by it, and
    biases that GPT-Neo and Qwen2 lack.
    """
    lacking = {"gpt_neo": ("q_proj.bias", "k_proj.bias", "v_proj.bias"), "qwen2": ("o_proj.bias",)}
    total = 0.0
    for name, parameter in model.named_parameters():
        square = float(parameter.grad.double().square().sum())
        if isinstance(model, NanoGPTForCausalLM):
            if name.endswith(lacking.get(format, ())):
                continue
            is_scaled = format == "gpt_neo" and ".q_proj." in name
            square *= model.config.head_dim if is_scaled else 1
        total += square
    return math.sqrt(total)


def test_loss_and_gradient_norm_are_the_same(name, models):
    tokens = make_tokens()
    labels = tokens.clone()
    labels[0, 5:9] = -100
    losses = [model(tokens, labels=labels).loss for model in models]
    for loss in losses:
        loss.backward()
    assert losses[1].item() == pytest.approx(losses[0].item(), rel=1e-6)
    theirs, ours = (gradient_norm(model, REFERENCES[name].format) for model in models)
    assert theirs > 0.1
    assert ours == pytest.approx(theirs, rel=1e-5)


def test_ours_to_theirs_to_ours_is_the_same_to_the_bit(name, pairs, tmp_path):
    _, ours = pairs(name)
    export_checkpoint(ours, tmp_path / "native", to=REFERENCES[name].format)
    convert_checkpoint(tmp_path / "native", tmp_path / "back")
    first, last = (load_file(f / "model.safetensors") for f in (ours, tmp_path / "back"))
    assert first.keys() == last.keys()
    assert all(first[key].equal(last[key]) for key in first)
    assert read_config(tmp_path / "back") == read_config(ours)


def test_the_native_equivalent_of_a_converted_model_is_what_it_came_from(name, pairs, tmp_path):
    theirs, ours = pairs(name)
    exported = export_checkpoint(ours, tmp_path / "native")
    if exported.format != REFERENCES[name].format:  # a format before it computes the same
        assert (REFERENCES[name].format, exported.format) in [("qwen2", "llama"), ("opt", "gpt2")]
        with torch.no_grad():
            before, after = (load(f)(make_tokens()).logits for f in (theirs, tmp_path / "native"))
        assert difference(after, before) <= TOLERANCE
        return
    first, last = (load_file(f / "model.safetensors") for f in (theirs, tmp_path / "native"))
    if exported.format == "gpt2":  # written by the names of OpenAI's files
        first = {key.removeprefix("transformer."): tensor for key, tensor in first.items()}
        last = {key.removeprefix("transformer."): tensor for key, tensor in last.items()}
    assert first.keys() == last.keys()
    for key, tensor in first.items():
        torch.testing.assert_close(last[key], tensor, rtol=3e-7, atol=0)


def test_the_recorded_differences_are_of_every_reference_and_small():
    recorded = json.loads((ROOT / "benchmarks/results/compatibility.json").read_text())["rows"]
    assert set(REFERENCES) < set(recorded)
    assert max(row["max_difference"] for row in recorded.values()) <= TOLERANCE
    assert all(recorded[name]["round_trip"] for name in REFERENCES)


# What files look like in the wild


def test_shards_are_read_as_one(pairs, tmp_path):
    theirs, ours = pairs("gpt2")
    load(theirs).save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    convert_checkpoint(tmp_path / "shards", tmp_path / "ours")
    first, last = (load_file(f / "model.safetensors") for f in (ours, tmp_path / "ours"))
    assert all(first[key].equal(last[key]) for key in first)


@pytest.mark.parametrize("name", ["gpt1", "gpt2", "gpt_neo, global and local"])
def test_old_files_with_buffers_short_names_and_a_stored_tied_head_are_read(name, pairs):
    theirs, ours = pairs(name)
    weights = load_file(theirs / "model.safetensors")
    names = {key.removeprefix("transformer."): tensor for key, tensor in weights.items()}
    embedding = next(tensor for tensor in weights.values() if tensor.shape[0] == 67)
    names["lm_head.weight"] = embedding.clone()
    buffer = "h.0.attn.attention.bias" if "neo" in name else "h.0.attn.bias"
    names[buffer] = torch.ones(1, 1, 48, 48).tril()
    old = theirs.parent / "old"
    load(theirs).config.save_pretrained(old)
    save_file(names, old / "model.safetensors", metadata={"format": "pt"})
    convert_checkpoint(old, old.parent / "old-ours")
    first, last = (load_file(f / "model.safetensors") for f in (ours, old.parent / "old-ours"))
    assert first.keys() == last.keys()
    assert all(first[key].equal(last[key]) for key in first)


def test_a_config_of_older_transformers_means_the_same(pairs):
    theirs, ours = pairs("llama, RoPE llama3")
    fields = read_config(theirs)
    scaling = fields.pop("rope_parameters")
    fields |= {"rope_theta": scaling.pop("rope_theta"), "rope_scaling": scaling}
    fields |= {"torch_dtype": fields.pop("dtype"), "transformers_version": "4.43.0"}
    old = theirs.parent / "old"
    shutil.copytree(theirs, old)
    (old / "config.json").write_text(json.dumps(fields), encoding="utf-8")
    convert_checkpoint(old, old.parent / "old-ours")
    assert read_config(old.parent / "old-ours") == read_config(ours)


def test_gpt_neo_whose_layers_disagree_with_their_pattern_is_what_transformers_runs(tmp_path):
    model = make_reference("gpt_neo, global and local")
    model.save_pretrained(tmp_path / "theirs")
    fields = read_config(tmp_path / "theirs")
    fields["attention_layers"] = ["local", "local", "global", "local"]
    (tmp_path / "theirs" / "config.json").write_text(json.dumps(fields), encoding="utf-8")
    convert_checkpoint(tmp_path / "theirs", tmp_path / "ours")
    export_checkpoint(tmp_path / "ours", tmp_path / "native")
    with torch.no_grad():
        before = model(make_tokens()).logits
        theirs, *ours = (
            load(tmp_path / f)(make_tokens()).logits for f in ("theirs", "ours", "native")
        )
    assert difference(theirs, before) > 1
    assert max(difference(theirs, logits) for logits in ours) <= TOLERANCE


@pytest.mark.parametrize(("heads", "is_exact"), [(4, True), (8, False)])  # of 16 and of 8
def test_a_rounded_conversion_of_half_precision_says_so(heads, is_exact, tmp_path, caplog):
    model = GPTNeoForCausalLM(GPTNeoConfig(**NEO | IDS | {"num_heads": heads}))
    for dtype in (torch.bfloat16, torch.float32):
        place = tmp_path / str(dtype)
        model.to(dtype).save_pretrained(place / "theirs")
        convert_checkpoint(place / "theirs", place / "ours")
        export_checkpoint(place / "ours", place / "native", to="gpt_neo")
        warnings = [r.getMessage() for r in caplog.records if "rounded" in r.getMessage()]
        assert len(warnings) == (0 if is_exact else 2)  # only of bfloat16, once each way
    assert is_exact or "q_proj.weight and 3 more" in warnings[0]


def test_generation_settings_in_an_old_config_are_kept(tmp_path):
    model = make_reference("gpt2")
    model.save_pretrained(tmp_path / "theirs")
    (tmp_path / "theirs" / "generation_config.json").unlink()
    old = {"do_sample": True, "temperature": 0.7, "top_k": 9, "eos_token_id": 5}
    (tmp_path / "theirs" / "config.json").write_text(
        json.dumps(read_config(tmp_path / "theirs") | old), encoding="utf-8"
    )
    convert_checkpoint(tmp_path / "theirs", tmp_path / "ours")
    theirs, ours = (load(tmp_path / f).generation_config.to_diff_dict() for f in ("theirs", "ours"))
    assert old.items() <= theirs.items() and old.items() <= ours.items()


def test_additional_chat_templates_of_a_hub_source_are_kept(hub, tmp_path):
    words = train_tokenizer([], kind="byte")
    words.chat_template = {"default": "{{ messages }}", "tool_use": "{{ tools }}"}
    config = GPT2Config(vocab_size=257, n_embd=8, n_layer=1, n_head=1, **dict.fromkeys(ENDS, 0))
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "theirs")
    words.save_pretrained(tmp_path / "theirs")
    (tmp_path / "theirs" / "other").mkdir()
    (tmp_path / "theirs" / "other" / "config.json").write_text("{}")  # is not downloaded
    api = HfApi()
    api.create_repo("user/words")
    api.upload_folder(repo_id="user/words", folder_path=tmp_path / "theirs")
    convert_checkpoint("user/words", tmp_path / "ours")
    _, found = load_checkpoint(tmp_path / "ours")
    assert found.chat_template == words.chat_template
    assert not (local_folder("user/words") / "other").exists()


def test_gpt2_with_its_own_tokenizer_writes_the_same_text(tmp_path):
    letters = {letter: i for i, letter in enumerate([*"abcdefghijklmnopqrstuvwxyz", "Ġ", "ab"])}
    words = GPT2Tokenizer(vocab=letters | {"<|endoftext|>": 28}, merges=[("a", "b")])
    make_reference("gpt2").save_pretrained(tmp_path / "theirs")
    words.save_pretrained(tmp_path / "theirs")
    assert convert_checkpoint(tmp_path / "theirs", tmp_path / "ours").has_tokenizer
    model, tokenizer = load_checkpoint(tmp_path / "ours")
    inputs = words("cab abba", return_tensors="pt")
    assert tokenizer("cab abba").input_ids == inputs.input_ids[0].tolist()
    theirs, ours = (
        words.decode(m.generate(**inputs, do_sample=False, max_new_tokens=9)[0])
        for m in (load(tmp_path / "theirs"), model)
    )
    assert ours == theirs and ours.startswith("cab abba")


@pytest.mark.parametrize("name", ["gpt2", "qwen3", "gpt_neo, global and local", "nanochat"])
def test_the_dtype_is_kept_both_ways(name, tmp_path):
    make_reference(name).to(torch.bfloat16).save_pretrained(tmp_path / "theirs")
    convert_checkpoint(tmp_path / "theirs", tmp_path / "ours")
    export_checkpoint(tmp_path / "ours", tmp_path / "native")
    for folder in ("ours", "native"):
        weights = load_file(tmp_path / folder / "model.safetensors")
        assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
        assert load(tmp_path / folder).dtype == torch.bfloat16
