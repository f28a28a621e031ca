"""Text from a prompt: a thin layer over transformers' `generate()`."""

from collections.abc import Generator, Sequence
from threading import Event, Thread
from typing import Any

import torch
from transformers import (
    Cache,
    CompileConfig,
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    LogitsProcessor,
    LogitsProcessorList,
    MinPLogitsWarper,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TemperatureLogitsWarper,
    TextIteratorStreamer,
    TopHLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from .errors import UserError, explain_errors
from .modeling_nanogpt import CACHE

# What shapes the distribution that a token is drawn from, in the order in which transformers
# applies it, and the value that changes nothing.
_WARPERS: dict[str, tuple[type, float | None]] = {
    "temperature": (TemperatureLogitsWarper, 1.0),
    "top_h": (TopHLogitsWarper, None),
    "top_k": (TopKLogitsWarper, 0),
    "top_p": (TopPLogitsWarper, 1.0),
    "min_p": (MinPLogitsWarper, None),
    "typical_p": (TypicalLogitsWarper, 1.0),
    "epsilon_cutoff": (EpsilonLogitsWarper, 0.0),
    "eta_cutoff": (EtaLogitsWarper, 0.0),
}


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
    prompt: str | torch.Tensor,
    *,
    max_new_tokens: int | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float | None = None,
    stop_strings: str | Sequence[str] = (),
    stop_at_eos: bool = True,
    compile: bool = False,
    past_key_values: Cache | None = None,
    seed: int | None = None,
    streamer: Any = None,
) -> Generator[Any, None, None]:
    """Yield the text that follows `prompt` in pieces, as it is produced.

    A setting that is `None` is what the checkpoint's `generation_config.json` says, or off. Whoever
    closes the iterator stops the model, too.

    Args:
        prompt: what to go on from, as text or as token ids (1, T).
        max_new_tokens: by default 100, or as many as the context has room for.
        temperature: 0 always takes the likeliest token (greedy); above 0 samples, below 1 more
            cautiously, above 1 more freely.
        top_k: sample from the `top_k` likeliest tokens only.
        top_p: sample from the likeliest tokens that together have this probability (0 to 1].
        min_p: sample from tokens at least this probable, relative to the likeliest [0 to 1].
        repetition_penalty: above 1 makes tokens less likely that were there before.
        stop_strings: end after the first of these that appears.
        stop_at_eos: end where the model ends the document.
        compile: decode by torch.compile with a static cache; the first text of a length waits for
            it, a minute perhaps, and later ones are faster.
        past_key_values: what the model has kept of the prompt's first tokens; it grows.
        seed: makes sampling repeatable, whatever other threads do; without one, tokens are drawn
            from torch's own source of chance.
        streamer: makes something else of the tokens than text, as a `BaseStreamer` that can be
            iterated over.

    Raises:
        UserError: a setting is out of range, the prompt leaves no room in the model's context, or
            the tokenizer is of another model.
    """
    stop_strings = [stop_strings] if isinstance(stop_strings, str) else stop_strings
    own = model.generation_config
    if top_k is None:
        top_k = own.top_k or 0  # and not the 50 that transformers falls back on
    optional = {"top_p": top_p, "min_p": min_p, "repetition_penalty": repetition_penalty}
    given: dict[str, Any] = {name: v for name, v in optional.items() if v is not None}
    check_settings(
        temperature=temperature, top_k=top_k, stop_strings=stop_strings, seed=seed, **given
    )
    ids = encode_prompt(model, tokenizer, prompt) if isinstance(prompt, str) else prompt
    given |= {"temperature": temperature, "top_k": top_k}
    drawing = _prepare_drawing(model, given, seed) if temperature > 0 else []
    stopping = {"stop_strings": list(stop_strings), "tokenizer": tokenizer} if stop_strings else {}
    eos = tokenizer.eos_token_id if own.eos_token_id is None else own.eos_token_id
    settings = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "max_new_tokens": _choose_length(model, ids.shape[1], max_new_tokens),
        "repetition_penalty": given.get("repetition_penalty", own.repetition_penalty),
        # The likeliest of what `drawing` returns is the token drawn: transformers itself would draw
        # from the one source of chance that all threads share.
        "do_sample": False,
        "logits_processor": LogitsProcessorList(drawing),
        **dict.fromkeys(_WARPERS),
        "eos_token_id": eos if stop_at_eos else None,
        CACHE: past_key_values,
        "pad_token_id": 0,  # one row is never padded; without an id transformers warns
        **(compiled_decoding() if compile else {}),
        **stopping,
    }
    if streamer is None:
        streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    return _stream(model, settings, streamer)


def _prepare_drawing(
    model: PreTrainedModel, given: dict[str, Any], seed: int | None
) -> list[LogitsProcessor]:
    """Return what turns logits into scores whose largest is the token drawn."""
    processors = []
    for name, (warper, neutral) in _WARPERS.items():
        value = given.get(name, getattr(model.generation_config, name))
        if value not in (None, neutral):
            device = {"device": model.device} if warper is EtaLogitsWarper else {}
            processors.append(warper(value, **device))
    if watermark := model.generation_config.watermarking_config:
        processors.append(watermark.construct_processor(model.config.vocab_size, model.device))
    source = None if seed is None else torch.Generator(model.device).manual_seed(seed)
    return [*processors, _Draw(source)]


