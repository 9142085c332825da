"""The error tree. A `DistkdError` is the user's to mend (exit code 2, one message); anything else is ours.

Exceptions are what the same command may get past when it is started again (exit code 1): `DiskError`, `LostRankError`,
`DivergedError`.
"""

__all__ = [
    "CheckpointError",
    "ConfigError",
    "DataError",
    "DiskError",
    "DistkdError",
    "DivergedError",
    "Interrupted",
    "LostRankError",
    "NonFiniteError",
    "SampleError",
    "ShapeError",
    "TakenOverError",
]


class DistkdError(Exception):
    """Base of every error that is a user's mistake or bad data; `kind` goes into `outcome.json`."""

    kind = "error"
    local = False
    """Whether this rank alone ran into it, so that it has to speak although it is not the main rank."""


class ConfigError(DistkdError, ValueError):
    """The configuration or the command line is wrong; also a `ValueError`, so that validators collect it."""

    kind = "config"


class DataError(DistkdError):
    """A shard, a manifest, a raw file or a split is wrong."""

    kind = "data"
    shared = False
    """Whether all ranks raise it alike, in the middle of a run, so that one of them speaks."""


class SampleError(DataError):
    """The bytes of one sample are damaged; `data.on_error: skip` goes on without it."""

    def __init__(self, message: str, sample: int):
        super().__init__(message)
        self.sample = sample


class CheckpointError(DistkdError):
    """A checkpoint or an export is missing, damaged, or belongs to something else."""

    kind = "checkpoint"


class ShapeError(DistkdError):
    """A tensor does not have the shape that the config promises."""

    kind = "shape"


class NonFiniteError(DistkdError):
    """The loss became NaN or infinite; all ranks stop together and the samples are named."""

    kind = "nonfinite"


class DivergedError(DistkdError):
    """Ranks that must hold the same weights and banks do not; nothing after that would be an experiment."""

    kind = "diverged"


class DiskError(DistkdError):
    """A file system did not do what it should: it is full, broken or out of reach, here or now."""

    kind = "disk"


class TakenOverError(DistkdError):
    """A later attempt trains in the same run folder: two jobs, or two terminals, on one run."""

    kind = "taken_over"


class LostRankError(DistkdError):
    """Another rank died or stopped answering."""

    kind = "lost_rank"


class Interrupted(Exception):
    """A signal asked for a stop and a complete checkpoint was written; exit code 3."""
