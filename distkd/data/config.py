"""What a run's config says of its data."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import (
    BeforeValidator,
    Field,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    StringConstraints,
    model_validator,
)

from distkd.base import StrictConfig
from distkd.data.augment import AugmentConfig
from distkd.data.degrade import DegradedConfig
from distkd.data.manifest import Name
from distkd.data.plan import Balance
from distkd.data.remote.transport import is_url
from distkd.data.shardset import Check
from distkd.data.unreadable import OnError
from distkd.data.volumes import VolumeConfig
from distkd.errors import ConfigError

__all__ = ["DataConfig", "StreamConfig"]


def _as_text(value: object) -> object:
    return str(value) if isinstance(value, Path) else value


class StreamConfig(StrictConfig):
    """How shards are read one after another, from a URL or a slow disk."""

    lanes: PositiveInt | None = None
    """Stretches of the epoch that are read side by side. The number of ranks divides it, and it divides the global
    batch; batches are the same at any such number of ranks. Unset: what 64 and the global batch have in common."""
    buffer: PositiveInt = 4096
    """Samples that a lane shuffles together; what is read again when a run is resumed in mid-epoch."""
    cache: Path | None = None
    """Folder for fetched shards on a disk of the node, shared by its ranks; unset, one in the temporary folder."""
    cache_gib: PositiveFloat = 50.0
    """Largest size of that folder, all sets together."""
    ahead: NonNegativeInt = 32
    """Shards fetched before they are needed, where the cache has room."""
    fit_samples: PositiveInt = 10_000
    """Training samples, of the first shards, that the statistics of vectors are taken from."""


class DataConfig(StrictConfig):
    """Which shard set, which part of it, and how samples are varied."""

    shards: Annotated[str, BeforeValidator(_as_text)] | None = None
    """Folder of a shard set; with `make` it is where the set is made if it is not there yet. Or where one lies that is
    streamed: `https://host/set`, or `pipe:command {}`, where `{}` is the file's name."""
    scratch: Annotated[str, BeforeValidator(_as_text), StringConstraints(min_length=1)] | None = None
    """A folder on this machine's own disk, `$NAMES` of the environment are filled in: the shard set is copied there
    first, once a machine, and read from there. Without room it is read where it lies, with a warning."""
    make: Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9_]*$")] | None = None
    """Recipe of the repository's `shards/` folder that makes the set from what the repository holds."""
    fold: NonNegativeInt = 0
    """Number of the fold."""
    labelled: PositiveInt | None = None
    """Training samples that keep their label, by class shares and seed; the others are distilled only. None: all."""
    views: PositiveInt = 1
    """Independently augmented copies of each training sample; a method may ask for more."""
    augment: AugmentConfig = AugmentConfig()
    transform_on: Literal["host", "device"] = "host"
    """`device` sends images to the device as they are stored, whole, and crops, warps, jitters, normalises and coarsens
    whole batches there. Vectors and volumes are made on the host either way."""
    image_mean: Annotated[tuple[float, ...], Field(min_length=1)] = (0.5,)
    """Subtracted from images of 0..1; one value, or one per channel."""
    image_std: Annotated[tuple[PositiveFloat, ...], Field(min_length=1)] = (0.5,)
    """Divisor of images after the mean is subtracted; one value, or one per channel."""
    threads: NonNegativeInt = 2
    """Threads that decode, beside the one that prepares the next batches; 0 does all of it in the training thread."""
    cache_mib: NonNegativeInt = 1024
    """Decoded samples kept in memory: a modality is, if all of it fits into what is left; smallest first."""
    check: Check = "first"
    """Checksums of what is read: at a sample's first reading, always, or never."""
    on_error: OnError = "fail"
    """A sample that cannot be read stops the run, or is skipped: in training the next one of the plan takes its place,
    on any number of ranks the same; in evaluation it is left out and counted."""
    max_skipped: Annotated[float, Field(ge=0, lt=1)] = 0.01
    """Share of the set's samples that `on_error: skip` may leave out, one at least; beyond it the run stops."""
    access: Literal["auto", "indexed", "stream"] = "auto"
    """`indexed` reads any sample at once, from a folder; `stream` reads shards one after another, from a folder or a
    URL; `auto` streams URLs."""
    stream: StreamConfig = StreamConfig()
    degraded: dict[Name, DegradedConfig] = {}  # noqa: RUF012 - pydantic copies it
    """Coarser copies of stored images, by the name under which a model uses them."""
    volume: VolumeConfig = VolumeConfig()
    """How volumes are cut, normalised and varied."""
    balance: Balance = "none"
    """`oversample` repeats the samples of small classes (as AT+ does), `weighted` draws each class equally often. An
    epoch keeps its number of steps either way: of a longer list it takes a part."""

    @model_validator(mode="after")
    def _access_fits(self) -> Self:
        remote = self.shards is not None and is_url(self.shards)
        if remote and self.make is not None:
            raise ConfigError(f"data.make makes a folder, data.shards={self.shards} is none; leave one of them out")
        if remote and self.scratch is not None:
            raise ConfigError(
                f"data.scratch copies a folder, data.shards={self.shards} is none; leave it out: what is streamed is "
                "kept on a disk of this machine by data.stream.cache"
            )
        if self.scratch is not None and not self.scratch.startswith(("/", "$")):
            raise ConfigError(
                f"data.scratch={self.scratch} is no whole path; name a folder on each machine's own disk by its whole "
                "path, which may begin with a $NAME of the environment"
            )
        if remote and self.access == "indexed":
            raise ConfigError(
                f"data.access=indexed reads a folder, data.shards={self.shards} is none; copy the set to a disk, or "
                "set data.access to stream"
            )
        if (remote or self.access == "stream") and self.balance != "none":
            raise ConfigError(
                f"data.balance={self.balance} needs samples in any order, which a stream does not give; copy the set "
                "to a disk, or set data.balance to none"
            )
        return self

    @property
    def streams(self) -> bool:
        """Whether shards are read one after another, and not samples in any order."""
        return self.access == "stream" or (self.shards is not None and is_url(self.shards))
