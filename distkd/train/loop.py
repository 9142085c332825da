"""The training loop: the file to read first.

A step is a plan's global batch, in one or more passes; after it come the optimizer, the banks, and, at steps that are
the same on every rank, metrics, evaluation and checkpoints. Whatever a rank decides here, all ranks decide.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from contextlib import closing, nullcontext
from pathlib import Path

from torch import Tensor

from distkd.base import Batch, StepOutput, World
from distkd.comm.world import any_rank, barrier, broadcast_object, observed
from distkd.data.loader import train_batches
from distkd.data.manifest import Split
from distkd.engines import Update
from distkd.errors import Interrupted, TakenOverError
from distkd.metrics.exporter import check_files
from distkd.metrics.meters import Stopwatch
from distkd.metrics.sinks import check_sinks
from distkd.train import checkpoint
from distkd.train.attention import write_attention
from distkd.train.checkpoint import Best
from distkd.train.evaluate import SplitReport, evaluate, write_report
from distkd.train.export import write_export
from distkd.train.folder import Events, check_config, read_outcome
from distkd.train.job import Job, assemble
from distkd.train.run import Run, met_alone, samples_per_pass
from distkd.train.schedule import lr_scale
from distkd.train.settings import Settings
from distkd.train.signals import StopFlag, stop_file
from distkd.train.tally import Reading, Tally

__all__ = ["LOOK_EVERY", "train", "train_step"]

log = logging.getLogger(__name__)

LOOK_EVERY = 200
"""Steps after which all rows of the memory banks are gone through again, at a logging step."""


def train(settings: Settings, world: World, *, allow_change: bool = False, followed: bool = False) -> Path:
    """Train one stage to its end and export the student, resuming by itself; returns the run folder.

    Args:
        settings: of the stage.
        world: the ranks that train it.
        allow_change: go on in a folder that was made with another config.
        followed: another stage comes after this one.

    Raises:
        DistkdError: user errors, before or during training; `outcome.json` says the same.
        Interrupted: a signal asked for a stop and a complete checkpoint was written; or, where another stage follows,
            it came when this one was all but done.
    """
    check_config(settings, allow_change=allow_change)
    check_sinks(settings.metrics)
    check_files(settings.metrics)
    folder = settings.folder
    outcome = broadcast_object(read_outcome(folder), world)
    if outcome is not None and outcome["state"] == "done" and not allow_change:
        log.warning("run %s is done and is left as it is; another --run.name trains it again", folder)
        return folder
    job = assemble(settings, world)
    run = Run(job, Events(folder, world))
    with StopFlag(stop_file(world)) as stop_flag:
        run.open()
        try:
            fit(run, stop_flag)
            finish(run)
        except BaseException as error:
            error = met_alone(error, folder)
            run.close(error)
            raise error
        run.close(None, stop_flag.is_set)
        if followed and any_rank(stop_flag.is_set(), world, device=job.device):
            raise Interrupted(f"stopped as asked when {folder} was done; start again for the stages after it")
    return folder


def train_step(job: Job, passes: Sequence[Batch], watch: Stopwatch) -> tuple[StepOutput, Update]:
    """One optimizer step: forward and backward of each pass, the update, then what follows it."""
    if job.undo is not None:
        job.undo.keep()
    outs: list[StepOutput] = []
    for number, batch in enumerate(passes):
        with job.engine.accumulate(last=number == len(passes) - 1):
            with watch.phase("forward"):
                out = job.method.step(job.forward, batch.to(job.device, job.dtype), job.world)
            with watch.phase("backward"):
                job.engine.backward(out.loss / len(passes))
        outs.append(out)
    with watch.phase("checkpoint"):
        job.before_update()
    with watch.phase("optimizer"):
        update = job.engine.step(_lr_scale(job, passes[0].step))
    out = StepOutput.merge(outs)
    if job.undo is not None and not update.applied:
        job.undo.back()
        for arriving in out.rows:  # nobody leaves a collective behind
            arriving.wait()
        return out, update
    with watch.phase("collective"), job.engine.whole() if job.method.follows_weights else nullcontext():
        job.method.after_step(out, job.world)
    return out, update


def _lr_scale(job: Job, step: int) -> float:
    config, plan = job.settings, job.plan
    return lr_scale(config.optim, step, steps_per_epoch=plan.steps_per_epoch, epochs=config.run.epochs)


def fit(run: Run, stop_flag: StopFlag) -> None:
    """Every step from where the run stands to its last."""
    job, plan, config, observer = run.job, run.job.plan, run.job.settings.run, run.observer
    tally = Tally(job, config.log_every, observer.phases, observer.backlog)
    tally.restore(run.carried)
    watch = tally.watch
    if run.owes_validation:
        validate(run)
    batches = train_batches(job.dataset, plan, job.world, job.passes, run.step, observer.backlog)
    job.method.trainable.train()
    observer.begin()
    with closing(batches), observed(watch.waiting):
        while run.step < plan.n_steps:
            with watch.phase("data"):
                step, passes = next(batches)
            assert step == run.step, (step, run.step)
            with observer.flops.counted() if observer.flops.can_count else nullcontext():
                out, update = train_step(job, passes, watch)
            left_out = tally.add(passes, out, update)
            if not update.applied:
                skip(run, left_out)
            run.step += 1
            watch.lap()
            observer.step(run.step, sum(map(len, passes)))

            ended_epoch = run.step % plan.steps_per_epoch == 0
            checkpoint_due = run.step % (config.checkpoint_every or plan.steps_per_epoch) == 0
            run.carried = []
            if run.step % config.log_every == 0 or checkpoint_due or ended_epoch:
                look = ended_epoch or run.step % LOOK_EVERY < config.log_every
                reading = tally.read(stop_flag, memories=look)
                publish(run, reading)
                stop = reading.stop and run.step < plan.n_steps
            elif stop := tally.should_stop(run.step, stop_flag):
                run.carried = tally.carry()
            if ended_epoch and run.step // plan.steps_per_epoch % config.eval_every == 0:
                run.owes_validation = True
                if not stop:  # whoever asks for a stop does not wait for a long evaluation
                    validate(run)
            if checkpoint_due or stop:
                with watch.phase("checkpoint"):
                    save(run)
            if stop:
                raise run.stopped()
        run.saver.wait()


def skip(run: Run, words: str | None) -> None:
    """Count a step that was left out and say so, except for an overflow of float16, which is part of the trade."""
    run.skipped += 1
    run.observer.skipped()
    if words is not None:
        log.warning("%s", words)
        run.events.add("skipped", step=run.step, message=words)


def publish(run: Run, reading: Reading) -> None:
    """One line of metrics and of progress on the main rank; every rank notes the samples that it could not read."""
    run.note_unreadable()
    lr = run.job.settings.optim.lr * _lr_scale(run.job, run.step - 1)
    if run.job.world.is_main:
        saving = {"save": run.saver.seconds} if run.saver.seconds else {}
        run.record(
            samples=run.step * run.job.plan.global_batch,
            loss=reading.loss,
            parts=reading.parts,
            gauges=reading.gauges,
            lr=lr,
            grad_norm=reading.grad_norm,
            skipped=run.skipped,
            **({"replaced": reading.replaced} if reading.replaced else {}),
            timings=reading.timings | saving,
        )
    run.saver.seconds = 0.0
    run.observer.reading(run.step, reading, lr)
    if run.progress is not None:
        run.progress.update(run.step, loss=math.nan if reading.loss is None else reading.loss)


def validate(run: Run) -> None:
    """Score the validation split, remember the best student, tell the method."""
    run.owes_validation = False
    job, config = run.job, run.job.settings.eval
    with job.engine.whole():
        report = watched_score(run, "val")
        if report is None:
            return
        value = report.metrics.get(config.metric)
        if value is not None and value > run.best.value + config.min_gain:
            weights = job.method.student.state_dict() if job.world.is_main else {}
            run.best = Best(run.step, value, {name: tensor.detach().cpu().clone() for name, tensor in weights.items()})
    run.record(val=report.metrics)
    if run.progress is not None:
        run.progress.validated(config.metric, value)
    job.method.after_eval(report.metrics, job.world)


def watched_score(run: Run, split: Split) -> SplitReport | None:
    """`score`, told to whoever watches."""
    with run.observer.evaluating():
        report = score(run.job, split)
    if report is not None:
        run.observer.scored(split, report.metrics)
    return report


def score(job: Job, split: Split) -> SplitReport | None:
    """Evaluate the student as it stands; None where the fold has no such split."""
    if len(job.dataset.split_samples(split)) == 0:
        return None
    return evaluate(
        job.method.predict,
        job.method.trainable,
        job.dataset,
        split,
        job.settings.eval,
        micro_batch=job.settings.batch.per_rank(job.world),
        device=job.device,
        dtype=job.dtype,
        world=job.world,
    )


def save(run: Run) -> None:
    """A checkpoint of the run as it stands."""
    job = run.job
    meta = {
        "epoch": job.plan.epoch_of(run.step),
        "world_size": job.world.size,
        "samples_per_pass": samples_per_pass(job),
        "split_digest": job.split_digest,
        "data_digest": job.data_digest,
        "unreadable": sorted(job.dataset.unreadable.everywhere),
        "teacher": None if job.teacher is None else job.teacher.card["sha256"],
        "skipped": run.skipped,
        "owes_validation": run.owes_validation,
        "carried": run.carried,
        "config": job.settings.model_dump(mode="json"),
    }
    replicated = [job.method.state] if job.engine.sharded else [job.method.trainable, job.method.state]
    checkpoint.check_equal(replicated, run.step, job.world)
    entries = job.engine.entries() + checkpoint.state_entries(job.method.state)
    run.saver.save(run.step, entries, run.best, meta)


def finish(run: Run) -> None:
    """Put the selected weights into the student, export it, and score it on every split that was held out.

    Raises:
        TakenOverError: a later attempt has the run, and does all of this itself.
    """
    if not broadcast_object(run.is_current() if run.job.world.is_main else None, run.job.world):
        raise TakenOverError(f"another attempt of this run has taken over in {run.folder}; this one ends")
    with run.job.engine.whole():
        _finish(run)
    barrier(run.job.world)


def _finish(run: Run) -> None:
    job, settings = run.job, run.job.settings
    selected = "last"
    if settings.eval.select == "best" and run.best.step >= 0:
        selected = "best"
        weights = run.best.weights if job.world.is_main else None
        job.method.student.load_state_dict(_from_main(weights, job))
    run_name = settings.run.name
    about = {"method": settings.method.name, "fold": job.dataset.fold, "seed": settings.run.seed, "run": run_name}
    selection = {
        "selected": selected,
        "step": run.best.step if selected == "best" else run.step,
        "select_metric": settings.eval.metric if selected == "best" else None,
    }
    if job.world.is_main:
        trained_on = {"split_digest": job.split_digest, "shards": job.dataset.shard_set.place}
        write_export(
            run.folder / "export",
            job.method.student.state_dict(),
            config=settings.model,
            dataset=job.dataset,
            about={**about, "selection": selection, **trained_on},
        )
    held_out: tuple[Split, ...] = ("val", "test")
    for split in held_out:
        report = watched_score(run, split)
        if report is not None and job.world.is_main:
            write_report(run.folder, report, about | {"selection": selection})
            write_attention(
                run.folder,
                job.method.student,
                job.dataset,
                split,
                device=job.device,
                dtype=job.dtype,
                per_class=settings.eval.attention_samples,
            )
            if run.sinks is not None:
                run.sinks.score(run.step, split, report.metrics)
            if run.progress is not None:
                run.progress.scored(split, report.metrics, settings.eval.metric)


def _from_main(weights: dict[str, Tensor] | None, job: Job) -> dict[str, Tensor]:
    found = broadcast_object(weights, job.world)
    assert found is not None
    return found
