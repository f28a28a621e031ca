"""The answer to one request: its choices are written at once, and sent whole or as a stream."""

import asyncio
from bisect import bisect_left
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from transformers.utils import logging

from ..errors import UserError, one_line
from ..streaming import TextDecoder
from .batching import EndedError, StoppingDecoder, Writer
from .openai_api import CompletionRequest
from .openai_format import ResponseFormat, format_error, format_event
from .scoring import Reading, Scorer

logger = logging.get_logger(__name__)

FAILED = "The server is stopping, or has failed: try again later."


class Prompt(NamedTuple):
    """A prompt as text, which `echo` returns, and as token ids; and how to continue it."""

    text: str
    ids: list[int]
    settings: dict[str, Any]


class _Piece(NamedTuple):
    """The next part of a choice: its text, the tokens that begin in it, and why it is the last."""

    choice: "_Choice"
    text: str
    tokens: list[int]
    offsets: list[int]  # where the tokens begin, in characters of the prompt and the text
    reason: str | None = None


class Answer:
    """The answer to a checked request, of `n` choices to each prompt.

    A seed repeats the first choice; the choices after it have the seeds that follow.
    """

    def __init__(
        self,
        writer: Writer,
        scorer: Scorer,
        request: CompletionRequest,
        prompts: list[Prompt],
        format: ResponseFormat,
    ):
        self.writer, self.scorer, self.request = writer, scorer, request
        self.prompts, self.format = prompts, format
        self.choices = [
            _Choice(self, i * request.n + j, prompt, _number_seed(prompt.settings, j))
            for i, prompt in enumerate(prompts)
            for j in range(request.n)
        ]

    @property
    def usage(self) -> dict[str, int]:
        prompt = sum(len(prompt.ids) for prompt in self.prompts)
        completion = sum(choice.count for choice in self.choices)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
        }

    async def collect(self) -> dict[str, Any]:
        """Return the whole answer."""
        found: dict[_Choice, list[_Piece]] = {choice: [] for choice in self.choices}
        async with aclosing(_merge([choice.pieces() for choice in self.choices])) as pieces:
            async for piece in pieces:
                found[piece.choice].append(piece)
        choices = []
        for choice, parts in found.items():
            text = "".join(piece.text for piece in parts)
            logprobs = await choice.score(
                [token for piece in parts for token in piece.tokens],
                [offset for piece in parts for offset in piece.offsets],
            )
            reason = parts[-1].reason or ""
            choices.append(self.format.format_choice(choice.index, text, logprobs, reason))
        return self.format.format_whole(choices, self.usage)

    async def stream(self) -> AsyncGenerator[str, None]:
        """Yield the answer as server-sent events."""
        try:
            for choice in self.choices:
                yield self.format.format_start(choice.index)
            async with aclosing(_merge([choice.pieces() for choice in self.choices])) as pieces:
                async for choice, text, tokens, offsets, reason in pieces:
                    logprobs = await choice.score(tokens, offsets)
                    if text or tokens:
                        yield self.format.format_piece(choice.index, text, logprobs)
                    if reason:
                        yield self.format.format_end(choice.index, reason)
            if self.request.include_usage:
                yield self.format.format_usage(self.usage)
            yield "data: [DONE]\n\n"
        # The response has begun, so the error is an event.
        except Exception as error:
            if not isinstance(error, EndedError | UserError):
                logger.exception("A request failed.")
            message = one_line(error) if isinstance(error, UserError) else FAILED
            yield format_event(format_error(message, by_client=False))


def _number_seed(settings: dict[str, Any], n: int) -> dict[str, Any]:
    if settings["temperature"] == 0:  # nothing is drawn, and a batch is faster
        return {name: value for name, value in settings.items() if name != "seed"}
    return settings | {"seed": (settings["seed"] + n) % 2**32} if "seed" in settings else settings


@dataclass(eq=False)
class _Choice:
    """One text that follows a prompt, while it is written."""

    answer: Answer
    index: int
    prompt: Prompt
    settings: dict[str, Any]
    count: int = 0  # tokens written
    reading: Reading | None = None
    # The tokens that are not yet in a piece, and where they begin.
    tokens: list[int] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)

    async def pieces(self) -> AsyncGenerator[_Piece, None]:
        request, writer, prompt = self.answer.request, self.answer.writer, self.prompt
        if request.echo:
            starts = []
            if request.top_logprobs is not None:
                starts = await asyncio.to_thread(_find_starts, writer, prompt)
            yield _Piece(self, prompt.text, prompt.ids, starts)
        chat = self.answer.format.chat
        # A message is a text of its own.
        decoder = TextDecoder(writer.tokenizer, [] if chat else prompt.ids)
        text, reason, released = StoppingDecoder(decoder, request.stops), "length", 0
        if self.settings["max_new_tokens"]:
            async with aclosing(writer.write(prompt.ids, self.settings)) as tokens:
                async for token in tokens:
                    self.count += 1
                    is_end = token in writer.ends
                    reason = "stop" if is_end else reason
                    if not (is_end and chat):  # the end is not a part of a message
                        self.starts.append(len(prompt.text) + released + len(text.held))
                        self.tokens.append(token)
                    piece = text.add(token)
                    released += len(piece)
                    yield self._take(piece, len(prompt.text) + released)
                    if text.stopped:
                        break
        rest = text.finish()
        end = len(prompt.text) + released + len(rest) + (not text.stopped)
        yield self._take(rest, end, "stop" if text.stopped else reason)

    def _take(self, text: str, end: int, reason: str | None = None) -> _Piece:
        """Return a piece with the tokens that begin before `end`."""
        count = bisect_left(self.starts, end)
        piece = _Piece(self, text, self.tokens[:count], self.starts[:count], reason)
        del self.tokens[:count], self.starts[:count]
        return piece

    async def score(self, tokens: list[int], offsets: list[int]) -> dict[str, Any] | None:
        """Return the probabilities of the next tokens, if the request wants them."""
        request, scorer = self.answer.request, self.answer.scorer
        if request.top_logprobs is None:
            return None
        if self.reading is None:
            self.reading = Reading(scorer, request.top_logprobs)
            if not request.echo:
                await scorer.score(self.reading, self.prompt.ids)
        scores = await scorer.score(self.reading, tokens)
        return self.answer.format.format_logprobs(scores, offsets)


def _find_starts(writer: Writer, prompt: Prompt) -> list[int]:
    """Return where each token begins in the prompt, which may write special tokens out."""
    added = writer.tokenizer.added_tokens_decoder
    special = {token: added[token].content for token in added if added[token].special}
    decoder, starts, length = TextDecoder(writer.tokenizer), [], 0
    for token in prompt.ids:
        starts.append(length)
        length += len(decoder.add(token))
        if token in special and prompt.text.startswith(special[token], length):
            length += len(special[token])
    return starts


async def _merge(generators: list[AsyncGenerator[_Piece, None]]) -> AsyncGenerator[_Piece, None]:
    """Yield what generators yield, as it comes; the first error ends them all."""
    queue: asyncio.Queue[_Piece | Exception | None] = asyncio.Queue()

    async def drain(generator: AsyncGenerator[_Piece, None]) -> None:
        try:
            async with aclosing(generator):
                async for piece in generator:
                    queue.put_nowait(piece)
            queue.put_nowait(None)
        except Exception as error:  # raised below, in the reader's task
            queue.put_nowait(error)

    tasks = [asyncio.ensure_future(drain(generator)) for generator in generators]
    left = len(tasks)
    try:
        while left:
            item = await queue.get()
            if isinstance(item, Exception):
                raise item
            if item is None:
                left -= 1
            else:
                yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
