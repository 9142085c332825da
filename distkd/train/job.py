"""A run put together from its settings: data, plan, teacher, method and engine, ready for the loop."""

from __future__ import annotations

import hashlib
import logging
import math
import os
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from distkd.base import Forward, World
from distkd.comm.world import broadcast_object, gather_objects
from distkd.data.config import DataConfig
from distkd.data.dataset import Dataset
from distkd.data.make import make_shards
from distkd.data.plan import Plan
from distkd.data.remote.store import RemoteStore
from distkd.data.remote.stream import StreamReader
from distkd.data.remote.transport import is_url
from distkd.data.scratch import open_copied
from distkd.data.shardset import ShardSet
from distkd.data.stream_plan import StreamPlan
from distkd.engines import Engine, make_engine
from distkd.errors import ConfigError, DataError, DistkdError
from distkd.machine import memory_bytes
from distkd.methods import Method, Setup, build
from distkd.models.build import Classifier
from distkd.models.norm import set_world
from distkd.train.export import Export, load_export
from distkd.train.folder import make_root
from distkd.train.settings import Settings
from distkd.train.undo import Undo

__all__ = [
    "Job",
    "assemble",
    "dataset_of",
    "device_of",
    "open_shards",
    "shards_folder",
    "split_digest",
    "teacher_folder",
]

log = logging.getLogger(__name__)


@dataclass(slots=True)
class Job:
    """Everything that the loop drives."""

    settings: Settings
    world: World
    device: torch.device
    dtype: torch.dtype
    dataset: Dataset
    plan: Plan | StreamPlan
    passes: int
    method: Method
    engine: Engine
    forward: Forward
    teacher: Export | None
    split_digest: str
    """Of the training samples; hashed once, every checkpoint carries it."""
    data_digest: str
    """Of the manifest; so does it."""
    maps: str = ""
    """Sizes of the maps that the method compares, in words; empty where it compares none."""
    undo: Undo | None = None
    """Where the engine may leave an update out."""
    before_update: Callable[[], None] = lambda: None
    """Waits for whoever still reads the weights."""


