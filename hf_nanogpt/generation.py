"""Text from a prompt: a thin layer over transformers' `generate()`."""

from collections.abc import Callable, Generator, Sequence
from contextlib import closing
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
    TopHLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from .data.encoding import encoding_errors
from .errors import UserError, settings_errors
from .modeling_nanogpt import CACHE
from .streaming import TextDecoder, TokenStreamer

# What shapes the distribution of the next token, in the order in which transformers applies it, and
# the value that changes nothing.
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
_TEMPERATURE = 0.8  # of the command line and the playground, for checkpoints without one
# The numeric settings of `stream_text`: type, range, and the range in words. Outside the limits of
# temperature and penalty, logits become infinite or all the same.
SETTINGS: dict[str, tuple[type, Callable[[Any], bool], str]] = {
    "max_new_tokens": (int, lambda n: n >= 1, "a whole number, at least 1"),
    "temperature": (float, lambda t: t == 0 or 1e-3 <= t <= 1e3, "0 (greedy), or 0.001 to 1000"),
    "top_k": (int, lambda k: k >= 0, "a whole number, at least 1, or 0 for all tokens"),
    "top_p": (float, lambda p: 0 < p <= 1, "a number above 0 and at most 1"),
    "min_p": (float, lambda p: 0 <= p <= 1, "a number from 0 to 1"),
    "repetition_penalty": (float, lambda r: 0.01 <= r <= 100, "0.01 to 100 (1 changes nothing)"),
    "seed": (int, lambda seed: 0 <= seed < 2**32, "a whole number from 0 to 4294967295"),
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
        prompt: the text to continue; an empty one starts a document.
        seed: makes sampling repeatable; sample i uses `seed + i`.
        settings: passed to `stream_text`.
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
    eos_token_id: int | list[int] | None = None,
    compile: bool = False,
    past_key_values: Cache | None = None,
    seed: int | None = None,
    logits_processor: Sequence[LogitsProcessor] = (),
    streamer: Any = None,
) -> Generator[Any, None, None]:
    """Yield the text that follows `prompt` piece by piece, while it is generated.

    A setting that is `None` takes its value from the checkpoint's `generation_config.json`; if that
    has none, the setting is off. Closing the iterator stops the model.

    Args:
        prompt: the text to continue. Or token ids (1, T), as of a chat: what follows them is then a
            text of its own, which begins without the space that some tokenizers put before words.
        max_new_tokens: by default 100, or as many as still fit the context.
        temperature: 0 always takes the most likely token (greedy). Above 0 samples: below 1 is more
            cautious, above 1 more varied.
        top_k: sample from the `top_k` most likely tokens only.
        top_p: sample from the most likely tokens that together have this probability (0 to 1].
        min_p: sample from tokens at least this probable, relative to the most likely one [0 to 1].
        repetition_penalty: above 1 makes tokens that already occurred less likely.
        stop_strings: stop after the first of these strings.
        stop_at_eos: stop where the model ends the document.
        eos_token_id: the ids that end it; by default those of the model, else of the tokenizer.
        compile: decode with torch.compile and a static cache. The first text of each length waits
            for the compiler, perhaps a minute; later ones are faster.
        past_key_values: a cache that already holds the first tokens of the prompt; it grows.
        seed: makes sampling repeatable, whatever other threads do. Without a seed, torch's global
            random number generator is used.
        logits_processor: what else changes the logits, before the temperature does.
        streamer: a `BaseStreamer` that can be iterated over, to yield something other than text.

    Raises:
        UserError: a setting is out of range, the prompt fills the model's context, or the tokenizer
            belongs to another model.
    """
    stop_strings = [stop_strings] if isinstance(stop_strings, str) else list(stop_strings)
    sampling = {
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
    }
    check_settings(**sampling, seed=seed, max_new_tokens=max_new_tokens)
    if "" in stop_strings:
        raise UserError(
            "stop_strings holds an empty string: each must have at least one character."
        )
    defaults = model.generation_config
    for name, value in sampling.items():
        sampling[name] = getattr(defaults, name) if value is None else value
    ends = find_ends(model, tokenizer) if eos_token_id is None else eos_token_id
    ids = encode_prompt(model, tokenizer, prompt) if isinstance(prompt, str) else prompt
    settings = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "max_new_tokens": _choose_length(model, ids.shape[1], max_new_tokens),
        "repetition_penalty": sampling["repetition_penalty"],
        # transformers would draw from the generator that all threads share. Instead, our last
        # processor draws, and greedy search takes the token it drew.
        "do_sample": False,
        "logits_processor": LogitsProcessorList(
            [*logits_processor, *(_build_processors(model, sampling, seed) if temperature else [])]
        ),
        **dict.fromkeys(_WARPERS),  # switched off, as they are among the processors above
        "num_beams": 1,  # beams cannot be streamed
        "eos_token_id": ends if stop_at_eos else None,
        CACHE: past_key_values,
        "pad_token_id": 0,  # unused, as there is one row; without it transformers warns
        **(compiled_decoding() if compile else {}),
        **({"stop_strings": stop_strings, "tokenizer": tokenizer} if stop_strings else {}),
    }
    if streamer is not None:
        return _generate_in_thread(model, settings, streamer)
    context = ids[0].tolist() if isinstance(prompt, str) else []
    tokens = _generate_in_thread(model, settings, TokenStreamer())
    return _decode(tokens, TextDecoder(tokenizer, context))


