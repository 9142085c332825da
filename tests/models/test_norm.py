"""Batch norm over ranks against torch's own over the concatenated batch, in float64."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from distkd.base import InputSpec, World
from distkd.comm import world as comm
from distkd.errors import ShapeError
from distkd.models.build import EncoderConfig, ModelConfig, build
from distkd.models.ema import MeanTeacher
from distkd.models.norm import SyncBatchNorm, linear_before_norm, make_norm, set_world

SHAPES = [(12, 5), (12, 5, 3, 4), (12, 5, 2, 3, 2)]
PLAIN = {2: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}
NAMES = ["output", "grad_input", "grad_weight", "grad_bias", "running_mean", "running_var"]


def _values(
    shape: tuple[int, ...], *, mean: float = 2.0, std: float = 3.0, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator, dtype=torch.float64) * std + mean
    return x.to(dtype), torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def _randomise(layer: nn.Module) -> None:
    generator = torch.Generator().manual_seed(1)
    for tensor in layer.state_dict().values():
        if tensor.is_floating_point():
            tensor.copy_(torch.rand(tensor.shape, generator=generator, dtype=torch.float64) + 0.5)


def _pass(layer: nn.Module, x: Tensor, grad: Tensor) -> dict[str, Any]:
    """Everything a training pass through the layer leaves behind."""
    x = x.detach().requires_grad_()
    y = layer(x)
    y.backward(grad)
    found = (y.detach(), x.grad, layer.weight.grad, layer.bias.grad, layer.running_mean, layer.running_var)
    return dict(zip(NAMES, found, strict=True))


def _sync_pass(world: World, *, x: Tensor, grad: Tensor, sizes: list[int]) -> dict[str, Any]:
    layer = SyncBatchNorm(x.shape[1]).to(x.dtype)
    _randomise(layer)
    set_world(layer, world)
    before = comm.counts.copy()
    found = _pass(layer, x.split(sizes)[world.rank], grad.split(sizes)[world.rank])
    collectives = dict(comm.counts - before)
    return found | {"collectives": collectives, "batches": layer.state_dict()["num_batches_tracked"].item()}


def _reference(x: Tensor, grad: Tensor) -> dict[str, Any]:
    layer = PLAIN[x.dim()](x.shape[1]).to(x.dtype)
    _randomise(layer)
    return _pass(layer, x, grad)


def _assert_equal_to_torch(results: list[dict[str, Any]], x: Tensor, grad: Tensor, tolerance: float) -> None:
    expected = _reference(x, grad)
    merged = {name: torch.cat([found[name] for found in results]) for name in NAMES[:2]}
    merged |= {name: torch.stack([found[name] for found in results]).sum(dim=0) for name in NAMES[2:4]}
    for name, tensor in merged.items():
        torch.testing.assert_close(tensor, expected[name], atol=tolerance, rtol=tolerance)
    for found in results:  # running statistics: on every rank
        for name in NAMES[4:]:
            torch.testing.assert_close(found[name], expected[name], atol=tolerance, rtol=tolerance)
            assert torch.equal(found[name], results[0][name])
        assert found["batches"] == 1


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("sizes", [[6, 6], [11, 1], [3, 3, 3, 3], [1, 6, 2, 3]])
def test_equals_batch_norm_over_the_concatenated_batch(ranks, shape, sizes):
    x, grad = _values(shape)
    results = ranks(len(sizes)).run(_sync_pass, x=x, grad=grad, sizes=sizes)
    _assert_equal_to_torch(results, x, grad, 1e-12)


def test_one_value_per_rank_is_enough_where_there_are_several_ranks(ranks):
    x, grad = _values((2, 5))
    _assert_equal_to_torch(ranks(2).run(_sync_pass, x=x, grad=grad, sizes=[1, 1]), x, grad, 1e-12)


def test_takes_values_that_are_not_contiguous(ranks):
    x, grad = _values((8, 3, 4, 5))
    x, grad = x.contiguous(memory_format=torch.channels_last), grad.transpose(2, 3).contiguous().transpose(2, 3)
    _assert_equal_to_torch(ranks(2).run(_sync_pass, x=x, grad=grad, sizes=[3, 5]), x, grad, 1e-12)


def _steps(layer: nn.Module, batches: list[Tensor]) -> tuple[Tensor, Tensor]:
    for x in batches:
        layer(x)
    state = layer.state_dict()
    return state["running_mean"], state["running_var"]


def _sync_steps(world: World, *, batches: list[Tensor]) -> tuple[Tensor, Tensor]:
    layer = SyncBatchNorm(batches[0].shape[1]).double()
    set_world(layer, world)
    return _steps(layer, [x.chunk(world.size)[world.rank] for x in batches])


@pytest.mark.parametrize("size", [2, 4])
def test_running_statistics_equal_those_of_torch_after_many_steps(ranks, size):
    batches = [_values((8, 3), mean=mean)[0] for mean in (0.0, 50.0, -7.0, 3.0, 3.0)]
    expected = _steps(nn.BatchNorm1d(3).double(), batches)
    for found in ranks(size).run(_sync_steps, batches=batches):
        torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-12)


def _counts_by_phase(world: World) -> list[dict[str, int]]:
    layer, x = SyncBatchNorm(3), torch.randn(4, 3)
    set_world(layer, world)
    found = []

    def note() -> None:
        found.append(dict(comm.counts))
        comm.counts.clear()

    comm.counts.clear()
    y = layer(x.requires_grad_())
    note()
    y.sum().backward()
    note()
    layer(x.detach()).sum().backward()  # the first layer of a network: nobody asks for the gradient of its input
    note()
    with torch.no_grad():
        layer(x)
    note()
    layer.eval()(x).sum().backward()
    note()
    return found


def test_takes_one_collective_forward_and_one_backward(ranks):
    one, none = {"all_reduce_sum": 1}, {}
    assert ranks(1).run(_counts_by_phase) == [[none] * 5]
    assert ranks(2).run(_counts_by_phase) == [[one, one, one, one, none]] * 2


@pytest.mark.parametrize("mean", [0.0, 1e3])
def test_keeps_float32_digits_where_the_mean_is_far_from_zero(ranks, mean):
    x, grad = _values((64, 3, 4, 4), mean=mean, std=1.0, dtype=torch.float32)
    results = ranks(2).run(_sync_pass, x=x, grad=grad, sizes=[40, 24])
    expected = _reference(x.double(), grad.double())
    tolerance = 2e-6 + 1e-7 * mean  # the last digit of a value of 1000 is 6e-5
    for name in NAMES[:2]:
        found = torch.cat([part[name] for part in results]).double()
        torch.testing.assert_close(found, expected[name], atol=tolerance, rtol=0)
    torch.testing.assert_close(results[0]["running_var"].double(), expected["running_var"], atol=0, rtol=1e-6)


def test_takes_bfloat16_values_with_float32_weights(ranks):
    x, grad = _values((12, 5, 3, 4), dtype=torch.bfloat16)
    results = ranks(2).run(_sync_pass_mixed, x=x, grad=grad)
    output = torch.cat([found["output"] for found in results])
    assert output.dtype is torch.bfloat16
    expected = _reference(x.double(), grad.double())
    torch.testing.assert_close(output.double(), expected["output"], atol=0.03, rtol=0.02)
    assert results[0]["grad_weight"].dtype is torch.float32


def test_input_gradient_of_bfloat16_has_no_bias_where_the_mean_is_large(ranks):
    """A gradient sums to zero over the values of a channel; rounding the parts of its formula would not."""
    x, grad = _values((16, 4, 12, 12), mean=40.0, std=1.0, dtype=torch.bfloat16)
    results = ranks(2).run(_sync_pass_mixed, x=x, grad=(grad + 0.3 * (x - 40)))
    found = torch.cat([part["grad_input"] for part in results])
    assert found.dtype is torch.bfloat16
    assert found.double().mean(dim=(0, 2, 3)).abs().max().item() < 1e-3


def _sync_pass_mixed(world: World, *, x: Tensor, grad: Tensor) -> dict[str, Any]:
    layer = SyncBatchNorm(x.shape[1])
    _randomise(layer)
    set_world(layer, world)
    return _pass(layer, x.chunk(2)[world.rank], grad.chunk(2)[world.rank])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_is_torch_bit_for_bit_in_a_world_of_one(shape, dtype):
    x, grad = _values(shape, dtype=dtype)
    before = comm.counts.copy()
    found, expected = _sync_pass(World(), x=x, grad=grad, sizes=[len(x)]), _reference(x, grad)
    for name in NAMES:
        assert torch.equal(found[name], expected[name]), name
    assert comm.counts == before


def test_eval_uses_the_running_statistics_and_no_collective():
    layer = SyncBatchNorm(5).double()
    _randomise(layer)
    set_world(layer, World(0, 2))  # a collective would fail: there is no group
    plain = nn.BatchNorm1d(5).double()
    plain.load_state_dict(layer.state_dict())
    x, _ = _values((3, 5))
    assert torch.equal(layer.eval()(x), plain.eval()(x))


def test_set_world_reaches_every_layer_and_survives_a_copy():
    specs = {"path": InputSpec("image", (3, 64, 64)), "omic": InputSpec("vector", (7,))}
    encoders = {"omic": EncoderConfig(name="mlp", widths=(5, 4))}
    model = MeanTeacher(build(ModelConfig(modalities=["path", "omic"], encoders=encoders), specs, 3, seed=0), decay=0.9)
    set_world(model, World(1, 2))
    layers = [m for m in copy.deepcopy(model).modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert len(layers) == 20 + 1 + 3 + 2  # trunk, its head, mlp, fusion
    assert all(isinstance(layer, SyncBatchNorm) and layer.world == World(1, 2) for layer in layers)
    assert SyncBatchNorm(3).world == World()


@pytest.mark.parametrize("shape", [(1, 4), (1, 4, 1, 1)])
def test_refuses_one_value_per_channel(shape):
    with pytest.raises(
        ShapeError, match=r"needs at least 2 values per channel to train on, got shape \(1, 4"
    ) as caught:
        SyncBatchNorm(4)(torch.zeros(shape))
    assert "use a larger micro batch or model.norm=group" in str(caught.value)
    assert SyncBatchNorm(4).eval()(torch.zeros(shape)).shape == shape


def test_refuses_a_rank_without_values():
    layer = SyncBatchNorm(4)
    set_world(layer, World(1, 2))
    with pytest.raises(ShapeError, match=r"rank 1: .* needs at least 1 values per channel .* got shape \(0, 4\)"):
        layer(torch.zeros(0, 4))


def test_refuses_other_channels():
    with pytest.raises(ShapeError, match=r"batch norm of 4 channels got shape \(2, 3\)"):
        SyncBatchNorm(4)(torch.zeros(2, 3))


@pytest.mark.parametrize("channels", [3, 8, 16, 33, 64, 512])
def test_group_norm_has_groups_that_divide_the_channels(channels):
    layer = make_norm("group", channels, 2)
    assert isinstance(layer, nn.GroupNorm)
    assert channels % layer.num_groups == 0
    assert layer(torch.randn(1, channels, 2, 2)).shape == (1, channels, 2, 2)
    assert isinstance(make_norm("group", channels, 1), nn.LayerNorm)
    assert isinstance(make_norm("sync", channels, 1), SyncBatchNorm)


def test_group_norm_of_a_sample_does_not_see_the_others():
    layer, x = make_norm("group", 32, 2), torch.randn(5, 32, 4, 4, dtype=torch.float64)
    layer.double()
    torch.testing.assert_close(layer(x)[3:4], layer(x[3:4]), atol=1e-14, rtol=0)


def _bias_gradient(layer: nn.Linear, norm: nn.Module) -> Tensor:
    layer.bias.grad = None
    x = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))
    norm(layer(x)).pow(3).sum().backward()
    assert layer.bias.grad is not None
    return layer.bias.grad


@pytest.mark.parametrize(
    "copied", [lambda layer: layer, copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))]
)
def test_bias_before_batch_norm_has_a_gradient_of_exactly_zero_in_every_copy(copied):
    layer, norm = copied(linear_before_norm("sync", 3, 4)), make_norm("sync", 4, 1)
    plain = nn.Linear(3, 4)
    plain.load_state_dict(layer.state_dict())
    assert 0 < _bias_gradient(plain, norm).abs().max().item() < 1e-4  # what the zero stands in for is rounding
    assert torch.equal(_bias_gradient(layer, norm), torch.zeros(4))
    assert torch.equal(layer(torch.eye(3)), plain(torch.eye(3)))
    assert layer.weight.grad is not None
    assert layer.weight.grad.any()


def test_bias_before_batch_norm_has_its_gradient_in_eval_mode():
    layer, norm = linear_before_norm("sync", 3, 4).eval(), make_norm("sync", 4, 1).eval()
    assert _bias_gradient(layer, norm).all()


def test_bias_before_layer_norm_has_its_gradient():
    layer, norm = linear_before_norm("group", 3, 4), make_norm("group", 4, 1)
    assert _bias_gradient(layer, norm).all()


def test_linear_before_norm_starts_from_the_weights_of_a_plain_one():
    found = []
    for make in (
        nn.Linear,
        lambda i, o: linear_before_norm("sync", i, o),
        lambda i, o: linear_before_norm("group", i, o),
    ):
        torch.manual_seed(3)
        found.append(make(5, 4).state_dict())
    for state in found[1:]:
        assert all(torch.equal(state[name], tensor) for name, tensor in found[0].items())
