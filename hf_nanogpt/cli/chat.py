"""The verbs `chat` and `serve`."""

import io
import os
import sys
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

from ..errors import UserError, printable
from . import VERBS
from .parser import Parser, add_sampling, quiet_libraries


def run_chat(argv: list[str]) -> None:
    parser = Parser(prog="hf-nanogpt chat", description=VERBS["chat"], allow_abbrev=False)
    parser.add_argument("checkpoint", help="folder or Hub id, with a chat template")
    parser.add_argument("--system", default="", metavar="TEXT", help="tell the model what to be")
    parser.add_argument(
        "--max_new_tokens", type=int, default=256, help="longest answer (default 256)"
    )
    add_sampling(parser)
    given = vars(parser.parse(argv))

    quiet_libraries()
    from ..apps.chat import Chat
    from ..checkpoint.folder import load_checkpoint

    chat = Chat(*load_checkpoint(given.pop("checkpoint")), **given)
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # `Chat` refuses what is no text
    person = sys.stdin.isatty()
    if person:
        with suppress(ImportError):  # gives `input` its editing and history
            import readline  # noqa: F401
        print("Type a message, or /help. Ctrl-D ends.")
    while (line := _read_line(person)) is not None and line.strip() != "/exit":
        try:
            _answer(chat, line.strip())
        except KeyboardInterrupt:  # ends the answer, and not the chat
            if not person:
                raise
        except ValueError as error:
            print(printable(f"({' '.join(str(error).split())})"), file=sys.stderr)


def _read_line(person: bool) -> str | None:
    """Return the next line, or None at the end."""
    if not person:
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
    """Print what a command says, or the answer to a message."""
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


def run_serve(argv: list[str]) -> None:
    parser = Parser(prog="hf-nanogpt serve", description=VERBS["serve"], allow_abbrev=False)
    parser.add_argument("checkpoint", help="folder or Hub id")
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen at (default: this machine only)"
    )
    parser.add_argument("--port", type=int, default=8000, help="0 takes a free one (default 8000)")
    parser.add_argument(
        "--api_key",
        help="what clients must send as a bearer token; needed where other machines can reach the "
        "server. The environment variable HF_NANOGPT_API_KEY keeps it off the list of processes",
    )
    args = parser.parse(argv)

    if not all(map(find_spec, ("starlette", "uvicorn"))):
        raise UserError("A server needs packages: pip install 'hf-nanogpt[serve]'.")

    quiet_libraries()
    from ..apps.addresses import check_key_is_there, list_hosts, open_socket
    from ..apps.chat import NO_TEMPLATE
    from ..apps.serving import build_app, serve_app, write_request
    from ..checkpoint.folder import load_checkpoint

    key = args.api_key or os.environ.get("HF_NANOGPT_API_KEY")
    listener = open_socket(args.host, args.port)
    host, port = listener.getsockname()[:2]
    check_key_is_there(args.host, host, key)
    model, tokenizer = load_checkpoint(args.checkpoint)
    name = args.checkpoint.rstrip("/")
    if Path(name).is_absolute():  # clients are told the name, and no path of this machine
        name = Path(name).name
    app = build_app(name, model, tokenizer, api_key=key, hosts=list_hosts(args.host, host))
    url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

    def welcome() -> None:
        if not tokenizer.chat_template:
            print(f"Only {url}/v1/completions will answer. {NO_TEMPLATE}")
        print(printable(f"{name} answers at {url}/v1 (Ctrl-C ends it); try:"))
        chat = bool(tokenizer.chat_template)
        print(printable(write_request(url, name, chat=chat, with_key=bool(key))), flush=True)

    serve_app(app, listener, on_ready=welcome)
    print("Ended.")
