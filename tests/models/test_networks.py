"""The encoders and the projector, each by itself."""

from __future__ import annotations

import math
import pickle
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from distkd.errors import CheckpointError
from distkd.models.cnn import CNN
from distkd.models.dropout import KeyedAlphaDropout, dropout_keys
from distkd.models.heads import Projector, unit_rows
from distkd.models.mlp import MLP
from distkd.models.norm import SyncBatchNorm
from distkd.models.resnet import ResNet18
from distkd.models.snn import SNN
from distkd.models.trunk import ImageEncoder
from distkd.models.weights import load_weights


def _count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


# ResNet-18


@pytest.fixture(scope="module")
def imagenet() -> dict[str, torch.Tensor]:
    """A state dict as the usual weights files hold it: a trunk of 3 channels and a classifier of 1000 classes."""
    torch.manual_seed(0)
    trunk = ResNet18(3)
    for layer in trunk.modules():
        if isinstance(layer, SyncBatchNorm):
            assert layer.running_mean is not None
            nn.init.normal_(layer.running_mean)
    return {**trunk.state_dict(), "fc.weight": torch.zeros(1000, 512), "fc.bias": torch.zeros(1000)}


def test_resnet18_has_the_names_and_sizes_of_the_usual_weights_files():
    trunk = ResNet18(3)
    assert _count(trunk) == 11_176_512
    shapes = {name: tuple(p.shape) for name, p in trunk.state_dict().items()}
    assert shapes["conv1.weight"] == (64, 3, 7, 7)
    assert shapes["bn1.running_var"] == (64,)
    assert shapes["layer1.0.conv1.weight"] == (64, 64, 3, 3)
    assert shapes["layer2.0.downsample.0.weight"] == (128, 64, 1, 1)
    assert shapes["layer4.1.bn2.weight"] == (512,)
    assert not any(name.startswith("layer1.0.downsample") for name in shapes)
    assert len(shapes) == 120  # 122 of the usual file, less its classifier


def test_resnet18_equals_a_plain_functional_form(imagenet):
    """The network written out from the paper, on the same weights."""
    trunk = ResNet18(3).double().eval()
    trunk.load_state_dict({name: t for name, t in imagenet.items() if not name.startswith("fc.")})
    w = {name: t.double() for name, t in trunk.state_dict().items()}

    def norm(x, name):
        stats = (w[f"{name}.running_mean"], w[f"{name}.running_var"], w[f"{name}.weight"], w[f"{name}.bias"])
        return nn.functional.batch_norm(x, *stats)

    def block(x, name, stride):
        y = torch.relu(
            norm(nn.functional.conv2d(x, w[f"{name}.conv1.weight"], stride=stride, padding=1), f"{name}.bn1")
        )
        y = norm(nn.functional.conv2d(y, w[f"{name}.conv2.weight"], padding=1), f"{name}.bn2")
        if f"{name}.downsample.0.weight" in w:
            shortcut = nn.functional.conv2d(x, w[f"{name}.downsample.0.weight"], stride=stride)
            x = norm(shortcut, f"{name}.downsample.1")
        return torch.relu(x + y)

    image = torch.randn(2, 3, 70, 53, dtype=torch.float64)
    x = torch.relu(norm(nn.functional.conv2d(image, w["conv1.weight"], stride=2, padding=3), "bn1"))
    x = nn.functional.max_pool2d(x, 3, stride=2, padding=1)
    for layer in (1, 2, 3, 4):
        x = block(x, f"layer{layer}.0", 1 if layer == 1 else 2)
        x = block(x, f"layer{layer}.1", 1)
    torch.testing.assert_close(trunk(image)[0], x, atol=1e-10, rtol=1e-10)
    feature, map_BKHW, inner = ImageEncoder(trunk, None, norm="sync")(image)
    assert map_BKHW is not None
    assert inner is None
    torch.testing.assert_close(feature, nn.functional.adaptive_avg_pool2d(x, 1).flatten(1), atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("norm", ["sync", "group"])
@pytest.mark.parametrize("channels, size", [(1, 28), (3, 64)])
def test_resnet18_takes_grey_and_colour_images_of_any_size(norm, channels, size):
    encoder = ImageEncoder(ResNet18(channels, norm=norm), 16, norm=norm)
    feature, map_BKHW, _ = encoder(torch.randn(2, channels, size, size))
    assert map_BKHW is None  # the logits are no linear function of it
    assert feature.shape == (2, 16)
    assert (feature >= 0).all()


def test_weights_of_a_release_without_batch_counts_load(tmp_path, imagenet):
    old = {name: tensor for name, tensor in imagenet.items() if not name.endswith("num_batches_tracked")}
    assert len(old) == 102
    _load(trunk := ResNet18(3), _saved(old, tmp_path / "old.pth"))
    assert torch.equal(trunk.layer4.state_dict()["1.bn2.running_mean"], imagenet["layer4.1.bn2.running_mean"])


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_weights_are_read_without_their_classifier(tmp_path, imagenet, suffix):
    path = _saved(imagenet, tmp_path / f"weights{suffix}")
    _load(trunk := ResNet18(3), path)
    for name, tensor in trunk.state_dict().items():
        assert torch.equal(tensor, imagenet[name]), name


def test_grey_images_get_the_sum_of_the_channels(tmp_path, imagenet):
    path = _saved(imagenet, tmp_path / "weights.safetensors")
    colour, grey = ResNet18(3).eval(), ResNet18(1).eval()
    _load(colour, path)
    _load(grey, path)
    image = torch.randn(2, 1, 40, 40)
    torch.testing.assert_close(grey(image), colour(image.expand(-1, 3, -1, -1)), atol=1e-4, rtol=1e-4)


def _load(trunk: ResNet18, path: Path) -> None:
    load_weights(trunk, path, name="ResNet-18", without=("fc.",))


def _saved(state: dict[str, torch.Tensor], path: Path) -> Path:
    if path.suffix == ".safetensors":
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, path)
    else:
        torch.save(state, path)
    return path


