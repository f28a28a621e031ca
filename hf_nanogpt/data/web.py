"""A text of the web, downloaded once into the cache, by the client that huggingface_hub uses."""

import hashlib
import os
import tempfile
from pathlib import Path
from typing import Any

from datasets import config
from datasets.utils import tqdm
from huggingface_hub import constants, get_session
from huggingface_hub.errors import HTTPError
from huggingface_hub.utils import build_hf_headers
from transformers.utils import logging

from ..errors import UserError, without_secrets

logger = logging.get_logger(__name__)

_PATIENCE = 60  # seconds without a byte


def is_address(text: str) -> bool:
    """Say whether a text is the address of a file on the web."""
    return text.lower().startswith(("https://", "http://"))


def download_text(url: str) -> Path:
    """Return the file with what is at an address; only what has changed is downloaded again.

    A user and password in the address are used, and written nowhere. Where the server cannot be
    reached, an earlier copy is returned with a warning.

    Raises:
        UserError: the server does not have it, cannot be reached, or breaks off.
    """
    name = hashlib.sha256(url.encode()).hexdigest()[:32]
    folder = Path(config.DOWNLOADED_DATASETS_PATH)
    try:
        return _download(url, folder, name)
    except Exception as error:  # of a library that huggingface_hub has replaced twice
        shown, why = without_secrets(url), _explain(error)
        earlier = sorted(folder.glob(f"{name}-*"), key=os.path.getmtime)
        if earlier and not hasattr(error, "response"):
            logger.warning(f"{shown} could not be reached ({why}): an earlier copy is used.")
            return earlier[-1]
        raise UserError(
            f"data={shown} could not be downloaded ({why}): give the path of a file instead."
        ) from None  # what caused it may show the password


def _download(url: str, folder: Path, name: str) -> Path:
    # The Hub gets the token, as from everything else here; redirected, the client drops it.
    own = url.startswith(f"{constants.ENDPOINT}/")
    headers = (build_hf_headers() if own else {}) | {"Accept-Encoding": "identity"}
    with get_session().stream(
        "GET", url, headers=headers, follow_redirects=True, timeout=_PATIENCE
    ) as answer:
        answer.raise_for_status()
        version = _version(answer.headers)
        path = folder / f"{name}-{hashlib.sha256(version.encode()).hexdigest()[:32]}"
        if version and path.is_file():
            return path
        return _save(answer, path, title=Path(without_secrets(url)).name, known=bool(version))


def _version(headers: Any) -> str:
    """Return what tells one content of an address from the next; nothing where that is unknown."""
    if etag := headers.get("ETag"):
        return etag
    changed = headers.get("Last-Modified")
    return f"{changed} {headers.get('Content-Length')}" if changed else ""


def _save(answer: Any, path: Path, *, title: str, known: bool) -> Path:
    """Write the body of an answer, whole or not at all, with a bar that shows its size.

    Where its version is not `known`, its name ends in a checksum of the content instead.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    size = int(answer.headers.get("Content-Length", 0)) or None
    with (
        tempfile.TemporaryDirectory(prefix=".download-", dir=path.parent) as folder,
        tqdm(desc=f"Downloading {title}", total=size, unit="B", unit_scale=True) as bar,
    ):
        part = Path(folder) / path.name
        with part.open("wb") as file:
            for piece in answer.iter_bytes():
                file.write(piece)
                bar.update(len(piece))
        if not known:
            with part.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()[:32]
            path = path.with_name(f"{path.name.partition('-')[0]}-{digest}")
        if known or not path.is_file():  # what is there already keeps its time
            os.replace(part, path)
    return path


def _explain(error: Exception) -> str:
    """Say what went wrong without the address, which may hold a password."""
    if (answer := getattr(error, "response", None)) is not None:
        return f"the server answered {answer.status_code} {answer.reason_phrase}".strip()
    if isinstance(error, OSError | HTTPError):  # of the disk, or of the connection
        return " ".join(str(error).split()) or type(error).__name__
    return f"it is not a valid address, {type(error).__name__}"
