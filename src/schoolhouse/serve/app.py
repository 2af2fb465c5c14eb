"""The server: routes, and the loop that serves them on this machine's own address."""

from __future__ import annotations

import asyncio
import functools
import secrets
import socket
from collections.abc import AsyncIterator, Callable, Mapping
from importlib import resources
from pathlib import Path
from urllib.parse import parse_qs

import uvicorn
from sse_starlette import EventSourceResponse
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, RedirectResponse, Response
from starlette.routing import Route

from schoolhouse import recipe as recipes
from schoolhouse.data import show
from schoolhouse.errors import ConfigError, SchoolhouseError
from schoolhouse.report.read import Run, read
from schoolhouse.serve import pages
from schoolhouse.serve import workspace as spaces
from schoolhouse.serve.buttons import Buttons
from schoolhouse.serve.chats import Chats
from schoolhouse.serve.guard import Guard
from schoolhouse.serve.pages import Seen
from schoolhouse.serve.workspace import Workspace

LOOPBACK = "127.0.0.1"
MOST_BYTES = 1_000_000
"""Of what a form may send."""
SECONDS = 1.0
"""Between two looks at a run's files."""

Given = Mapping[str, str]
"""What a form sent."""
Handler = Callable[[Request, Given], Response]


class Page:
    """The routes over one workspace."""

    def __init__(self, root: Path) -> None:
        self._workspace = Workspace(root)
        self._buttons, self._chats = Buttons(self._workspace), Chats(root)
        self._known: dict[Path, Seen] = {}

    def app(self, token: str) -> Starlette:
        """The application, behind its guard."""
        seen: dict[str, Handler] = {
            "/": self._index, "/compare": self._compare, "/style.css": _style, "/page.js": _script,
            "/runs/{name}": self._run, "/runs/{name}/chat": self._chat,
        }
        pressed: dict[str, Handler] = {
            "/start": self._start, "/runs/{name}/stop": self._stop, "/runs/{name}/resume": self._resume,
            "/runs/{name}/chat": self._say, "/runs/{name}/forget": self._forget,
        }
        routes = [Route(path, self._apart(handler)) for path, handler in seen.items()]
        routes += [Route(path, self._apart(handler), methods=["POST"]) for path, handler in pressed.items()]
        routes.append(Route("/runs/{name}/changes", self._changes))
        return Starlette(routes=routes, middleware=[Middleware(Guard, token=token)])

    def close(self) -> None:
        """End the students that talk; runs go on."""
        self._chats.close()

    def _apart(self, handler: Handler) -> Callable:
        """The handler in a thread of its own, since it reads files; with the fields of the form that was sent."""

        async def endpoint(request: Request) -> Response:
            try:
                sent = await _body(request)
            except ClientDisconnect:
                return Response(status_code=400)
            fields = parse_qs(sent.decode("utf-8", errors="replace"), keep_blank_values=True)
            await run_in_threadpool(self._chats.rest)
            return await run_in_threadpool(handler, request, {name: values[-1] for name, values in fields.items()})

        return endpoint

    def _path(self, name: str) -> Path:
        """The directory of a run that is there."""
        found = self._workspace.runs().get(name)
        if found is None:
            raise HTTPException(404, "There is no such run.")
        return found

    def _version(self, name: str, path: Path) -> str:
        return spaces.version(path, self._buttons.status(name))

    def _seen(self, name: str, path: Path) -> Seen:
        """A run as it is now; its records are read again when they have changed."""
        status = self._buttons.status(name)
        version, known = spaces.version(path, status), self._known.get(path)
        if known is None or known.version != version:
            known = self._known[path] = Seen(status, version, *_read(path))
        return known

    def _index(self, request: Request, given: Given, error: ConfigError | None = None) -> Response:
        runs = {name: self._seen(name, path) for name, path in self._workspace.runs().items()}
        found = {path: _described(self._workspace.root / path) for path in self._workspace.recipes()}
        starters_first = dict(sorted(found.items(), key=lambda one: not one[1].startswith("starter/")))
        return HTMLResponse(pages.index(starters_first, runs, given, error), 200 if error is None else 400)

    def _start(self, request: Request, given: Given) -> Response:
        settings = [line.strip() for line in given.get("settings", "").splitlines() if line.strip()]
        name = given.get("name", "").strip()
        try:
            self._buttons.start(given.get("recipe", ""), name, _processes(given), settings)
        except ConfigError as error:
            return self._index(request, given, error)
        return RedirectResponse(pages.url(name), 303)

    def _run(self, request: Request, given: Given, error: ConfigError | None = None) -> Response:
        name = request.path_params["name"]
        path = self._path(name)
        return HTMLResponse(pages.run(name, path, self._seen(name, path), error), 200 if error is None else 400)

    def _stop(self, request: Request, given: Given) -> Response:
        return self._press(request, self._buttons.stop)

    def _resume(self, request: Request, given: Given) -> Response:
        return self._press(request, lambda name: self._buttons.resume(name, _processes(given)))

    def _press(self, request: Request, button: Callable[[str], None]) -> Response:
        name = request.path_params["name"]
        self._path(name)
        try:
            button(name)
        except ConfigError as error:
            return self._run(request, {}, error)
        return RedirectResponse(pages.url(name), 303)

    async def _changes(self, request: Request) -> Response:
        """A word whenever something of a run has changed, for as long as somebody listens."""
        name, since = request.path_params["name"], request.query_params.get("since", "")
        path = await run_in_threadpool(self._path, name)

        async def told() -> AsyncIterator[dict[str, str]]:
            seen = since
            while path.is_dir():
                now = await run_in_threadpool(self._version, name, path)
                if now != seen:
                    yield {"data": now}
                seen = now
                await asyncio.sleep(SECONDS)

        return EventSourceResponse(told())

    def _compare(self, request: Request, given: Given) -> Response:
        names = (request.query_params.get("first", ""), request.query_params.get("second", ""))
        first, second = (self._seen(name, self._path(name)).run for name in names)
        if first is None or second is None:
            raise HTTPException(404, "One of these runs has not begun.")
        return HTMLResponse(pages.compare(names, first, second))

    def _chat(self, request: Request, given: Given) -> Response:
        name = request.path_params["name"]
        return HTMLResponse(pages.chat(name, self._chats.of(name, self._path(name))))

    def _say(self, request: Request, given: Given) -> Response:
        name, text = request.path_params["name"], given.get("text", "").strip()
        chat = self._chats.of(name, self._path(name))
        if text:
            self._chats.make_room(name)
            chat.ask(text)
        return RedirectResponse(pages.url(name, "chat"), 303)

    def _forget(self, request: Request, given: Given) -> Response:
        name = request.path_params["name"]
        self._path(name)
        self._chats.forget(name)
        return RedirectResponse(pages.url(name, "chat"), 303)


