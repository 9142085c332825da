"""Classes of a table: the texts of its column `label`, of which two that mean the same are not two."""

from __future__ import annotations

import re
from collections import Counter, defaultdict

from distkd.data.raw.table import NOT_VALUES, Row, TableOptions
from distkd.data.raw.table_problems import Problems, first_few

__all__ = ["class_names"]

MANY_CLASSES = 100


def class_names(rows: list[Row], options: TableOptions, problems: Problems) -> tuple[list[str], dict[str, int]]:
    """Class names in order, and the class of each text that stands in the column `label`."""
    return _given(rows, options, problems) if options.classes else _found(rows, problems)


def _found(rows: list[Row], problems: Problems) -> tuple[list[str], dict[str, int]]:
    texts = Counter(row.label for row in rows if row.label)
    for row in rows:
        if row.label.lower() in NOT_VALUES:
            problems.add(
                f"{row.label!r} says that there is none; leave it blank, or name it in --classes if it is a class",
                row=row.line,
                column="label",
            )
    spellings: defaultdict[str, list[str]] = defaultdict(list)
    for text in sorted(texts, key=lambda text: (-texts[text], text)):
        if text.lower() not in NOT_VALUES:
            spellings[_meaning(text)].append(text)
    for alike in spellings.values():
        if len(alike) > 1:
            what = "one number" if _is_number(alike[0]) else "one word"
            problems.add(f"{' and '.join(map(repr, alike))} are {what}; write them alike", column="label")
    class_of = {text: alike[0] for alike in spellings.values() for text in alike}
    names = sorted(set(class_of.values()), key=lambda text: (0, int(text), text) if _is_int(text) else (1, 0, text))
    if len(names) < 2:
        which = f" ({names[0]!r})" if names else ""
        problems.add(
            f"{len(names)} class{'' if len(names) == 1 else 'es'}{which}, expected at least 2; fill in the labels",
            column="label",
        )
    if len(names) > MANY_CLASSES and 2 * len(names) > len(rows):
        problems.add(
            f"{len(names)} different labels in {len(rows)} rows, such as {names[0]!r}; expected classes",
            column="label",
        )
    number_of = {name: number for number, name in enumerate(names)}
    return names, {text: number_of[name] for text, name in class_of.items()}


def _given(rows: list[Row], options: TableOptions, problems: Problems) -> tuple[list[str], dict[str, int]]:
    names = list(options.classes)
    if len(set(names)) < max(2, len(names)) or "" in names:
        problems.add(f"--classes is {', '.join(names)!r}, expected at least 2 different names")
    numbered = not any(_is_int(name) for name in names)
    label_of = {name: number for number, name in enumerate(names)}
    texts = {row.label for row in rows if row.label}
    for text in texts:
        if text not in label_of and numbered and _is_int(text) and 0 <= int(text) < len(names):
            label_of[text] = int(text)
    numbers = f", or 0 to {len(names) - 1}" if numbered else ""
    for row in rows:
        if row.label and row.label not in label_of:
            blank = "; leave it blank if there is none" if row.label.lower() in NOT_VALUES else ""
            problems.add(
                f"{row.label!r} is none of --classes, expected {', '.join(names)}{numbers}{blank}",
                row=row.line,
                column="label",
            )
    unused = [name for number, name in enumerate(names) if number not in {label_of.get(text) for text in texts}]
    if unused and len(unused) < len(names):
        problems.note(f"no row has the class {first_few(map(repr, unused))} of --classes")
    return names, label_of


def _meaning(text: str) -> str:
    """Equal for texts that a person would take for one class."""
    return repr(float(text.replace(",", "."))) if _is_number(text) else text.casefold()


def _is_number(text: str) -> bool:
    return re.fullmatch(r"[+-]?(\d+([.,]\d*)?|[.,]\d+)([eE][+-]?\d{1,3})?", text) is not None


def _is_int(text: str) -> bool:
    return re.fullmatch(r"[+-]?\d{1,9}", text) is not None
