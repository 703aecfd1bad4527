"""Dry runs: a real stage at its real widths, with little of what merely repeats, in a process of its own."""
