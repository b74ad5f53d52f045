"""Who may ask for what: one table, and whatever is not in it is refused.

With API keys every route is closed unless the table says otherwise: a route that somebody forgets to enter answers
403. A caller without a key learns nothing, not even which paths exist. Without keys the service is open to everybody.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from starlette.datastructures import Headers
from starlette.routing import BaseRoute, Match, Route
from starlette.types import Scope

from service.errors import KeyMissing, KeyUnknown, RouteNotFound, ScopeMissing
from service.keys import ANYBODY, Caller, Keyring
from service.keys import Scope as KeyScope

PUBLIC: tuple[KeyScope, ...] = ()
_INFER: tuple[KeyScope, ...] = ("infer",)
_PROBE: tuple[KeyScope, ...] = ("probe",)
_ADMIN: tuple[KeyScope, ...] = ("admin",)
# Whoever changes the models has to see how they stand.
_SEEN: tuple[KeyScope, ...] = ("infer", "admin")

# Method and path of every route, parameters as {} -> the scopes of which one is enough, or PUBLIC.
ACCESS: dict[str, tuple[KeyScope, ...]] = {
    "GET /": PUBLIC,
    "GET /playground/{}": PUBLIC,
    "GET /samples": PUBLIC,
    "GET /samples/{}": PUBLIC,
    "GET /docs": PUBLIC,
    "GET /docs/assets/{}": PUBLIC,
    "GET /openapi.json": PUBLIC,
    "GET /problems/{}": PUBLIC,
    "GET /livez": PUBLIC,
    "GET /readyz": PUBLIC,
    "GET /v2/health/live": PUBLIC,
    "GET /v2/health/ready": PUBLIC,
    "GET /v2": _INFER,
    "GET /v2/": _INFER,
    "GET /v2/models": _INFER,
    "GET /v2/models/{}": _INFER,
    "GET /v2/models/{}/ready": _INFER,
    "POST /v2/models/{}/infer": _INFER,
    "GET /v2/models/{}/versions/{}": _INFER,
    "GET /v2/models/{}/versions/{}/ready": _INFER,
    "POST /v2/models/{}/versions/{}/infer": _INFER,
    "GET /metrics": ("metrics", "admin"),
    "POST /classify": _INFER,
    "POST /embed": _INFER,
    "GET /models": _SEEN,
    "GET /models/{}": _SEEN,
    "PUT /models/{}": _ADMIN,
    "DELETE /models/{}": _ADMIN,
    "POST /models/{}/promote": _ADMIN,
    "DELETE /models/{}/canary": _ADMIN,
    "GET /label-sets": _INFER,
    "GET /label-sets/{}": _INFER,
    "PUT /label-sets/{}": _INFER,
    "DELETE /label-sets/{}": _INFER,
    "POST /v1/embeddings": _INFER,
    "GET /v1/models": _INFER,
    "GET /v1/models/{}": _INFER,
    "POST /attack-probe": _PROBE,
    "GET /probes": _PROBE,
    "GET /probes/{}": _PROBE,
    "DELETE /probes/{}": _PROBE,
    "GET /probes/{}/events": _PROBE,
}
_PARAMETER = re.compile(r"{[^}]*}")
_NOBODY = Caller(scopes=frozenset())


def operation(method: str, path: str) -> str:
    """A route as the table names it."""
    return f"{method} {_PARAMETER.sub('{}', path)}"


def token_of(headers: Headers) -> str:
    """The API key of a request.

    Raises:
        KeyMissing: there is none, or not in a form that is read.
        KeyUnknown: there are several.
    """
    bearers = [value.partition(" ") for value in headers.getlist("authorization")]
    given = {value.strip() for scheme, _, value in bearers if scheme.lower() == "bearer"}
    given |= {value.strip() for value in headers.getlist("x-api-key")}
    given.discard("")
    if not given:
        raise KeyMissing("Send an API key: `Authorization: Bearer ick_...` or `X-API-Key: ick_...`.")
    if len(given) > 1:
        raise KeyUnknown("Several API keys were sent; send one.")
    return given.pop()


class Access:
    """Let those through who may ask, and say who they are; before anything of the body is read.

    Args:
        routes: every route of the app.
        keys: the API keys; None: everybody may ask for everything.
    """

    def __init__(self, routes: Sequence[BaseRoute], keys: Keyring | None) -> None:
        self.keys = keys
        self._routes = [route for route in routes if isinstance(route, Route)]
        # Asking every route takes as long as checking a key ten times over: those without parameters are asked here.
        self._plain: dict[tuple[str, str], str | None] = {}
        for route in self._routes:
            if "{" not in route.path:
                for method in (route.methods or set()) - {"HEAD"}:  # a GET by the time it comes here
                    self._plain[method, route.path] = self._matched(
                        {"type": "http", "method": method, "path": route.path}
                    )

    def admit(self, scope: Scope) -> bool:
        """Find out who asks, as `caller` in the request's state; it is set where the answer is no, too.

        Returns:
            Whether the request will have to be paid for: those are that a body is sent with, to be inferred from.

        Raises:
            AccessDenied: they may not.
            RouteNotFound: they have a key, and ask for what is not there.
        """
        state = scope["state"]
        if self.keys is None:
            state["caller"] = ANYBODY
            return False
        state["caller"] = _NOBODY
        asked = self._operation(scope)
        needed = ACCESS.get(asked) if asked is not None else None
        if needed == PUBLIC:
            return False
        # Known from here on, also where the answer is no: the log names the key.
        state["caller"] = caller = self.keys.caller(token_of(Headers(scope=scope)))
        if asked is None:
            raise RouteNotFound("There is nothing under this path; /docs lists what is here.")
        if needed is None:
            raise ScopeMissing("This route is open to no API key.", challenge='error="insufficient_scope"')
        if not caller.scopes.intersection(needed):
            raise ScopeMissing(
                f"This needs an API key with the scope {' or '.join(needed)}; {caller.key} has "
                f"{', '.join(sorted(caller.scopes))}.",
                challenge=f'error="insufficient_scope", scope="{" ".join(needed)}"',
            )
        return needed == _INFER and scope["method"] == "POST"

    def _operation(self, scope: Scope) -> str | None:
        """The route that will answer; None: there is none."""
        known = None if scope.get("root_path") else self._plain.get((scope["method"], scope["path"]))
        return known if known is not None else self._matched(scope)

    def _matched(self, scope: Scope) -> str | None:
        """The route, found as the router finds it.

        Where a path is there under other methods it is one of those, which answers 405.
        """
        partial = None
        for route in self._routes:
            match, _ = route.matches(scope)
            if match is Match.FULL:
                return operation(scope["method"], route.path)
            if match is Match.PARTIAL and partial is None:
                partial = operation(min((route.methods or set()) - {"HEAD"}, default=""), route.path)
        return partial
