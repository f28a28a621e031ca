"""A server of OpenAI's API for one checkpoint, for clients that need not be trusted.

What a request may ask is in api_requests.py, how many are written at once in batching.py, and what
an answer is in answering.py. Here are the addresses and who may ask: a browser must name this
machine as the host and send JSON as such, so that no page from elsewhere reaches the server, and
beyond this machine a client needs the key.
"""

import asyncio
import hmac
import shlex
import signal
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from ipaddress import ip_address
from json import dumps
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..errors import UserError
from ..generation import encode_prompt
from .answering import FAILED, Answer, ChatForm, TextForm, write_event
from .api_requests import Request, read_body, read_request
from .batching import EndedError, Writer
from .chat import NO_TEMPLATE, find_turn_ends, render_messages

if TYPE_CHECKING:
    from starlette.requests import Request as HTTPRequest
    from starlette.responses import Response

_TEXT, _CHAT = "/v1/completions", "/v1/chat/completions"
_LARGEST_BODY = 4 * 2**20  # bytes
_PATIENCE = 3  # seconds that answers have to end by themselves when the server ends


class _RefusalError(Exception):
    """An answer of another status than 400."""

    def __init__(self, status: int, message: str):
        super().__init__(message)
        self.status = status


def build_app(
    name: str,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    api_key: str | None = None,
    hosts: list[str] | None = None,
) -> Any:
    """Return the ASGI application that serves a model under a name, and nothing else.

    A request that cannot be answered gets status 400 and a sentence, in the form of OpenAI's API.
    As there, answers are sampled unless a request says `temperature=0`.

    Args:
        api_key: what clients must send as `Authorization: Bearer ...`, if anything.
        hosts: the only values of the header `Host` that are answered; by default all.

    Raises:
        UserError: the tokenizer is of another model.
    """
    from starlette.applications import Starlette
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware
    from starlette.responses import JSONResponse
    from starlette.routing import Route

    server = _Server(name, model, tokenizer, api_key)

    async def health(request: "HTTPRequest") -> "Response":
        return JSONResponse({"status": "ok"})

    given: dict[str, Any] = {"allowed_hosts": hosts or ["*"], "www_redirect": False}
    app = Starlette(
        routes=[
            Route("/health", health),
            Route("/v1/models", server.guard(server.list_models)),
            Route("/v1/models/{name:path}", server.guard(server.show_model)),
            Route("/load_model", server.guard(server.load_model), methods=["POST"]),
            Route(_TEXT, server.guard(server.complete), methods=["POST"]),
            Route(_CHAT, server.guard(server.chat), methods=["POST"]),
        ],
        middleware=[Middleware(TrustedHostMiddleware, **given)],
    )
    app.state.writer = server.writer
    return app


def open_socket(host: str, port: int) -> socket.socket:
    """Listen at an address; port 0 is any free one.

    Raises:
        UserError: that cannot be, as where another program listens there.
    """
    if not 0 <= port < 2**16:
        raise UserError(f"port={port} is not possible: it must be from 0 (any free one) to 65535.")
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(address[:2], family=family)
    except (OSError, UnicodeError) as error:
        why = getattr(error, "strerror", None) or error
        raise UserError(
            f"host={host} port={port} cannot be listened at ({why}): choose another "
            "--port, or 0 for any free one."
        ) from error


def list_hosts(host: str, address: str) -> list[str]:
    """Return the hosts that a browser may name: this machine's where only it is served, else all.

    A page from elsewhere could make its own name mean this machine, and then ask the server.
    """
    if not ip_address(address.partition("%")[0]).is_loopback:
        return ["*"]
    return ["localhost", "127.0.0.1", "[::1]", f"[{address}]" if ":" in address else address, host]


def check_key_is_there(host: str, address: str, api_key: str | None) -> None:
    """Raise a `UserError` if other machines can reach the server and no key is needed."""
    if "*" in list_hosts(host, address) and not api_key:
        raise UserError(
            f"host={host} lets other machines in, so clients need a key: give --api_key, or set "
            "HF_NANOGPT_API_KEY, or leave --host out to serve this machine only."
        )


