"""The user's mistakes: one error type, and the words that explain it in one sentence."""

import difflib
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

from huggingface_hub import constants, get_token
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HTTPError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    StrictDataclassError,
)


class UserError(ValueError):
    """A mistake of the user, in one sentence that says what to do.

    The command line prints it without a traceback. Any other exception is a bug of ours, or of a
    library, and shows its traceback.
    """


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return a sentence that names the known word nearest to `name`, or nothing.

    >>> did_you_mean("lerning_rate", ["learning_rate", "warmup_steps"])
    ' Did you mean learning_rate?'
    >>> did_you_mean("xyz", ["learning_rate"])
    ''
    """
    near = difflib.get_close_matches(name.split("=")[0], list(known), n=1, cutoff=0.5)
    return f" Did you mean {near[0]}?" if near else ""


def one_line(error: object) -> str:
    """Return the reason that an error gives, on one line; without one, the name of its type."""
    return " ".join(str(error).split()) or type(error).__name__


@contextmanager
def explain_errors(what: str) -> Iterator[None]:
    """Raise whatever a library raises for a hostile or damaged file as a `UserError`.

    Only the call that reads the file belongs inside, as a bug would be called a mistake, too.
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
def settings_errors() -> Iterator[None]:
    """Raise as a `UserError` what a configuration or arguments of a library say of a bad value."""
    try:
        yield
    except UserError:
        raise
    except (ValueError, StrictDataclassError) as error:
        raise UserError(one_line(error)) from error


# What a terminal obeys: all control characters, of which a line's end and a tab are no danger. A
# carriage return is left out, so that the ends of lines stay what they are.
_CONTROLS = {code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160))}
_CONTROLS |= {ord("\n"): "\n", ord("\t"): "\t", ord("\r"): ""}


def printable(text: object) -> str:
    r"""Return the text with nothing in it that a terminal obeys, such as `\x1b[2J`.

    >>> print(printable("a\x1b[2Jb"))
    a\x1b[2Jb
    """
    return str(text).translate(_CONTROLS)


def without_secrets(address: str) -> str:
    """Return an address of the web without user, password, query and fragment; else the text.

    The query may hold a signature, which is as good as a password.
    """
    if not address.lower().startswith(("http://", "https://")):
        return address
    try:
        parts = urlsplit(address)
    except ValueError:  # not an address at all
        return address.partition("://")[0] + "://..."
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


# The Hub

FAILURES = (OSError, HTTPError, RuntimeError)  # of a request; RuntimeError is of an upload
_WAITS = (0.5, 2.0, 8.0)  # seconds before another attempt
LOG_IN = "you are not logged in: run `hf auth login`, or set HF_TOKEN"
_BAD_TOKEN = "the Hub does not accept your token: run `hf auth login`, or set another HF_TOKEN"


def explain_hub_error(error: BaseException | None) -> str:
    """Return why a request failed, as found in an error or in those that led to it."""
    chain = []
    while error is not None and error not in chain:
        chain.append(error)
        error = error.__cause__ or error.__context__
    if any(isinstance(e, OfflineModeIsEnabled) for e in chain) or constants.is_offline_mode():
        return "HF_HUB_OFFLINE is set"
    if any(isinstance(e, LocalTokenNotFoundError) for e in chain):
        return LOG_IN
    answers = [e for e in chain if isinstance(e, HfHubHTTPError)]
    if answers:
        return _explain_answer(answers[-1])
    if any(isinstance(e, HTTPError) for e in chain):
        return f"{constants.ENDPOINT} cannot be reached, or broke off: try again"
    if chain and not any(isinstance(e, LocalEntryNotFoundError) for e in chain):
        return " ".join(str(chain[0]).split())
    return "the Hub has no such id, or cannot be reached"


def _explain_answer(error: HfHubHTTPError) -> str:
    status = error.response.status_code
    said = error.response.headers.get("X-Error-Message", "")
    if isinstance(error, GatedRepoError):
        return "its owner must let you in: ask for access on its page, and log in"
    if isinstance(error, RemoteEntryNotFoundError):
        return "it has no such file as a checkpoint has"
    if isinstance(error, RevisionNotFoundError):
        return "it has no such revision"
    if status == 401 and (not get_token() or "Invalid" in said):
        return _BAD_TOKEN if get_token() else f"the Hub has no such id, or {LOG_IN}"
    if isinstance(error, RepositoryNotFoundError):
        return "the Hub has no such id, or your token may not see it"
    if status == 403:
        return "your token may not write there: take one with write access to that namespace"
    return f"the Hub answered {status} {said}".strip()


def retry(request: Callable[[], Any]) -> Any:
    """Return what a request returns; ask again where it failed for a moment only."""
    for wait in (*_WAITS, None):
        try:
            return request()
        except FAILURES as error:
            if wait is None or not _is_passing(error):
                raise
            time.sleep(wait)


def _is_passing(error: BaseException) -> bool:
    """Say whether the same request may well succeed a moment later."""
    if isinstance(error, HfHubHTTPError):
        return error.response.status_code in (408, 409, 412, 429, 500, 502, 503, 504)
    return isinstance(error, HTTPError)  # the connection failed
