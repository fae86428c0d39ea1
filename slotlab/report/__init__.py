"""The report: one page on one or more runs. ``write.write_report`` writes it; ``slotlab view`` serves it."""

from __future__ import annotations

from slotlab.report.options import PageOptions
from slotlab.report.write import Extras, write_report

__all__ = ["Extras", "PageOptions", "write_report"]
