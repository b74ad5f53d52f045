"""Every error that Ironclip raises on purpose, as one tree.

IronclipError
├── InputError                 the caller's input cannot be used
│   ├── OptionError            an option is unknown or out of range
│   ├── ImageError             the picture cannot be used
│   │   ├── ImageInvalid       not a readable picture (truncated, corrupt, empty)
│   │   ├── ImageUnsupported   a format, or a kind of picture, that is not accepted
│   │   └── ImageTooLarge      more bytes, pixels or pixels a side than allowed
│   ├── LabelError             the labels, prompts or templates cannot be used
│   │   └── TooManyLabels      more labels or prompts than allowed
│   ├── TreeError              the label tree is not a tree over these labels
│   └── InputTooLarge          the request as a whole is over a limit
├── NotFound                   a name that is not registered here
│   ├── EncoderNotFound
│   └── LabelSetNotFound
├── Conflict                   the stored state differs from what the caller expects
├── EncoderLoadError           an encoder spec that cannot be loaded
│   ├── UnknownEncoder         no such model, tag or folder; lists what exists
│   ├── WeightsUnavailable     the weights cannot be fetched (no network, no such repository)
│   ├── ChecksumMismatch       the file is not the one that was pinned
│   ├── ArchitectureMismatch   the weights do not fit the architecture
│   └── GoldenMismatch         it does not compute what its maker saw
├── ArtifactError              a folder that is not a readable artifact
└── Unavailable                a right request that cannot be answered now
    ├── Overloaded             the queue is full
    ├── NotReady               still loading, draining, or a worker is down
    └── DeadlineExceeded       the time the caller allowed has passed

Each class has a stable `code` (kebab-case, part of the API) and a `title`; the instance's text says what
happened and what to do. Nothing here knows HTTP: `service/errors.py` holds the one table to statuses.
"""

from __future__ import annotations


class IronclipError(Exception):
    """Base of all errors raised on purpose.

    Args:
        detail: one or two sentences: what is wrong with what was given, and what to do.
        pointer: JSON Pointer (RFC 6901) to the offending part of the input, where there is one.
        limit: the limit that was passed, where there is one.
    """

    code = "ironclip-error"
    title = "Ironclip error"

    def __init__(self, detail: str, *, pointer: str | None = None, limit: int | float | None = None) -> None:
        super().__init__(detail)
        self.detail = detail
        self.pointer = pointer
        self.limit = limit

    def at(self, pointer: str) -> IronclipError:
        """Return this error with `pointer` put in front of its own (for an error raised deeper inside)."""
        self.pointer = pointer + (self.pointer or "")
        return self


class InputError(IronclipError):
    """The caller's input cannot be used."""

    code = "input-invalid"
    title = "The input cannot be used"


class OptionError(InputError):
    """An option is unknown or out of its range."""

    code = "option-invalid"
    title = "An option is unknown or out of range"


class ImageError(InputError):
    """The picture cannot be used."""

    code = "image-error"
    title = "The image cannot be used"


class ImageInvalid(ImageError):
    """Not a readable picture: truncated, corrupt or empty."""

    code = "image-invalid"
    title = "The image cannot be decoded"


class ImageUnsupported(ImageError):
    """A format, or a kind of picture, that is not accepted."""

    code = "image-unsupported"
    title = "This kind of image is not accepted"


class ImageTooLarge(ImageError):
    """More bytes, pixels or pixels a side than allowed."""

    code = "image-too-large"
    title = "The image is too large"


class LabelError(InputError):
    """The labels, prompts, descriptions or templates cannot be used.

    Attributes:
        may_be_cut: a text has more tokens than the encoder reads; who offers to cut it may say so.
    """

    code = "labels-invalid"
    title = "The labels cannot be used"
    may_be_cut = False


class TooManyLabels(LabelError):
    """More labels or prompts than allowed."""

    code = "labels-too-many"
    title = "Too many labels"


class TreeError(InputError):
    """The label tree is not a tree over these labels."""

    code = "tree-invalid"
    title = "The label tree cannot be used"


