"""The command line: each verb parses its flags, calls one function of the library and prints."""

import errno
import os
import sys
from collections.abc import Sequence
from importlib import import_module

from ..errors import UserError
from .parser import find_nearest
from .streams import OutputLostError, describe_loss, standard_streams

VERBS: dict[str, str] = {
    "train": "train a GPT on your text, from nothing or from a checkpoint",
    "tokenize": "turn a text into tokens once, in a folder to train from",
    "generate": "go on from a prompt, printed as it is produced",
    "chat": "talk with a model in the terminal",
    "serve": "answer OpenAI's API on this machine, for any client of it",
    "explain": "show what a model expected at each token of a text, and where its heads look",
    "playground": "a page in the browser: text with each token's chances, and other ways to go on",
    "eval": "measure checkpoints on a text, in bits per byte, or on tasks of lm-eval",
    "convert": "turn a GPT-1, GPT-2, GPT-Neo, Llama, Qwen3, nanochat or nanoGPT model into ours",
    "export": "turn a model of ours into one of those, for tools without hf_nanogpt",
    "push": "share a checkpoint on the Hub: model, tokenizer, code and card in one commit",
    "pull": "download a checkpoint from the Hub to a folder, whole or not at all",
    "info": "describe a checkpoint or a preset: sizes, memory, FLOPs",
    "doctor": "check that results are right here, and print what a bug report needs",
    "bench": "measure the speed of training or generation here, beside other implementations",
}
# A verb is the function `run_VERB` of its module here, which is imported when it is called for.
_MODULES = {
    "train": ["train", "tokenize"],
    "generate": ["generate", "explain"],
    "chat": ["chat", "serve"],
    "convert": ["convert", "export"],
    "playground": ["playground"],
    "measure": ["eval", "info", "bench"],
    "doctor": ["doctor"],
    "hub": ["push", "pull"],
}
_WHERE = {verb: module for module, verbs in _MODULES.items() for verb in verbs}
# These do nothing but print: they end when nobody reads it. The others go on without a reader.
_ONLY_PRINTING = ("generate", "explain", "chat", "info", "doctor", "-h", "--help", "--version")
# What to lower where memory does not suffice.
_LOWER = {
    "train": "--per_device_train_batch_size (with --gradient_accumulation_steps as much higher it "
    "stays the same training, and --resume goes on), --per_device_eval_batch_size or --block_size",
    "tokenize": "--num_proc",
    "eval": "--batch_size or --context_length",
    "bench": "--batch_size, --block_size or the size of the model",
    "generate": "--max_new_tokens or the length of the prompt, or take a smaller model",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run `hf-nanogpt`; return 0, 2 for bad input (one sentence on stderr), or 130 for Ctrl-C.

    A training that a signal has stopped exits with 128 and the signal's number.
    """
    # Threads of torch wait for each other by spinning, and so take the core from the one they wait
    # for as soon as another program runs: small steps then take ten times as long or more. A short
    # spin costs nothing on a quiet machine. (libgomp reads this once, when torch is imported.)
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    # Work that is done within this many seconds shows no bar. (tqdm reads it when imported, too.)
    os.environ.setdefault("TQDM_DELAY", "2")
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
            if _is_out_of_memory(error):
                lower = _LOWER.get(verb, "the size of the model")
                return _refuse(f"There is not enough memory for {verb}: lower {lower}.")
            if not _is_users(error):
                raise
            return _refuse(str(error))
    return 0


def _call(verb: str, argv: list[str]) -> None:
    if verb in ("-h", "--help"):
        print(_overview())
    elif verb == "--version":
        from .. import __version__

        print(__version__)
    elif module := _WHERE.get(verb):
        getattr(import_module(f".{module}", __name__), f"run_{verb}")(argv)
    else:
        near = find_nearest(verb, list(VERBS)) or f": choose one of {', '.join(VERBS)}"
        raise UserError(f"{verb!r} is no command{near}.")


def _refuse(sentence: str) -> int:
    from ..errors import printable

    print(printable(f"hf-nanogpt: {' '.join(sentence.split())}"), file=sys.stderr)
    return 2


def _is_out_of_memory(error: BaseException | None) -> bool:
    """Say whether memory for tensors or anything else was missing, of whichever device."""
    while error is not None:
        known = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
        words = ("an't allocate memory", "annot allocate memory", "ALLOC_FAILED", "bad_alloc")
        if known or any(word in str(error) for word in words):
            return True
        error = error.__cause__
    return False


def _is_users(error: Exception) -> bool:
    """Say whether an error is about what the user gave; any other is ours and shows a traceback."""
    return isinstance(error, ValueError) or type(error).__name__.startswith("StrictDataclass")


def _overview() -> str:
    width = max(map(len, VERBS))
    lines = [f"  {verb:<{width}}  {what}" for verb, what in VERBS.items()]
    return "\n".join(
        [
            "usage: hf-nanogpt COMMAND ...",
            "",
            "Train, use and share a small GPT in the Hugging Face ecosystem.",
            "",
            "commands:",
            *lines,
            "",
            "hf-nanogpt COMMAND --help tells more. Start with: hf-nanogpt train",
        ]
    )
