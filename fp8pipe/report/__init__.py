"""The report of a run: one HTML file, every figure of which names the place it was read from."""

from fp8pipe.report.page import default_output, write_report

__all__ = ["default_output", "write_report"]
