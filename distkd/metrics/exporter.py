"""Numbers of a training that runs, for Prometheus: each rank serves its own over HTTP and announces where.

The trainer writes into its ledger and never waits for what is done here: snapshots, files and scrapes have threads of
their own. Short jobs, and machines that may open no port, hand their values to a node_exporter instead.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
from collections.abc import Callable, Mapping
from contextlib import ExitStack
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

__all__ = ["Exporter", "MetricsConfig", "check_files", "device_labels", "node_address", "node_labels", "start_exporter"]

log = logging.getLogger(__name__)

_WITHDRAW_S = 1.0
"""How long the end of a run waits for a disk that has to let a target go."""


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
        OSError: the port is taken, or the target cannot be announced.
        OverflowError: port and local rank exceed 65535.
        ConfigError: a file of the password or of TLS is not as it has to be.
        RuntimeError: a thread cannot be started.

    Whatever is raised, no socket, file or thread is left behind.
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
        self._place, self._attempt = (run, world.rank), attempt
        self._is_announced = False
        self._ends = ExitStack()
        try:
            # what may fail with a reason to try without a server comes before the ledger is touched
            self._server = None if config.export == "off" else self._listen(config, world, labels)
            textfile = None if config.textfile is None else Textfile(config.textfile, world, labels)
            self._keeper = Keeper(ledger, counters_file(run, world.rank), world, info=info, textfile=textfile)
            self._ends.callback(self._keeper.close)
            if self._server is not None:
                self._server.serve(lambda: self._keeper.page)
        except BaseException:
            self._end()
            raise

    def _listen(self, config: MetricsConfig, world: World, labels: Mapping[str, str]) -> ScrapeServer:
        tls = None if config.tls_cert is None else tls_context(config.tls_cert, config.tls_key)
        password = None if config.password_file is None else read_password(config.password_file)
        address, announced = ("127.0.0.1",) * 2 if config.export == "local" else node_address()
        port = config.port + world.local_rank if config.port else 0
        server = ScrapeServer((address, port), tls=tls, password=password)
        self._ends.callback(server.close)
        self.address = f"{announced}:{server.server_address[1]}"
        scheme = {} if tls is None else {"__scheme__": "https"}  # of what Prometheus calls, no label
        self._is_announced = True  # perhaps in part
        targets.write(*self._place, self.address, {**labels, **scheme}, attempt=self._attempt)
        return server

    def withdraw(self) -> None:
        """Remove the target and go on serving; a disk that does not take it is no reason to stop. Once is enough."""
        if not self._is_announced:
            return
        self._is_announced = False
        thread = threading.Thread(target=self._remove_target, name="metrics-withdraw", daemon=True)
        try:
            thread.start()
        except RuntimeError:  # there are too many; then it may take as long as the disk likes
            self._remove_target()
        else:
            thread.join(_WITHDRAW_S)

    def close(self, *, linger_s: float = 0.0, until: Callable[[], bool] = lambda: False) -> None:
        """Withdraw the target and let the port go, within some three seconds beside `linger_s`. Once is enough.

        Args:
            linger_s: who has scraped this rank gets so long to do it once more, so that its last values are seen;
                not after `withdraw`.
            until: asked again and again meanwhile; that wait ends when it says yes.
        """
        try:
            if linger_s > 0 and self._is_announced and self._server is not None and self._server.was_scraped:
                self._keeper.close()
                self._server.wait_for_scrape(linger_s, until)
        finally:
            self._end()

    def _end(self) -> None:
        with self._ends:  # closes the keeper, then the server, whatever happens
            self.withdraw()  # first: whoever is slow to end may be killed on the way

    def _remove_target(self) -> None:
        try:
            targets.remove_own(*self._place)
        except OSError as error:
            log.warning("%s cannot be removed: %s", error.filename, error.strerror)


def check_files(config: MetricsConfig) -> None:
    """Refuse files and folders that are not as they have to be, before anything is computed.

    Raises:
        ConfigError: they are not.
    """
    if config.tls_cert is not None:
        tls_context(config.tls_cert, config.tls_key)
    if config.password_file is not None:
        read_password(config.password_file)
    if config.textfile is not None and not config.textfile.is_dir():
        raise ConfigError(
            f"metrics.textfile={config.textfile} is no folder of this machine; name one that its node_exporter reads"
        )


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
    except (OSError, OverflowError, ConfigError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        if config.port and isinstance(error, OSError | OverflowError):
            reason += f" (port {config.port + world.local_rank}); --metrics.port 0 takes a free one"
        lost = f"metrics.export={config.export}" if config.export != "off" else "metrics.textfile"
        # as an error, since ranks other than the main one are heard with nothing less
        log.error("rank %d trains on without %s: %s", world.rank, lost, reason)
        # a textfile needs threads, too, and the ledger may have its earlier counters already
        if config.textfile is None or config.export == "off" or isinstance(error, RuntimeError):
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