class _Harmful:
    def __reduce__(self):
        return (print, ("code of a pickle ran",))


@pytest.mark.parametrize("save", [torch.save, lambda value, path: path.write_bytes(pickle.dumps(value))])
def test_a_pickle_that_could_run_code_is_refused(tmp_path, capsys, save):
    path = tmp_path / "weights.pth"
    save({"conv1.weight": _Harmful()}, path)
    with pytest.raises(CheckpointError, match=r"weights\.pth is not a plain state dict: .* is refused"):
        _load(ResNet18(3), path)
    assert "ran" not in capsys.readouterr().out


def test_bad_weights_files_are_told_apart(tmp_path, imagenet):
    def message(path: Path, channels: int = 3) -> str:
        with pytest.raises(CheckpointError) as caught:
            _load(ResNet18(channels), path)
        return str(caught.value)

    whole = _saved(imagenet, tmp_path / "whole.safetensors")
    words = "does not exist; make it as docs/models.md shows, or start from random weights without a file"
    for absent in ("none.safetensors", "none.pth"):
        assert message(tmp_path / absent) == f"weights file {tmp_path / absent} {words}"
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(whole.read_bytes()[:1000])
    assert "cannot be read, it may be cut short" in message(cut)
    other = _saved({"conv1.weight": torch.zeros(64, 3, 7, 7)}, tmp_path / "other.pth")
    assert "is not of a ResNet-18 with 3 input channels" in message(other)
    assert "is not of a ResNet-18 with 2 input channels" in message(whole, channels=2)
    with pytest.raises(CheckpointError, match=r"it also holds bn1\.running_mean, .* and \d+ more$") as caught:
        _load(ResNet18(3, norm="group"), whole)
    assert len(str(caught.value)) < 600  # the first few of the sixty names


@pytest.mark.parametrize(
    "content, words",
    [
        ([torch.zeros(1)], "does not hold a state dict of names and tensors, but a list"),
        ({"state_dict": {}, "epoch": 3}, "'state_dict' is a dict; save the state dict alone"),
        ({0: torch.zeros(1)}, "does not hold a state dict of names and tensors: 0 is a Tensor"),
    ],
)
def test_a_file_of_something_else_is_refused(tmp_path, content, words):
    torch.save(content, tmp_path / "weights.pth")
    with pytest.raises(CheckpointError, match=re.escape(words)):
        _load(ResNet18(3), tmp_path / "weights.pth")


