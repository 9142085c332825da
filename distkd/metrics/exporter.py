"""Numbers of a training that runs, for Prometheus: each rank serves its own over HTTP and announces where.

The trainer writes into its ledger and never waits for what is done here: snapshots, files and scrapes have threads of
their own. Short jobs, and machines that may open no port, hand their values to a node_exporter instead.
"""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Mapping
from pathlib import Path

import torch

from distkd.allocation import Allocation
from distkd.base import World
from distkd.errors import ConfigError
from distkd.metrics import targets
from distkd.metrics.keeper import Keeper, Textfile, counters_file
from distkd.metrics.ledger import Ledger
from distkd.metrics.server import ScrapeServer, read_password, tls_context
from distkd.metrics.settings import MetricsConfig

__all__ = ["Exporter", "MetricsConfig", "device_labels", "node_address", "node_labels", "start_exporter"]

log = logging.getLogger(__name__)


class Exporter:
    """Serves this rank's ledger until it is closed; the counters of earlier attempts are in it from here on.

    Args:
        config: `export` is not `off`, or there is a `textfile`.
        run: the run folder, where the target is announced and the counters are kept.
        world: this rank; its local rank is added to a fixed port.
        ledger: what the trainer knows.
        labels: of the target, beside its rank.
        attempt: of the run, to clear up by; no label.
        info: label values of `distkd_rank_info`.

    Raises:
        OSError: the port is taken, or the target cannot be announced; nothing is left behind.
        OverflowError: port and local rank exceed 65535.
        ConfigError: a file of the password or of TLS is not as it has to be.
    """

    def __init__(
        self,
        config: MetricsConfig,
        run: Path,
        world: World,
        *,
        ledger: Ledger,
        labels: Mapping[str, str],
        info: Mapping[str, str],
        attempt: int | None = None,
    ):
        self.address = ""
        """`host:port` as announced; empty without a server."""
        self._linger_s = config.linger_s
        self._place, self._attempt = (run, world.rank), attempt
        # whatever may fail comes before the ledger is touched
        self._server = None if config.export == "off" else self._listen(config, world, labels)
        textfile = None if config.textfile is None else Textfile(config.textfile, world, labels)
        self._keeper = Keeper(ledger, counters_file(run, world.rank), world, info=info, textfile=textfile)
        if self._server is not None:
            self._server.serve(lambda: self._keeper.page)

    def _listen(self, config: MetricsConfig, world: World, labels: Mapping[str, str]) -> ScrapeServer:
        tls = None if config.tls_cert is None else tls_context(config.tls_cert, config.tls_key)
        password = None if config.password_file is None else read_password(config.password_file)
        address, announced = ("127.0.0.1",) * 2 if config.export == "local" else node_address()
        port = config.port + world.local_rank if config.port else 0
        server = ScrapeServer((address, port), tls=tls, password=password)
        self.address = f"{announced}:{server.server_address[1]}"
        scheme = {} if tls is None else {"__scheme__": "https"}  # of what Prometheus calls, no label
        try:
            targets.write(*self._place, self.address, {**labels, **scheme}, attempt=self._attempt)
        except OSError:
            self._withdraw()
            server.close()
            raise
        return server

    def refresh(self) -> None:
        """Serve what the ledger says now, without waiting for the next turn; waits for the disk, so not in a step."""
        self._keeper.refresh()

    def close(self, *, last: bool) -> None:
        """Withdraw the target and let the port go; a disk that does not take it is no reason to stop.

        Args:
            last: the run has ended for good, on all ranks: who has scraped it may do so once more, so that its last
                values are seen.
        """
        try:
            if last and self._server is not None and self._server.was_scraped:
                self._keeper.close()
                self._server.wait_for_scrape(self._linger_s)
        finally:
            self._withdraw()  # first: whoever is slow to end may be killed on the way
            self._keeper.close()
            if self._server is not None:
                self._server.close()

    def _withdraw(self) -> None:
        try:
            targets.remove_own(*self._place)
        except OSError as error:
            log.warning("%s cannot be removed: %s", error.filename, error.strerror)


def start_exporter(
    config: MetricsConfig,
    run: Path,
    world: World,
    *,
    ledger: Ledger,
    labels: Mapping[str, str],
    info: Mapping[str, str],
    attempt: int | None = None,
) -> Exporter | None:
    """An exporter as asked for. None where it is off, and where it fails: this rank says so once and trains on.

    Where only the server fails, a `textfile` still gets its values.
    """
    if config.export == "off" and config.textfile is None:
        return None
    try:
        return Exporter(config, run, world, ledger=ledger, labels=labels, info=info, attempt=attempt)
    except (OSError, OverflowError, ConfigError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        if config.port and not isinstance(error, ConfigError):
            reason += f" (port {config.port + world.local_rank}); --metrics.port 0 takes a free one"
        # as an error, since ranks other than the main one are heard with nothing less
        log.error("rank %d trains on without metrics.export=%s: %s", world.rank, config.export, reason)
        if config.textfile is None:
            return None
        alone = config.model_copy(update={"export": "off"})
        return start_exporter(alone, run, world, ledger=ledger, labels=labels, info=info, attempt=attempt)


def device_labels(device: torch.device) -> dict[str, str]:
    """What a rank computes on, and the UUID by which exporters of GPU metrics know it; empty on a CPU."""
    if device.type != "cuda":
        return {"device": device.type, "gpu_uuid": ""}
    properties = torch.cuda.get_device_properties(device)
    return {"device": properties.name, "gpu_uuid": f"GPU-{properties.uuid}"}


def node_labels(environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Node and job of this process; the job is empty outside of SLURM, which to Prometheus is no label."""
    allocation = Allocation.from_environment(environ)
    return {
        "node": environ.get("SLURMD_NODENAME") or socket.gethostname(),
        targets.JOB: "" if allocation is None else allocation.job,
    }


def node_address(environ: Mapping[str, str] = os.environ) -> tuple[str, str]:
    """Address (IPv4) to listen on, and the one that others call.

    The first that is not loopback of: LOCAL_ADDR, which launch/multinode.sh knows too; what the host name stands for;
    the one on the way to MASTER_ADDR. Where there is none, all interfaces, announced by host name.
    """
    for find in (lambda: environ.get("LOCAL_ADDR", ""), _address_of_host, lambda: _address_towards(environ)):
        try:
            address = socket.gethostbyname(found) if (found := find()) else ""
        except OSError:  # the name is unknown, or there is no way
            continue
        if address and not address.startswith("127."):
            return address, address
    log.warning("metrics are served on all interfaces: the host name is unknown or stands for loopback; set LOCAL_ADDR")
    return "0.0.0.0", socket.gethostname()


def _address_of_host() -> str:
    return socket.gethostbyname(socket.gethostname())


def _address_towards(environ: Mapping[str, str]) -> str:
    """This machine's address on the way to MASTER_ADDR, empty without one; nothing is sent."""
    master = environ.get("MASTER_ADDR")
    if not master:
        return ""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as way:
        way.connect((master, 9))
        return way.getsockname()[0]
