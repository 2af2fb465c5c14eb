"""Who may ask: this machine's browser with the token that was printed, for pages of this address alone."""

from __future__ import annotations

import hashlib
import hmac
import re

from starlette.datastructures import MutableHeaders
from starlette.requests import Request
from starlette.responses import PlainTextResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

HOST = re.compile(r"(127\.0\.0\.1|localhost|\[::1\])(:[0-9]{1,5})?")
"""Names of this machine; under another name a page of somebody else might ask (DNS rebinding)."""
HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src data:; "
    "connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff", "referrer-policy": "same-origin", "cache-control": "no-store",
    "cross-origin-resource-policy": "same-origin",
}
"""Nothing is loaded from elsewhere, no script is run but ours, and no other page shows this one."""


class Guard:
    """Stands before every route."""

    def __init__(self, app: ASGIApp, token: str) -> None:
        self._app, self._token = app, token
        self.cookie = f"schoolhouse-{hashlib.sha256(token.encode()).hexdigest()[:12]}"
        """Its own for each server: a browser sends the cookies of one port to all."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer what is refused, and pass on the rest."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)  # starting and ending: there are no websockets
            return

        async def protected(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(HEADERS)
            await send(message)

        answer = self._refusal(Request(scope)) or self._app
        await answer(scope, receive, protected)

    def _refusal(self, request: Request) -> Response | None:
        host = request.headers.get("host", "")
        if not HOST.fullmatch(host):
            return PlainTextResponse("This page is for the browser of its own machine.", 403)
        given = request.query_params.get("token")
        if given is not None:
            return self._let_in(given)
        carried = request.headers.get("authorization", "").removeprefix("Bearer ")
        by_cookie = self._is_token(request.cookies.get(self.cookie, ""))
        if not by_cookie and not self._is_token(carried):
            return PlainTextResponse("Open the address that `schoolhouse serve` printed: it holds the token.", 401)
        asks = request.method not in ("GET", "HEAD")
        if asks and by_cookie and request.headers.get("origin") != f"http://{host}":
            return PlainTextResponse("Buttons of other pages do nothing here.", 403)
        return None

    def _let_in(self, given: str) -> Response:
        """The token leaves the address bar for a cookie that no script reads and no other page sends."""
        if not self._is_token(given):
            return PlainTextResponse("The token is not that of this page.", 401)
        answer = RedirectResponse("/", 303)
        answer.set_cookie(self.cookie, self._token, httponly=True, samesite="strict")
        return answer

    def _is_token(self, given: str) -> bool:
        return hmac.compare_digest(given.encode(), self._token.encode())
