"""Records to Weights & Biases, from a thread of its own: neither its network nor its start holds up a step.

Online or offline is the user's WANDB_MODE, who the user is WANDB_API_KEY or an earlier `wandb login`; nothing of that
is read or written here. The run's id is in `<run>/wandb.json`, so that an attempt goes on where the last one ended.
"""

from __future__ import annotations

import importlib
import logging
import os
import queue
import secrets
import threading
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from distkd.files import read_json, write_json
from distkd.metrics.scalars import Scalars

__all__ = ["WeightsAndBiases"]

log = logging.getLogger(__name__)

_WAITING = 10_000
"""Records that may wait; more of them say that W&B has stopped taking any."""
_INIT_S, _FINISH_S = 30, 20
"""How long W&B may try to begin, and to end: a scheduler that asked for the end is in a hurry."""


class WeightsAndBiases:
    """One W&B run for all attempts of a run.

    Whatever goes wrong on its thread is raised by the next call of any method.

    Args:
        folder: the run's; W&B keeps its own files in `wandb/` there.
        project: name of the W&B project.
        run: name of the W&B run; runs of one root are a group.
        method: its job type.
        settings: the resolved config.
    """

    name = "W&B"

    def __init__(self, folder: Path, project: str, *, run: str, method: str, settings: Mapping[str, Any]):
        wandb = _import_quietly()
        begin = partial(
            wandb.init,
            project=project,
            id=_run_id(folder / "wandb.json", project),
            resume="allow",
            dir=str(folder),
            name=run,
            group=folder.absolute().parent.name,
            job_type=method,
            # how a run is watched is no setting of the experiment, and names files of the machine
            config={section: values for section, values in settings.items() if section != "metrics"},
            settings=wandb.Settings(
                init_timeout=_INIT_S,
                finish_timeout=_FINISH_S,
                finish_timeout_raises=True,
                login_timeout=1,  # nobody is asked for a key in the middle of a training
                silent=True,
                # numbers are sent, not what else is on the machine
                console="off",
                disable_git=True,
                disable_job_creation=True,
                save_code=False,
                x_disable_meta=True,
                x_disable_machine_info=True,
                x_save_requirements=False,
            ),
        )
        self._scalars = Scalars()
        self._waiting: queue.Queue[Callable[[Any], object] | None] = queue.Queue(_WAITING)
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._work, args=(begin,), name="wandb", daemon=True)
        self._thread.start()

    def truncate_after(self, step: int) -> None:
        """W&B keeps what it has: a step that is done again becomes a second point at the same place."""
        self._scalars = Scalars(step)

    def write(self, record: Mapping[str, Any]) -> None:
        about = {name: record[name] for name in ("step", "epoch", "samples") if name in record}
        line = {**about, "_timestamp": record["time"], **self._scalars.of(record)}
        self._later(lambda run: run.log(line))

    def score(self, step: int, split: str, metrics: Mapping[str, float | None]) -> None:
        known = {f"final/{split}/{name}": value for name, value in metrics.items() if value is not None}
        self._later(lambda run: run.summary.update(known))

    def close(self, state: str = "done") -> None:
        """Wait for the uploads, though not for long; what has not gone by then stays on disk for `wandb sync`."""
        self._later(lambda run: _finish(run, state))
        self._later(None)
        self._thread.join(_FINISH_S + 5)
        if self._thread.is_alive():
            raise TimeoutError("it does not come to an end")
        if self._error is not None:
            raise self._error

    def _later(self, act: Callable[[Any], object] | None) -> None:
        if self._error is not None:
            raise self._error
        try:
            self._waiting.put_nowait(act)
        except queue.Full:
            raise TimeoutError(f"it has not taken the last {_WAITING} records") from None

    def _work(self, begin: Callable[[], Any]) -> None:
        try:
            run = begin()
            run.define_metric("step")
            run.define_metric("*", step_metric="step")
            if not run.offline:  # it warns where there is none
                log.info("W&B shows this run at %s", run.url)
            for act in iter(self._waiting.get, None):
                act(run)
        except Exception as error:  # noqa: BLE001 - it is raised where the sink is used
            self._error = error


def _import_quietly() -> Any:
    """On the thread that trains, since filters of warnings belong to all threads."""
    # numbers of the run are sent, no reports about the package's own faults
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return importlib.import_module("wandb")


def _run_id(path: Path, project: str) -> str:
    """The id of the W&B run that earlier attempts have written to, or a new one; another project has another run."""
    try:
        known = read_json(path)
        if known["project"] == project:
            return str(known["id"])
    except (OSError, ValueError, LookupError, TypeError):
        pass
    new = secrets.token_hex(6)
    write_json(path, {"project": project, "id": new})
    return new


def _finish(run: Any, state: str) -> None:
    if state == "interrupted":
        run.mark_preempting()  # shown as preempted then, and not as failed, until it goes on
    run.finish(exit_code=0 if state == "done" else 1)
