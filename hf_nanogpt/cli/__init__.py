"""The command line: each verb reads its flags, calls one function of the library and prints."""

import errno
import os
import sys
from collections.abc import Sequence
from importlib import import_module

from ..errors import UserError, did_you_mean, is_out_of_memory, one_line, printable
from .streams import OutputLostError, describe_loss, standard_streams

VERBS: dict[str, str] = {
    "train": "train a GPT on your text, from scratch or from a checkpoint",
    "tokenize": "turn a text into tokens once, in a folder to train from",
    "generate": "continue a prompt, printed as it is produced",
    "chat": "talk with a model in the terminal",
    "serve": "answer OpenAI's API on this machine, for any client",
    "explain": "show what a model expected at each token of a text, and where its heads look",
    "playground": "a page in the browser: each token's chances, and how else the text could go",
    "eval": "measure checkpoints on a text, in bits per byte, or on tasks of lm-eval",
    "convert": "import a GPT-1, GPT-2, GPT-Neo, OPT, Llama, Qwen2 or 3, nanochat or nanoGPT model",
    "export": "write a checkpoint in one of those formats, for tools without hf_nanogpt",
    "push": "share a checkpoint on the Hub: model, tokenizer, code and card in one commit",
    "pull": "download a complete checkpoint from the Hub to a folder",
    "info": "describe a checkpoint or a preset: sizes, memory, FLOPs",
    "doctor": "check that results are right on this machine, and print what a bug report needs",
    "bench": "measure the speed of training or generation, compared with other implementations",
}
# A verb is the function `run_VERB` of its module, which is imported when the verb is called.
_MODULES = {
    "train": ["train", "tokenize"],
    "generate": ["generate", "explain"],
    "apps": ["chat", "serve", "playground"],
    "convert": ["convert", "export"],
    "measure": ["eval", "info", "doctor", "bench"],
    "hub": ["push", "pull"],
}
_MODULE_OF = {verb: module for module, verbs in _MODULES.items() for verb in verbs}
# These only print, and end when nobody reads it. The others continue without a reader.
_ONLY_PRINTING = ("generate", "explain", "chat", "info", "doctor", "-h", "--help", "--version")
# What to lower when memory does not suffice; training says it itself.
_LOWER = {
    "tokenize": "--num_proc",
    "eval": "--batch_size or --context_length",
    "bench": "--batch_size, --block_size or the size of the model",
    "generate": "--max_new_tokens or the length of the prompt, or use a smaller model",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run `hf-nanogpt`; return 0, 2 for bad input (one sentence on stderr), or 130 for Ctrl-C.

    A training that a signal has stopped exits with 128 and the signal's number. An exception that
    is not about the user's input is a bug, and is raised.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    verb = argv[0] if argv else "--help"
    with standard_streams(lasting=verb not in _ONLY_PRINTING):
        try:
            _call(verb, argv[1:])
            sys.stdout.flush()
        except KeyboardInterrupt:
            print("\nInterrupted.", file=sys.stderr)
            return 130
        except OutputLostError as error:
            if error.errno == errno.EPIPE:  # the reader, such as `head`, has seen enough
                return 0
            return _refuse(describe_loss(error))
        except Exception as error:
            if os.environ.get("HF_NANOGPT_TRACEBACK"):
                raise
            if is_out_of_memory(error):
                lower = _LOWER.get(verb, "the size of the model")
                return _refuse(f"There is not enough memory for {verb}: lower {lower}.")
            if not isinstance(error, UserError):
                raise
            return _refuse(one_line(error))
    return 0


def _call(verb: str, argv: list[str]) -> None:
    if verb in ("-h", "--help"):
        print(_overview())
    elif verb == "--version":
        from .. import __version__

        print(__version__)
    elif module := _MODULE_OF.get(verb):
        getattr(import_module(f".{module}", __name__), f"run_{verb}")(argv)
    else:
        hint = did_you_mean(verb, VERBS) or f" Choose one of {', '.join(VERBS)}."
        raise UserError(f"{verb!r} is not a command.{hint}")


def _refuse(sentence: str) -> int:
    print(printable(f"hf-nanogpt: {sentence}"), file=sys.stderr)
    return 2


def _overview() -> str:
    width = max(map(len, VERBS))
    verbs = "\n".join(f"  {verb:<{width}}  {what}" for verb, what in VERBS.items())
    return f"""usage: hf-nanogpt COMMAND ...

Train, use and share a small GPT in the Hugging Face ecosystem.

commands:
{verbs}

hf-nanogpt COMMAND --help lists its flags. Start with: hf-nanogpt train"""
