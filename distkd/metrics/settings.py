"""The section `metrics` of the config: who may see the numbers of a run, and where they go."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, StringConstraints, model_validator

from distkd.base import StrictConfig
from distkd.errors import ConfigError

__all__ = ["MetricsConfig"]


class MetricsConfig(StrictConfig):
    """Numbers of a running training for Prometheus and others, see docs/monitoring.md."""

    export: Literal["off", "local", "network"] = "off"
    """`local` answers to this machine alone, `network` at the address under which other machines know this one;
    whoever reaches that may read the numbers, unless there is a password."""
    port: Annotated[int, Field(ge=0, le=65535)] = 0
    """Port of the first rank of a machine, the others take the next ones; 0 takes any free ones. The target file says
    which."""
    linger_s: NonNegativeFloat = 30.0
    """Seconds that a finished run waits for one more scrape, if it was scraped at all, so that its last values are
    known; should be longer than the server's scrape interval, and 0 does not wait."""
    textfile: Path | None = None
    """Folder that a node_exporter on the same machine reads (`--collector.textfile.directory`): each rank keeps its
    values there, also when it has ended; for jobs shorter than a scrape interval, and machines that open no port."""
    tls_cert: Path | None = None
    """Certificate in PEM form, with what leads to its root; numbers are then served over HTTPS only."""
    tls_key: Path | None = None
    """Private key of the certificate, without a passphrase; null where the certificate's file has it."""
    password_file: Path | None = None
    """File with one line `user:password`, unreadable for others, which a scraper has to name (basic authentication)."""
    tensorboard: bool = False
    """Write the lines of metrics.jsonl for TensorBoard, too."""
    wandb: Annotated[str, StringConstraints(min_length=1)] | None = None
    """Project of Weights & Biases that gets them, too."""

    @property
    def exports(self) -> bool:
        """Whether anybody gets to see the ledger."""
        return self.export != "off" or self.textfile is not None

    @model_validator(mode="after")
    def _is_safe(self) -> MetricsConfig:
        if self.tls_key is not None and self.tls_cert is None:
            raise ConfigError("metrics.tls_key needs the certificate it belongs to; set metrics.tls_cert")
        if self.port and self.export == "off":
            raise ConfigError("metrics.port does nothing, since metrics.export is off; set it to local or network")
        guards = {"tls_cert": self.tls_cert, "password_file": self.password_file}
        given = " and ".join(f"metrics.{name}" for name, path in guards.items() if path is not None)
        if given and self.export == "off":
            raise ConfigError(
                f"{given} would guard nothing, since metrics.export is off; set it to local or network, "
                f"or leave {given} out"
            )
        if self.password_file is not None and self.export == "network" and self.tls_cert is None:
            raise ConfigError(
                "metrics.password_file with metrics.export=network would send the password over the network in the "
                "clear; set metrics.tls_cert (and tls_key)"
            )
        return self
