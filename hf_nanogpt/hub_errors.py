"""Why a request to the Hub failed, in words, and which requests to repeat.

Not in errors.py, because huggingface_hub takes half a second to import and `hf-nanogpt --help`
needs `UserError`.
"""

import time
from collections.abc import Callable
from typing import Any

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
)

from .errors import one_line

FAILURES = (OSError, HTTPError, RuntimeError)  # what a request raises; an upload: RuntimeError
_WAITS = (0.5, 2.0, 8.0)  # seconds before another attempt
LOG_IN = "you are not logged in: run `hf auth login`, or set HF_TOKEN"
_BAD_TOKEN = "the Hub does not accept your token: run `hf auth login`, or set another HF_TOKEN"
# What to say, by the type of the error; the first that fits.
_MEANINGS: list[tuple[type[HfHubHTTPError], str]] = [
    (GatedRepoError, "its owner must let you in: ask for access on its page, and log in"),
    (RemoteEntryNotFoundError, "it lacks a file that every checkpoint has"),
    (RevisionNotFoundError, "it has no such revision"),
]


def explain_hub_error(error: BaseException | None) -> str:
    """Return why a request failed, judged by the error and by those that caused it."""
    chain: list[BaseException] = []
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
        return f"{constants.ENDPOINT} cannot be reached, or the connection broke: try again"
    if chain and not any(isinstance(e, LocalEntryNotFoundError) for e in chain):
        return one_line(chain[0])
    return "the Hub has no such id, or cannot be reached"


def _explain_answer(error: HfHubHTTPError) -> str:
    """Return what an answer of the Hub means: its type, its status or its own message."""
    for error_type, meaning in _MEANINGS:
        if isinstance(error, error_type):
            return meaning
    status = error.response.status_code
    message = error.response.headers.get("X-Error-Message", "")
    if status == 401 and (not get_token() or "Invalid" in message):
        return _BAD_TOKEN if get_token() else f"the Hub has no such id, or {LOG_IN}"
    if isinstance(error, RepositoryNotFoundError):
        return "the Hub has no such id, or your token may not see it"
    if status == 403:
        return "your token may not write there: use one with write access to that namespace"
    return f"the Hub answered {status} {message}".strip()


def retry(request: Callable[[], Any]) -> Any:
    """Return what a request returns; repeat it after a failure that may pass."""
    for wait in (*_WAITS, None):
        try:
            return request()
        except FAILURES as error:
            if wait is None or not _may_pass(error):
                raise
            time.sleep(wait)


def _may_pass(error: BaseException) -> bool:
    """Say whether the same request may succeed a moment later."""
    if isinstance(error, HfHubHTTPError):
        return error.response.status_code in (408, 409, 412, 429, 500, 502, 503, 504)
    return isinstance(error, HTTPError)  # the connection failed