class _Draw(LogitsProcessor):
    """Draw one token as `torch.multinomial` does, from a source of chance that may be our own.

    The largest of p / q, where each q is exponentially distributed, is a token of probability p.
    All others become impossible, so that no later processor, such as a watermark's, changes it.
    """

    def __init__(self, source: torch.Generator | None):
        self.source = source

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        shares = scores.softmax(dim=-1)
        if shares.isnan().any():  # as `torch.multinomial` does; the largest of them means nothing
            raise UserError("The model's probabilities are nan: its training has diverged.")
        shares /= torch.empty_like(shares).exponential_(generator=self.source)
        drawn = shares.argmax(dim=-1, keepdim=True)
        return torch.full_like(scores, -torch.inf).scatter_(-1, drawn, 0.0)


def compiled_decoding() -> dict[str, Any]:
    """Return the settings of `generate()` that compile the steps after the prompt."""
    config = CompileConfig(mode="default")
    config._compile_all_devices = True  # without it transformers compiles on GPUs only
    return {"cache_implementation": "static", "compile_config": config}


def encode_prompt(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    *,
    add_special_tokens: bool = True,
) -> torch.Tensor:
    """Return the token ids of `prompt`, (1, T), on the model's device; of "" the bos token.

    `add_special_tokens=False` is for a chat template's text, which has them already.

    Raises:
        UserError: the prompt has no tokens and there is no bos token, or the tokenizer cannot
            encode it, or has ids that the model has not.
    """
    size, vocab_size = len(tokenizer), model.config.vocab_size
    if size > vocab_size:
        raise UserError(
            f"The tokenizer has {size} tokens and the model vocab_size={vocab_size}: take the "
            "tokenizer that the model was trained with."
        )
    with explain_errors("The tokenizer cannot encode the prompt"):
        prompt.encode()  # a shell or a pipe may hand over bytes that are not UTF-8
        ids = tokenizer(prompt, add_special_tokens=add_special_tokens)["input_ids"]
    if not ids and tokenizer.bos_token_id is None:
        raise UserError(
            f"prompt={prompt!r} starts from the bos token, and this tokenizer has none: give a "
            "text."
        )
    ids = ids or [tokenizer.bos_token_id]
    if max(ids) >= vocab_size:
        raise UserError(
            f"The tokenizer gives the prompt the token id {max(ids)}, and the model has ids below "
            f"vocab_size={vocab_size}: take the tokenizer that the model was trained with."
        )
    return torch.tensor([ids], device=model.device)


def _stream(model, settings, streamer) -> Generator[Any, None, None]:
    abandoned = Event()
    settings["stopping_criteria"] = [lambda *_, **__: abandoned.is_set()]
    errors: list[BaseException] = []

    def work() -> None:
        try:
            model.generate(**settings, streamer=streamer)
        except BaseException as error:  # handed to the reader below, which raises it
            errors.append(error)
            streamer.end()

    thread = Thread(target=work, daemon=True)
    thread.start()
    try:
        yield from streamer
    finally:
        abandoned.set()
        thread.join()
    if errors:
        raise errors[0]


def _choose_length(model: PreTrainedModel, prompt_tokens: int, max_new_tokens: int | None) -> int:
    limit = model.config.max_position_embeddings
    room = limit - prompt_tokens
    if room < 1:
        raise UserError(
            f"The prompt has {prompt_tokens} tokens, and this model's context is {limit}: shorten "
            "the prompt to less than that."
        )
    if max_new_tokens is None:
        return min(100, room)
    check_settings(max_new_tokens=max_new_tokens)
    if max_new_tokens > room:
        raise UserError(
            f"The prompt has {prompt_tokens} tokens and max_new_tokens={max_new_tokens}, together "
            f"more than this model's context of {limit}: shorten the prompt, or generate at most "
            f"{room} tokens."
        )
    return max_new_tokens


# Beyond the limits of temperature and penalty, logits become infinite, or all the same.
_ALLOWED = {
    "max_new_tokens": (lambda n: n >= 1, "1 or more"),
    "temperature": (lambda t: t == 0 or 1e-3 <= t <= 1e3, "0 (greedy), or from 0.001 to 1000"),
    "top_k": (lambda k: k >= 0, "1 or more, or 0 for all tokens"),
    "top_p": (lambda p: 0 < p <= 1, "above 0 and at most 1"),
    "min_p": (lambda p: 0 <= p <= 1, "from 0 to 1"),
    "repetition_penalty": (lambda r: 0.01 <= r <= 100, "from 0.01 to 100 (1 changes nothing)"),
    "stop_strings": (lambda texts: "" not in texts, "texts of at least one character"),
    "seed": (lambda seed: seed is None or 0 <= seed < 2**32, "from 0 to 4294967295"),
}


def check_settings(**settings: Any) -> None:
    """Raise a `UserError` for the first setting of `stream_text` that is out of range."""
    for name, value in settings.items():
        fine, rule = _ALLOWED[name]
        if not fine(value):
            raise UserError(f"{name}={value} is not possible: it must be {rule}.")
