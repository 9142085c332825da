"""What a table may hold and seldom means: said before shards are made of it."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from typing import TYPE_CHECKING

from distkd.base import UNLABELLED
from distkd.data.manifest import SPLITS
from distkd.data.raw.table import Row
from distkd.data.raw.table_problems import Problems, first_few

if TYPE_CHECKING:
    from distkd.data.raw.table_plan import Plan

__all__ = ["add_notes"]

_LABEL_MAP = re.compile(r"(^|_)(seg|segmentation|segmentierung|mask|maske|label|labels|labelmap|gt|annotation)\d*(_|$)")
_TOTAL = re.compile(r"(summe|gesamt|total|sum|mean|average|mittelwert|anzahl|count)\b", re.IGNORECASE)


def add_notes(plan: Plan, problems: Problems) -> None:
    for note in (*_classes(plan), *_twins(plan), *_totals(plan), *_label_maps(plan)):
        problems.note(note)


def _classes(plan: Plan) -> Iterable[str]:
    """Classes that a split of a fold lacks."""
    if plan.roles.is_segmentation:
        return
    total = Counter(plan.labels)
    absent: defaultdict[tuple[str, str], list[int]] = defaultdict(list)
    for number, fold in enumerate(plan.folds):
        for split in SPLITS:
            patients = set(fold.patients(split))
            counts = Counter(
                label for row, label in zip(plan.rows, plan.labels, strict=True) if row.patient in patients
            )
            for label, name in enumerate(plan.names):
                if total[label] and patients and not counts[label]:
                    absent[name, split].append(number)
    for (name, split), folds in absent.items():
        yield (
            f"class {name!r} has no row in {split} of fold {first_few(folds)}; such a fold cannot be trained on: move "
            "patients, or merge classes"
        )


def _twins(plan: Plan) -> Iterable[str]:
    """Rows with the same files and numbers."""
    rows_of: defaultdict[tuple[object, ...], list[int]] = defaultdict(list)
    for place, row in enumerate(plan.rows):
        if row.files or row.numbers:
            rows_of[tuple(sorted(row.files.items())), repr(sorted(row.numbers.items()))].append(place)
    groups = [places for places in rows_of.values() if len(places) > 1]
    if not groups:
        return
    words: list[str] = []
    for places in groups:
        several = [
            f"different {what}s"
            for what, values in (
                ("patient", {plan.rows[place].patient for place in places}),
                ("label", {plan.labels[place] for place in places}),
            )
            if len(values) > 1
        ]
        lines = " and ".join(str(plan.rows[place].line) for place in places[:3])
        words.append(lines + (" and more" if len(places) > 3 else "") + (f" ({', '.join(several)})" if several else ""))
    yield f"rows with the same files and numbers: {first_few(words)}; remove what was entered twice"


def _totals(plan: Plan) -> Iterable[str]:
    """Rows such as the sum below a spreadsheet's columns."""
    of_files = any(kind != "target" for _, kind in plan.roles.files.values())
    odd = [
        row
        for row, label in zip(plan.rows, plan.labels, strict=True)
        if _TOTAL.match(row.patient) or (of_files and label == UNLABELLED and not row.files)
    ]
    if odd:
        yield (
            f"row {first_few(f'{row.line} ({row.patient!r})' for row in odd)}: {_why(odd[0])}; remove it, if it is no "
            "sample"
        )


def _why(row: Row) -> str:
    return "named like a total" if _TOTAL.match(row.patient) else "without label and without files"


def _label_maps(plan: Plan) -> Iterable[str]:
    """Inputs that may be the answer."""
    if plan.roles.is_segmentation:
        return
    for name, (column, _) in plan.roles.files.items():
        modality = plan.modalities.get(name)
        if modality is None or modality.kind == "vector":
            continue
        few = [plan.facts[path].few_values for row in plan.rows if (path := row.files.get(name)) in plan.facts]
        values = sorted({value for own in few for value in own or ()}) if few and all(few) else []
        reasons = ["by its name"] if _LABEL_MAP.search(name) else []
        reasons += [f"by its values {', '.join(map(str, values[:8]))}"] if values else []
        if reasons:
            yield (
                f"column {column!r} looks like a label map ({' and '.join(reasons)}) and is an input; call it "
                f"target:{name} if it is what a model should find"
            )
