"""Text from a prompt: a thin layer over transformers' `generate()`."""

from collections.abc import Iterator
from threading import Thread
from typing import Any

import torch
from transformers import (
    CompileConfig,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TextIteratorStreamer,
    set_seed,
)


def generate_text(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    *,
    num_samples: int = 1,
    seed: int | None = None,
    **settings: Any,
) -> list[str]:
    """Return `num_samples` texts that each begin with `prompt`.

    Args:
        prompt: what to go on from; an empty one starts a document.
        seed: makes sampling repeatable.
        settings: those of `stream_text`.
    """
    texts = []
    for i in range(num_samples):
        sample_seed = None if seed is None else seed + i
        pieces = stream_text(model, tokenizer, prompt, seed=sample_seed, **settings)
        texts.append(prompt + "".join(pieces))
    return texts


def stream_text(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    *,
    max_new_tokens: int = 100,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float | None = None,
    stop_at_eos: bool = True,
    compile: bool = False,
    seed: int | None = None,
) -> Iterator[str]:
    """Yield the text that follows `prompt` in pieces, as it is produced.

    Args:
        temperature: 0 always takes the likeliest token (greedy); above 0 samples, below 1 more
            cautiously, above 1 more freely.
        top_k: sample from the `top_k` likeliest tokens only.
        top_p: sample from the likeliest tokens that together have this probability (0 to 1].
        min_p: sample from tokens at least this probable, relative to the likeliest [0 to 1].
        repetition_penalty: above 1 makes tokens less likely that were there before.
        stop_at_eos: end where the model ends the document.
        compile: decode by torch.compile with a static cache; the first text of a length waits for
            it, a minute perhaps, and later ones are faster.
        seed: makes sampling repeatable.

    Raises:
        ValueError: a setting is out of range, or the prompt leaves no room in the model's context.
    """
    _check_settings(max_new_tokens, temperature, top_k, top_p, min_p, repetition_penalty)
    filters = {"temperature": temperature, "top_k": top_k or 0, "top_p": top_p, "min_p": min_p}
    sampling = {k: v for k, v in filters.items() if v is not None} if temperature > 0 else {}
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=temperature > 0,
        repetition_penalty=repetition_penalty,
        eos_token_id=tokenizer.eos_token_id if stop_at_eos else None,
        pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id,
        **sampling,
        **(compiled_decoding() if compile else {}),
    )
    inputs = _encode(tokenizer, prompt).to(model.device)
    _check_room(model, inputs["input_ids"].shape[1], max_new_tokens)
    return _stream(model, tokenizer, inputs, config, seed)


def compiled_decoding() -> dict[str, Any]:
    """Return the settings of `generate()` that compile the steps after the prompt."""
    config = CompileConfig(mode="default")
    config._compile_all_devices = True  # without it transformers compiles on GPUs only
    return {"cache_implementation": "static", "compile_config": config}


def _stream(model, tokenizer, inputs, config, seed) -> Iterator[str]:
    if seed is not None:
        set_seed(seed)
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    errors: list[BaseException] = []

    def work() -> None:
        try:
            model.generate(**inputs, generation_config=config, streamer=streamer)
        except BaseException as error:  # handed to the reader below, which raises it
            errors.append(error)
            streamer.end()

    thread = Thread(target=work, daemon=True)
    thread.start()
    yield from streamer
    thread.join()
    if errors:
        raise errors[0]


def _encode(tokenizer: PreTrainedTokenizerBase, prompt: str):
    if prompt:
        try:
            return tokenizer(prompt, return_tensors="pt")
        except Exception as error:  # `tokenizers` raises no narrower kind
            raise ValueError(f"The tokenizer cannot encode the prompt: {error}.") from error
    if tokenizer.bos_token is None:
        raise ValueError(
            "prompt='' starts from the bos token, and this tokenizer has none: give a text."
        )
    ids = torch.tensor([[tokenizer.bos_token_id]])
    return tokenizer.pad({"input_ids": ids}, return_tensors="pt")


def _check_room(model: PreTrainedModel, prompt_tokens: int, max_new_tokens: int) -> None:
    limit = model.config.max_position_embeddings
    if prompt_tokens + max_new_tokens > limit:
        raise ValueError(
            f"The prompt has {prompt_tokens} tokens and max_new_tokens={max_new_tokens}, together "
            f"more than this model's context of {limit}: shorten the prompt, or generate at most "
            f"{max(limit - prompt_tokens, 0)} tokens."
        )


def _check_settings(max_new_tokens, temperature, top_k, top_p, min_p, repetition_penalty) -> None:
    allowed = {
        "max_new_tokens": (max_new_tokens, max_new_tokens >= 1, "1 or more"),
        "temperature": (temperature, temperature >= 0, "0 (greedy) or more"),
        "top_k": (top_k, top_k is None or top_k >= 1, "1 or more"),
        "top_p": (top_p, top_p is None or 0 < top_p <= 1, "above 0 and at most 1"),
        "min_p": (min_p, min_p is None or 0 <= min_p <= 1, "from 0 to 1"),
        "repetition_penalty": (
            repetition_penalty,
            repetition_penalty is None or repetition_penalty > 0,
            "above 0 (1 changes nothing)",
        ),
    }
    for name, (value, fine, rule) in allowed.items():
        if not fine:
            raise ValueError(f"{name}={value} is not possible: it must be {rule}.")
