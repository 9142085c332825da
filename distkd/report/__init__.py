"""The page that shows what a study found: tables with intervals, curves, confusion, and where every number comes from."""

from distkd.report.make import default_output, make_report

__all__ = ["default_output", "make_report"]
