"""A browser as far as the page needs one: a cookie, forms, and a listener to its changes."""

from __future__ import annotations

import contextlib
import http.client
import json
import re
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

from test_run import PATIENCE, command

RECIPE = """\
model: starter/qwen3
data: {train: [{path: starter/arithmetic, limit: 200}]}
batch: {examples: 4, tokens: 300}
train: {steps: 12}
optim: {learning_rate: 3e-3}
exam: {data: {path: starter/arithmetic:exam, limit: 4}, max_new_tokens: 8, grader: contains}
checkpoint: {every: 3}
"""


@dataclass(frozen=True, slots=True)
class Answer:
    """What came back."""

    status: int
    headers: dict[str, str]
    text: str


@dataclass
class Visitor:
    """Somebody at the page of `port`, with the token that was printed."""

    port: int
    token: str
    process: subprocess.Popen[str]
    cookie: str = ""
    headers: dict[str, str] = field(default_factory=dict)

    @property
    def origin(self) -> str:
        """The page's own."""
        return f"http://127.0.0.1:{self.port}"

    def enter(self) -> None:
        """Open the address that was printed."""
        answer = self.ask("GET", f"/?token={self.token}")
        assert (answer.status, answer.headers["location"]) == (303, "/")
        assert "HttpOnly" in answer.headers["set-cookie"] and "SameSite=strict" in answer.headers["set-cookie"]
        self.cookie = answer.headers["set-cookie"].partition(";")[0]

    def ask(self, method: str, path: str, sent: str = "", **headers: str) -> Answer:
        """One request, nothing added but the cookie."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE)
        given = {"Host": f"127.0.0.1:{self.port}", **({"Cookie": self.cookie} if self.cookie else {}), **headers}
        with contextlib.closing(connection):
            connection.request(method, path, sent.encode() if sent else None, {k.title(): v for k, v in given.items()})
            answer = connection.getresponse()
            found = {name.lower(): value for name, value in answer.getheaders()}
            return Answer(answer.status, found, answer.read().decode())

    def get(self, path: str) -> str:
        """A page that is there."""
        answer = self.ask("GET", path)
        assert answer.status == 200, (path, answer)
        return answer.text

    def press(self, path: str, status: int = 303, **fields: object) -> Answer:
        """A form of the page, sent."""
        answer = self.ask("POST", path, urlencode({name: str(value) for name, value in fields.items()}),
                          origin=self.origin)  # fmt: skip
        assert answer.status == status, (path, answer)
        return answer

    def start(self, name: str, *settings: str, **more: object) -> None:
        """Begin a run of the recipe."""
        given = {"recipe": "lesson.yaml", "processes": 1, "settings": "\n".join(settings)} | more
        self.press("/start", name=name, **given)

    def told(self, name: str) -> str:
        """The line of a run's state."""
        found = re.search(r'class="verdict" role="status">([^<]*)<', self.get(where(name)))
        return found[1].rpartition(": ")[2]

    def wait(self, name: str, *states: str) -> None:
        """Until a run is told to be in one of these states."""
        limit = time.monotonic() + PATIENCE
        while (told := self.told(name)) not in states:
            assert time.monotonic() < limit, f"{name}: {told}, not {states}"
            assert "did not start" not in told, self.get(where(name))
            time.sleep(0.3)

    @contextlib.contextmanager
    def listening(self, name: str) -> Iterator[http.client.HTTPResponse]:
        """A listener to a run's changes, as its page has one."""
        path = re.search('data-changes="([^"]*)"', self.get(where(name)))[1]
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE)
        with contextlib.closing(connection):
            connection.request("GET", path, headers={"Cookie": self.cookie})
            yield connection.getresponse()


def where(name: str, *rest: str) -> str:
    """A run's page."""
    return "/".join(["/runs", quote(name, safe=""), *rest])


def hears(listener: http.client.HTTPResponse) -> str:
    """The next change."""
    while not (line := listener.readline().decode()).startswith("data:"):
        assert line, "the page hung up"
    return line


@contextlib.contextmanager
def page(root: Path, **options: Any) -> Iterator[Visitor]:
    """The page of a workspace under way, and somebody who has entered it."""
    process = subprocess.Popen(command("serve", root, "--port", 0), stdout=subprocess.PIPE, text=True, **options)
    try:
        printed = re.fullmatch(r"http://127\.0\.0\.1:(\d+)/\?token=(\S+)\n", process.stdout.readline())
        visitor = Visitor(int(printed[1]), printed[2], process)
        visitor.enter()
        yield visitor
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def records(run: Path) -> list[dict[str, Any]]:
    """The metrics of a run."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
