"""Tokens and text for many requests at once.

Tokens come from transformers' continuous batching. A request is written alone, after those before
it, if a batch cannot do what it asks: a seed, because a batch has one random number generator for
all, or a setting that transformers' batches do not know.
"""

import asyncio
from collections.abc import AsyncGenerator, Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from itertools import count
from threading import Event
from typing import Any, TypeAlias

import torch
from transformers import ContinuousBatchingConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from ..errors import UserError
from ..generation import stream_text
from ..streaming import TextDecoder, TokenStreamer
from .scoring import CHANGES, build_processors, share_weights

logger = logging.get_logger(__name__)

ROWS = 16  # the largest number of requests in a batch; others wait
_CACHE_BYTES = 2**30  # for the keys and values of a batch, unless one request needs more
_PAGE = 256  # transformers hands out the cache in pages of this many tokens
_PREFILL = 512  # prompt tokens that one step reads
_REQUEST_SETTINGS = {"max_new_tokens", "temperature", "top_k", "top_p"}
# What generation_config.json may set without ruling out batches.
_BATCHED = {"temperature", "top_k", "top_p", "do_sample", "suppress_tokens", "max_length"}
_BATCHED |= {"bos_token_id", "eos_token_id", "pad_token_id", "max_new_tokens", "use_cache"}
_BATCHED |= {"transformers_version", "_from_model_config"}

# Takes a token, an error, or None at the end.
Put: TypeAlias = Callable[[int | Exception | None], None]


class EndedError(Exception):
    """The server stopped, or the model failed, before the answer was complete."""


