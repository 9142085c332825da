"""AT+: the attention head against its textbook form, what a teacher's graph keeps, and what native resolution saves.

Three parts, one line. *Head*: value and gradient of the attention loss from two maps; target: the textbook form, one
backward with a graph for each class and network as in the released code (card `inter-resolution-at-plus`, section 8),
takes at least four times as long as ours. The closed form left to autograd stands between; before that gradients are
compared in float64. *Stage*: the same loss one stage earlier, where class scores have to be differentiated, all classes
as one batch against one by one. *Kept*: bytes that autograd keeps of a teacher's forward and of the head. *Protocol*:
a VGG16 student of images at a fraction of the teacher's pixels a side (native) against one of images brought back to
the teacher's size (reference): training step (forward, losses with a known teacher, backward) and inference, in seconds
and in multiply-adds.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.common import compare, report
from distkd.base import Batch, InputSpec, World
from distkd.comm.roots import global_roots
from distkd.models.build import Classifier, EncoderConfig, ModelConfig, build
from distkd.models.vgg import VGG16
from distkd.ops import attention
from distkd.ops.kd import labelled_cross_entropy

CLASSES, FACTORS = 4, (2, 4, 8)
Maps = Callable[[Tensor, Tensor], Tensor]


@dataclass
class Head:
    """Two networks' last maps and linear layers."""

    maps: dict[str, Tensor]
    weights: dict[str, Tensor]
    bias: Tensor

    def logits(self, side: str) -> Tensor:
        return self.maps[side].mean(dim=(2, 3)) @ self.weights[side].T + self.bias


def draw_head(batch: int, channels: int, side: int, device: torch.device, dtype: torch.dtype) -> Head:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(device, dtype).requires_grad_()

    maps = {name: draw(batch, channels, side, side) for name in ("student", "teacher")}
    return Head(maps, {name: draw(CLASSES, channels) for name in maps}, draw(CLASSES))


def textbook_maps(head: Head, side: str) -> Tensor:
    logits, map_BKHW = head.logits(side), head.maps[side]
    found: list[Tensor] = []
    for c in range(CLASSES):
        (slope,) = torch.autograd.grad(logits[:, c].sum(), map_BKHW, create_graph=True)
        found.append((slope.mean(dim=(2, 3), keepdim=True) * map_BKHW).relu().sum(dim=1))
    return torch.stack(found, dim=1)


def textbook(head: Head) -> Tensor:
    scaled: list[Tensor] = []
    for side in ("student", "teacher"):
        flat = textbook_maps(head, side).flatten(1)
        low, high = flat.min(dim=1, keepdim=True).values, flat.max(dim=1, keepdim=True).values
        scaled.append((flat - low) / (high - low))
    return (scaled[0] - scaled[1].detach()).square().mean(dim=1).sqrt().mean()


def by_maps(head: Head, maps: Maps) -> Tensor:
    with torch.no_grad():
        teacher = attention.normalised(maps(head.maps["teacher"], head.weights["teacher"]))
    student = attention.normalised(maps(head.maps["student"], head.weights["student"]))
    return attention.map_distance(student, teacher)


def plain_closed_form(map_BKHW: Tensor, weight_CK: Tensor) -> Tensor:
    flat_BKN, weight_BCK = map_BKHW.flatten(2), weight_CK.expand(len(map_BKHW), -1, -1)
    above = torch.bmm(weight_BCK.clamp(min=0), flat_BKN.clamp(min=0))
    below = torch.bmm(weight_BCK.clamp(max=0), flat_BKN.clamp(max=0))
    return ((above + below) / flat_BKN.shape[2]).unflatten(2, map_BKHW.shape[2:])


FORMS: dict[str, Callable[[Head], Tensor]] = {
    "ours": lambda head: by_maps(head, attention.class_maps),
    "closed_form_by_autograd": lambda head: by_maps(head, plain_closed_form),
    "textbook": textbook,
}


