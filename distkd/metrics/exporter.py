"""Numbers of a training that runs, for Prometheus: each rank serves its own over HTTP and announces where.

A rank publishes at its logging steps what the host knows then; nothing here waits for the device or for another rank.
A scrape is answered by a thread of its own from the last numbers published, and never holds up a step.
"""

from __future__ import annotations

import logging
import os
import socket
import socketserver
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from prometheus_client import CollectorRegistry, MetricsHandler
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector
from pydantic import Field

from distkd.allocation import Allocation
from distkd.base import StrictConfig, World
from distkd.metrics import targets

__all__ = [
    "EXPORTED", "Exporter", "MetricsConfig", "Values", "device_labels", "node_address", "node_labels", "start_exporter",
]  # fmt: skip

log = logging.getLogger(__name__)

_SCRAPE_TIMEOUT_S = 10.0
"""How long a connection may say nothing; otherwise each silent one would keep a thread."""
_POLL_S = 0.2
"""How long the end of a run may wait for the server's loop."""


class MetricsConfig(StrictConfig):
    """Numbers of a running training for Prometheus, see docs/monitoring.md."""

    export: Literal["off", "local", "network"] = "off"
    """`local` answers to this machine alone, `network` at the address under which other machines know this one;
    whoever reaches that may read the numbers."""
    port: Annotated[int, Field(ge=0, le=65535)] = 0
    """Port of the first rank of a machine, the others take the next ones; 0 takes any free ones. The target file says
    which."""


@dataclass(frozen=True, slots=True)
class _Metric:
    name: str
    kind: Literal["gauge", "counter"]
    help: str
    label: str | None = None
    """Its only label, where it has one."""


EXPORTED = (
    _Metric("distkd_train_step", "gauge", "Optimizer steps of the run, as of the last logging step."),
    _Metric("distkd_steps_total", "counter", "Optimizer steps of the run, equal on all ranks, kept over restarts."),
    _Metric(
        "distkd_samples_total", "counter", "Samples of all ranks together, equal on all ranks, kept over restarts."
    ),
    _Metric("distkd_loss", "gauge", "Mean over ranks and steps since the last logging step, unweighted parts.", "part"),
    _Metric("distkd_grad_norm", "gauge", "Norm of the gradient, mean over steps since the last logging step."),
    _Metric("distkd_lr", "gauge", "Learning rate of the last step."),
    _Metric("distkd_last_step_timestamp_seconds", "gauge", "When the last logging step of this attempt ended."),
    _Metric("distkd_restarts", "gauge", "Attempts of the run before this one."),
)
"""All that is exported, beside `distkd_rank_info`. What tells ranks apart (run, rank, node) is in the target file."""

_FAMILIES = {"gauge": GaugeMetricFamily, "counter": CounterMetricFamily}

Values = float | Mapping[str, float] | None
"""What a name of `EXPORTED` stands at: a number, or one for each value of its label; None is not exported."""


class _Server(socketserver.ThreadingTCPServer):
    """Not `http.server.HTTPServer`, which asks for the host's full name when it binds and may wait long for that."""

    allow_reuse_address = True
    daemon_threads = True
    request_queue_size = 16

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A scraper that hangs up in mid-answer is no news."""
        log.debug("scrape by %s failed", client_address, exc_info=True)


class _Handler(MetricsHandler):
    timeout = _SCRAPE_TIMEOUT_S


class Exporter(Collector):
    """Serves this rank's last values until it is closed.

    Args:
        config: `export` is not `off`.
        run: the run folder, where the target is announced.
        world: this rank; its local rank is added to a fixed port.
        labels: of the target, beside its rank.
        info: label values of `distkd_rank_info`.
        values: by name of `EXPORTED`, what is known before the first logging step.

    Raises:
        OSError: the port is taken, or the target cannot be announced; nothing is left behind.
        OverflowError: port and local rank exceed 65535.
    """

    def __init__(
        self,
        config: MetricsConfig,
        run: Path,
        world: World,
        *,
        labels: Mapping[str, str],
        info: Mapping[str, str],
        values: Mapping[str, Values],
    ):
        self._info, self._values = info, values
        registry = CollectorRegistry()
        registry.register(self)
        address, announced = ("127.0.0.1",) * 2 if config.export == "local" else node_address()
        port = config.port + world.local_rank if config.port else 0
        self._server = _Server((address, port), _Handler.factory(registry))
        self.address = f"{announced}:{self._server.server_address[1]}"
        serve = {"poll_interval": _POLL_S}
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs=serve, name="metrics", daemon=True)
        self._thread.start()
        self._place = run, world.rank
        try:
            targets.write(run, world.rank, self.address, labels)
        except OSError:
            self.close()
            raise

    def update(self, values: Mapping[str, Values]) -> None:
        """Replace all values at once; a scrape sees the old or the new ones."""
        self._values = values

    def collect(self) -> Iterator[GaugeMetricFamily | CounterMetricFamily]:
        """What a scrape is answered with; called on the thread of the scrape."""
        values = self._values
        for metric in EXPORTED:
            value = values.get(metric.name)
            if value is None:
                continue
            by_label = value if isinstance(value, Mapping) else {"": value}
            family = _FAMILIES[metric.kind](metric.name, metric.help, labels=[metric.label] if metric.label else [])
            for label, number in by_label.items():
                family.add_metric([label] if metric.label else [], number)
            yield family
        about = GaugeMetricFamily("distkd_rank_info", "What this rank runs on.", labels=list(self._info))
        about.add_metric(list(self._info.values()), 1)
        yield about

    def close(self) -> None:
        """Withdraw the target and let the port go; a disk that does not take it is no reason to stop."""
        try:
            targets.remove_own(*self._place)
        except OSError as error:
            log.warning("%s cannot be removed: %s", error.filename, error.strerror)
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def start_exporter(
    config: MetricsConfig,
    run: Path,
    world: World,
    *,
    labels: Mapping[str, str],
    info: Mapping[str, str],
    values: Mapping[str, Values],
) -> Exporter | None:
    """An exporter as asked for. None where it is off, and where it fails: this rank says so once and trains on."""
    if config.export == "off":
        return None
    try:
        return Exporter(config, run, world, labels=labels, info=info, values=values)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        if config.port:
            reason += f" (port {config.port + world.local_rank}); --metrics.port 0 takes a free one"
        # as an error, since ranks other than the main one are heard with nothing less
        log.error("rank %d trains on without metrics.export=%s: %s", world.rank, config.export, reason)
        return None


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
