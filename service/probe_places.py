"""How many probes there may be in one process, and of one tenant; which of them begins next, and when."""

from __future__ import annotations

import heapq
import threading
import time
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol
from weakref import WeakSet

from ironclip.errors import Overloaded

if TYPE_CHECKING:
    from service.probe_job import Job

# Probes that advance side by side in one encoder; more wait.
ACTIVE = 16
# Of the probes that run and wait one tenant may have one in so many.
_TENANT_SHARE = 4


def next_of(waiting: Sequence[Job], active: Sequence[Job]) -> Job | None:
    """Of those that wait the one that begins now: of whoever has the fewest under way, the first that came.

    Whoever has none under way gets a place beyond `ACTIVE` too, or a tenant whose probes have taken all of them would
    keep the others out until these end. So there are never more than `ACTIVE` and one for each tenant.
    """
    under_way = Counter(job.tenant for job in active)
    first = min(waiting, key=lambda job: under_way[job.tenant], default=None)
    return first if first is not None and (len(active) < ACTIVE or not under_way[first.tenant]) else None


def seconds_until_begun(tenant: str, waiting: Sequence[Job], active: Sequence[Job], used: float = 1.0) -> float:
    """Until a probe of this tenant that comes now is begun, if each takes so large a share of the time that it may."""
    if not any(job.tenant == tenant for job in (*waiting, *active)):
        return 0.0
    now = time.monotonic()
    # When each place is free again. What was begun beyond the places has to end before any is.
    ends = sorted(max(0.0, min(job.started + used * job.seconds, job.deadline) - now) for job in active)
    places = [0.0] * (ACTIVE - len(ends)) + ends[max(0, len(ends) - ACTIVE) :]
    heapq.heapify(places)
    for job in waiting:
        heapq.heapreplace(places, min(places[0] + used * job.seconds, max(places[0], job.deadline - now)))
    return places[0]


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