def gradients(head: Head, form: Callable[[Head], Tensor]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(form(head), [head.maps["student"], head.weights["student"]])


def differences(head: Head) -> dict[str, float]:
    """Largest difference of a gradient from the textbook's, relative to the largest gradient."""
    expected = gradients(head, textbook)
    largest = max(gradient.abs().max().item() for gradient in expected)
    found = {name: gradients(head, form) for name, form in FORMS.items() if name != "textbook"}
    return {
        name: max((a - b).abs().max().item() for a, b in zip(ours, expected, strict=True)) / largest
        for name, ours in found.items()
    }


def kept_bytes(forward: Callable[[], Any], known: list[Tensor]) -> int:
    """Bytes that autograd keeps for a backward beyond tensors that live anyway, each storage once."""
    there = {x.untyped_storage().data_ptr() for x in known}
    found: dict[int, int] = {}
    alive: list[Any] = []  # else an address is used again

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in there:
            found[storage.data_ptr()] = storage.nbytes()
            alive.append(storage)
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        alive.append(forward())
    return sum(found.values())


# one stage earlier


def stage_step(rest: nn.Module, map_BKHW: Tensor, teacher: Tensor, weight: nn.Linear, *, batched: bool) -> None:
    logits = weight(rest(map_BKHW).mean(dim=(2, 3)))
    if batched:
        slopes = attention.class_slopes(logits, map_BKHW, create_graph=True)
    else:
        rows = [torch.autograd.grad(logits[:, c].sum(), map_BKHW, create_graph=True)[0] for c in range(CLASSES)]
        slopes = torch.stack([row.sum(dim=(2, 3)) for row in rows], dim=1)
    maps = attention.normalised(attention.class_maps(map_BKHW, slopes))
    loss = attention.map_distance(maps, teacher) + logits.square().mean()
    torch.autograd.grad(loss, [map_BKHW, *rest.parameters(), weight.weight])


def stage_sides(size: int, device: torch.device) -> dict[str, Callable[[], None]]:
    """The last block of VGG16 on the map before it, of one image."""
    layers = list(VGG16().features)
    rest = nn.Sequential(*layers[24:]).to(device)
    head = nn.Linear(512, CLASSES).to(device)
    generator = torch.Generator().manual_seed(0)
    map_BKHW = torch.randn(1, 512, size // 16, size // 16, generator=generator).relu().to(device).requires_grad_()
    teacher = torch.rand(1, CLASSES, size // 16, size // 16, generator=generator).to(device)

    def side(batched: bool) -> Callable[[], None]:
        return lambda: stage_step(rest, map_BKHW, teacher, head, batched=batched)

    return {"batched": side(True), "one_by_one": side(False)}


# native and reference


@dataclass
class Student:
    """A VGG16 of images of some size, and what its teacher said at full size."""

    model: Classifier
    batch: Batch
    teacher_map: Tensor
    teacher_maps: Tensor

    def train(self) -> None:
        self.model.zero_grad()
        out = self.model(self.batch)
        assert out.map_BKHW is not None
        size = self.teacher_map.shape[2], self.teacher_map.shape[3]
        maps = attention.class_maps(out.map_BKHW, self.model.classifier.weight)
        seen = attention.map_distance(attention.normalised(attention.upsampled(maps, size)), self.teacher_maps)
        difference = attention.upsampled(out.map_BKHW, size) - self.teacher_map
        features = global_roots({"features": (difference.square().sum(), difference.numel())}, World())["features"]
        (labelled_cross_entropy(out.logits_BC, self.batch.label_B) + 10 * seen + 0.1 * features).backward()

    def predict(self) -> None:
        with torch.no_grad():
            self.model(self.batch)


def make_student(size: int, teacher_size: int, batch: int, device: torch.device) -> Student:
    config = ModelConfig(modalities=["coarse"], encoders={"coarse": EncoderConfig(name="vgg16")})
    model = build(config, {"coarse": InputSpec("image", (3, size, size))}, CLASSES, seed=0).to(device)
    generator, number = torch.Generator().manual_seed(0), torch.arange(batch)
    image = torch.rand(batch, 3, size, size, generator=generator)
    found = Batch(
        views=({"coarse": image},),
        present={"coarse": torch.ones(batch, dtype=torch.bool)},
        label_B=number % CLASSES,
        index_B=number,
        sample_B=number,
        key_B=number,
    )
    places = teacher_size // 16
    map_BKHW = torch.randn(batch, 512, places, places, generator=generator).to(device)
    maps = attention.normalised(attention.class_maps(map_BKHW, model.classifier.weight.detach()))
    return Student(model, found.to(device, torch.float32), map_BKHW, maps)


def teacher_bytes(size: int, batch: int, device: torch.device) -> dict[str, int]:
    """What a teacher's forward keeps with a graph, as in the released code, and frozen with its graph off."""
    student = make_student(size, size, batch, device)
    model = student.model
    known = [*model.parameters(), student.batch.inputs["coarse"]]
    found = {"with_graph": kept_bytes(lambda: model(student.batch), known)}
    model.requires_grad_(False)
    with torch.no_grad():
        found["ours"] = kept_bytes(lambda: model(student.batch), known)
    return found


def multiply_adds(step: Callable[[], None]) -> int:
    with FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops() // 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=4, help="samples of the head")
    parser.add_argument("--channels", type=int, default=512)
    parser.add_argument("--side", type=int, default=32, help="places of a map a side")
    parser.add_argument("--repeats", type=int, default=15, help="of the head; of the networks a fifth")
    parser.add_argument("--size", type=int, default=256, help="pixels of the teacher a side")
    parser.add_argument("--images", type=int, default=1, help="samples of a student's step")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    key = "wall_s" if device.type == "cuda" else "least_processor_s"
    shape = (arguments.batch, arguments.channels, arguments.side, device)
    exact, head = draw_head(*shape, torch.float64), draw_head(*shape, torch.float32)
    few = max(1, arguments.repeats // 5)

    def of_head(form: Callable[[Head], Tensor]) -> Callable[[], Any]:
        return lambda: gradients(head, form)

    about: dict[str, Any] = {
        "head": {"batch": arguments.batch, "channels": arguments.channels, "side": arguments.side},
        "relative_gradient_difference": differences(exact),
    }
    sides = compare({name: of_head(form) for name, form in FORMS.items()}, repeats=arguments.repeats)
    ratios = {f"{name} / ours": sides[name][key] / sides["ours"][key] for name in FORMS if name != "ours"}
    known = [*head.maps.values(), *head.weights.values(), head.bias]
    about["head_kept_mib"] = {
        name: round(kept_bytes(lambda f=form: f(head), known) / 2**20, 3) for name, form in FORMS.items()
    }

    stage = compare(stage_sides(arguments.size, device), repeats=few, warmup=1)
    ratios["stage -2: one_by_one / batched"] = stage["one_by_one"][key] / stage["batched"][key]
    sides |= {f"stage -2: {name}": figures for name, figures in stage.items()}

    kept = teacher_bytes(arguments.size, 2, device)
    about["teacher_kept_mib"] = {name: round(n / 2**20, 1) for name, n in kept.items()}

    sizes = {"reference": arguments.size, **{f"native {f}": arguments.size // f for f in FACTORS}}
    students = {name: make_student(size, arguments.size, arguments.images, device) for name, size in sizes.items()}
    about |= {"size": arguments.size, "images": arguments.images}
    for what in ("train", "predict"):
        steps = {name: getattr(student, what) for name, student in students.items()}
        counts = {name: multiply_adds(step) for name, step in steps.items()}
        found = compare(steps, repeats=few, warmup=1)
        sides |= {f"{what}: {name}": figures for name, figures in found.items()}
        for name in list(steps)[1:]:
            ratios[f"{what}: reference / {name}"] = found["reference"][key] / found[name][key]
            ratios[f"{what}: multiply-adds, reference / {name}"] = counts["reference"] / counts[name]
    report("attention", sides, ratios, **about)


if __name__ == "__main__":
    main()
