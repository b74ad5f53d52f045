"""LitServe: `python -m loadtests.peers.apps.litserve PORT`."""

from __future__ import annotations

import base64
import sys
from collections.abc import Sequence
from typing import Any

import litserve
from torch import Tensor

from loadtests.peers.apps.tower import MAX_BATCH, MAX_WAIT_MS, Tower


class Api(litserve.LitAPI):  # type: ignore[misc]
    """The tower, in the framework's five steps."""

    def setup(self, device: str) -> None:
        """Load the model in the worker's process."""
        self.tower = Tower()

    def decode_request(self, request: dict[str, str]) -> Tensor:
        """A request's picture as pixels."""
        return self.tower.decode(base64.b64decode(request["image"]))

    def batch(self, inputs: Sequence[Tensor]) -> Sequence[Tensor]:
        """Left as a list: the tower stacks it."""
        return inputs

    def predict(self, x: Sequence[Tensor]) -> list[str]:
        """Vectors of a batch."""
        return self.tower.encode(x)

    def unbatch(self, output: list[str]) -> list[str]:
        """One vector a request."""
        return output

    def encode_response(self, output: str) -> dict[str, Any]:
        """The answer's JSON."""
        return {"vector": output}


if __name__ == "__main__":
    api = Api(max_batch_size=MAX_BATCH, batch_timeout=MAX_WAIT_MS / 1000)
    server = litserve.LitServer(api, accelerator="cpu", timeout=60)
    server.run(host="127.0.0.1", port=int(sys.argv[1]), generate_client_file=False, log_level="warning")