class InputTooLarge(InputError):
    """The request as a whole is over a limit."""

    code = "input-too-large"
    title = "The request is too large"


class NotFound(IronclipError):
    """A name that is not registered here."""

    code = "not-found"
    title = "Not found"


class EncoderNotFound(NotFound):
    """No encoder is served under this name."""

    code = "encoder-not-found"
    title = "No such encoder"


class LabelSetNotFound(NotFound):
    """No label set is registered under this name (or name@digest)."""

    code = "label-set-not-found"
    title = "No such label set"


class Conflict(IronclipError):
    """The stored state differs from what the caller expects (a failed precondition)."""

    code = "precondition-failed"
    title = "The stored state differs from what was expected"


class EncoderLoadError(IronclipError):
    """An encoder spec that cannot be loaded."""

    code = "encoder-load-failed"
    title = "The encoder cannot be loaded"


class UnknownEncoder(EncoderLoadError):
    """No such model, pre-trained tag or folder."""

    code = "encoder-unknown"
    title = "Unknown encoder"


class WeightsUnavailable(EncoderLoadError):
    """The weights cannot be fetched: no network, or no such repository."""

    code = "weights-unavailable"
    title = "The weights cannot be fetched"


class ChecksumMismatch(EncoderLoadError):
    """The file on disk is not the one whose SHA-256 was pinned."""

    code = "checksum-mismatch"
    title = "The checksum does not match"


class ArchitectureMismatch(EncoderLoadError):
    """The weights do not fit the architecture named by the configuration."""

    code = "architecture-mismatch"
    title = "The weights do not fit the architecture"


class GoldenMismatch(EncoderLoadError):
    """The encoder's features are not those that were stored with it: it does not compute what was measured."""

    code = "golden-mismatch"
    title = "The encoder does not compute what was stored with it"


class ArtifactError(IronclipError):
    """A folder that is not a readable artifact, or one that cannot be written."""

    code = "artifact-invalid"
    title = "The artifact cannot be used"


class Unavailable(IronclipError):
    """A right request that cannot be answered now.

    Args:
        detail: as for IronclipError.
        retry_after: seconds after which it is worth asking again, if known.
    """

    code = "unavailable"
    title = "Not available now"

    def __init__(self, detail: str, *, retry_after: float | None = None, limit: int | float | None = None) -> None:
        super().__init__(detail, limit=limit)
        self.retry_after = retry_after


class Overloaded(Unavailable):
    """More work is asked for than can be done in time, or held.

    Args:
        detail: as for IronclipError.
        limit_name: which limit it was, one of a closed set.
        retry_after: seconds after which it is worth asking again, if known.
        limit: its value.
    """

    code = "overloaded"
    title = "The service is overloaded"

    def __init__(
        self,
        detail: str,
        *,
        limit_name: str = "other",
        retry_after: float | None = None,
        limit: int | float | None = None,
    ) -> None:
        super().__init__(detail, retry_after=retry_after, limit=limit)
        self.limit_name = limit_name


class NotReady(Unavailable):
    """Still loading, draining, or a model worker is down.

    Attributes:
        by_item: the worker went down over an item that it had alone, and had gone down with that item before.
    """

    code = "not-ready"
    title = "The service is not ready"
    by_item = False


class OutOfMemory(Unavailable):
    """The device has no memory for an item, not even alone; since all are equally large, it is no fault of the item."""

    code = "out-of-memory"
    title = "Not enough memory"


class DeadlineExceeded(Unavailable):
    """The time the caller allowed has passed, or what was left of it did not suffice.

    Attributes:
        unbegun: it was given up before that time was over, and nothing of it had been begun.
    """

    code = "deadline-exceeded"
    title = "The deadline has passed"
    unbegun = False


def shown(value: object) -> str:
    """A value that was given, short enough for a message; an integer may have more digits than can be printed."""
    return "one of very many digits" if isinstance(value, int) and abs(value) > 1 << 128 else repr(value)[:40]