def serve_app(app: Any, listener: socket.socket, *, on_ready: Callable[[], None]) -> None:
    """Answer requests until SIGINT or SIGTERM; `on_ready` is called when the first may come."""
    import uvicorn

    writer: Writer = app.state.writer

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            on_ready()

        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            asyncio.get_running_loop().call_later(_PATIENCE, writer.abandon)
            await super().shutdown(sockets)
            await writer.close()

    # uvicorn ends well at either signal and then raises it again: both become Ctrl-C's exception.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    config = uvicorn.Config(
        app,
        log_level="warning",
        server_header=False,
        timeout_graceful_shutdown=2 * _PATIENCE,
    )
    with suppress(KeyboardInterrupt):
        Server(config).run(sockets=[listener])


def write_request(url: str, name: str, *, chat: bool, with_key: bool = False) -> str:
    """Return a command line of curl that asks the server at `url` for an answer or a text."""
    message = {"role": "user", "content": "Hello!"}
    body = {"messages": [message]} if chat else {"prompt": "Hello", "max_tokens": 30}
    data = shlex.quote(dumps({"model": name, **body}, ensure_ascii=False))
    key = '-H "Authorization: Bearer $HF_NANOGPT_API_KEY" ' if with_key else ""
    return (
        f"curl {url}{_CHAT if chat else _TEXT} {key}-H 'Content-Type: application/json' -d {data}"
    )


