"""A server of OpenAI's API for one checkpoint, safe with clients that cannot be trusted.

openai_api.py checks a request, answering.py makes its answer, and openai_format.py puts it into
JSON; batching.py writes the tokens of several answers at once, and scoring.py computes their
probabilities. Here are the routes and the limits: a browser must name this machine as the host and
send JSON with its content type, so that no other web page can use the server; from other machines a
client needs the key.
"""

import asyncio
import hmac
import json
import shlex
import signal
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any, cast

import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..data.chat_text import ChatTextEncoder
from ..errors import UserError, one_line
from ..generation import check_vocabulary, encode_prompt
from .answering import FAILED, Answer, Prompt
from .batching import EndedError, Writer
from .chat import NO_TEMPLATE, find_turn_ends, render_messages
from .openai_api import CompletionRequest, RequestError, check_request, parse_body
from .openai_format import ResponseFormat, format_error, format_event
from .scoring import Scorer

_TEXT, _CHAT, _MODELS = "/v1/completions", "/v1/chat/completions", "/v1/models"
_MAX_BODY = 4 * 2**20  # bytes
_GRACE = 3  # seconds for answers to finish when the server stops


def build_app(
    name: str,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    api_key: str | None = None,
    hosts: list[str] | None = None,
) -> Starlette:
    """Return the ASGI application that serves one model under `name`.

    A bad request gets status 400 and an explanation in the form of OpenAI's API. As there, answers
    are sampled unless a request sets `temperature=0`.

    Args:
        api_key: what clients must send as `Authorization: Bearer ...`; by default nothing.
        hosts: the accepted values of the header `Host`; by default all.

    Raises:
        UserError: the tokenizer belongs to another model.
    """
    server = _Server(name, model, tokenizer, api_key)
    app = Starlette(
        routes=[
            Route("/health", server.show_health),
            Route(_MODELS, server.list_models),
            Route(_MODELS + "/{name:path}", server.show_model),
            Route("/load_model", server.load_model, methods=["POST"]),
            Route(_TEXT, server.answer, methods=["POST"]),
            Route(_CHAT, server.answer, methods=["POST"]),
        ],
        middleware=[
            Middleware(TrustedHostMiddleware, allowed_hosts=hosts or ["*"], www_redirect=False)
        ],
        exception_handlers=dict.fromkeys(
            (UserError, HTTPException, EndedError, ClientDisconnect, Exception), _explain
        ),
    )
    app.state.writer, app.state.scorer = server.writer, server.scorer
    return app


def serve_app(app: Starlette, listener: socket.socket, *, on_ready: Callable[[], None]) -> None:
    """Answer requests until SIGINT or SIGTERM; call `on_ready` once the first may come."""
    writer: Writer = app.state.writer
    scorer: Scorer = app.state.scorer

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            on_ready()

        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            asyncio.get_running_loop().call_later(_GRACE, writer.abandon)
            await super().shutdown(sockets)
            await writer.close()
            await scorer.close()

    # uvicorn shuts down at either signal and then raises it again, here as KeyboardInterrupt.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    config = uvicorn.Config(
        app, log_level="warning", server_header=False, timeout_graceful_shutdown=2 * _GRACE
    )
    with suppress(KeyboardInterrupt):
        Server(config).run(sockets=[listener])


def write_request(url: str, name: str, *, chat: bool, with_key: bool = False) -> str:
    """Return a curl command that asks the server at `url` for an answer or a text."""
    message = {"role": "user", "content": "Hello!"}
    body = {"messages": [message]} if chat else {"prompt": "Hello", "max_tokens": 30}
    data = shlex.quote(json.dumps({"model": name, **body}, ensure_ascii=False))
    key = '-H "Authorization: Bearer $HF_NANOGPT_API_KEY" ' if with_key else ""
    path = _CHAT if chat else _TEXT
    return f"curl {url}{path} {key}-H 'Content-Type: application/json' -d {data}"


async def _explain(request: Request, error: Exception) -> Response:
    """Return the response to a request that failed."""
    param = code = None
    if isinstance(error, RequestError):
        status, message, param, code = error.status, one_line(error), error.param, error.code
    elif isinstance(error, HTTPException):
        status, message = error.status_code, error.detail
        if status in (404, 405):
            asked = f"{request.method} {request.url.path!r:.80}"
            message = f"This server has no {asked}; it has POST {_TEXT} and {_CHAT}, GET {_MODELS}."
    elif isinstance(error, UserError):
        status, message = 400, one_line(error)
    elif isinstance(error, EndedError):
        status, message = 503, FAILED
    elif isinstance(error, ClientDisconnect):
        status, message = 499, "The client has disconnected."
    else:  # a bug: starlette shows its traceback on the server
        status, message = 500, FAILED
    headers = getattr(error, "headers", None)  # such as Allow
    content = format_error(message, by_client=status < 500, param=param, code=code)
    return JSONResponse(content, status, headers)