@pytest.mark.parametrize("zipped", [True, False])
def test_a_damaged_file_is_refused_wherever_it_is_cut(tmp_path, zipped):
    path = tmp_path / "weights.pth"
    torch.save({"conv1.weight": torch.zeros(64, 3, 7, 7)}, path, _use_new_zipfile_serialization=zipped)
    whole, trunk = path.read_bytes(), ResNet18(3)
    for length in [0, 1, 10, *range(50, 1000, 50), len(whole) // 2, len(whole) - 1]:
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=r"weights\.pth (cannot be read|is not a plain state dict)"):
            _load(trunk, path)


def test_a_web_page_saved_as_weights_is_refused(tmp_path):
    path = tmp_path / "weights.pth"
    path.write_text("<html>not found</html>")
    with pytest.raises(CheckpointError, match=r"damaged, or a pickle .* fetch it again"):
        _load(ResNet18(3), path)


# small networks


def test_snn_has_the_layers_of_the_card():
    snn = SNN(80, (64, 48, 32), 128, dropout=0.1)
    assert _count(snn) + _count(nn.Linear(128, 3)) == 14_483
    linear = [layer for layer in snn.modules() if isinstance(layer, nn.Linear)]
    assert [(layer.in_features, layer.out_features) for layer in linear] == [(80, 64), (64, 48), (48, 32), (32, 128)]
    assert sum(isinstance(layer, nn.ELU) for layer in snn.modules()) == 4
    assert [layer.p for layer in snn.modules() if isinstance(layer, KeyedAlphaDropout)] == [0.1] * 4
    for layer in linear:
        assert not layer.bias.any()
        assert layer.weight.std().item() == pytest.approx(1 / math.sqrt(layer.in_features), rel=0.1)


def test_snn_equals_its_formula_in_eval_mode():
    snn = SNN(6, (5, 4), 3, dropout=0.1).double().eval()
    x = torch.randn(7, 6, dtype=torch.float64)
    expected = x
    for layer in snn.modules():
        if isinstance(layer, nn.Linear):
            expected = nn.functional.elu(expected @ layer.weight.T + layer.bias)
    torch.testing.assert_close(snn(x), expected.clamp_min(0), atol=1e-12, rtol=0)


@pytest.mark.parametrize("norm", ["sync", "group"])
@pytest.mark.parametrize("widths", [(), (8,), (8, 4)])
def test_mlp_takes_any_widths(norm, widths):
    mlp = MLP(5, widths, 6, norm=norm, dropout=0.3)
    with dropout_keys(torch.arange(4), "student"):
        feature = mlp(torch.randn(4, 5))
    assert feature.shape == (4, 6)
    assert (feature >= 0).all()


@pytest.mark.parametrize("norm", ["sync", "group"])
@pytest.mark.parametrize("size", [16, 17, 28, 40])
def test_cnn_takes_small_images_of_any_size(norm, size):
    feature, _, _ = ImageEncoder(CNN(1, (4, 8, 8), norm=norm), 6, norm=norm)(torch.randn(3, 1, size, size + 3))
    assert feature.shape == (3, 6)
    assert (feature >= 0).all()


# projector


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.float64, 1e-15)])
def test_projector_gives_unit_rows(dtype, tolerance):
    projector = Projector(6, 4).to(dtype)
    x = torch.randn(5, 6, dtype=dtype)
    z = projector(x)
    y = projector.linear(x)
    torch.testing.assert_close(z, y / y.square().sum(dim=1, keepdim=True).sqrt(), atol=tolerance, rtol=0)


def test_a_row_of_zeros_stays_zero_with_a_finite_gradient():
    x = torch.tensor([[0.0, 0.0], [3.0, 4.0], [3e-12, 4e-12]], requires_grad=True)
    z = unit_rows(x)
    torch.testing.assert_close(z, torch.tensor([[0.0, 0.0], [0.6, 0.8], [0.6, 0.8]]))
    z[:2].sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, torch.tensor([[1.0, 1.0], [0.032, -0.024], [0.0, 0.0]]))
