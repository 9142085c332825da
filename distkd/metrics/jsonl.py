"""`metrics.jsonl`: one strict JSON object a line, appended while the run lives, cut back when it resumes.

The writer belongs to one process (rank 0). Numbers that JSON cannot hold (NaN, infinity) become null.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from distkd.errors import DataError
from distkd.files import write_text

__all__ = ["MetricsWriter", "json_ready", "number", "objects", "read_jsonl"]

log = logging.getLogger(__name__)


def json_ready(value: Any) -> Any:
    """The same value with None for every float that JSON cannot hold, keys as text."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): json_ready(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [json_ready(item) for item in value]
    return value


def _whole_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each line with its object; a torn last line is left out, a torn line elsewhere is an error."""
    lines = path.read_bytes().split(b"\n")
    last = max((number for number, line in enumerate(lines) if line.strip()), default=-1)
    for number, line in enumerate(lines):
        if not line.strip():
            continue
        try:
            record = dict(json.loads(line).items())
        except (ValueError, AttributeError) as error:
            if number == last:
                return
            raise DataError(
                f"{path} line {number + 1} is not a JSON object ({error}); only the last line may be torn; "
                f"remove the line or take the file from a copy"
            ) from error
        yield line.decode(), record


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """All whole objects of the file in order; none when it does not exist; a torn last line is left out."""
    return [record for _, record in _whole_lines(path)] if path.exists() else []


def objects(lines: Iterable[bytes]) -> Iterator[dict[str, Any]]:
    """The objects among lines of a log that lives; what is being written, or was torn by a kill, is passed over."""
    for line in lines:
        try:
            value = json.loads(line)
        except ValueError:
            continue
        if isinstance(value, dict):
            yield value


def number(value: Any) -> float | None:
    """The value where it is a number: a damaged file, or NaN written as null, has none."""
    return value if isinstance(value, (int, float)) and not isinstance(value, bool) else None


class MetricsWriter:
    """Appends objects to a JSONL file, each on disk (of the operating system) when `write` returns.

    Opening repairs what a kill has torn, so that the next line starts on its own. What a full disk does not take is
    kept and written as soon as there is room.
    """

    def __init__(self, path: Path):
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            self._keep(lambda record: True)
        self._file = path.open("ab", buffering=0)
        self._rest = b""

    def write(self, record: Mapping[str, Any]) -> None:
        line = json.dumps(json_ready(record), allow_nan=False, separators=(",", ":")) + "\n"
        full = bool(self._rest)
        self._rest += line.encode()
        try:
            while self._rest:
                self._rest = self._rest[self._file.write(self._rest) :]
        except OSError as error:
            if not full:
                log.warning("%s cannot be written: %s; its lines are kept until it can", self.path, error.strerror)

    def truncate_after(self, step: int) -> None:
        """Drops the objects of later steps, which a resumed run will write again; objects without a step stay."""
        self._file.close()
        # a file of its own in any case: a writer of an earlier attempt that lives on keeps the old one
        self._keep(lambda record: record.get("step", step) <= step, always=True)
        self._file = self.path.open("ab", buffering=0)

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _keep(self, wanted: Callable[[dict[str, Any]], bool], *, always: bool = False) -> None:
        kept = "".join(line + "\n" for line, record in _whole_lines(self.path) if wanted(record))
        if always or kept.encode() != self.path.read_bytes():
            write_text(self.path, kept)