class Writer:
    """Writes the tokens that follow prompts, for the requests of one event loop.

    `settings` are those of `stream_text`: `max_new_tokens`, `temperature`, `top_k` and `top_p`; a
    request with `seed`, `min_p`, `repetition_penalty` or those of `build_processors` is written
    alone.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, ends: list[int]):
        self.model, self.tokenizer, self.ends = model, tokenizer, ends
        defaults = model.generation_config.to_diff_dict()
        active = {name for name, value in defaults.items() if value not in (None, False)}
        # longrope rotates keys by the longest text of a batch: other requests would change a text.
        rope = str(getattr(model.config, "rope_parameters", None))
        self._can_batch = active <= _BATCHED and "'longrope'" not in rope
        self._manager: Any = None
        self._ids = count()
        self._alone = ThreadPoolExecutor(1)
        self._ended = Event()
        self._queues: set[asyncio.Queue] = set()

    async def write(self, prompt: list[int], settings: dict[str, Any]) -> AsyncGenerator[int, None]:
        """Yield tokens as they are written; closing the iterator stops the work.

        Raises:
            EndedError: no more tokens will come.
        """
        if self._ended.is_set():
            raise EndedError
        queue: asyncio.Queue = asyncio.Queue()
        self._queues.add(queue)
        batched = self._can_batch and settings.keys() <= _REQUEST_SETTINGS
        start = self._start_in_batch if batched else self._start_alone
        stop = start(prompt, settings, queue.put_nowait)
        try:
            while (token := await queue.get()) is not None:
                if isinstance(token, Exception):
                    raise token
                yield token
        finally:
            self._queues.discard(queue)
            stop()

    def abandon(self) -> None:
        """End all answers now; must be called in the event loop."""
        self._ended.set()
        for queue in self._queues:
            queue.put_nowait(EndedError())

    async def close(self) -> None:
        """End all answers, and wait until no thread uses the model any more."""
        self.abandon()
        await asyncio.to_thread(self._alone.shutdown, cancel_futures=True)
        if self._manager is not None:
            await asyncio.to_thread(self._manager.stop, hard_stop=True)

    def _start_in_batch(self, prompt, settings, put: Put) -> Callable[[], None]:
        """Add a request to the batch, and return a function that removes it."""
        if self._manager is None or not self._manager.is_running():
            self._manager = self._build_manager()
        manager, name, seen = self._manager, str(next(self._ids)), 0

        def receive(output) -> None:
            nonlocal seen
            for token in output.generated_tokens[seen:]:
                put(token)
            seen = len(output.generated_tokens)
            if output.is_finished():
                put(EndedError() if output.error else None)

        def stop() -> None:
            manager.cancel_request(name)
            # Output may still be on its way to the handler, so the handler goes a little later.
            handlers = manager.output_router.result_handlers
            asyncio.get_running_loop().call_later(10, handlers.pop, name, None)

        manager.register_result_handler(name, receive)
        greedy = not settings["temperature"]
        manager.add_request(
            prompt,
            request_id=name,
            max_new_tokens=settings["max_new_tokens"],
            streaming=True,
            eos_token_id=self.ends or -1,
            temperature=1.0 if greedy else float(settings["temperature"]),
            top_k=1 if greedy else settings["top_k"] or self.model.config.vocab_size,
            top_p=0.0 if greedy else float(settings["top_p"]),  # 0 leaves exactly one token
        )
        return stop

    def _build_manager(self) -> Any:
        model = share_weights(self.model)  # as the manager switches it to paged attention
        # transformers prepares only those processors whose settings differ from its defaults. The
        # values do not matter: each request brings its own.
        config = model.generation_config
        config.update(do_sample=True, temperature=0.5, top_k=1, top_p=0.5)
        config.eos_token_id = self.ends or -1
        manager = model.init_continuous_batching(
            generation_config=config,
            continuous_batching_config=ContinuousBatchingConfig(
                num_blocks=-(-self._count_cached_tokens() // _PAGE),
                max_batch_tokens=_PREFILL,
                max_requests_per_batch=ROWS,
                per_request_processors=True,
            ),
        )
        manager.start()
        return manager

    def _count_cached_tokens(self) -> int:
        """Return how many tokens the cache holds: at least one request's whole context."""
        config = self.model.config
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        token_bytes = 2 * config.num_hidden_layers * heads * size * self.model.dtype.itemsize
        longest = config.max_position_embeddings + 2 * _PAGE
        return max(longest, min(ROWS * longest, _CACHE_BYTES // token_bytes))

    def _start_alone(self, prompt, settings, put: Put) -> Callable[[], None]:
        """Queue a request for the one thread that writes alone; return a function that stops it."""
        loop, stopped = asyncio.get_running_loop(), Event()

        def hand_over(token: int | Exception | None) -> None:
            with suppress(RuntimeError):  # the event loop has ended
                loop.call_soon_threadsafe(put, token)

        def work() -> None:
            if stopped.is_set():
                return
            last: Exception | None = None
            try:
                with closing(self._stream(prompt, settings)) as tokens:
                    for token in tokens:
                        if stopped.is_set() or self._ended.is_set():
                            raise EndedError
                        hand_over(token)
            except (UserError, EndedError) as error:  # `write` raises it
                last = error
            except Exception:
                logger.exception("A request failed.")
                last = EndedError()
            hand_over(last)

        self._alone.submit(work)
        return stopped.set

    def _stream(self, prompt: list[int], settings: dict[str, Any]) -> Generator[int, None, None]:
        ids = torch.tensor([prompt], device=self.model.device)
        own = {name: value for name, value in settings.items() if name not in CHANGES}
        return stream_text(
            self.model,
            self.tokenizer,
            ids,
            eos_token_id=self.ends or None,
            logits_processor=build_processors(settings, len(prompt)),
            streamer=TokenStreamer(),
            **own,
        )


class StoppingDecoder:
    """Decodes tokens as they come, and ends before the first stop text."""

    def __init__(self, decoder: TextDecoder, stops: list[str]):
        self.decoder, self.stops, self.stopped = decoder, stops, False
        self.held = ""  # text that may be the beginning of a stop text

    def add(self, token: int) -> str:
        """Return the text that is now certain."""
        return self._release(self.decoder.add(token))

    def finish(self) -> str:
        """Return the rest of the text, when no more tokens come."""
        if self.stopped:
            return ""
        rest = self._release(self.decoder.finish())
        return rest + self.held

    def _release(self, text: str) -> str:
        """Return the text up to a stop text, without an end that may become one."""
        text, self.held = self.held + text, ""
        # The stop text that ends first counts, however the text came in pieces.
        if ends := [(text.index(s) + len(s), text.index(s)) for s in self.stops if s in text]:
            self.stopped = True
            return text[: min(ends)[1]]
        longest = max(map(len, self.stops), default=0)
        for start in range(max(0, len(text) - longest), len(text)):
            if any(stop.startswith(text[start:]) for stop in self.stops):
                text, self.held = text[:start], text[start:]
                break
        return text
