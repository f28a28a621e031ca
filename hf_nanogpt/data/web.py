"""A text on the web, downloaded once into the cache with the client that huggingface_hub uses."""

import hashlib
import os
import re
import tempfile
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from datasets import config
from datasets.utils import tqdm
from huggingface_hub import constants, get_session
from huggingface_hub.errors import HTTPError
from huggingface_hub.utils import build_hf_headers
from transformers.utils import logging

from ..errors import UserError, explain_errors, one_line, without_secrets

logger = logging.get_logger(__name__)

_TIMEOUT = 60  # seconds without a byte


def is_address(text: str) -> bool:
    """Say whether a text is the address of a file on the web."""
    return text.lower().startswith(("https://", "http://"))


def download_text(url: str) -> Path:
    """Return a file with the content at an address; it is downloaded again only if it changed.

    A user and password in the address are used, and written nowhere. If the server cannot be
    reached, an earlier copy is returned with a warning.

    Raises:
        UserError: the server does not have the file, cannot be reached, or breaks off.
    """
    folder, name = Path(config.DOWNLOADED_DATASETS_PATH), _digest(url)
    try:
        with explain_errors("not an address"):
            get_session().build_request("GET", url)
        return _download(url, folder, name)
    except UserError:  # its reason may show the password
        why, copies = "it is not a valid address", []
    except (HTTPError, OSError) as error:  # of the connection, or of the disk
        why = one_line(error).replace(url, without_secrets(url))
        copies = sorted(folder.glob(f"{name}-*"), key=os.path.getmtime)
        if (answer := getattr(error, "response", None)) is not None:
            why, copies = f"the server answered {answer.status_code} {answer.reason_phrase}", []
    if copies:
        logger.warning(f"{without_secrets(url)} could not be reached ({why}): using an old copy.")
        return copies[-1]
    raise UserError(
        f"data={without_secrets(url)} could not be downloaded ({why.strip()}): give the path of a "
        "file instead."
    )


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _ending(url: str) -> str:
    """Return how the name in an address ends, such as `.txt` or `.jsonl.gz`: it says the format."""
    return "".join(re.findall(r"\.\w{1,8}(?=\.|$)", urlsplit(url).path)[-2:])


def _download(url: str, folder: Path, name: str) -> Path:
    # Like all requests to the Hub, this one carries the token; a redirect elsewhere drops it.
    is_hub = url.startswith(f"{constants.ENDPOINT}/")
    headers = (build_hf_headers() if is_hub else {}) | {"Accept-Encoding": "identity"}
    with get_session().stream(
        "GET", url, headers=headers, follow_redirects=True, timeout=_TIMEOUT
    ) as answer:
        answer.raise_for_status()
        # What changes with the content; some servers do not say. (A date has only whole seconds.)
        version = answer.headers.get("ETag", "")
        path = folder / f"{name}-{_digest(version)}{_ending(url)}"
        return path if version and path.is_file() else _save(answer, path, url, version)


def _save(answer: Any, path: Path, url: str, version: str) -> Path:
    """Write the body of an answer, whole or not at all, with a progress bar.

    Without a version, the name of the file ends in a checksum of the content instead.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    title = f"Downloading {Path(without_secrets(url)).name}"
    size = int(answer.headers.get("Content-Length", 0)) or None
    checksum = hashlib.sha256()
    with (
        tempfile.TemporaryDirectory(prefix=".download-", dir=path.parent) as folder,
        tqdm(desc=title, total=size, unit="B", unit_scale=True) as bar,
    ):
        part = Path(folder) / path.name
        with part.open("wb") as file:
            for piece in answer.iter_bytes():
                file.write(piece)
                checksum.update(piece)
                bar.update(len(piece))
        if not version:
            name = f"{path.name.partition('-')[0]}-{checksum.hexdigest()[:32]}"
            path = path.with_name(name + _ending(url))
        if version or not path.is_file():  # the same content keeps the time of its first download
            os.replace(part, path)
    return path