async def _body(request: Request) -> bytes:
    """What a form sends, as far as that is sensible."""
    sent = b""
    async for part in request.stream():
        sent += part
        if len(sent) > MOST_BYTES:
            raise HTTPException(413, "That is too much.")
    return sent


def _read(path: Path) -> tuple[Run | None, str]:
    """A run's records, or why they cannot be read."""
    if not (path / "run.json").is_file():
        return None, ""
    try:
        return read(path), ""
    except (ConfigError, OSError) as error:
        return None, str(error)


def _described(path: Path) -> str:
    """What a recipe trains, and how."""
    try:
        return _described_at(path, path.stat().st_mtime_ns)
    except OSError as error:
        return f"cannot be read: {error.strerror}"


@functools.lru_cache(maxsize=1000)
def _described_at(path: Path, changed: int) -> str:
    try:
        recipe = recipes.read(path)
    except SchoolhouseError as error:
        return f"cannot be read: {error.found}"
    return f"{recipe.model.path} · {recipes.way(recipe)}"


def _processes(given: Given) -> int:
    text = given.get("processes", "1")
    return int(text) if text.isascii() and text.isdigit() and len(text) < 9 else 0  # refused where it is used


def _style(request: Request, given: Given) -> Response:
    return Response(show.STYLE + _file("schoolhouse.report", "page.css") + _file(__package__, "serve.css"),
                    media_type="text/css")


def _script(request: Request, given: Given) -> Response:
    return Response(_file("schoolhouse.report", "page.js") + _file(__package__, "serve.js"),
                    media_type="text/javascript")


def _file(package: str, name: str) -> str:
    return resources.files(package).joinpath(name).read_text(encoding="utf-8")


class _Server(uvicorn.Server):
    """Ends the students before it waits for requests, of which some may wait for them."""

    def __init__(self, settings: uvicorn.Config, page: Page) -> None:
        super().__init__(settings)
        self._page = page

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        await run_in_threadpool(self._page.close)
        await super().shutdown(sockets)


def serve(root: Path, port: int) -> None:
    """Serve the page of a workspace until ctrl-C; raises ConfigError where the port is taken."""
    if not root.is_dir():
        raise ConfigError(f"there is no directory {root}", required="a directory with recipes and runs/",
                          where="command line", remedy="name one, or leave it out for this one")
    token, page = secrets.token_urlsafe(24), Page(root.resolve())
    with _socket(port) as listening:
        print(f"http://{LOOPBACK}:{listening.getsockname()[1]}/?token={token}", flush=True)
        print("for this machine's browser; ctrl-C closes the page, runs go on", flush=True)
        settings = uvicorn.Config(
            page.app(token), log_level="warning", access_log=False, proxy_headers=False, server_header=False,
            timeout_graceful_shutdown=2,
        )
        try:
            _Server(settings, page).run(sockets=[listening])
        except KeyboardInterrupt:
            print("closed", flush=True)
        finally:
            page.close()


def _socket(port: int) -> socket.socket:
    found = socket.socket()
    found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        found.bind((LOOPBACK, port))
        found.listen()  # whoever comes before the loop runs waits
    except (OSError, OverflowError) as error:
        found.close()
        raise ConfigError(f"the page cannot have port {port}: {error}", required="a port that is free",
                          where="command line: --port", remedy="choose another, or --port 0 for any") from None
    return found