class _Server:
    """Answers for one model."""

    def __init__(
        self,
        name: str,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        api_key: str | None,
    ):
        encode_prompt(model, tokenizer, "a")
        self.name, self.model, self.tokenizer, self.api_key = name, model, tokenizer, api_key
        self.ends = find_turn_ends(model, tokenizer)
        self.writer = Writer(model, tokenizer, self.ends)
        self.since = int(time.time())
        # No text of more characters than this fits the context: it is refused before it becomes
        # tokens, which takes far more memory than the text.
        longest = max(map(len, tokenizer.get_vocab()))
        self.most_characters = longest * model.config.max_position_embeddings

    def guard(self, answer: Callable) -> Callable:
        """Wrap what answers a request: it needs the key, and what goes wrong becomes a sentence."""
        from starlette.requests import ClientDisconnect
        from starlette.responses import JSONResponse

        async def guarded(request: "HTTPRequest") -> "Response":
            try:
                self.check_key(request)
                return await answer(request)
            except (ValueError, _RefusalError) as error:
                status, message = getattr(error, "status", 400), " ".join(str(error).split())
            except EndedError:
                status, message = 503, FAILED
            except ClientDisconnect:
                status, message = 499, "The client has gone."
            kind = "invalid_request_error" if status < 500 else "server_error"
            return JSONResponse({"error": {"message": message, "type": kind}}, status)

        return guarded

    def check_key(self, request: "HTTPRequest") -> None:
        given = request.headers.get("authorization", "")
        wanted = f"Bearer {self.api_key}".encode()
        if self.api_key and not hmac.compare_digest(given.encode("latin-1"), wanted):
            raise _RefusalError(401, "This server needs its key: send Authorization: Bearer KEY.")

    async def read_body(self, request: "HTTPRequest") -> dict[str, Any]:
        """Return the JSON of a request for this model.

        A browser sends text of this content type to another site only after asking that site.
        """
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise _RefusalError(
                415, "The request must have the header Content-Type: application/json."
            )
        chunks, size = [], 0
        async for chunk in request.stream():
            size += len(chunk)
            if size <= _LARGEST_BODY:  # what is too much is read, for the client to hear why
                chunks.append(chunk)
        if size > _LARGEST_BODY:
            raise _RefusalError(
                413,
                f"The request has {size:,} bytes, and this server reads at most {_LARGEST_BODY:,}.",
            )
        body = await asyncio.to_thread(read_body, b"".join(chunks))
        if not isinstance(body.get("model"), str):
            raise UserError(f"model={body.get('model')!r:.80} is not possible: give {self.name!r}.")
        self.check_name(body["model"])
        return body

    def check_name(self, name: str) -> None:
        if name != self.name:
            raise _RefusalError(
                404, f"This server has no model {name!r:.80}: it has {self.name!r} only."
            )

    # the addresses

    def describe(self) -> dict[str, Any]:
        return {"id": self.name, "object": "model", "owned_by": "hf-nanogpt", "created": self.since}

    async def list_models(self, request: "HTTPRequest") -> "Response":
        from starlette.responses import JSONResponse

        return JSONResponse({"object": "list", "data": [self.describe()]})

    async def show_model(self, request: "HTTPRequest") -> "Response":
        from starlette.responses import JSONResponse

        self.check_name(request.path_params["name"])
        return JSONResponse(self.describe())

    async def load_model(self, request: "HTTPRequest") -> "Response":
        """Say that the model is loaded, which `transformers chat` waits for."""
        from starlette.responses import PlainTextResponse

        await self.read_body(request)
        event = {"status": "ready", "model": self.name, "cached": True}
        return PlainTextResponse(write_event(event), media_type="text/event-stream")

    async def complete(self, request: "HTTPRequest") -> "Response":
        return await self.answer(request, TextForm(self.name))

    async def chat(self, request: "HTTPRequest") -> "Response":
        if not self.tokenizer.chat_template:
            raise UserError(NO_TEMPLATE)
        return await self.answer(request, ChatForm(self.name))

    async def answer(self, request: "HTTPRequest", form: "TextForm") -> "Response":
        from starlette.responses import JSONResponse, StreamingResponse

        body = await self.read_body(request)
        # Templates and tokenizers take their time, in which others are answered.
        asked, prompt = await asyncio.to_thread(self.prepare, body, form.is_chat)
        answer = Answer(self.writer, asked, prompt)
        if asked.stream:
            return StreamingResponse(answer.stream(form), media_type="text/event-stream")
        whole = asyncio.ensure_future(answer.collect())
        gone = asyncio.ensure_future(_wait_until_gone(request))
        try:
            await asyncio.wait({whole, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not whole.done():
                raise _RefusalError(499, "The client has gone.")
            return JSONResponse(form.write_whole(whole.result(), answer.reason, answer.usage))
        finally:
            whole.cancel()
            gone.cancel()

    def prepare(self, body: dict[str, Any], is_chat: bool) -> tuple[Request, list[int]]:
        """Return what a request asks, with the settings that it leaves out, and its tokens."""
        asked = read_request(body, chat=is_chat)
        text = asked.prompt
        if not isinstance(text, str):
            self.check_size("".join(message["content"] for message in text))
            text = render_messages(self.tokenizer, text)
        self.check_size(text)
        ids = encode_prompt(self.model, self.tokenizer, text, add_special_tokens=not is_chat)
        length, limit = ids.shape[1], self.model.config.max_position_embeddings
        if length >= limit:
            raise UserError(f"The prompt has {length} tokens, and this model's context is {limit}.")
        own, room = self.model.generation_config, limit - length
        asked.settings["max_new_tokens"] = min(asked.settings.get("max_new_tokens", room), room)
        asked.settings.setdefault("temperature", own.temperature or 1.0)
        asked.settings.setdefault("top_k", own.top_k or 0)
        asked.settings.setdefault("top_p", own.top_p or 1.0)
        return asked, ids[0].tolist()

    def check_size(self, text: str) -> None:
        if len(text) > self.most_characters:
            raise UserError(
                f"The prompt has {len(text):,} characters, and at most {self.most_characters:,} "
                f"fit this model's context of {self.model.config.max_position_embeddings} tokens."
            )


async def _wait_until_gone(request: "HTTPRequest") -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