def device_of(settings: Settings, world: World) -> torch.device:
    """Where this rank computes.

    Raises:
        ConfigError: CUDA is asked for and missing, or there are fewer devices than local ranks.
    """
    wanted = settings.engine.device
    if wanted == "cpu" or (wanted == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ConfigError(
            "engine.device is cuda, but this torch finds no CUDA device; use cpu or auto, or see `distkd doctor`"
        )
    if world.local_rank >= torch.cuda.device_count():
        raise ConfigError(
            f"local rank {world.local_rank} has no device of its own: {torch.cuda.device_count()} CUDA devices here; "
            "start at most one rank per device"
        )
    torch.cuda.set_device(world.local_rank)
    torch.backends.cudnn.deterministic = True  # a resumed run ends bit for bit where it would have
    return torch.device("cuda", world.local_rank)


def open_shards(settings: Settings, world: World) -> ShardSet:
    """The shard set of the config, made first where `data.make` names a recipe and the folder is absent.

    Where `data.scratch` is set it is read from a copy there, for which ranks of a machine wait without a collective.
    """
    data = settings.data
    if data.shards is not None and is_url(data.shards):
        return _remote(data.shards, data)
    folder = shards_folder(settings)
    failure: DistkdError | None = None
    if data.make is not None and world.is_main and not (folder / "manifest.json").exists():
        try:
            make_root(settings.run.root)
            make_shards(data.make, folder)
        except DistkdError as error:
            failure = error
    failure = broadcast_object(failure, world)
    if failure is not None:
        raise failure
    if data.scratch is not None:
        return open_copied(folder, data.scratch, check=data.check, speaks=world.local_rank == 0)
    return ShardSet(folder, check=data.check)


def shards_folder(settings: Settings) -> Path:
    """Where the shard set lies, or is to be made; not for URLs.

    Raises:
        ConfigError: the config names none.
    """
    data = settings.data
    if data.shards is None and data.make is None:
        raise ConfigError("data.shards is missing; name a shard set, or a recipe with data.make")
    return settings.run.root / "shards" / str(data.make) if data.shards is None else Path(data.shards)


def _remote(url: str, data: DataConfig) -> ShardSet:
    cache = data.stream.cache or Path(tempfile.gettempdir()) / f"distkd-shards-{os.getuid()}"
    store = RemoteStore(url, cache, int(data.stream.cache_gib * (1 << 30)), ahead=data.stream.ahead)
    return StreamReader(store, check=data.check)


def split_digest(dataset: Dataset) -> str:
    """Digest of which samples are trained on: equal for two runs that may share a teacher."""
    key_of = dataset.shard_set.manifest.samples.key
    keys = sorted(key_of[sample] for sample in dataset.split_samples("train").tolist())
    return hashlib.sha256("\n".join(keys).encode()).hexdigest()


def _load_teacher(settings: Settings, needed: bool) -> Export | None:
    if not needed:
        if settings.teacher.export is not None:
            log.warning("method %s needs no teacher; teacher.export is not used", settings.method.name)
        return None
    if settings.teacher.export is None:
        raise ConfigError(
            f"method {settings.method.name!r} needs a teacher; set teacher.export to a run folder, or to the name of a "
            f"run below run.root={settings.run.root}"
        )
    return load_export(teacher_folder(settings))


def teacher_folder(settings: Settings) -> Path:
    """What `teacher.export` means: the path itself, or below `run.root` for a bare name that is no path from here."""
    assert settings.teacher.export is not None
    path = Path(settings.teacher.export)
    return settings.run.root / path if len(path.parts) == 1 and not path.exists() else path


def _check_teacher_task(teacher: Export, shards: ShardSet, degraded: Iterable[str]) -> None:
    """A teacher must know this task, and see only what this shard set has, or what is made of it."""
    card, manifest = teacher.card, shards.manifest
    if card["task"] != manifest.task or card["class_names"] != manifest.class_names:
        raise ConfigError(
            f"teacher {teacher.folder} was trained for task {card['task']!r} with classes {card['class_names']}, "
            f"this run has task {manifest.task!r} with classes {manifest.class_names}; name a teacher of this task"
        )
    absent = [name for name in teacher.config.modalities if name not in (*manifest.modalities, *degraded)]
    if absent:
        raise ConfigError(
            f"teacher {teacher.folder} sees {', '.join(map(repr, absent))}, but shard set {shards.place} has "
            f"{', '.join(sorted(manifest.modalities))}; name a teacher of these modalities, or shards that have all; a "
            "coarse copy that the teacher saw must stand in data.degraded here, too"
        )


def _check_teacher_data(teacher: Export, dataset: Dataset, trained_on: str) -> None:
    """A teacher must not know this fold's held-out patients, and must be shown what it was trained on."""
    if teacher.card["split_digest"] != trained_on:
        raise ConfigError(
            f"teacher {teacher.folder} was trained on other samples (fold {teacher.card['fold']} of "
            f"{teacher.card['shards']}) than this run trains on (fold {dataset.fold} of {dataset.shard_set.place}), so "
            "it may know the test patients; train the teacher on the same fold"
        )
    for name in teacher.config.modalities:
        was, now = (preprocess.inputs[name].looks for preprocess in (teacher.preprocess, dataset.preprocess))
        if was != now:
            raise ConfigError(
                f"teacher {teacher.folder} was trained on {name!r} as {was}, this run makes it {now}; "
                "set data.augment.crop, data.image_mean and data.image_std as the teacher's config has them"
            )


def _warn_of_scenes(dataset: Dataset, student: Classifier, teacher: Classifier, world: World) -> None:
    """Places of two pictures can be compared if both show one scene; a shard set does not tell."""
    names = [model.mapped_modality for model in (student, teacher)]
    sources = {dataset.preprocess.source(name) for name in names if name is not None}
    if world.is_main and len(sources) > 1:
        log.warning(
            "the student's map is of %s and the teacher's of %s, which are stored apart: they must show the same "
            "scene, place by place; a coarse copy of one image is made by data.degraded",
            *names,
        )


def _dataset(settings: Settings, shards: ShardSet, modalities: list[str]) -> Dataset:
    data = settings.data.model_copy(update={"views": max(settings.data.views, settings.method.views)})
    return Dataset(shards, data, modalities, settings.run.seed)


def dataset_of(settings: Settings, world: World, modalities: list[str]) -> Dataset:
    """The data of a run without the rest of it."""
    return _dataset(settings, open_shards(settings, world), modalities)


def assemble(settings: Settings, world: World) -> Job:
    """Build a run; the same initial weights, banks and plan on every rank.

    Raises:
        DistkdError: whatever is wrong with config, data or teacher, before any step is taken.

    Collectives: one broadcast, in which the other ranks wait while rank 0 makes missing shards, and one gather.
    """
    device = device_of(settings, world)
    passes = settings.batch.passes(world)
    dtype = torch.float64 if settings.engine.precision == "fp64" else torch.float32
    teacher = _load_teacher(settings, settings.method.needs_teacher)
    shards = open_shards(settings, world)
    modalities = list(settings.model.modalities)
    if teacher is not None:
        _check_teacher_task(teacher, shards, settings.data.degraded)
        modalities += [name for name in teacher.config.modalities if name not in modalities]
    dataset = _dataset(settings, shards, modalities)
    trained_on, data_digest = split_digest(dataset), _same_data(dataset, world)
    if teacher is not None:
        _check_teacher_data(teacher, dataset, trained_on)
    plan = _plan(settings, dataset)
    plan.local_slots(0, passes, world)  # whether it divides into these ranks is told now
    setup = Setup(
        model=settings.model,
        specs=dataset.input_specs,
        n_classes=dataset.n_classes,
        train_label_N=torch.from_numpy(np.asarray(dataset.train_label_N, dtype=np.int64)),
        seed=settings.run.seed,
        world=world,
        teacher=None if teacher is None else _teacher_model(teacher),
        dtype=dtype,
        memory_bytes=_memory_of(device, world),
    )
    method = build(settings.method, setup)
    maps = ""
    if settings.method.needs_maps and setup.teacher is not None:
        sizes = [" x ".join(map(str, model.map_size)) for model in (method.student, setup.teacher)]
        maps = f"student {sizes[0]}, teacher {sizes[1]}"
        _warn_of_scenes(dataset, method.student, setup.teacher, world)
    for part in (method.trainable, method.frozen, method.state):
        part.to(device)
        set_world(part, world)
    skip = settings.run.nonfinite == "skip"
    engine = make_engine(settings.engine, settings.optim, world, device=device, skip=skip)
    forward = engine.wrap(method.trainable, method.groups(), outside=method.outside)
    undo = Undo(method.trainable, method.state) if skip or settings.engine.precision == "fp16" else None
    return Job(
        settings=settings,
        world=world,
        device=device,
        dtype=dtype,
        dataset=dataset,
        plan=plan,
        passes=passes,
        method=method,
        engine=engine,
        forward=forward,
        teacher=teacher,
        split_digest=trained_on,
        data_digest=data_digest,
        maps=maps,
        undo=undo,
    )


def _same_data(dataset: Dataset, world: World) -> str:
    """The digest of the shard set, which must be one set on all nodes. One gather."""
    digests = gather_objects(dataset.digest, world)
    other = next((rank for rank, digest in enumerate(digests) if digest != digests[0]), None)
    if other is not None:
        raise DataError(
            f"rank {other} reads another shard set in {dataset.shard_set.place!r} than rank 0: the manifests differ; "
            "copy one set to all nodes"
        )
    return digests[0]


def _plan(settings: Settings, dataset: Dataset) -> Plan | StreamPlan:
    data, global_batch = settings.data, settings.batch.global_batch
    if data.streams:
        counts = [len(numbers) for numbers in dataset.samples_of_shards("train")]
        lanes, buffer = data.stream.lanes or math.gcd(global_batch, 64), data.stream.buffer
        return StreamPlan(counts, global_batch, settings.run.seed, settings.run.epochs, lanes, buffer)
    return Plan(
        n_samples=len(dataset.train_label_N),
        global_batch=global_batch,
        seed=settings.run.seed,
        epochs=settings.run.epochs,
        balance=data.balance,
        label_N=dataset.train_label_N,
    )


def _memory_of(device: torch.device, world: World) -> int:
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return memory_bytes() // world.local_size


def _teacher_model(export: Export) -> Classifier:
    model = export.load()
    model.role = "teacher"
    return model
