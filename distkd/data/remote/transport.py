"""Bytes of one file of a shard set by URL or command: where it lies, a stream of it, and no secret in a message.

http(s) goes through the standard library: it tells the HTTP status, and the URL with its signature stays out of the
process table. Commands (`pipe:`) and the other schemes go through the webdataset library.
"""

from __future__ import annotations

import re
import select
import shlex
import subprocess
from base64 import b64encode
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, contextmanager, suppress
from http.client import HTTPException, responses
from typing import IO, Any, Protocol, cast
from urllib.error import HTTPError, URLError
from urllib.parse import SplitResult, unquote, urlsplit, urlunsplit
from urllib.request import Request, url2pathname, urlopen

from distkd.errors import ConfigError, DataError

__all__ = ["TransferError", "address", "check_name", "check_url", "is_url", "masked", "open_stream"]

_BLOCK_BYTES = 1 << 18
"""Read at once; between two blocks a transfer can be stopped."""

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")
_SCHEME = re.compile(r"([a-z][a-z0-9+.-]*):")
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://[^\s'\"|;&<>]*(&[^\s'\"|;&<>]+)*")
_PLACE = "{}"
"""Stands for the file's name in a command or URL."""

_WORTH_A_RETRY = {408, 425, 429}
"""HTTP states below 500 that pass by themselves."""

_SIGPIPE = 141
"""What a shell with `pipefail` says when a command of its pipeline was not read to the end."""

Read = Callable[[], bytes]
"""The next bytes, empty at the end."""


class TransferError(Exception):
    """What a transfer found instead of the bytes; a second attempt is in vain where it is `permanent`."""

    def __init__(self, found: str, *, permanent: bool = False):
        super().__init__(found)
        self.permanent = permanent


class _Pipe(Protocol):
    """What is used of webdataset's Pipe."""

    proc: subprocess.Popen[bytes]
    stream: IO[bytes]

    def close(self) -> None: ...


def is_url(text: str) -> bool:
    """Whether a shard set is named by URL or command, and not by a folder."""
    return text.startswith("pipe:") or "://" in text


def check_url(url: str) -> str:
    """The URL, without a slash at its end.

    Raises:
        ConfigError: nothing that can be read from.
    """
    found = _SCHEME.match(url)
    scheme = found.group(1) if found else ""
    if scheme == "pipe":
        if _PLACE not in url:
            raise ConfigError(
                f"the command {masked(url)!r} has no {_PLACE}, which stands for the file's name, as in "
                f"'pipe:aws s3 cp s3://bucket/set/{_PLACE} -'"
            )
        return url
    try:
        host = urlsplit(url).netloc
    except ValueError as error:
        raise ConfigError(f"{masked(url)!r} is no URL: {error}; expected such as 'https://host/set'") from None
    if scheme == "file" and host not in ("", "localhost"):
        raise ConfigError(f"{masked(url)!r} names a host; a folder of this machine is 'file:///path/set'")
    if scheme in ("http", "https") and not host:
        raise ConfigError(f"{masked(url)!r} names no host; expected such as 'https://host/set'")
    if scheme not in ("file", "http", "https") and scheme not in _library_schemes():
        known = sorted({"file", "http", "https", "pipe", *_library_schemes()})
        raise ConfigError(
            f"no way to read {masked(url)!r}; available: {', '.join(known)}; for any other store give the command "
            f"that writes a file to its output, as in 'pipe:aws s3 cp s3://bucket/set/{_PLACE} -'"
        )
    return url.rstrip("/")


def check_name(file: str) -> str:
    """The name of a file of the set, which goes into paths and commands.

    Raises:
        DataError: it could lead anywhere else.
    """
    if not _NAME.fullmatch(file):
        raise DataError(
            f"the manifest names the file {file!r}, expected letters, digits, '-', '_' and '.' without a folder; "
            "the shard set is not to be trusted: get it from its maker again"
        )
    return file


def address(url: str, file: str) -> str:
    """Where one file of the set lies: in place of `{}`, or at the end of the path, before a signature."""
    if _PLACE in url:
        return url.replace(_PLACE, file)
    parts = urlsplit(url)
    return urlunsplit(parts._replace(path=f"{parts.path.rstrip('/')}/{file}"))


def masked(text: str) -> str:
    """A URL without user, password and query; of a command its first word, paths and URLs only."""
    if not text.startswith("pipe:"):
        return _masked_url(text)
    try:
        words = shlex.split(text.removeprefix("pipe:"))
    except ValueError:
        words = text.removeprefix("pipe:").split()
    while words and re.match(r"\w+=", words[0]):
        words.pop(0)  # an environment variable before the command may be a token
    shown = words[:1] if words and re.fullmatch(r"[\w./-]+", words[0]) else ["..."]
    for word in words[1:]:
        urls = [_masked_url(found.group()) for found in _URL.finditer(word)]
        part = urls or ([word] if re.fullmatch(r"\.{0,2}/[\w./{}-]+", word) else ["..."])
        shown += part if part != ["..."] or shown[-1] != "..." else []
    return "pipe:" + " ".join(shown)


