"""Talking to a student from the page: each in a process of its own, `schoolhouse chat RUN --json`."""

from __future__ import annotations

import contextlib
import json
import subprocess
import threading
import time
from pathlib import Path

from schoolhouse.serve.buttons import PROGRAM

IDLE_SECONDS = 600.0
"""After this long without a message a student gives its memory back; what was said stays."""
LONGEST_FAULT = 2000
"""Of why a student does not answer, as much as is shown."""
MOST_STUDENTS = 2
"""Students in memory at once."""


class Chat:
    """A conversation with one student."""

    def __init__(self, root: Path, target: str) -> None:
        self.said: list[dict[str, str]] = []
        """Messages so far."""
        self.fault = ""
        """Why the last message has no answer."""
        self.used = time.monotonic()
        self._root, self._target = root, target
        self._complaints = root / target / "chat.txt"
        self._turn = threading.Lock()
        self._process: subprocess.Popen[str] | None = None

    def ask(self, text: str) -> None:
        """Say something, and wait for the answer; a message without one is taken back."""
        with self._turn:
            self.used, self.fault = time.monotonic(), ""
            messages = [*self.said, {"role": "user", "content": text}]
            found = self._answer(messages)
            if "answer" in found:
                self.said = [*messages, {"role": "assistant", "content": found["answer"]}]
            else:
                self.fault = found["error"]
            self.used = time.monotonic()

    def close(self) -> None:
        """End the process; a message begins another."""
        with self._turn:
            self._end()

    @property
    def is_open(self) -> bool:
        """Whether its process holds a student."""
        return self._process is not None

    def _answer(self, messages: list[dict[str, str]]) -> dict[str, str]:
        process = self._begun()
        try:
            process.stdin.write(json.dumps({"messages": messages}) + "\n")
            process.stdin.flush()
            line = process.stdout.readline()
        except OSError:  # it has ended
            line = ""
        if line:
            return json.loads(line)
        self._end()
        said = self._complaints.read_text(encoding="utf-8", errors="replace")
        return {"error": said[-LONGEST_FAULT:] or "the student's process ended without a word"}

    def _begun(self) -> subprocess.Popen[str]:
        if self._process is None or self._process.poll() is not None:
            self._end()
            with self._complaints.open("wb") as complaints:
                self._process = subprocess.Popen(
                    [*PROGRAM, "chat", self._target, "--json"], cwd=self._root, stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE, stderr=complaints, text=True, encoding="utf-8",
                )
        return self._process

    def _end(self) -> None:
        if self._process is not None:
            for pipe in (self._process.stdin, self._process.stdout):
                with contextlib.suppress(OSError):
                    pipe.close()
            self._process.terminate()
            self._process.wait()
            self._process = None


class Chats:
    """The conversations of this page, by run."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._every: dict[str, Chat] = {}

    def of(self, name: str) -> Chat:
        """The conversation with a run's student; begins with nothing said."""
        return self._every.setdefault(name, Chat(self._root, str(Path("runs") / name)))

    def make_room(self, name: str) -> None:
        """End students that were not spoken to for long, and others where one more would be too many."""
        others = sorted((one for key, one in self._every.items() if key != name and one.is_open), key=_since)
        for place, one in enumerate(others):
            if _since(one) > IDLE_SECONDS or place + 1 >= MOST_STUDENTS:
                one.close()

    def forget(self, name: str) -> None:
        """End a conversation."""
        if name in self._every:
            self._every.pop(name).close()

    def close(self) -> None:
        """End all of them."""
        for name in list(self._every):
            self.forget(name)


def _since(chat: Chat) -> float:
    """Seconds since it was spoken to last."""
    return time.monotonic() - chat.used