def find_temperature(model: PreTrainedModel) -> float:
    """Return the temperature that a checkpoint asks for; 0.8, a cautious one, if it asks for none.

    Where it only says that it samples, transformers would take 1.
    """
    defaults = model.generation_config
    if defaults.temperature is not None:
        return defaults.temperature
    return 1.0 if defaults.do_sample else _TEMPERATURE


def find_ends(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int | list[int] | None:
    """Return the ids that end a text: those of the model's settings, else the tokenizer's."""
    ends = model.generation_config.eos_token_id
    return tokenizer.eos_token_id if ends is None else ends


def _build_processors(
    model: PreTrainedModel, sampling: dict[str, Any], seed: int | None
) -> list[LogitsProcessor]:
    """Return the processors that turn logits into scores; the highest score is the drawn token."""
    processors = []
    with settings_errors():  # values from generation_config.json, which we did not check
        for name, (warper, neutral) in _WARPERS.items():
            value = sampling.get(name, getattr(model.generation_config, name))
            if value not in (None, neutral):
                device = {"device": model.device} if warper is EtaLogitsWarper else {}
                processors.append(warper(value, **device))
        if watermark := model.generation_config.watermarking_config:
            vocab_size = model.config.vocab_size
            processors.append(watermark.construct_processor(vocab_size, model.device))
    generator = None if seed is None else torch.Generator(model.device).manual_seed(seed)
    return [*processors, _Draw(generator)]


class _Draw(LogitsProcessor):
    """Draw one token as `torch.multinomial` does, with a generator that may be our own.

    The largest p / q, where each q is exponentially distributed, belongs to a token drawn with
    probability p. All other tokens become impossible, so that no later processor changes the draw.
    """

    def __init__(self, generator: torch.Generator | None):
        self.generator = generator

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        probabilities = scores.softmax(dim=-1)
        if probabilities.isnan().any():  # `argmax` would return a token all the same
            raise UserError("The model's probabilities are NaN: its training has diverged.")
        probabilities /= torch.empty_like(scores).exponential_(generator=self.generator)
        drawn = probabilities.argmax(dim=-1, keepdim=True)
        return torch.full_like(scores, -torch.inf).scatter_(-1, drawn, 0.0)


def compiled_decoding() -> dict[str, Any]:
    """Return the settings of `generate()` that compile the steps after the prompt."""
    # CUDA graphs made it twice to three times as fast on an H200; a CPU has none.
    mode = "reduce-overhead" if torch.cuda.is_available() else "default"
    config: Any = CompileConfig(mode=mode)
    config._compile_all_devices = True  # without it transformers compiles on GPUs only
    return {"cache_implementation": "static", "compile_config": config}


def encode_prompt(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    *,
    encode: Callable[[str], list[int]] | None = None,
) -> torch.Tensor:
    """Return the token ids of `prompt`, (1, T), on the model's device; for "" the bos token.

    `encode` is for the text of a chat template, see `ChatTextEncoder`.

    Raises:
        UserError: the prompt is empty and there is no bos token, the tokenizer cannot encode it, or
            the tokenizer belongs to another model.
    """
    check_vocabulary(model, tokenizer)
    with encoding_errors(tokenizer, prompt, what="prompt"):
        prompt.encode()  # a shell or a pipe may pass bytes that are not UTF-8
        ids = encode(prompt) if encode else tokenizer(prompt)["input_ids"]
    if not ids and tokenizer.bos_token_id is None:
        raise UserError(
            "An empty prompt starts from the bos token, but this tokenizer has none: give a text."
        )
    ids = ids or [tokenizer.bos_token_id]
    if max(ids) >= model.config.vocab_size:
        raise UserError(_describe_mismatch(model, f"turns the prompt into token id {max(ids)}"))
    return torch.tensor([ids], device=model.device)


def check_vocabulary(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise a `UserError` if the tokenizer has more tokens than the model."""
    if len(tokenizer) > model.config.vocab_size:
        raise UserError(_describe_mismatch(model, f"has {len(tokenizer)} tokens"))


def _describe_mismatch(model: PreTrainedModel, what: str) -> str:
    return (
        f"The tokenizer {what}, but the model has vocab_size={model.config.vocab_size}: use the "
        "tokenizer it was trained with."
    )


def _decode(tokens: Generator[int, None, None], decoder: TextDecoder) -> Generator[str, None, None]:
    with closing(tokens):
        for token in tokens:
            if text := decoder.add(token):
                yield text
        if rest := decoder.finish():
            yield rest


def _generate_in_thread(
    model: Any, settings: dict[str, Any], streamer: Any
) -> Generator[Any, None, None]:
    closed = Event()
    settings["stopping_criteria"] = [lambda *_, **__: closed.is_set()]
    errors: list[BaseException] = []
    # Autocast belongs to a thread: hand the caller's over.
    device = model.device.type
    enabled = torch.is_autocast_enabled(device)
    dtype = torch.get_autocast_dtype(device) if enabled else None

    def work() -> None:
        try:
            # settings_errors: transformers checks some of them only now.
            with settings_errors(), torch.autocast(device, dtype, enabled):
                model.generate(**settings, streamer=streamer)
        except BaseException as error:  # raised below, in the reader's thread
            errors.append(error)
            streamer.end()

    thread = Thread(target=work, daemon=True)
    thread.start()
    try:
        yield from streamer
    finally:
        closed.set()
        thread.join()
    if errors:
        raise errors[0]


def _choose_length(model: PreTrainedModel, prompt_tokens: int, max_new_tokens: int | None) -> int:
    limit = model.config.max_position_embeddings
    room = limit - prompt_tokens
    if room < 1:
        raise UserError(
            f"The prompt has {prompt_tokens} tokens, and this model's context is {limit}: shorten "
            f"the prompt to at most {limit - 1} tokens."
        )
    if max_new_tokens is None:
        return min(100, room)
    if max_new_tokens > room:
        raise UserError(
            f"The prompt has {prompt_tokens} tokens and max_new_tokens={max_new_tokens}; together "
            f"they exceed this model's context of {limit}. Shorten the prompt, or generate at most "
            f"{room} tokens."
        )
    return max_new_tokens


def check_settings(**settings: float | None) -> None:
    """Raise a `UserError` for the first of the `SETTINGS` that is out of range; None is allowed."""
    for name, value in settings.items():
        _, is_allowed, rule = SETTINGS[name]
        if value is not None and not is_allowed(value):
            raise UserError(f"{name}={value} is invalid: it must be {rule}.")
