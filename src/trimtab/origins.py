"""Which web pages may use a server, and by which names it may be called.

A browser sends the requests of any page to any server that it reaches, those of this machine included, and says in `Origin`
whose they are. A page may also point a name of its own at this machine, and is then of the same origin as the server; so a
server that only this machine reaches answers to this machine's names alone. What is no browser sends no `Origin` and is let in.
"""

import ipaddress
import re
from collections.abc import Iterable, Sequence

from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Scope

from trimtab.errors import InvalidOption

__all__ = ["Origins", "is_json", "is_loopback"]

_AUTHORITY = r"(?P<host>\[[0-9a-f:.]+\]|[a-z0-9._-]+)(?::(?P<port>[0-9]{1,5}))?"
_HOST = re.compile(_AUTHORITY)
_ORIGIN = re.compile(rf"(?P<scheme>[a-z][a-z0-9+.-]*)://{_AUTHORITY}")
_JSON = re.compile(rb"application/(?:[a-z0-9!#$&^_.-]+\+)?json[ \t]*(?:;.*)?", re.IGNORECASE)
_PORTS = {"http": "80", "https": "443"}
_ANY = "*"


class Origins:
    """What is let in; anything else is to be answered with 403.

    Args:
        allowed: origins of pages other than the server's own, such as `https://example.com`; `*` for all.
        host: the address that the server listens on.
        hosts: names that it may be called by, beside `host` and this machine's own; `*` for any. Without one, a server that
            other machines reach may be called by any name.

    Raises:
        InvalidOption: there is no such origin or name.
    """

    def __init__(self, allowed: Iterable[str] = (), *, host: str = "0.0.0.0", hosts: Iterable[str] = ()) -> None:
        self._allowed = frozenset(map(_read_origin, allowed))
        named = frozenset(map(_read_host, hosts))
        checked = _ANY not in named and (named or is_loopback(host))
        self._hosts = named | {_bare(host)} if checked else None

    def refusal(self, scope: Scope) -> tuple[str, str] | None:
        """Why a request, or a socket, is not let in, and a code for it; None if it is.

        Args:
            scope: ASGI's, of type `http` or `websocket`.
        """
        hosts, origins = _values(scope, b"host"), _values(scope, b"origin")
        for host in hosts:
            if self._hosts is not None and not self._answers_to(host):
                cure = "say localhost, or start the server with --allowed_hosts"
                return f"this server is not called '{_show(host)}': {cure}", "host_not_allowed"
        if _ANY in self._allowed:
            return None
        scheme = scope.get("scheme", "http").replace("ws", "http")
        own = _origin(f"{scheme}://{hosts[0]}") if len(hosts) == 1 else None
        for origin in origins:
            found = _origin(origin)
            if found is None or not (found == own or found in self._allowed):
                cure = "start the server with --allowed_origins to let them in"
                return f"pages of '{_show(origin)}' may not use this server: {cure}", "origin_not_allowed"
        if not origins and _is_embedded(scope):
            return "pages of other origins may not use this server", "origin_not_allowed"
        return None

    def with_cors(self, app: ASGIApp) -> ASGIApp:
        """The application behind what answers preflights, and lets allowed pages read answers."""
        if not self._allowed:
            return app
        return _AllowedOrigins(
            app,
            allow_origins=self._allowed,
            allow_methods=["*"],
            allow_headers=["*"],  # OpenAI's clients send a dozen of their own
            allow_private_network=True,
            expose_headers=["x-request-id", "retry-after"],
        )

    @property
    def allowed(self) -> list[str]:
        """The allowed origins, as browsers write them."""
        return sorted(self._allowed)

    def _answers_to(self, given: str) -> bool:
        found = _HOST.fullmatch(given.lower())
        if found is None:
            return False
        name = _bare(found["host"])
        return is_loopback(name) or name in (self._hosts or ())


class _AllowedOrigins(CORSMiddleware):
    """Starlette's, with our idea of which origins are the same."""

    def is_allowed_origin(self, origin: str) -> bool:
        return self.allow_all_origins or _origin(origin) in self.allow_origins


def is_json(content_types: Sequence[bytes]) -> bool:
    """Whether a body with these `Content-Type` headers is said to be JSON. Pages of other origins cannot say so unasked."""
    return len(content_types) == 1 and _JSON.fullmatch(content_types[0].strip()) is not None


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach it."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def _origin(text: str) -> str | None:
    """An origin as browsers write it: in lower case, without the port that goes without saying. None if it is none."""
    found = _ORIGIN.fullmatch(text.lower())
    if found is None:
        return None
    name = _bare(found["host"])
    host = f"[{name}]" if ":" in name else name
    port = "" if found["port"] in (None, _PORTS.get(found["scheme"])) else f":{int(found['port'])}"
    return f"{found['scheme']}://{host}{port}"


def _bare(host: str) -> str:
    """A name or address without brackets, and an address in its shortest form."""
    name = host.lower().removeprefix("[").removesuffix("]")
    try:
        return ipaddress.ip_address(name).compressed
    except ValueError:
        return name


def _read_origin(text: str) -> str:
    found = text if text == _ANY else _origin(text.removesuffix("/"))
    if found is None:
        raise InvalidOption(
            f"--allowed_origins must be '*' or like https://example.com or http://localhost:3000, without a path, not '{text}'"
        )
    return found


def _read_host(text: str) -> str:
    found = _HOST.fullmatch(text.lower())
    if text != _ANY and found is None:
        raise InvalidOption(f"--allowed_hosts must be '*' or a name like example.com, not '{text}'")
    return _ANY if found is None else _bare(found["host"])


def _is_embedded(scope: Scope) -> bool:
    """Whether a page of another origin asks for a part of itself, an image or a script; browsers send no `Origin` then."""
    site, mode = (_values(scope, name) for name in (b"sec-fetch-site", b"sec-fetch-mode"))
    visits = mode == ["navigate"] and scope.get("method") in ("GET", "HEAD")
    return bool({"cross-site", "same-site"} & set(site)) and not visits


def _values(scope: Scope, name: bytes) -> list[str]:
    return [value.decode("latin-1").strip() for key, value in scope["headers"] if key.lower() == name]


def _show(text: str) -> str:
    return text if len(text) <= 80 and text.isprintable() else f"{ascii(text)[1:80]}…"