class _Server:
    """The endpoints of one model."""

    def __init__(
        self,
        name: str,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        api_key: str | None,
    ):
        check_vocabulary(model, tokenizer)
        self.name, self.model, self.tokenizer, self.api_key = name, model, tokenizer, api_key
        self.text_encoder = ChatTextEncoder(tokenizer)
        self.writer = Writer(model, tokenizer, find_turn_ends(model, tokenizer))
        self.scorer = Scorer(model, tokenizer)
        self.description: dict[str, Any] = {"id": name, "object": "model"}
        self.description |= {"owned_by": "hf-nanogpt", "created": int(time.time())}
        # A text of more characters cannot fit the context. It is refused before it is tokenized,
        # which takes far more memory than the text.
        longest = max(map(len, tokenizer.get_vocab()))
        self.max_characters = longest * model.config.max_position_embeddings

    async def show_health(self, request: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def list_models(self, request: Request) -> Response:
        self.check_key(request)
        return JSONResponse({"object": "list", "data": [self.description]})

    async def show_model(self, request: Request) -> Response:
        self.check_key(request)
        self.check_name(request.path_params["name"])
        return JSONResponse(self.description)

    async def load_model(self, request: Request) -> Response:
        """Say that the model is loaded, which `transformers chat` waits for."""
        await self.read_body(request)
        event = format_event({"status": "ready", "model": self.name, "cached": True})
        return PlainTextResponse(event, media_type="text/event-stream")

    async def answer(self, request: Request) -> Response:
        """Answer a chat or continue a text, at once or as a stream."""
        body = await self.read_body(request)
        chat = request.url.path == _CHAT
        if chat and not self.tokenizer.chat_template:
            raise UserError(NO_TEMPLATE)
        # Templates and tokenizers take time: in a thread, they do not hold up other requests.
        answer = await asyncio.to_thread(self.prepare, body, chat=chat)
        if answer.request.stream:
            return StreamingResponse(answer.stream(), media_type="text/event-stream")
        whole = asyncio.ensure_future(answer.collect())
        gone = asyncio.ensure_future(_wait_for_disconnect(request))
        try:
            await asyncio.wait({whole, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not whole.done():
                raise ClientDisconnect
            return JSONResponse(whole.result())
        finally:
            whole.cancel()
            gone.cancel()

    def check_key(self, request: Request) -> None:
        scheme, _, sent = request.headers.get("authorization", "").partition(" ")
        same = hmac.compare_digest(sent.encode("latin-1"), (self.api_key or "").encode())
        if self.api_key and not (same and scheme.lower() == "bearer"):
            message = "This server needs a key: send Authorization: Bearer KEY."
            raise RequestError(message, code="invalid_api_key", status=401)

    async def read_body(self, request: Request) -> dict[str, Any]:
        """Return the JSON of a request for this model, by a client with the key."""
        self.check_key(request)
        # A browser sends this content type to another site only after asking that site.
        content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if content_type != "application/json":
            message = "The request must have the header Content-Type: application/json."
            raise HTTPException(415, message)
        chunks, size = [], 0
        async for chunk in request.stream():
            size += len(chunk)
            if size <= _MAX_BODY:  # the rest is read and dropped, so that the client gets an answer
                chunks.append(chunk)
        if size > _MAX_BODY:
            message = f"The request has {size:,} bytes; this server accepts at most {_MAX_BODY:,}."
            raise HTTPException(413, message)
        body = await asyncio.to_thread(parse_body, b"".join(chunks))
        if not isinstance(body.get("model"), str):
            raise RequestError(
                f"model={body.get('model')!r:.80} is invalid: it must be {self.name!r}.", "model"
            )
        self.check_name(body["model"])
        return body

    def check_name(self, name: str) -> None:
        if name != self.name:
            message = f"This server has no model {name!r:.80}: it has {self.name!r} only."
            raise RequestError(message, "model", "model_not_found", 404)

    def prepare(self, body: dict[str, Any], *, chat: bool) -> Answer:
        """Return the answer to a request, ready to be written."""
        request = check_request(body, chat=chat, vocab_size=self.model.config.vocab_size)
        encode = self.encode_messages if chat else self.encode_text
        try:
            prompts = [self.prepare_prompt(request, *encode(prompt)) for prompt in request.prompts]
        except UserError as error:
            field, code = "messages" if chat else "prompt", getattr(error, "code", None)
            raise RequestError(str(error), field, code) from error
        form = ResponseFormat(self.name, chat=chat, include_usage=request.include_usage)
        return Answer(self.writer, self.scorer, request, prompts, form)

    def prepare_prompt(self, request: CompletionRequest, text: str, ids: list[int]) -> Prompt:
        """Return a prompt with settings that fit into the context after it."""
        limit = self.model.config.max_position_embeddings
        room = limit - len(ids)
        longest = request.settings.get("max_new_tokens", limit)
        if room < min(longest, 1):
            raise self.refuse_length(f"{len(ids)} tokens, and this model's context is {limit}.")
        defaults = self.model.generation_config
        settings = {
            "temperature": defaults.temperature or 1.0,
            "top_k": defaults.top_k or 0,
            "top_p": defaults.top_p or 1.0,
            **request.settings,
            "max_new_tokens": min(longest, room),
        }
        return Prompt(text, ids, settings)

    def encode_messages(self, messages: list[dict[str, str]]) -> tuple[str, list[int]]:
        """Return no text, as an answer is a text of its own, and the token ids of a chat."""
        self.check_length("".join(message["content"] for message in messages))
        text = render_messages(self.tokenizer, self.text_encoder.hide(messages))
        self.check_length(text)
        ids = encode_prompt(self.model, self.tokenizer, text, encode=self.text_encoder.encode)
        return "", ids[0].tolist()

    def encode_text(self, prompt: str | list[int]) -> tuple[str, list[int]]:
        """Return the text and the token ids of a prompt that is one of them."""
        if not isinstance(prompt, str):
            text = self.tokenizer.decode(prompt, skip_special_tokens=True)
            return cast(str, text), prompt
        self.check_length(prompt)
        return prompt, encode_prompt(self.model, self.tokenizer, prompt)[0].tolist()

    def check_length(self, text: str) -> None:
        if len(text) > self.max_characters:
            raise self.refuse_length(
                f"{len(text):,} characters, and at most {self.max_characters:,} fit this model's "
                f"context of {self.model.config.max_position_embeddings} tokens."
            )

    def refuse_length(self, why: str) -> RequestError:
        return RequestError(f"The prompt has {why} Shorten it.", code="context_length_exceeded")


async def _wait_for_disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
