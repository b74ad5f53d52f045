"""How many probes there may be in one process, and of one tenant."""

from __future__ import annotations

import threading
from typing import Protocol
from weakref import WeakSet

from ironclip.errors import Overloaded

# Of the probes that run and wait one tenant may have one in so many.
_TENANT_SHARE = 4


class Holder(Protocol):
    """Who has probes: a Prober."""

    def running_of(self, tenant: str | None) -> int:
        """Probes that run and wait of one tenant; of all for None."""


class Places:
    """The places for probes of one process, whichever encoders they are of.

    Args:
        most: probes that may run and wait at most.
        shared: there are API keys, so of these a tenant may have its share alone, whatever its name.
    """

    def __init__(self, most: int, *, shared: bool = False) -> None:
        self.most, self.share = most, max(1, most // _TENANT_SHARE) if shared else most
        self._lock = threading.Lock()
        self._probers: WeakSet[Holder] = WeakSet()

    def add(self, prober: Holder) -> None:
        """Count the probes of an encoder too, as long as it is there."""
        with self._lock:
            self._probers.add(prober)

    def taken(self, tenant: str | None = None) -> int:
        """Probes that run and wait; of one tenant, where it is named."""
        with self._lock:
            probers = list(self._probers)
        return sum(prober.running_of(tenant) for prober in probers)

    def check(self, tenant: str, retry_after: float) -> None:
        """Raise Overloaded where there is no place for one more."""
        taken = self.taken()
        if taken >= self.most:
            raise Overloaded(
                f"{taken} probes run and wait, at most {self.most} may (IRONCLIP_MAX_PROBES).",
                limit_name="probes",
                retry_after=retry_after,
                limit=self.most,
            )
        ours = self.taken(tenant) if self.share < self.most else 0
        if ours >= self.share:
            raise Overloaded(
                f"{ours} probes of this tenant run and wait, at most {self.share} may (a quarter of "
                "IRONCLIP_MAX_PROBES).",
                limit_name="probes-of-tenant",
                retry_after=retry_after,
                limit=self.share,
            )
