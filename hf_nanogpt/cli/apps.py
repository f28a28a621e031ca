"""The verbs `chat`, `serve` and `playground`."""

import io
import os
import sys
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

from ..errors import UserError, one_line, printable
from . import VERBS
from .parser import SAMPLING, Flags, load_libraries, parse_flags

_CHAT: Flags = [
    ("checkpoint", str, None, "folder or Hub id of a model with a chat template"),
    ("--system TEXT", str, "", "tell the model what to be"),
    ("--max_new_tokens", int, 256, "longest answer, in tokens"),
    *SAMPLING,
]


def run_chat(argv: list[str]) -> None:
    settings = vars(parse_flags("chat", VERBS["chat"], _CHAT, argv))

    load_libraries()
    from ..apps.chat import Chat
    from ..checkpoint.loading import load_checkpoint
    from ..generation import find_temperature

    model, tokenizer = load_checkpoint(settings.pop("checkpoint"))
    if settings["temperature"] is None:
        settings["temperature"] = find_temperature(model)
    chat = Chat(model, tokenizer, **settings)
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # `Chat` refuses what is not text
    is_person = sys.stdin.isatty()
    if is_person:
        with suppress(ImportError):  # gives `input` its editing and history
            import readline  # noqa: F401
        print("Type a message, or /help. Ctrl-D ends.")
    while (line := _read_line(is_person)) is not None and line.strip() != "/exit":
        try:
            _answer(chat, line.strip())
        except KeyboardInterrupt:  # ends the answer, but not the chat
            if not is_person:
                raise
        except UserError as error:
            print(printable(f"({one_line(error)})"), file=sys.stderr)


def _read_line(is_person: bool) -> str | None:
    """Return the next line, or None at the end."""
    if not is_person:
        return sys.stdin.readline() or None
    try:
        return input("> ")
    except EOFError:
        print()
        return None
    except KeyboardInterrupt:
        print("\n(Ctrl-D ends.)", file=sys.stderr)
        return ""


def _answer(chat, line: str) -> None:
    """Print the result of a command, or the answer to a message."""
    if line.startswith("/"):
        print(printable(chat.run_command(line)))
        return
    if not line:
        return
    before = chat.forgotten
    pieces = chat.answer(line)
    if new := chat.forgotten - before:
        print(f"(the oldest {new} messages no longer fit the context)", file=sys.stderr)
    try:
        for piece in pieces:
            print(printable(piece), end="", flush=True)
    finally:
        pieces.close()
        print()


_HOST = ("--host", str, "127.0.0.1", "address to listen on; by default this machine only")
_API_KEY = (
    "what clients must send as a bearer token; required when other machines can reach the server. "
    "The environment variable HF_NANOGPT_API_KEY keeps it out of the list of processes"
)
_SERVE: Flags = [
    ("checkpoint", str, None, "folder or Hub id"),
    _HOST,
    ("--port", int, 8000, "0 takes a free one"),
    ("--api_key", str, None, _API_KEY),
]


def run_serve(argv: list[str]) -> None:
    args = parse_flags("serve", VERBS["serve"], _SERVE, argv)
    if not all(map(find_spec, ("starlette", "uvicorn"))):
        raise UserError("A server needs packages: pip install 'hf-nanogpt[serve]'.")

    load_libraries()
    from ..apps.addresses import check_key_is_there, list_hosts, open_socket
    from ..apps.chat import NO_TEMPLATE
    from ..apps.serving import build_app, serve_app, write_request
    from ..checkpoint.loading import load_checkpoint

    # Refuse a bad address before the model is loaded.
    key = args.api_key or os.environ.get("HF_NANOGPT_API_KEY")
    listener = open_socket(args.host, args.port)
    host, port = listener.getsockname()[:2]
    check_key_is_there(args.host, host, key)

    model, tokenizer = load_checkpoint(args.checkpoint)
    name = args.checkpoint.rstrip("/")
    if Path(name).is_absolute():  # clients see the name; a path of this machine is private
        name = Path(name).name
    app = build_app(name, model, tokenizer, api_key=key, hosts=list_hosts(args.host, host))
    url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

    def welcome() -> None:
        is_chat = bool(tokenizer.chat_template)
        if not is_chat:
            print(f"Only {url}/v1/completions will answer. {NO_TEMPLATE}")
        print(printable(f"{name} answers at {url}/v1 (Ctrl-C ends it); try:"))
        print(printable(write_request(url, name, chat=is_chat, with_key=bool(key))), flush=True)

    serve_app(app, listener, on_ready=welcome)
    print("Ended.")


_PLAYGROUND: Flags = [
    ("checkpoint", str, None, "folder or Hub id"),
    ("second", str, None, "another one, to compare side by side", {"nargs": "?"}),
    _HOST,
    ("--port", int, None, "default 7860, or the next free one"),
]


def run_playground(argv: list[str]) -> None:
    args = parse_flags("playground", VERBS["playground"], _PLAYGROUND, argv)

    load_libraries()
    from ..apps.playground import serve_playground

    checkpoints = [name for name in (args.checkpoint, args.second) if name is not None]
    page = serve_playground(checkpoints, host=args.host, port=args.port)
    print(f"The playground is at {page.local_url} (Ctrl-C ends it).", flush=True)
    page.block_thread()
