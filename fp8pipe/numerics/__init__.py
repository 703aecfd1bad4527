"""Every number format: grids, scales, rounding, and what differs by device."""
