"""Texts on the web: downloaded by a plain install, kept, and without showing passwords."""

import base64
import gzip
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from conftest import ROOT
from datasets import config

from hf_nanogpt import DataArguments, load_documents, load_text, tokenize_corpus
from hf_nanogpt.data.web import download_text

TEXT = "Naïve 東京 🦊,\r\nand many words.\n" * 30
SECRET = "S3cret"


class Site(ThreadingHTTPServer):
    """Serve one text at any path, as the settings say, and count the bodies that were sent."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.text, self.headers, self.status = TEXT.encode(), {"ETag": '"1"'}, 200
        self.cut, self.asked = False, []
        self.address = f"127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    server: Site

    def do_GET(self) -> None:
        site = self.server
        site.asked.append((self.path, self.headers.get("Authorization")))
        self.send_response(site.status)
        for name, value in site.headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(site.text)))
        self.end_headers()
        self.wfile.write(site.text[: len(site.text) // 2] if site.cut else site.text)

    def log_message(self, *args) -> None:
        """Write nothing."""


@pytest.fixture
def site(hub, tmp_path, monkeypatch):
    """A server on loopback, and an empty cache for what is downloaded from it."""
    monkeypatch.setattr(config, "DOWNLOADED_DATASETS_PATH", tmp_path / "cache")
    with Site() as site:
        thread = threading.Thread(target=site.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield site
        site.shutdown()
        thread.join()


def read(url: str) -> str:
    return "".join(row["text"] for row in load_text(url))


@pytest.mark.slow
def test_a_plain_install_reads_an_address(site, tmp_path):
    script = (
        "import sys; sys.modules['aiohttp'] = sys.modules['requests'] = None\n"
        "from hf_nanogpt import load_text\n"
        "print(ascii(''.join(row['text'] for row in load_text(sys.argv[1]))))"
    )
    url = f"http://{site.address}/a.txt"
    own = {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path)}
    run = subprocess.run(
        [sys.executable, "-c", script, url],
        env=os.environ | own,
        capture_output=True,
        text=True,
    )
    assert run.stdout.strip() == ascii(TEXT), run.stderr


def test_an_unchanged_text_stays_in_the_cache_and_a_changed_one_is_read_anew(site):
    url = f"http://{site.address}/a.txt"
    first = download_text(url)
    written = first.stat().st_mtime_ns
    assert download_text(url) == first and first.stat().st_mtime_ns == written
    site.text, site.headers = b"changed\n", {"ETag": '"2"'}
    assert read(url) == "changed\n"
    site.text, site.headers = b"once more\n", {}  # a server without versions
    assert read(url) == "once more\n"
    assert download_text(url) == download_text(url)


@pytest.mark.parametrize("headers", [{}, {"Last-Modified": "Fri, 01 May 2026 10:00:00 GMT"}])
def test_without_an_etag_a_text_that_changed_is_read_anew(site, headers):
    url = f"http://{site.address}/a.txt"
    for text in ("first\n", "other\n"):  # of equal size, in the same second
        site.text, site.headers = text.encode(), headers
        assert read(url) == text


@pytest.mark.parametrize("name", ["rows.jsonl", "ROWS.JSONL?download=true", "v1.2/rows.jsonl.gz"])
@pytest.mark.parametrize("headers", [{"ETag": '"1"'}, {}])
def test_an_address_of_a_table_is_read_as_a_table(site, name, headers):
    rows = "".join(json.dumps({"text": f"{i}"}) + "\n" for i in range(9)).encode()
    site.text, site.headers = gzip.compress(rows) if name.endswith("gz") else rows, headers
    assert read(f"http://{site.address}/{name}") == "012345678"
    site.text, site.headers = b"\n" + site.text[:50], {"ETag": '"2"'}
    with pytest.raises(ValueError, match=rf"data=http://{site.address}/") as caught:
        read(f"http://{site.address}/{name}")
    assert "download=" not in str(caught.value)


def test_what_breaks_off_leaves_nothing_and_an_earlier_copy_serves_without_the_server(site):
    url = f"http://{site.address}/a.txt"
    site.cut = True
    with pytest.raises(ValueError, match=r"a\.txt could not be downloaded \(.*: give the path"):
        download_text(url)
    assert not list(config.DOWNLOADED_DATASETS_PATH.iterdir())
    site.cut = False
    kept = download_text(url)
    site.cut, site.headers = True, {"ETag": '"2"'}
    assert download_text(url) == kept and kept.read_bytes().decode() == TEXT


@pytest.mark.parametrize("status", [401, 403, 404, 500])
def test_an_answer_that_is_not_the_text_is_refused_with_its_number(site, status):
    site.status = status
    with pytest.raises(ValueError, match=f"could not be downloaded .the server answered {status}"):
        read(f"http://{site.address}/a.txt")


def test_a_password_is_used_and_appears_nowhere(site, tmp_path, capfd, monkeypatch):
    url = f"http://user:{SECRET}@{site.address}/a.txt?Signature={SECRET}"
    assert read(url) == TEXT
    wanted = "Basic " + base64.b64encode(f"user:{SECRET}".encode()).decode()
    assert site.asked == [(f"/a.txt?Signature={SECRET}", wanted)]

    folder = tmp_path / "tokens"
    tokenize_corpus(DataArguments(data=url, tokenizer="byte"), folder)
    messages = []
    with pytest.raises(ValueError) as caught:  # another tokenizer than it was begun with
        tokenize_corpus(DataArguments(data=url, tokenizer="char"), folder)
    messages.append(str(caught.value))
    for text, settings in ((b"", {}), (b"\0\1", {}), (b"x", {}), (b"y", {"status": 404})):
        site.text, site.headers, site.status = text, {}, settings.get("status", 200)
        with pytest.raises(ValueError) as caught:
            load_documents(DataArguments(data=url))
        messages.append(str(caught.value))
    for bad in (f"http://user:{SECRET}@127.0.0.1:1/a", f"http://user:{SECRET}@[::1/a"):
        with pytest.raises(ValueError, match="could not be downloaded") as caught:
            read(bad)
        messages.append(str(caught.value))
    shown = " ".join([*messages, *capfd.readouterr()])
    assert SECRET not in shown and "user:" not in shown
    for path in tmp_path.rglob("*"):
        assert SECRET not in path.name
        assert path.is_dir() or SECRET.encode() not in path.read_bytes()


def test_a_redirect_to_another_host_does_not_get_the_password(site):
    with Site() as other:
        thread = threading.Thread(target=other.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        site.status, site.headers = 302, {"Location": f"http://{other.address}/b.txt"}
        assert read(f"http://user:{SECRET}@{site.address}/a.txt") == TEXT
        other.shutdown()
        thread.join()
    assert other.asked == [("/b.txt", None)]
