"""transformers' own OpenAI-compatible server, for one checkpoint.

`transformers serve` finds a class by its name among those of transformers, loads any id that a
request names, and lets an answer run past the context. Here the checkpoint is loaded already, is
the only one there is, and answers end where its context does.
"""

import shlex
import signal
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from json import dumps
from typing import Any

import torch
from jinja2 import TemplateError
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.cli.serving.model_manager import ModelManager
from transformers.cli.serving.utils import GenerateManager, GenerationState

from .chat import NO_TEMPLATE, find_turn_ends
from .generation import check_settings, encode_prompt

_TEXT, _CHAT = "/v1/completions", "/v1/chat/completions"


def build_app(name: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Any:
    """Return the FastAPI application that serves a model under a name, and nothing else.

    A request that cannot be answered gets status 400 and a sentence, in the form of OpenAI's API.
    As there, answers are sampled unless a request says `temperature=0`.

    Raises:
        ValueError: the tokenizer is of another model.
    """
    from fastapi.exceptions import RequestValidationError
    from fastapi.responses import JSONResponse
    from starlette.exceptions import HTTPException
    from transformers.cli.serving.chat_completion import ChatCompletionHandler
    from transformers.cli.serving.completion import CompletionHandler
    from transformers.cli.serving.response import ResponseHandler
    from transformers.cli.serving.server import build_server
    from transformers.cli.serving.systemone import SystemOneHandler
    from transformers.cli.serving.transcription import TranscriptionHandler

    encode_prompt(model, tokenizer, "a")
    own = model.generation_config
    ends = find_turn_ends(model, tokenizer) or None
    own.update(do_sample=True, top_k=own.top_k or 0, eos_token_id=ends)
    manager, state = parts = _OneModel(name, model, tokenizer), _OneThread()
    app = build_server(
        manager,
        ChatCompletionHandler(*parts),
        completion_handler=CompletionHandler(*parts),
        response_handler=ResponseHandler(*parts),
        transcription_handler=TranscriptionHandler(*parts),
        systemone_handler=SystemOneHandler(*parts),
        generation_state=state,
    )

    async def refuse(request: Any, error: Exception) -> JSONResponse:
        no_template = not tokenizer.chat_template and request.url.path != _TEXT
        status, why = 400, " ".join(str(error).split())
        if isinstance(error, KeyError | TypeError | RequestValidationError):
            no_template, why = False, f"The request is not as the API has it: {why}."
        if isinstance(error, HTTPException):
            status, why = error.status_code, error.detail
        message = NO_TEMPLATE if no_template and status == 400 else why
        body = {"message": message, "type": "invalid_request_error"}
        return JSONResponse({"error": body}, status)

    wrong = (ValueError, KeyError, TypeError, RequestValidationError)
    for kind in (*wrong, TemplateError, HTTPException):
        app.add_exception_handler(kind, refuse)
    return app


def open_socket(host: str, port: int) -> socket.socket:
    """Listen at an address; port 0 is any free one.

    Raises:
        ValueError: that cannot be, as where another program listens there.
    """
    if not 0 <= port < 2**16:
        raise ValueError(f"port={port} is not possible: it must be from 0 (any free one) to 65535.")
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(address[:2], family=family)
    except OSError as error:
        raise ValueError(
            f"host={host} port={port} cannot be listened at ({error.strerror}): choose another "
            "--port, or 0 for any free one."
        ) from error


def serve_app(app: Any, listener: socket.socket, *, on_ready: Callable[[], None]) -> None:
    """Answer requests until SIGINT or SIGTERM; `on_ready` is called when the first may come."""
    import uvicorn

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            on_ready()

    # uvicorn ends well at either signal and then raises it again: both become Ctrl-C's exception.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=5)
    with suppress(KeyboardInterrupt):
        Server(config).run(sockets=[listener])


def write_request(url: str, name: str, *, chat: bool) -> str:
    """Return a command line of curl that asks the server at `url` for an answer or a text."""
    message = {"role": "user", "content": "Hello!"}
    body = {"messages": [message]} if chat else {"prompt": "Hello", "max_tokens": 30}
    data = shlex.quote(dumps({"model": name, **body}, ensure_ascii=False))
    return f"curl {url}{_CHAT if chat else _TEXT} -H 'Content-Type: application/json' -d {data}"


class _OneModel(ModelManager):
    """Holds what is loaded already, and never looks for another."""

    def __init__(self, name: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase):
        super().__init__()
        self.force_model, self.loaded = name, (model, tokenizer)
        self.since = int(time.time())

    @staticmethod
    def process_model_name(model_id: str) -> str:
        return model_id  # without "@main", which the base class adds

    def load_model_and_processor(
        self, model_id_and_revision: str, progress_callback: Callable | None = None, **_: Any
    ) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        if model_id_and_revision != self.force_model:
            raise ValueError(f"This server has no model {model_id_and_revision!r}.")
        if progress_callback:
            progress_callback({"status": "ready", "model": self.force_model, "cached": True})
        return self.loaded

    def get_gen_models(self) -> list[dict[str, Any]]:
        row = {"id": self.force_model, "object": "model", "owned_by": "hf-nanogpt"}
        return [row | {"created": self.since}]


class _OneThread(GenerationState):
    """Answers requests one after another, all in the same thread."""

    def __init__(self):
        super().__init__()
        self.manager = _InContext()

    def get_manager(self, model_id: str, use_cb: bool = False) -> GenerateManager:
        return self.manager


class _InContext(GenerateManager):
    """Generates to the end of the context at most, and refuses a request before it starts."""

    def generate_streaming(self, model, processor, inputs, gen_config, *args, **kwargs):
        _fit(model, processor, inputs, gen_config)
        return super().generate_streaming(model, processor, inputs, gen_config, *args, **kwargs)

    async def generate_non_streaming(self, model, processor, inputs, gen_config, *args, **kwargs):
        _fit(model, processor, inputs, gen_config)
        given = (model, processor, inputs, gen_config, *args)
        return await super().generate_non_streaming(*given, **kwargs)


def _fit(model, tokenizer, inputs, config) -> None:
    """Check the settings of a request, and lower `max_new_tokens` to what there is room for."""
    if not inputs["input_ids"].numel():  # an empty prompt starts a document
        inputs["input_ids"] = encode_prompt(model, tokenizer, "")
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    length, limit = inputs["input_ids"].shape[1], model.config.max_position_embeddings
    if length >= limit:
        raise ValueError(f"The prompt has {length} tokens, and this model's context is {limit}.")
    names = ("max_new_tokens", "temperature", "top_p", "repetition_penalty")
    given = {name: getattr(config, name) for name in names}
    check_settings(**{name: value for name, value in given.items() if value is not None})
    config.max_new_tokens = min(config.max_new_tokens or limit, limit - length)
    if not config.do_sample:
        config.update(temperature=None, top_k=None, top_p=None)  # which would only give a warning
    config.pad_token_id = 0  # one row is never padded; without an id transformers warns
    if config.eos_token_id is None:  # of a request that brings its own configuration
        config.eos_token_id = model.generation_config.eos_token_id
