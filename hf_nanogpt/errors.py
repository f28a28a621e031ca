"""`UserError`, the one error type for the user's mistakes, and the parts of its messages."""

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from urllib.parse import urlsplit


class UserError(ValueError):
    """A mistake of the user, in one sentence that says what to do.

    The command line prints it without a traceback. Any other exception is a bug, ours or a
    library's, and shows its traceback.
    """


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return a sentence that suggests the known name nearest to `name`, or an empty string.

    >>> did_you_mean("lerning_rate", ["learning_rate", "warmup_steps"])
    ' Did you mean learning_rate?'
    >>> did_you_mean("--learning_rat=1e-3", ["--learning_rate"])
    ' Did you mean --learning_rate?'
    >>> did_you_mean("xyz", ["learning_rate"])
    ''
    """
    near = difflib.get_close_matches(name.split("=")[0], list(known), n=1, cutoff=0.5)
    return f" Did you mean {near[0]}?" if near else ""


def one_line(error: object) -> str:
    """Return the message of an error on one line, or the name of its type if it has no message."""
    return " ".join(str(error).split()) or type(error).__name__


def is_out_of_memory(error: BaseException | None) -> bool:
    """Say whether memory ran out, on any device, according to the error or those that caused it."""
    signs = ("an't allocate memory", "annot allocate memory", "ALLOC_FAILED", "bad_alloc")
    while error is not None:
        known = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
        if known or any(sign in str(error) for sign in signs):
            return True
        error = error.__cause__
    return False


@contextmanager
def explain_errors(what: str) -> Iterator[None]:
    """Raise whatever a library raises for a hostile or damaged file as a `UserError`.

    Put only the call that reads the file inside, or bugs would look like the user's mistakes.
    A panic in Rust, as in tokenizers, is not even an `Exception`.
    """
    try:
        yield
    except (KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:
        nested = isinstance(error, RecursionError)
        why = "it is nested too deeply" if nested else one_line(error)
        raise UserError(f"{what}: {why}") from error


@contextmanager
def settings_errors(*, of_rope: bool = False) -> Iterator[None]:
    """Raise what a library's configuration says about a bad value as a `UserError`.

    `of_rope`: also the `KeyError` that transformers raises for rope parameters that lack a key.
    Elsewhere a `KeyError` is a bug.
    """
    from huggingface_hub.errors import StrictDataclassError  # slow to import

    try:
        yield
    except UserError:
        raise
    except KeyError as error:
        if not of_rope:
            raise
        raise UserError(one_line(error.args[0])) from error
    except (ValueError, StrictDataclassError) as error:
        raise UserError(one_line(error)) from error


# Control characters, which a terminal obeys, and how to show them. A newline and a tab are
# harmless. A carriage return is dropped, so that a line that ends in CR LF still ends its line.
_CONTROLS = {code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160))}
_CONTROLS |= {ord("\n"): "\n", ord("\t"): "\t", ord("\r"): ""}


def printable(text: object) -> str:
    r"""Return the text with its control characters escaped, so that a terminal only shows them.

    >>> print(printable("a\x1b[2Jb"))
    a\x1b[2Jb
    """
    return str(text).translate(_CONTROLS)


def without_secrets(address: str) -> str:
    """Return a web address without user, password, query and fragment; return other text as it is.

    The query may hold a signature, which is as good as a password.
    """
    if not address.lower().startswith(("http://", "https://")):
        return address
    try:
        parts = urlsplit(address)
    except ValueError:  # not a valid address
        return address.partition("://")[0] + "://..."
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"
