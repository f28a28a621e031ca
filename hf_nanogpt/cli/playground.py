"""The verb `playground`."""

from . import VERBS
from .parser import Parser, quiet_libraries


def run_playground(argv: list[str]) -> None:
    parser = Parser(
        prog="hf-nanogpt playground", description=VERBS["playground"], allow_abbrev=False
    )
    parser.add_argument("checkpoint", help="folder or Hub id")
    parser.add_argument("second", nargs="?", help="another one, to compare side by side")
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen on (default: this machine only)"
    )
    parser.add_argument("--port", type=int, help="default 7860, or the next that is free")
    args = parser.parse(argv)

    quiet_libraries()
    from ..apps.playground import serve_playground

    checkpoints = [name for name in (args.checkpoint, args.second) if name is not None]
    page = serve_playground(checkpoints, host=args.host, port=args.port)
    print(f"The playground is at {page.local_url} (Ctrl-C ends it).", flush=True)
    page.block_thread()
