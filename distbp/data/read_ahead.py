"""Read ahead: while one stretch of the order is computed, the rows of the next are fetched from the disk.

The order of samples is known for ever, so nobody has to guess: the kernel is told which rows come next, and
reads them into the page cache while the processor multiplies (`DiskRows.read_ahead`).  One worker of a host
does it for all.  For data that are held in memory nothing happens.
"""

from __future__ import annotations

from distbp.data.base import Dataset
from distbp.data.order import Order
from distbp.data.rows import Rows

__all__ = ["ReadAhead"]


class ReadAhead:
    """Fetches what comes next in `order`, in stretches of one window, or of `batch_size` without windows."""

    def __init__(self, dataset: Dataset, order: Order, batch_size: int) -> None:
        self._rows = [
            rows for rows in (dataset.x, dataset.y) if isinstance(rows, Rows) and rows.disk_row_bytes
        ]
        # One of its own: the worker's evaluates positions ahead of its own steps and remembers them.
        self._order = Order(order.size, order.seed, order.blocks)
        self._stretch = batch_size if order.blocks is None else max(batch_size, order.blocks.samples)
        self._fetched = -1

    def reach(self, position: int) -> None:
        """Fetch up to the end of the stretch behind the one in which `position` lies."""
        if not self._rows:
            return
        current = position // self._stretch
        if self._fetched < current - 1 or self._fetched > current + 1:
            self._fetched = current - 1  # The first step, or one after a loss.
        while self._fetched < current + 1:
            self._fetched += 1
            indices = self._order.indices(self._fetched * self._stretch, self._stretch)
            for rows in self._rows:
                rows.read_ahead(indices)
