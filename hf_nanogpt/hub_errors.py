"""Why the Hub did not do what was asked, in a few words for a person; and asking it again."""

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
