"""The update in each of its forms: they are one optimizer, and a checkpoint of one goes on with another."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from distkd import doctor
from distkd.base import World
from distkd.engines import DDPEngine, OptimConfig
from distkd.engines import optimizer as engines_optimizer
from distkd.engines.optimizer import find_apex, make_optimizer
from distkd.errors import CheckpointError, ConfigError
from tests.engines.test_ddp import CPU, Line, Single, batch_of, loss_of, saved, step
from tests.laws.common import equal_up_to

OPTIMS: dict[str, dict[str, Any]] = {
    "adam": {"name": "adam", "weight_decay": 0.1},
    "adamw": {"name": "adamw", "weight_decay": 0.1, "betas": [0.5, 0.9]},
    "sgd": {"name": "sgd", "betas": [0.0, 0.9]},
    "momentum": {"name": "sgd", "betas": [0.8, 0.9], "weight_decay": 0.1},
}


class FusedAdam(torch.optim.Optimizer):
    """What apex's does, as its documentation has it, a tensor at a time: one step counter for a group."""

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        bias_correction: bool = True,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        adam_w_mode: bool = True,
        weight_decay: float = 0.0,
    ):
        defaults = {"lr": lr, "bias_correction": bias_correction, "betas": betas, "eps": eps}
        super().__init__(params, {**defaults, "weight_decay": weight_decay})
        self.adam_w_mode = adam_w_mode

    @torch.no_grad()
    def step(self) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            lr, (beta1, beta2), decay = group["lr"], group["betas"], group["weight_decay"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                state, gradient = self.state[p], p.grad
                if not state:
                    state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
                if not self.adam_w_mode:
                    gradient = gradient + decay * p
                state["exp_avg"].lerp_(gradient, 1 - beta1)
                state["exp_avg_sq"].mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
                corrected = state["exp_avg"] / (1 - beta1 ** group["step"])
                root = (state["exp_avg_sq"] / (1 - beta2 ** group["step"])).sqrt()
                update = corrected / (root + group["eps"]) + (decay * p if self.adam_w_mode else 0)
                p -= lr * update


class FusedSGD(torch.optim.Optimizer):
    """What apex's does: a buffer for every parameter, with or without momentum."""

    def __init__(self, params: Any, lr: float, momentum: float = 0.0, weight_decay: float = 0.0):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                buffer = self.state[p].setdefault("momentum_buffer", torch.zeros_like(p))
                buffer.mul_(group["momentum"]).add_(p.grad + group["weight_decay"] * p)
                p -= group["lr"] * buffer


@pytest.fixture
def nvidia(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for NVIDIA's apex, and for a model on CUDA."""
    apex, optimizers = ModuleType("apex"), ModuleType("apex.optimizers")
    optimizers.FusedAdam, optimizers.FusedSGD = FusedAdam, FusedSGD  # type: ignore[attr-defined]
    apex.optimizers = optimizers  # type: ignore[attr-defined]
    for name, module in {"apex": apex, "apex.optimizers": optimizers, "amp_C": ModuleType("amp_C")}.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(engines_optimizer, "_on_cuda", lambda groups: True)


def engine_of(model: Line, **optim: Any) -> tuple[DDPEngine, Any]:
    engine = DDPEngine(OptimConfig(**{"lr": 0.1, **optim}), World(), device=CPU)
    groups = [{"params": list(part.parameters())} for part in (model.trunk, model.head)]
    return engine, engine.wrap(model, groups)


def steps(engine: DDPEngine, forward: Any, first: int, last: int) -> None:
    for number in range(first, last):
        engine.backward(loss_of(forward(batch_of(number).to(CPU, torch.float32))))
        engine.step(1.0)


# which one is made


@pytest.mark.parametrize("name", ["adam", "adamw", "sgd"])
@pytest.mark.parametrize("fused, expected", [("auto", True), ("torch", True), ("none", False)])
def test_fused_is_torchs_kernel_where_apex_is_not(name: str, fused: str, expected: bool):
    found = make_optimizer(OptimConfig(name=name, fused=fused), [{"params": Line().parameters()}], apex=True)  # type: ignore[arg-type]
    assert type(found).__name__.lower() == name
    assert [group["fused"] for group in found.param_groups] == [expected]
    assert [group["foreach"] for group in found.param_groups] == [False]


@pytest.mark.usefixtures("nvidia")
@pytest.mark.parametrize("fused", ["auto", "apex"])
@pytest.mark.parametrize("optim, kind", [("adam", FusedAdam), ("adamw", FusedAdam), ("momentum", FusedSGD)])
def test_apex_is_taken_where_it_is(optim: str, kind: type, fused: str):
    engine, _ = engine_of(Single(), **OPTIMS[optim], fused=fused)
    assert isinstance(engine.optimizer, kind)
    assert getattr(engine.optimizer, "adam_w_mode", None) == {"adam": False, "adamw": True}.get(optim)


@pytest.mark.usefixtures("nvidia")
@pytest.mark.parametrize("model, possible", [(Line, True), (Single, False)], ids=["float64", "another engine"])
def test_auto_takes_torch_where_apex_cannot_serve(model: Callable[[], Line], possible: bool):
    found = make_optimizer(OptimConfig(), [{"params": model().parameters()}], apex=possible)
    assert type(found) is torch.optim.Adam


# what is refused


def write_package(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (folder / "apex" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "apex" / name).write_text(text)


PACKAGES: dict[str, dict[str, str]] = {
    "absent": {},
    # the web toolkit imports its framework, which need not be there
    "toolkit": {"__init__.py": "from pyramid.config import Configurator\n", "forms.py": ""},
    "broken": {"__init__.py": "", "optimizers/__init__.py": "import amp_C\n"},
}


@pytest.mark.parametrize(
    "kind, words",
    [
        ("absent", "optim.fused=apex: NVIDIA apex is not installed; build it from github.com/NVIDIA/apex; or use"),
        ("toolkit", "`apex` that is installed is an unrelated web toolkit; pip uninstall apex, and build NVIDIA's"),
        ("broken", "extensions of the NVIDIA apex that is installed are missing or do not fit this torch; build it"),
    ],
)
def test_apex_is_found_or_its_absence_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, words: str):
    write_package(tmp_path, PACKAGES[kind])
    monkeypatch.syspath_prepend(tmp_path)
    assert find_apex() == kind
    with pytest.raises(ConfigError, match=words):
        engine_of(Single(), fused="apex")
    engine, _ = engine_of(Single(), fused="auto")
    assert type(engine.optimizer) is torch.optim.Adam


def test_a_build_that_does_not_load_is_told_from_the_web_toolkit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write_package(tmp_path, PACKAGES["broken"])
    (tmp_path / "amp_C.py").write_text("raise OSError('undefined symbol: _ZN3c104cuda')\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert find_apex() == "broken"


@pytest.mark.usefixtures("nvidia")
def test_apex_is_refused_where_it_cannot_serve(monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(ConfigError, match=r"apex knows no float64; use optim\.fused=torch, or engine\.precision=fp32"):
        engine_of(Line(), fused="apex")
    with pytest.raises(ConfigError, match=r"apex works with engine\.name=ddp only; use that, or optim\.fused=torch"):
        make_optimizer(OptimConfig(fused="apex"), [{"params": Single().parameters()}])
    monkeypatch.undo()
    monkeypatch.setattr(engines_optimizer, "find_apex", lambda: "nvidia")
    with pytest.raises(ConfigError, match=r"apex needs CUDA, and the model is not on it; use optim\.fused=auto or"):
        engine_of(Single(), fused="apex")


def test_the_doctor_says_what_the_engine_says(monkeypatch: pytest.MonkeyPatch):
    for kind, state in {"nvidia": "ok", "absent": "ok", "toolkit": "warn", "broken": "warn"}.items():
        monkeypatch.setattr(doctor, "find_apex", lambda kind=kind: kind)
        monkeypatch.setattr(doctor, "_version", lambda name, kind=kind: None if kind == "absent" else "0.9.10")
        (found,) = [check for check in doctor.checks() if check.name == "NVIDIA apex"]
        assert found.state == state, found
    assert "github.com/NVIDIA/apex" in found.fix
    assert "toolkit" not in found.found


# one optimizer in several forms


@pytest.mark.parametrize("optim", OPTIMS)
def test_all_forms_make_the_same_steps(nvidia: None, optim: str):
    weights: dict[str, dict[str, Tensor]] = {}
    for fused in ("none", "torch", "apex"):
        model = Single()
        engine, forward = engine_of(model, **OPTIMS[optim], fused=fused)
        steps(engine, forward, 0, 5)
        weights[fused] = model.state_dict()
    equal_up_to(weights["torch"], weights["none"], 1e-5)
    equal_up_to(weights["apex"], weights["none"], 1e-5)


@pytest.mark.parametrize("optim", OPTIMS)
@pytest.mark.parametrize("old", ["none", "torch", "apex"])
@pytest.mark.parametrize("new", ["none", "torch", "apex"])
def test_a_checkpoint_of_one_form_goes_on_with_another(nvidia: None, optim: str, old: str, new: str):
    whole, resumed = Single(), Single()
    engine, forward = engine_of(whole, **OPTIMS[optim], fused=old)
    steps(engine, forward, 0, 3)
    kept = saved(engine)
    steps(engine, forward, 3, 6)
    engine, forward = engine_of(resumed, **OPTIMS[optim], fused=new)
    engine.load(kept)
    again = saved(engine)
    assert again.keys() == kept.keys()
    for name, tensor in kept.items():
        assert torch.equal(again[name], tensor), name
        assert again[name].dtype == tensor.dtype, name
    steps(engine, forward, 3, 6)
    if old == new:
        assert all(torch.equal(tensor, resumed.state_dict()[name]) for name, tensor in whole.state_dict().items())
    equal_up_to(resumed.state_dict(), whole.state_dict(), 1e-5)


def test_names_and_fields_are_torchs_in_every_form(nvidia: None):
    found: list[list[str]] = []
    for fused in ("none", "torch", "apex"):
        engine, forward = engine_of(Single(), fused=fused)
        steps(engine, forward, 0, 2)
        kept = saved(engine)
        found.append(sorted(kept))
        assert kept["optimizer/head.bias/step"].item() == 2
    assert found[0] == found[1] == found[2]
    assert [name for name in found[0] if "trunk.weight" in name] == [
        "optimizer/trunk.weight/exp_avg",
        "optimizer/trunk.weight/exp_avg_sq",
        "optimizer/trunk.weight/step",
        "trainable/trunk.weight",
    ]


def test_a_step_is_read_when_the_entry_is(nvidia: None):
    engine, forward = engine_of(Single(), fused="apex")
    steps(engine, forward, 0, 1)
    entries = {entry.name: entry for entry in engine.entries()}
    steps(engine, forward, 1, 2)
    assert entries["optimizer/head.bias/step"].read().item() == 2


def test_parameters_that_count_apart_are_refused_by_apex(nvidia: None):
    engine, forward = engine_of(Single(), fused="torch")
    steps(engine, forward, 0, 2)
    kept = saved(engine)
    kept["optimizer/trunk.bias/step"] += 1
    engine, _ = engine_of(Single(), fused="apex")
    with pytest.raises(CheckpointError, match=r"made \[2, 3\] updates, and apex counts .* together; use optim\.fused"):
        engine.load(kept)


def test_state_is_kept_in_the_layout_of_the_weights():
    """The fused kernels walk parameter, gradient and state as they lie in memory."""
    model = Single()
    model.trunk.weight.data = model.trunk.weight.data.t().contiguous().t()
    engine, forward = engine_of(model)
    steps(engine, forward, 0, 1)
    kept = {name: tensor.contiguous() for name, tensor in saved(engine).items()}
    engine.load(kept)
    state = engine.optimizer.state[model.trunk.weight]
    assert state["exp_avg"].stride() == model.trunk.weight.stride() == (1, 4)
    assert torch.equal(state["exp_avg"], kept["optimizer/trunk.weight/exp_avg"])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_the_step_counter_is_beside_the_weights_on_cuda():
    model = Single().cuda()
    engine = DDPEngine(OptimConfig(fused="torch"), World(), device=torch.device("cuda"))
    forward = engine.wrap(model, [{"params": list(model.parameters())}])
    batch = batch_of(0).to(torch.device("cuda"), torch.float32)
    engine.backward(loss_of(forward(batch)))
    engine.step(1.0)
    engine.load(saved(engine))
    assert engine.optimizer.state[model.head.bias]["step"].is_cuda
    engine.backward(loss_of(forward(batch)))
    engine.step(1.0)
    assert saved(engine)["optimizer/head.bias/step"].item() == 2


def test_a_loaded_double_goes_on_bit_for_bit():
    """The counter too: it is float32 in every form."""
    engine, forward = engine_of(Line(), fused="none")
    step(engine, forward, 0)
    assert {t.dtype for name, t in saved(engine).items() if name.endswith("step")} == {torch.float32}
