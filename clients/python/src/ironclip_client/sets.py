"""Registered label sets: labels that are sent once and named in every request."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, overload

from ironclip_client import calls
from ironclip_client.options import CallOptions, Label, Tree, takes
from ironclip_client.results import LabelSet, LabelSetSummary
from ironclip_client.wire import Call

if TYPE_CHECKING:
    from typing_extensions import Unpack


def _document(labels: object, templates: object, tree: object) -> Mapping[str, Any]:
    return {"labels": labels, "templates": templates, "tree": tree}


class LabelSets:
    """The label sets of a service, as `client.label_sets`."""

    def __init__(self, send: Callable[[Call[Any]], Any]) -> None:
        self._send = send

    @takes(CallOptions)
    def list(self, **options: Unpack[CallOptions]) -> tuple[LabelSetSummary, ...]:
        """Every registered set, and those that ship with the service."""
        found: tuple[LabelSetSummary, ...] = self._send(calls.label_set_list(options))
        return found

    @overload
    def get(self, reference: str, *, if_none_match: None = None, **options: Unpack[CallOptions]) -> LabelSet: ...
    @overload
    def get(
        self, reference: str, *, if_none_match: str | LabelSetSummary, **options: Unpack[CallOptions]
    ) -> LabelSet | None: ...
    @takes(CallOptions)
    def get(
        self, reference: str, *, if_none_match: str | LabelSetSummary | None = None, **options: Unpack[CallOptions]
    ) -> LabelSet | None:
        """One set, by `name` or `name@digest`; None if `if_none_match` (a set or its digest) is still the newest.

        Raises:
            NotFound: no such set, or not in this version.
        """
        found: LabelSet | None = self._send(calls.label_set_get(reference, if_none_match, options))
        return found

    @takes(CallOptions)
    def put(
        self,
        name: str,
        labels: Iterable[str | Label],
        *,
        templates: str | Iterable[str] | None = None,
        tree: Tree | None = None,
        if_match: str | LabelSetSummary | None = None,
        only_new: bool = False,
        **options: Unpack[CallOptions],
    ) -> LabelSetSummary:
        """Make this the newest version of `name`.

        Args:
            name: what requests call it.
            labels: names, or `{"name", "prompts", "descriptions"}`.
            templates: prompt templates with `{}` for the name, or the name of a known list of them.
            tree: a label tree over the labels, or several by name.
            if_match: the set, or its digest, that is to be replaced; another one is left alone.
            only_new: replace nothing.
            **options: see CallOptions.

        Raises:
            Conflict: the set is not the one of `if_match`, there is one already, or it may not be changed.
            LabelError: the labels cannot be used.
        """
        document = _document(labels, templates, tree)
        found: LabelSetSummary = self._send(calls.label_set_put(name, document, if_match, only_new, options))
        return found

    @takes(CallOptions)
    def delete(
        self, name: str, *, if_match: str | LabelSetSummary | None = None, **options: Unpack[CallOptions]
    ) -> None:
        """Remove a set with all its versions.

        Raises:
            NotFound: no such set.
            Conflict: the set is not the one of `if_match`, or may not be removed.
        """
        self._send(calls.label_set_delete(name, if_match, options))


class AsyncLabelSets:
    """The label sets of a service, as `client.label_sets`."""

    def __init__(self, send: Callable[[Call[Any]], Awaitable[Any]]) -> None:
        self._send = send

    @takes(CallOptions)
    async def list(self, **options: Unpack[CallOptions]) -> tuple[LabelSetSummary, ...]:
        """As `LabelSets.list`."""
        found: tuple[LabelSetSummary, ...] = await self._send(calls.label_set_list(options))
        return found

    @overload
    async def get(self, reference: str, *, if_none_match: None = None, **options: Unpack[CallOptions]) -> LabelSet: ...
    @overload
    async def get(
        self, reference: str, *, if_none_match: str | LabelSetSummary, **options: Unpack[CallOptions]
    ) -> LabelSet | None: ...
    @takes(CallOptions)
    async def get(
        self, reference: str, *, if_none_match: str | LabelSetSummary | None = None, **options: Unpack[CallOptions]
    ) -> LabelSet | None:
        """As `LabelSets.get`."""
        found: LabelSet | None = await self._send(calls.label_set_get(reference, if_none_match, options))
        return found

    @takes(CallOptions)
    async def put(
        self,
        name: str,
        labels: Iterable[str | Label],
        *,
        templates: str | Iterable[str] | None = None,
        tree: Tree | None = None,
        if_match: str | LabelSetSummary | None = None,
        only_new: bool = False,
        **options: Unpack[CallOptions],
    ) -> LabelSetSummary:
        """As `LabelSets.put`."""
        document = _document(labels, templates, tree)
        found: LabelSetSummary = await self._send(calls.label_set_put(name, document, if_match, only_new, options))
        return found

    @takes(CallOptions)
    async def delete(
        self, name: str, *, if_match: str | LabelSetSummary | None = None, **options: Unpack[CallOptions]
    ) -> None:
        """As `LabelSets.delete`."""
        await self._send(calls.label_set_delete(name, if_match, options))
