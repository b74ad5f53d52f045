"""BentoML: `bentoml serve loadtests.peers.apps.bentoml:Embedder`."""

from __future__ import annotations

import base64

import bentoml

from loadtests.peers.apps.tower import MAX_BATCH, Tower


@bentoml.service(workers=1, traffic={"timeout": 60})
class Embedder:
    """The tower behind the framework's adaptive batching."""

    def __init__(self) -> None:
        self.tower = Tower()

    # The latency that the framework may give up at is as long as the request may take: nothing is to be shed for speed.
    @bentoml.api(batchable=True, max_batch_size=MAX_BATCH, max_latency_ms=60_000)  # type: ignore[untyped-decorator]
    def embed(self, images: list[str]) -> list[str]:
        """Vectors of a batch of pictures, base64 both."""
        return self.tower.encode([self.tower.decode(base64.b64decode(image)) for image in images])
