"""The page that shows what a study found: tables with intervals, curves, confusion, and where the numbers come from."""

from distkd.report.make import make_report

__all__ = ["make_report"]
