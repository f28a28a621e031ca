"""Tokens for many requests at once: by transformers' continuous batching, or one after another.

A request is written alone where the batch could not give it what it asks: a seed, for the batch has
one source of chance for all, or a setting that transformers' batches do not know.
"""

import asyncio
import copy
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from itertools import chain, count
from queue import SimpleQueue
from threading import Event
from typing import Any, TypeAlias

import torch
from transformers import ContinuousBatchingConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation import BaseStreamer
from transformers.utils import logging

from ..generation import stream_text

logger = logging.get_logger(__name__)

ROWS = 16  # at most so many requests are written at once; others wait
_CACHE = 2**30  # at most so many bytes for their keys and values, or what one request needs
_PAGE = 256  # transformers gives the cache away in pieces of so many tokens
_PREFILL = 512  # tokens of prompts that are read in one step
# What a checkpoint may ask for in its generation_config.json and still be written in a batch.
_BATCHED = {"temperature", "top_k", "top_p", "do_sample", "suppress_tokens", "max_length"}
_BATCHED |= {"bos_token_id", "eos_token_id", "pad_token_id", "max_new_tokens", "use_cache"}
_BATCHED |= {"transformers_version", "_from_model_config"}

Put: TypeAlias = Callable[[int | Exception | None], None]


class EndedError(Exception):
    """The server ends, or the model has failed, before the answer was whole."""


class Writer:
    """Writes the tokens that follow prompts, for the requests of one event loop.

    `settings` are those of `stream_text`: `max_new_tokens`, `temperature`, `top_k`, `top_p`, and,
    written alone, `seed`, `min_p` and `repetition_penalty`.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, ends: list[int]):
        self.model, self.tokenizer, self.ends = model, tokenizer, ends
        model.generation_config.eos_token_id = ends or None
        own = model.generation_config.to_diff_dict()
        self._can_batch = {name for name in own if own[name] not in (None, False)} <= _BATCHED
        # It turns keys by the longest text of a batch: other requests would change a text.
        rope = getattr(model.config, "rope_parameters", None)
        self._can_batch &= "'longrope'" not in str(rope)
        self._manager: Any = None
        self._ids = count()
        self._alone = ThreadPoolExecutor(1)
        self._ended = Event()
        self._waiting: set[asyncio.Queue] = set()

    async def write(self, prompt: list[int], settings: dict[str, Any]) -> AsyncGenerator[int, None]:
        """Yield tokens as they are written; whoever closes the iterator stops the work.

        Raises:
            EndedError: there will be no further tokens.
        """
        if self._ended.is_set():
            raise EndedError
        queue: asyncio.Queue = asyncio.Queue()
        self._waiting.add(queue)
        batched = self._can_batch and settings.keys() <= {
            *("max_new_tokens", "temperature", "top_k", "top_p")
        }
        start = self._start_in_batch if batched else self._start_alone
        stop = start(prompt, settings, queue.put_nowait)
        try:
            while (token := await queue.get()) is not None:
                if isinstance(token, Exception):
                    raise token
                yield token
        finally:
            self._waiting.discard(queue)
            stop()

    def abandon(self) -> None:
        """Let all that is being written end now; called in the event loop."""
        self._ended.set()
        for queue in self._waiting:
            queue.put_nowait(EndedError())

    async def close(self) -> None:
        """End all that is being written, and wait until no thread uses the model any more."""
        self.abandon()
        await asyncio.to_thread(self._alone.shutdown, cancel_futures=True)
        if self._manager is not None:
            await asyncio.to_thread(self._manager.stop, hard_stop=True)

    # in a batch

    def _start_in_batch(self, prompt, settings, put: Put) -> Callable[[], None]:
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
            # What was on its way still finds its reader; then nobody must remember the request.
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
            top_p=0.0 if greedy else float(settings["top_p"]),  # 0: exactly one token is left
        )
        return stop

    def _build_manager(self) -> Any:
        # A second model of the same weights, for this one is given another kind of attention.
        weights = chain(self.model.parameters(), self.model.buffers())
        twin = copy.deepcopy(self.model, {id(tensor): tensor for tensor in weights})
        # transformers asks for these settings where they differ from its own; each request has its
        # own values.
        config = twin.generation_config
        config.update(do_sample=True, temperature=0.5, top_k=1, top_p=0.5)
        config.eos_token_id = self.ends or -1
        manager = twin.init_continuous_batching(
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
        """Return how many tokens the cache holds: a whole context of one request at least."""
        config = self.model.config
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        token = 2 * config.num_hidden_layers * heads * size * self.model.dtype.itemsize
        longest = config.max_position_embeddings + 2 * _PAGE
        return max(longest, min(ROWS * longest, _CACHE // token))

    # alone

    def _start_alone(self, prompt, settings, put: Put) -> Callable[[], None]:
        loop, gone = asyncio.get_running_loop(), Event()

        def hand_over(token) -> None:
            with suppress(RuntimeError):  # the event loop has ended
                loop.call_soon_threadsafe(put, token)

        def work() -> None:
            last: Exception | None = None
            try:
                ids = torch.tensor([prompt], device=self.model.device)
                given = settings | {"streamer": _TokenStreamer()}
                with closing(stream_text(self.model, self.tokenizer, ids, **given)) as tokens:
                    for token in tokens:
                        if gone.is_set() or self._ended.is_set():
                            raise EndedError
                        hand_over(token)
            except (ValueError, EndedError) as error:  # the reader raises it
                last = error
            except Exception:
                logger.exception("A request could not be answered.")
                last = EndedError()
            hand_over(last)

        self._alone.submit(lambda: None if gone.is_set() else work())
        return gone.set


class _TokenStreamer(BaseStreamer):
    """Hands over the tokens themselves, without those of the prompt."""

    def __init__(self):
        self.queue: SimpleQueue[int | None] = SimpleQueue()
        self.prompt_seen = False

    def put(self, value: torch.Tensor) -> None:
        if self.prompt_seen:
            self.queue.put(int(value))
        self.prompt_seen = True

    def end(self) -> None:
        self.queue.put(None)

    def __iter__(self):
        return iter(self.queue.get, None)
