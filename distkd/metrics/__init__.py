"""Numbers about a run: metrics of predictions, levels of aggregation, meters, and the files that hold them."""

from distkd.metrics.classification import METRICS, PER_CLASS, ClassificationReport, classification_metrics
from distkd.metrics.jsonl import MetricsWriter, json_ready, read_jsonl
from distkd.metrics.levels import LEVELS, PatientRule, levels, to_group, to_patient
from distkd.metrics.meters import PHASES, Meter, Reduced, Stopwatch
from distkd.metrics.predictions import Predictions, read_predictions, write_predictions

__all__ = [
    "LEVELS",
    "METRICS",
    "PER_CLASS",
    "PHASES",
    "ClassificationReport",
    "Meter",
    "MetricsWriter",
    "PatientRule",
    "Predictions",
    "Reduced",
    "Stopwatch",
    "classification_metrics",
    "json_ready",
    "levels",
    "read_jsonl",
    "read_predictions",
    "to_group",
    "to_patient",
    "write_predictions",
]
