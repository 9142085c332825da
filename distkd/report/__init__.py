"""The page that shows what a study found: intervals, curves, confusion, what models look at, where it comes from."""

from distkd.report.make import make_report

__all__ = ["make_report"]
