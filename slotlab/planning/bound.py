"""The least time of counted work on a device: its roofline, operation by operation (Williams et al., 2009)."""

from __future__ import annotations

from dataclasses import dataclass

from slotlab.planning.devices import Device
from slotlab.training.cost import Cost

LAUNCH = 5e-6  # seconds from one kernel to the next where the host queues them one by one; under WSL rather 8e-6

# Share of its bound that work is expected to reach. No GPU has been measured: an assumption.
UTILISATION = 0.5


@dataclass(frozen=True)
class Bound:
    """Seconds. An operation takes at least the longest of three: its products at the device's rate of them, its bytes
    at the memory's, and the launch of a kernel."""

    compute: float  # if products alone took time
    memory: float  # if only reading and writing the device's memory did
    launches: float  # if only starting kernels did
    together: float  # the sum over the operations of the longest of the three
    by: str  # which of the three has the largest share of that sum

    @property
    def expected(self) -> float:
        """Seconds that the work is expected to take: the bound over ``UTILISATION``."""
        return self.together / UTILISATION

    @classmethod
    def of(cls, cost: Cost, device: Device, precision: str) -> Bound:
        """The bound of work whose float32 products have this ``optim.precision``."""
        alone = {"compute": 0.0, "memory": 0.0, "launches": 0.0}
        longest = dict(alone)
        for work, count in cost.work.items():
            seconds = {
                "compute": work.flops / device.rate(work.dtype, work.convolution, precision) if work.flops else 0.0,
                "memory": work.bytes / device.bandwidth,
                "launches": LAUNCH,
            }
            for name, value in seconds.items():
                alone[name] += count * value
            slowest = max(seconds, key=lambda name: seconds[name])
            longest[slowest] += count * seconds[slowest]
        by = max(longest, key=lambda name: longest[name])
        return cls(**alone, together=sum(longest.values()), by=by)
