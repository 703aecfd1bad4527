"""The report of a run: a single HTML file in which every figure names its source."""

from fp8pipe.report.page import default_output, write_report

__all__ = ["default_output", "write_report"]
