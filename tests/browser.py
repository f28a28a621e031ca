"""Headless Chromium, driven over WebDriver's HTTP protocol (w3.org/TR/webdriver2)."""

import base64
import json
import re
import shutil
import subprocess
from contextlib import contextmanager
from typing import Any
from urllib.request import Request, urlopen

MISSING = [name for name in ("chromium", "chromedriver") if not shutil.which(name)]
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--window-size=1100,1500"]
ELEMENT = "element-6066-11e4-a52e-4f735466cecf"  # the key that the standard gives elements


class Browser:
    """One window; each method is one command of the protocol."""

    def __init__(self, session: str):
        self.session = session

    def call(self, path: str, body: dict | None = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = Request(f"{self.session}/{path}", data, {"Content-Type": "application/json"})
        with urlopen(request, timeout=60) as answer:
            return json.load(answer)["value"]

    def open(self, url: str) -> None:
        self.call("url", {"url": url})

    def run(self, script: str) -> Any:
        return self.call("execute/sync", {"script": script, "args": []})

    def press(self, keys: str) -> None:
        strokes = [{"type": kind, "value": k} for k in keys for kind in ("keyDown", "keyUp")]
        self.call("actions", {"actions": [{"type": "key", "id": "k", "actions": strokes}]})

    def point(self, selector: str, x: float, y: float, *, click: bool = False) -> None:
        """Move the pointer to a share of an element's width and height, and perhaps click."""
        found = self.call("element", {"using": "css selector", "value": selector})[ELEMENT]
        box = self.run(
            f"const e = document.querySelector({json.dumps(selector)}); e.scrollIntoView();"
            "const b = e.getBoundingClientRect(); return [b.width, b.height]"
        )
        dx, dy = (int((share - 0.5) * side) for share, side in zip((x, y), box, strict=True))
        move = {"type": "pointerMove", "origin": {ELEMENT: found}, "x": dx, "y": dy}
        press = [{"type": kind, "button": 0} for kind in ("pointerDown", "pointerUp") if click]
        self.call(
            "actions", {"actions": [{"type": "pointer", "id": "p", "actions": [move, *press]}]}
        )

    def log(self) -> list[dict]:
        """Return what the console said since the last call."""
        return self.call("se/log", {"type": "browser"})

    def screenshot(self) -> bytes:
        return base64.b64decode(self.call("screenshot"))


@contextmanager
def open_browser(*flags: str):
    """Start Chromium, give its window and end it."""
    driver = subprocess.Popen(["chromedriver", "--port=0"], stdout=subprocess.PIPE, text=True)
    try:
        port = next(
            found[1]
            for line in driver.stdout
            if (found := re.search(r"successfully on port (\d+)", line))
        )
        server = Browser(f"http://127.0.0.1:{port}")
        options = {"args": [*FLAGS, *flags]}
        wanted = {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
        made = server.call("session", {"capabilities": {"alwaysMatch": wanted}})
        browser = Browser(f"{server.session}/session/{made['sessionId']}")
        try:
            yield browser
        finally:
            with urlopen(Request(browser.session, method="DELETE"), timeout=60):
                pass
    finally:
        driver.terminate()
        driver.wait()
        driver.stdout.close()
