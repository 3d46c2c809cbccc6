"""A headless Chromium, over a pair of pipes: DevTools' protocol, and nothing to install but the browser."""

import json
import os
import shutil
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

QUIET = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update", "--remote-debugging-pipe"),
)


class Tab(NamedTuple):
    """A page under way: `call` gives a command's answer, `events` are those so far."""

    call: Any
    events: list[dict[str, Any]]


def executable() -> str | None:
    """The browser's path, if there is one."""
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@contextmanager
def tab(browser: str, folder: Path) -> Iterator[Tab]:
    """An empty page of a new browser, whose files go to `folder`."""
    (read_theirs, write_ours), (read_ours, write_theirs) = os.pipe(), os.pipe()
    start = f'exec "$@" 3<&{read_theirs} 4>&{write_theirs}'  # the protocol's pipes have these numbers
    process = subprocess.Popen(
        ["bash", "-c", start, "bash", browser, *QUIET, f"--user-data-dir={folder}"],
        pass_fds=(read_theirs, write_theirs),
        stderr=subprocess.DEVNULL,
    )
    os.close(read_theirs)
    os.close(write_theirs)
    guard = threading.Timer(90, process.kill)  # a browser that hangs would hang the test
    guard.start()
    try:
        with open(write_ours, "wb") as commands, open(read_ours, "rb") as answers:
            yield _attach(commands, answers)
    finally:
        guard.cancel()
        process.wait(30)  # it ends with its pipes


def _attach(commands: Any, answers: Any) -> Tab:
    events: list[dict[str, Any]] = []
    session: dict[str, str] = {}
    number = iter(range(1, 10**6))

    def next_message() -> dict[str, Any]:
        text = bytearray()
        while not text.endswith(b"\0"):
            byte = answers.read(1)
            assert byte, "the browser has gone"
            text += byte
        return json.loads(text[:-1])

    def call(method: str, until: str = "", **params: Any) -> dict[str, Any]:
        """The answer to a command, once the event `until` has come too."""
        mine = next(number)
        seen = len(events)
        commands.write(json.dumps({"id": mine, "method": method, "params": params, **session}).encode() + b"\0")
        commands.flush()
        answer = None
        while answer is None or (until and until not in [event["method"] for event in events[seen:]]):
            message = next_message()
            if message.get("id") == mine:
                assert "error" not in message, message
                answer = message["result"]
            elif "method" in message:
                events.append(message)
        return answer

    target = call("Target.createTarget", url="about:blank")["targetId"]
    session["sessionId"] = call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
    return Tab(call, events)
