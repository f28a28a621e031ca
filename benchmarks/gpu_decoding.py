"""The decoding contestants of gpu.py: ours and transformers' own, by `generate()`, in turns."""

import time
from typing import Any

import torch
from gpu_training import CARD, TOY, make_config
from gpu_workers import Turns, device, synchronize, use_gpu
from transformers import AutoModelForCausalLM, set_seed

from hf_nanogpt import NanoGPTForCausalLM
from hf_nanogpt.generation import compiled_decoding

# Name: the model, and how it decodes. "graphs" is the mode that records CUDA graphs.
CONTESTANTS: dict[str, dict[str, str]] = {
    "ours, nano, eager": {"model": "nano", "way": "eager"},
    "ours, nano, static + compiled": {"model": "nano", "way": "compiled"},
    "ours, nano, static + compiled, CUDA graphs": {"model": "nano", "way": "graphs"},
    "Qwen3ForCausalLM, generate": {"model": "qwen3", "way": "eager"},
    "GPT2LMHeadModel, generate": {"model": "hf-gpt2", "way": "eager"},
}
BASE = "Qwen3ForCausalLM, generate"  # the native equivalent of nano; speeds are relative to it
BATCHES = (1, 32, 256)
ROUNDS = 2
_GREEDY: dict[str, Any] = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}


def decode_contestant(turns: Turns, *, spec: dict[str, str], rehearse: bool) -> None:
    """Generate for each batch size once, which compiles, and then whenever it is told to.

    An order is the number of texts; the answer, the seconds for their new tokens, prompt included.
    """
    set_seed(0)
    config = make_config(spec["model"], TOY.model if rehearse else CARD.model)
    if spec["model"] == "nano":
        # The initialisation for Muon has a head of zeros, which would always write token 0.
        config.initializer_range = 0.02
        model: Any = NanoGPTForCausalLM(config)
    else:
        model = AutoModelForCausalLM.from_config(config)
    model = model.to(device(), torch.bfloat16 if use_gpu() else torch.float32).eval()
    prompt_tokens, new_tokens = (8, 8) if rehearse else (128, 128)
    settings = choose_settings(spec["way"])

    def generate(batch: int) -> float:
        prompt = torch.randint(config.vocab_size, (batch, prompt_tokens), device=device())
        synchronize()
        start = time.perf_counter()
        text = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=new_tokens,
            **_GREEDY,
            **settings,
        )
        synchronize()
        assert text.shape == (batch, prompt_tokens + new_tokens)
        return time.perf_counter() - start

    for batch in BATCHES[:2] if rehearse else BATCHES:
        generate(batch)
    turns.ready()
    previous = None
    while True:
        batch = turns.wait()
        if batch != previous:  # the static cache is made anew for another batch size
            generate(batch)
        previous = batch
        turns.report(seconds=generate(batch), new_tokens=batch * new_tokens)


def choose_settings(way: str) -> dict[str, Any]:
    """Return the settings of `generate()` for a way to decode; without a GPU, nothing compiles."""
    if way == "eager":
        return {}
    if not use_gpu():
        return {"cache_implementation": "static"}
    settings = compiled_decoding()
    settings["compile_config"].mode = "reduce-overhead" if way == "graphs" else "default"
    # Each batch size has code of its own, and all of them stay.
    settings["compile_config"].dynamic = False
    return settings
