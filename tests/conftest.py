"""Shared by all tests: nothing leaves this machine, and one tiny configuration per GPT family."""

import gc
import os
import shutil
import signal
import tempfile
from pathlib import Path
from unittest.mock import patch

from minihub import Hub

# Set before torch, transformers, datasets or huggingface_hub are imported.
_HUB = Hub()
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in a shell's background
    signal.signal(signal.SIGINT, signal.default_int_handler)
if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:  # as after `nohup`
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
_CACHE = tempfile.TemporaryDirectory(prefix="hf_nanogpt-tests-")
os.environ |= {
    "HF_HOME": _CACHE.name,
    "HF_ENDPOINT": _HUB.url,
    "HF_HUB_DISABLE_XET": "1",  # with hf_xet the client asks nobody for the usual upload
    "HF_HUB_OFFLINE": "1",  # but for the tests that take the fixture `hub`
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "GOMP_SPINCOUNT": "10000",  # see hf_nanogpt/__init__.py
}

import pytest  # noqa: E402
import torch  # noqa: E402
from datasets.utils.logging import disable_progress_bar  # noqa: E402
from transformers import set_seed  # noqa: E402

from hf_nanogpt import NanoGPTConfig, NanoGPTForCausalLM, load_preset  # noqa: E402
from hf_nanogpt.modeling_nanogpt import CACHE  # noqa: E402

disable_progress_bar()

ROOT = Path(__file__).parent.parent
# A text to train on that stays as it is: our own source would change what the tests measure.
CORPUS = (ROOT / "LICENSE").read_text(encoding="utf-8")
TINY = {
    "vocab_size": 61,
    "n_layer": 3,
    "n_embd": 32,
    "n_head": 4,
    "block_size": 64,
    "dropout": 0.0,
    "initializer_range": 0.2,  # large enough that every part of the model matters
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
FAMILIES = {
    "nano": {"preset": "nano"},
    "gpt1": {"preset": "gpt1"},
    "gpt2": {"preset": "gpt2"},
    "gpt3": {"preset": "gpt3-125m", "sliding_window": 5, "layer_types": None},
    "llama": {"preset": "llama-7b", "num_key_value_heads": 2},
    "qwen3": {"preset": "qwen3-0.6b", "num_key_value_heads": 2, "head_dim": 16},
    "nanochat": {"preset": "nanochat-d12"},
}


def soon(*names, of=FAMILIES):
    """Return parameters for what takes long: those named in the short suite, all in the whole."""
    return [pytest.param(name, marks=[] if name in names else pytest.mark.slow) for name in of]


TWO_SOON = soon("nano", "gpt2")


def cache_of(output):
    """Return the cache in a model's output, by the name that this transformers release has."""
    return getattr(output, CACHE)


def tiny_config(family: str, **overrides) -> NanoGPTConfig:
    """Return the family's architecture at a size that runs in milliseconds."""
    row = dict(FAMILIES[family])
    preset = row.pop("preset")
    if family == "gpt3":
        kinds = ["full_attention", "sliding_attention"]
        row["layer_types"] = [kinds[i % 2] for i in range(TINY["n_layer"])]
    return load_preset(preset, **(TINY | row | overrides))


def tiny_model(family: str = "nano", *, seed: int = 0, **overrides) -> NanoGPTForCausalLM:
    """Return a randomly initialised tiny model in eval mode."""
    torch.manual_seed(seed)
    return NanoGPTForCausalLM(tiny_config(family, **overrides)).eval()


def certain_model(ids: torch.Tensor, **overrides) -> NanoGPTForCausalLM:
    """Return a tiny model that has learnt the ids (1, T) by heart, and so is sure of each next one.

    For what changes logits by more than rounding, as int8 weights do: the tokens of a random model
    may be decided by a hundredth.
    """
    model = tiny_model("nano", **({"initializer_range": 0.1} | overrides)).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        model(ids, labels=ids).loss.backward()
        optimizer.step()
    return model.eval()


def find_parameters_without_effect(model) -> set[str]:
    """Return the names of the parameters that change nothing, so that their gradient is 0.

    A bias of the keys adds the same number to all scores of a query, which their softmax takes
    away; rotary positions turn it differently at each position. What is left of such a gradient
    is rounding, and AdamW makes steps of full length from it.
    """
    if model.config.position_embedding_type != "learned":
        return set()
    return {name for name, _ in model.named_parameters() if name.endswith("k_proj.bias")}


def assert_same(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Compare logits of the same weights and tokens, computed twice: equal but for rounding.

    Weights that were loaded lie elsewhere in memory, and another number of rows or threads splits
    a matrix product elsewhere: sums may be added in another order on some processors.
    """
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def pytest_collection_finish():
    """Take all that was imported out of the garbage collector's sight.

    Trainer calls it after each training, where it took a third of the time of a short one.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _start_alike():
    """Let no test depend on what those before it drew at random, or told accelerate to do."""
    set_seed(0)
    with patch.dict(os.environ):  # which puts all back
        yield


@pytest.fixture(params=FAMILIES)
def family(request) -> str:
    return request.param


@pytest.fixture
def hub(monkeypatch):
    """The Hub of these tests (see minihub.py), empty, with the token of its owner, `user`."""
    from huggingface_hub import constants

    _HUB.reset()
    shutil.rmtree(constants.HF_HUB_CACHE, ignore_errors=True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setenv("HF_TOKEN", "hf_owner")
    return _HUB


@pytest.fixture
def tokens() -> torch.Tensor:
    """Random token ids, (2, 20), without the pad token."""
    return torch.randint(1, TINY["vocab_size"], (2, 20), generator=torch.Generator().manual_seed(1))


def native_equivalent(model, native_config, native_class):
    """Return the class of transformers with the same settings and weights."""
    names = set(native_config().to_dict()) & set(model.config.to_dict())
    fields = {
        n: getattr(model.config, n)
        for n in names - {"architectures", "model_type", "attention_dropout"}
    }
    config = native_config(**fields, rms_norm_eps=model.config.norm_eps)
    native = native_class(config).eval()
    native.load_state_dict(model.state_dict())
    return native
