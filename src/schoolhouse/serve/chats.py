"""Talking to a student from the page: each in a process of its own, `schoolhouse chat RUN --json`."""

from __future__ import annotations

import contextlib
import json
import subprocess
import threading
import time
from pathlib import Path

from schoolhouse.serve.buttons import PROGRAM
from schoolhouse.serve.workspace import COMPLAINTS

IDLE_SECONDS = 600.0
"""After this long without a message a student gives its memory back, when anything is asked of the page; what was said
stays."""
LONGEST_FAULT = 2000
"""Of why a student does not answer, as much as is shown."""
LONGEST_TEXT = 20_000
"""Characters of a message."""
MOST_STUDENTS = 2
"""Students in memory at once."""


class Chat:
    """A conversation with one student."""

    def __init__(self, root: Path, target: Path) -> None:
        self.said: list[dict[str, str]] = []
        """Messages so far."""
        self.fault = ""
        """Why the last message has no answer."""
        self.used = time.monotonic()
        """When it was spoken to last."""
        self._root, self._target = root, target
        self._turn = threading.Lock()
        self._over = False
        self._process: subprocess.Popen[str] | None = None

    def ask(self, text: str) -> None:
        """Say something, and wait for the answer; a message without one is taken back."""
        with self._turn:
            self.used, self.fault = time.monotonic(), ""
            messages = [*self.said, {"role": "user", "content": text}]
            found = self._answer(messages)
            self.used = time.monotonic()
            if "answer" in found:
                self.said = [*messages, {"role": "assistant", "content": found["answer"]}]
            else:
                self.fault = found["error"]

    @property
    def rests(self) -> bool:
        """Whether its process holds a student that nobody waits for."""
        return self.is_open and not self._turn.locked()

    def end(self) -> None:
        """Close it, and answer no more."""
        self._over = True
        self.close()

    def close(self) -> None:
        """End the process, also while it answers: whoever waits is told that it ended."""
        process = self._process
        if process is not None:
            process.kill()
            process.wait()

    @property
    def is_open(self) -> bool:
        """Whether its process holds a student."""
        return self._process is not None and self._process.poll() is None

    def _answer(self, messages: list[dict[str, str]]) -> dict[str, str]:
        if len(messages[-1]["content"]) > LONGEST_TEXT:
            return {"error": f"the message has more than {LONGEST_TEXT:,} characters"}
        if self._over:
            return {"error": "this conversation was ended"}
        line = ""
        with contextlib.suppress(OSError):  # it has ended, or cannot begin
            process = self._process if self.is_open else self._begun()
            process.stdin.write(json.dumps({"messages": messages}) + "\n")
            process.stdin.flush()
            line = process.stdout.readline()
        if line:
            return json.loads(line)
        self.close()
        path, said = self._target / COMPLAINTS, ""
        with contextlib.suppress(OSError):
            said = path.read_text(encoding="utf-8", errors="replace")
        return {"error": said[-LONGEST_FAULT:] or "the student's process ended without a word, or could not begin"}

    def _begun(self) -> subprocess.Popen[str]:
        with (self._target / COMPLAINTS).open("wb") as complaints:
            self._process = subprocess.Popen(
                [*PROGRAM, "chat", str(self._target), "--json"], cwd=self._root, stdin=subprocess.PIPE,
                stdout=subprocess.PIPE, stderr=complaints, text=True, encoding="utf-8",
                start_new_session=True,  # ctrl-C is for the page, which ends it
            )
        return self._process


class Chats:
    """The conversations of this page, by run."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._every: dict[str, Chat] = {}

    def of(self, name: str, directory: Path) -> Chat:
        """The conversation with a run's student; begins with nothing said."""
        return self._every.setdefault(name, Chat(self._root, directory))

    def rest(self) -> None:
        """End the processes of students that were not spoken to for long."""
        for one in list(self._every.values()):
            if one.rests and time.monotonic() - one.used > IDLE_SECONDS:
                one.close()

    def make_room(self, name: str) -> None:
        """End the processes of those that were spoken to longest ago, where one more would be too many."""
        others = sorted((one for key, one in self._every.items() if key != name and one.rests), key=_used)
        for one in others[: max(0, len(others) + 1 - MOST_STUDENTS)]:
            one.close()

    def forget(self, name: str) -> None:
        """End a conversation."""
        found = self._every.pop(name, None)
        if found is not None:
            found.end()

    def close(self) -> None:
        """End all of them."""
        for name in list(self._every):
            self.forget(name)


def _used(chat: Chat) -> float:
    return chat.used
