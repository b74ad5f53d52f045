"""What can be asked for, in one place for both clients; a test compares it with the service's OpenAPI document."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, TypedDict, TypeVar

from ironclip_client.errors import UsageError

F = TypeVar("F", bound=Callable[..., Any])


class _Named(TypedDict):
    name: str


class Label(_Named, total=False):
    """A label with texts of its own: `prompts` as they are, or `descriptions` of what it looks like."""

    prompts: Sequence[str]
    descriptions: Sequence[str]


Labels = Iterable[str | Label]
Defence = str | Mapping[str, Any]
Tree = str | Mapping[str, Any]


class CallOptions(TypedDict, total=False):
    """Of one call, not of its request.

    Attributes:
        timeout: seconds for all tries together; the client's own if not given.
        request_id: the call's id in the service's log: 8 to 128 letters, digits, `.`, `_`, `-`.
    """

    timeout: float
    request_id: str


class DecisionOptions(CallOptions, total=False):
    """What a decision is made of.

    Attributes:
        label_set: a registered label set, `name` or `name@digest`, in place of labels.
        encoder: one of `models()`; the service's default if not given.
        defence: a name, or `{"name": ..., option: ...}`; the encoder's own if not given.
        templates: prompt templates with `{}` for the name, or the name of a known list of them.
        tree: a label tree over the labels, or several by name.
        levels: how upper levels are scored.
    """

    label_set: str
    encoder: str
    defence: Defence
    templates: str | Sequence[str]
    tree: Tree
    levels: Literal["rollup", "prompts"]


class ClassifyOptions(DecisionOptions, total=False):
    """Of a classification.

    Attributes:
        top_k: predictions in each answer at most; 100 if not given.
    """

    top_k: int


class EmbedOptions(CallOptions, total=False):
    """Of an embedding.

    Attributes:
        encoder: one of `models()`; the service's default if not given.
        defence: before the pictures alone.
        label_set: for a defence whose vector depends on the labels.
        truncate: cut texts that are too long instead of refusing them.
        encoding_format: on the wire; `base64`, which is exact and small, if not given.
        embed_dtype: of the numbers; `float32` if not given. `int8` keeps cosines but for rounding, not the length 1,
            and `binary` the signs alone, eight to a byte: see Embeddings.
    """

    encoder: str
    defence: Defence
    label_set: str
    truncate: bool
    encoding_format: Literal["float", "base64"]
    embed_dtype: Literal["float32", "float16", "int8", "binary"]


class ProbeOptions(DecisionOptions, total=False):
    """Of a probe; everything has a default.

    Attributes:
        level: the level of the tree that is attacked.
        label: the true label; the clean answer if not given.
        target: a label that must be reached.
        objective: `embedding` attacks the vector itself and needs no labels.
        cosine_below: below this cosine with itself the vector counts as broken.
        gallery: vectors, whose `top_k` nearest must change.
        top_k: of the gallery.
        norm: what bounds the perturbation.
        eps: radii, in 1/255 for `linf`; the smallest that breaks is searched if not given.
        max_eps: upper end of that search.
        effort: how hard each radius is attacked.
        attack: one attack in place of the effort's: its name, or `{"name": ..., option: ...}`, taken as it is.
        seconds: wall clock of the probe, 10 if not given; what is known then is the answer.
        gradients: work at most, in gradient steps; a query without a gradient is a third of one.
        draws: of a defence that draws: those that are served, or new ones each time.
        seed: of the attack.
        artefacts: pictures to send along, at the smallest radius that broke it.
    """

    level: str
    label: str
    target: str
    objective: Literal["label", "embedding"]
    cosine_below: float
    gallery: Sequence[Sequence[float]]
    top_k: int
    norm: Literal["linf", "l2"]
    eps: Sequence[float]
    max_eps: float
    effort: Literal["quick", "standard", "thorough"]
    attack: str | Mapping[str, Any]
    seconds: float
    gradients: int
    draws: Literal["fixed", "fresh"]
    seed: int
    artefacts: Sequence[Literal["adversarial", "perturbation"]]


def names_of(options: type[Any]) -> tuple[str, ...]:
    """The options' names, those of one call first."""
    return tuple(options.__annotations__)


def takes(options: type[Any]) -> Callable[[F], F]:
    """Show a method's `**options` by name where signatures are shown, as in `help()` and notebooks."""

    def shown(method: F) -> F:
        known = [one for one in inspect.signature(method).parameters.values() if one.kind is not one.VAR_KEYWORD]
        missing = inspect.Parameter.empty
        more = [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=_written(kind))
            for name, kind in options.__annotations__.items()
            if name not in {one.name for one in known}
        ]
        returns = method.__annotations__.get("return", missing)
        method.__signature__ = inspect.Signature([*known, *more], return_annotation=returns)  # type: ignore[attr-defined]
        return method

    return shown


def split(options: Mapping[str, Any], kind: type[Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Options as (of the call, of the request), without those that are None.

    Raises:
        UsageError: an option that this call does not have.
    """
    known = names_of(kind)
    for name in options:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(known)}."
            raise UsageError(f"There is no option {name!r} here; {hint}")
    given = {name: value for name, value in options.items() if value is not None}
    of_call = {name: given.pop(name) for name in names_of(CallOptions) if name in given}
    return of_call, given


def _written(kind: Any) -> Any:
    return getattr(kind, "__forward_arg__", kind)
