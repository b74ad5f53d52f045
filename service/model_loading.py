"""An encoder from its files to a warm version: loaded, verified, then warmed beside what is served; in a thread."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from ironclip.domain import Domain, load_domain
from ironclip.encoder import Encoder
from ironclip.errors import ArtifactError, ChecksumMismatch, IronclipError, OutOfMemory
from ironclip.golden import check_golden
from ironclip.loading import load_encoder
from service import telemetry
from service.dtype import MIN_COSINE
from service.errors import InternalError
from service.heap import trim_heap
from service.plans import check_head
from service.probe_places import Places
from service.runtime import ServedEncoder, is_out_of_memory
from service.settings import Settings
from service.versions import Version

_NO_GOLDEN = (
    "It carries no golden features (they come with artifacts saved by ironclip): that it computes what its maker saw "
    "has not been verified."
)


@dataclass(frozen=True)
class Loaded:
    """A verified encoder in float32, and what it was trained on, if its artifact says so."""

    encoder: Encoder
    domain: Domain | None


class Loader:
    """Makes served encoders; every method blocks for as long as it takes, and belongs into a thread.

    Args:
        settings: of the service.
        images_expected: see ServedEncoder.
    """

    def __init__(self, settings: Settings, images_expected: Callable[[], bool]) -> None:
        self._settings = settings
        self._images_expected = images_expected
        # One count for all the encoders that it loads.
        self._places = Places(settings.max_probes, shared=settings.keys_file is not None) if settings.probes else None

    def load(self, version: Version) -> Loaded:
        """The float32 encoder, its digest and golden features verified.

        Raises:
            IronclipError: it cannot be loaded, or is not what was asked for.
        """
        encoder = load_encoder(version.path, device=self._settings.device)
        encoder.spec = version.spec
        version.to("verifying")
        version.digest = encoder.digest
        if version.expected and encoder.digest != version.expected:
            raise ChecksumMismatch(
                f"The encoder {version.spec!r} has digest {encoder.digest}, expected was {version.expected}: the "
                "weights or the configuration are not the pinned ones."
            )
        check_head(version.defence, encoder, version.name)
        golden = encoder.provenance.get("golden")
        if golden is None:
            version.notes.append(_NO_GOLDEN)
        else:
            check_golden(encoder, golden)
        domain = load_domain(encoder.folder) if encoder.folder else None
        if not version.still():
            raise ArtifactError(
                f"{version.spec} changed while it was read; it is loaded anew when it has come to rest."
            )
        return Loaded(encoder, domain)

    def warm(self, version: Version, loaded: Loaded) -> ServedEncoder:
        """The encoder in the dtype it is served in, verified in that too, warm, its workers running.

        Raises:
            GoldenMismatch: the served dtype drifts too far.
        """
        settings, encoder = self._settings, loaded.encoder
        version.to("warming")
        served = ServedEncoder(
            version.name,
            encoder,
            dtype=settings.dtype,
            forward=settings.compile,
            max_batch=settings.max_batch,
            max_queue=settings.max_queue,
            max_wait=settings.max_queue_ms / 1000,
            supervised=True,
            idle_wait_ms=settings.idle_wait_ms,
            defence=version.defence,
            places=self._places,
            quantum_ms=settings.probe_quantum_ms,
            images_expected=self._images_expected,
            observe=telemetry.observe_batch,
            domain=loaded.domain,
        )
        try:
            golden = encoder.provenance.get("golden")
            if golden is not None and served.dtype != "float32":
                check_golden(served.encoder, golden, MIN_COSINE)
            served.start()
        except BaseException:
            # What holds itself together would keep the weights, and the room that what is served needs.
            served.tokens.stop()
            served.release()
            raise
        trim_heap()
        return served


def as_problem(error: Exception, version: Version) -> IronclipError:
    """What went wrong with a load, as one of our errors; what is no fault of the encoder goes to the log."""
    if any(is_out_of_memory(one) for one in _chain(error)):
        return OutOfMemory(
            f"There is no memory for {version.name!r} in a further version; what was served goes on. Unload another "
            "encoder first, or give this one by IRONCLIP_ENCODERS to a process that starts with it."
        )
    if isinstance(error, IronclipError):
        return error
    telemetry.get_logger().error("encoder failed", encoder=version.name, exc_info=error)
    return InternalError(f"{type(error).__name__} while loading; the log has it.")


def _chain(error: BaseException) -> Iterator[Exception]:
    """An exception and what it was raised from, each once."""
    seen: set[int] = set()
    cause: BaseException | None = error
    while cause is not None and id(cause) not in seen:
        seen.add(id(cause))
        if isinstance(cause, Exception):
            yield cause
        cause = cause.__cause__ or cause.__context__
