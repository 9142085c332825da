"""`manifest.json` on the disk."""

from __future__ import annotations

import json
import re
from pathlib import Path

from pydantic import BaseModel, ValidationError

from distkd.data.consistency import check_consistency
from distkd.data.manifest import FORMAT_VERSION, MANIFEST, Manifest, explain
from distkd.errors import DataError
from distkd.files import raise_disk_fault, write_text

__all__ = ["read_manifest", "write_manifest"]

_VERSION_LINE = re.compile(r'^ "format_version": (\d{1,9}),?$', re.MULTILINE)
"""As `write_manifest` writes it; no text inside of the JSON can begin a line."""


class _Version(BaseModel):
    format_version: int | None = None


def read_manifest(folder: Path) -> Manifest:
    """The checked manifest of a shard set.

    Raises:
        DataError: there is none, it is damaged or of another version, or it contradicts itself.
        DiskError: the file system cannot give it.
    """
    path = folder / MANIFEST
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise DataError(
            f"no {MANIFEST} in {str(folder)!r}, so it is not a shard set; make one with "
            f"`python shards/<recipe>.py --out {folder}`"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        if isinstance(error, OSError):
            raise_disk_fault(repr(str(path)), error)
        raise DataError(f"cannot read {str(path)!r}: {error}; check the path and its rights") from error
    try:
        found = _version(text)
        if found is not None and not 1 <= found <= FORMAT_VERSION:
            raise DataError(
                f"{str(path)!r} has format version {found}, this distkd reads 1 to {FORMAT_VERSION}; "
                + ("update distkd" if found > FORMAT_VERSION else "build the shard set again")
            )
        manifest = Manifest.model_validate_json(text)
    except ValidationError as error:
        raise DataError(
            f"{str(path)!r} is not a valid manifest: {explain(error)}; build the shard set again"
        ) from error
    check_consistency(manifest, str(path))
    return manifest


def _version(text: str) -> int | None:
    """Without parsing all of the text where it has a line of its own."""
    line = _VERSION_LINE.search(text)
    return int(line[1]) if line else _Version.model_validate_json(text).format_version


def write_manifest(manifest: Manifest, folder: Path) -> None:
    """One line per top-level field, so that the head of the file is readable and equal content gives equal bytes.

    The file is on the disk when this returns, or there is none.
    """
    fields = manifest.model_dump(mode="json")
    lines = [
        f" {json.dumps(name)}: {json.dumps(value, separators=(',', ':'))}" for name, value in sorted(fields.items())
    ]
    write_text(folder / MANIFEST, "{\n" + ",\n".join(lines) + "\n}\n")
