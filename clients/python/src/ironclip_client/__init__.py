"""Client of the Ironclip service: zero-shot classification, embeddings and attack probes over HTTP.

    from ironclip_client import Client

    with Client("http://127.0.0.1:8000") as client:
        print(client.classify("carrot.png", ["carrot", "rocket"]).label)

`AsyncClient` has the same methods for asyncio.
"""

from ironclip_client.aio import AsyncClient
from ironclip_client.client import Client
from ironclip_client.errors import (
    Conflict,
    ConnectionFailed,
    DeadlineExceeded,
    Fault,
    Forbidden,
    ImageError,
    InvalidRequest,
    IronclipError,
    LabelError,
    NotFound,
    NotReady,
    Overloaded,
    ProbeCancelled,
    Problem,
    RateLimited,
    ServerError,
    TooLarge,
    Unauthorized,
    Unavailable,
    UnexpectedAnswer,
    UsageError,
)
from ironclip_client.images import ImageSource
from ironclip_client.options import (
    CallOptions,
    ClassifyOptions,
    DecisionOptions,
    EmbedOptions,
    Label,
    ProbeOptions,
)
from ironclip_client.probes import (
    ProbeClean,
    ProbeEvent,
    ProbeList,
    ProbePoint,
    ProbeResult,
    ProbeStanding,
    ProbeSummary,
)
from ironclip_client.results import (
    Batch,
    Classification,
    Domain,
    EncoderRef,
    LabelSet,
    LabelSetRef,
    LabelSetSummary,
    Meta,
    Model,
    Models,
    ModelVersion,
    ModelVersions,
    Prediction,
    Preprocessing,
    Readiness,
)
from ironclip_client.sending import RetryPolicy
from ironclip_client.sets import AsyncLabelSets, LabelSets
from ironclip_client.streams import AsyncProbeStream, ProbeStream
from ironclip_client.vectors import Embedding, Embeddings
from ironclip_client.version import VERSION as __version__

__all__ = [
    "AsyncClient",
    "AsyncLabelSets",
    "AsyncProbeStream",
    "Batch",
    "CallOptions",
    "Classification",
    "ClassifyOptions",
    "Client",
    "Conflict",
    "ConnectionFailed",
    "DeadlineExceeded",
    "DecisionOptions",
    "Domain",
    "EmbedOptions",
    "Embedding",
    "Embeddings",
    "EncoderRef",
    "Fault",
    "Forbidden",
    "ImageError",
    "ImageSource",
    "InvalidRequest",
    "IronclipError",
    "Label",
    "LabelError",
    "LabelSet",
    "LabelSetRef",
    "LabelSetSummary",
    "LabelSets",
    "Meta",
    "Model",
    "ModelVersion",
    "ModelVersions",
    "Models",
    "NotFound",
    "NotReady",
    "Overloaded",
    "Prediction",
    "Preprocessing",
    "ProbeCancelled",
    "ProbeClean",
    "ProbeEvent",
    "ProbeList",
    "ProbeOptions",
    "ProbePoint",
    "ProbeResult",
    "ProbeStanding",
    "ProbeStream",
    "ProbeSummary",
    "Problem",
    "RateLimited",
    "Readiness",
    "RetryPolicy",
    "ServerError",
    "TooLarge",
    "Unauthorized",
    "Unavailable",
    "UnexpectedAnswer",
    "UsageError",
    "__version__",
]