def open_stream(place: str, *, stall_s: float) -> AbstractContextManager[Read]:
    """Read a file from its address.

    Read to the end and leave the block: that is when a command's exit code is looked at. Who leaves with an exception
    ends the transfer.

    Args:
        stall_s: the longest time without a byte.

    Raises:
        TransferError: from the block, the reading function, or the end of the block.
    """
    scheme = place.partition(":")[0]
    if scheme in ("http", "https"):
        return _http(place, stall_s)
    return _file(place) if scheme == "file" else _through_library(place, stall_s)


@contextmanager
def _http(place: str, stall_s: float) -> Generator[Read, None, None]:
    parts = urlsplit(place)
    request = Request(_without_user(parts, fragment=""), headers={"User-Agent": "distkd"})
    if parts.username is not None:
        pair = f"{unquote(parts.username)}:{unquote(parts.password or '')}".encode()
        # not to where the server may redirect
        request.add_unredirected_header("Authorization", f"Basic {b64encode(pair).decode()}")
    with _in_words():
        response = urlopen(request, timeout=stall_s)

    def read() -> bytes:
        with _in_words():
            return response.read(_BLOCK_BYTES)

    with response:
        yield read


@contextmanager
def _in_words() -> Generator[None, None, None]:
    try:
        yield
    except HTTPError as error:
        error.close()
        # not error.reason: of a refused redirect it holds a URL
        words = f"HTTP status {error.code} {responses.get(error.code, '')}".rstrip()
        raise TransferError(words, permanent=error.code < 500 and error.code not in _WORTH_A_RETRY) from None
    except URLError as error:
        raise TransferError(f"no connection ({error.reason})") from None
    except OSError as error:
        raise TransferError(f"the connection broke ({error.strerror or error or type(error).__name__})") from None
    except HTTPException as error:
        raise TransferError(f"an answer that is no HTTP ({type(error).__name__})") from None


@contextmanager
def _file(place: str) -> Generator[Read, None, None]:
    try:
        file = open(url2pathname(urlsplit(place).path), "rb")  # noqa: SIM115 - the block below closes it
    except OSError as error:
        raise TransferError(error.strerror or str(error), permanent=True) from None

    def read() -> bytes:
        try:
            return file.read(_BLOCK_BYTES)
        except OSError as error:
            raise TransferError(error.strerror or str(error)) from None

    with file:
        yield read


@contextmanager
def _through_library(place: str, stall_s: float) -> Generator[Read, None, None]:
    from webdataset.gopen import Pipe, gopen  # pyright: ignore[reportMissingTypeStubs, reportUnknownVariableType]

    program = "webdataset's gopen"
    try:
        stream = cast(Any, gopen(place, "rb"))
    except (OSError, ValueError, ImportError) as error:
        # the message holds the whole command
        raise TransferError(f"{program} refuses it ({type(error).__name__})", permanent=True) from None
    if isinstance(stream, Pipe):
        yield from _piped(cast(_Pipe, stream), stall_s)
        return
    with stream:
        yield lambda: cast(bytes, stream.read(_BLOCK_BYTES))


def _piped(pipe: _Pipe, stall_s: float) -> Generator[Read, None, None]:
    poll = select.poll()
    poll.register(pipe.stream.fileno(), select.POLLIN)

    def read() -> bytes:
        if not poll.poll(stall_s * 1000):
            raise TransferError(f"no byte for {stall_s:g} s")
        return cast(Any, pipe.stream).read1(_BLOCK_BYTES)

    try:
        yield read
        pipe.stream.close()
        status = pipe.proc.wait(stall_s)
    except subprocess.TimeoutExpired:
        raise TransferError(f"the command has not ended {stall_s:g} s after its last byte") from None
    finally:
        _end(pipe)
    if status not in (0, _SIGPIPE):
        raise TransferError(f"exit code {status}" if status >= 0 else f"the command was killed by signal {-status}")


def _end(pipe: _Pipe) -> None:
    if pipe.proc.poll() is None:
        pipe.proc.kill()
    with suppress(OSError):  # its status is looked at by who read it to the end
        pipe.close()
    pipe.proc.wait()  # `close` does not where the stream is closed already


def _library_schemes() -> list[str]:
    from webdataset.gopen import gopen_schemes  # pyright: ignore[reportMissingTypeStubs, reportUnknownVariableType]

    return [name for name in cast(dict[str, object], gopen_schemes) if not name.startswith("_")]


def _masked_url(url: str) -> str:
    try:
        parts = urlsplit(url)
    except ValueError:  # such as brackets that do not close
        return url.partition(":")[0] + "://..."
    hidden = "***@" if "@" in parts.netloc else ""
    shown = _without_user(parts, query="***" if parts.query else "", fragment="")
    return shown.replace("://", f"://{hidden}", 1)


def _without_user(parts: SplitResult, **changes: str) -> str:
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2], **changes))
