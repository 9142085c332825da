"""Trunks in stages, VGG16 among them, and what makes a feature of their maps."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from distkd.base import InputSpec
from distkd.errors import CheckpointError, ConfigError
from distkd.models.build import Classifier, EncoderConfig, ModelConfig, build, parameter_table
from distkd.models.cnn import CNN
from distkd.models.resnet import ResNet18
from distkd.models.trunk import ImageEncoder, Trunk
from distkd.models.vgg import VGG16
from distkd.models.weights import load_weights
from tests.models.common import make_batch

SPECS = {
    "tile": InputSpec("image", (3, 16, 16)),
    "omic": InputSpec("vector", (7,)),
    "near": InputSpec("image", (1, 9, 9)),
}
CONVOLUTIONS = (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)
WIDTHS = (64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512)


def _model(encoders: dict[str, dict[str, object]], **kwargs: object) -> Classifier:
    config = ModelConfig.model_validate(
        {"modalities": list(encoders), "encoders": encoders, "feature_dim": 5, **kwargs}
    )
    return build(config, SPECS, 3, seed=0).double()


# VGG16


@pytest.fixture(scope="module")
def vgg() -> VGG16:
    torch.manual_seed(0)
    trunk = VGG16(3)
    for layer in trunk.features:
        if isinstance(layer, nn.Conv2d):
            assert layer.bias is not None
            nn.init.normal_(layer.bias, std=0.1)
    return trunk


def test_vgg16_has_the_names_and_sizes_of_the_usual_weights_files(vgg):
    expected = {}
    for number, before, after in zip(CONVOLUTIONS, (3, *WIDTHS), WIDTHS, strict=False):
        expected[f"features.{number}.weight"] = (after, before, 3, 3)
        expected[f"features.{number}.bias"] = (after,)
    assert {name: tuple(p.shape) for name, p in vgg.state_dict().items()} == expected
    assert sum(p.numel() for p in vgg.parameters()) == 14_714_688
    model = build(ModelConfig(modalities=["tile"], encoders={"tile": EncoderConfig(name="vgg16")}), SPECS, 4, seed=0)
    assert parameter_table(model)[-1] == ("all", 14_714_688 + 512 * 4 + 4)


def test_vgg16_equals_a_plain_functional_form(vgg):
    """Thirteen convolutions, a ReLU after each but the last, a pool before numbers 5, 10, 17 and 24."""
    weights = vgg.state_dict()
    image = torch.randn(2, 3, 38, 33)
    x = image
    for number in CONVOLUTIONS:
        if number in (5, 10, 17, 24):
            x = nn.functional.max_pool2d(x, 2)
        x = nn.functional.conv2d(x, weights[f"features.{number}.weight"], weights[f"features.{number}.bias"], padding=1)
        x = x if number == 28 else x.relu()
    assert (x < 0).any()
    torch.testing.assert_close(vgg(image)[0], x, atol=0, rtol=0)
    assert x.shape == (2, 512, 2, 2)


def test_vgg16_gives_the_maps_of_the_card_at_512_px():
    x, shapes = torch.zeros(1, 3, 512, 512, device="meta"), []
    for stage in VGG16(3).to("meta").stages():
        x = stage(x)
        shapes.append(tuple(x.shape[1:]))
    assert shapes == [(64, 256, 256), (128, 128, 128), (256, 64, 64), (512, 32, 32), (512, 32, 32)]


def test_vgg16_is_the_same_in_training_and_evaluation(vgg):
    image = torch.randn(2, 3, 16, 16)
    assert torch.equal(vgg.train()(image)[0], vgg.eval()(image)[0])
    assert not list(vgg.buffers())


def _saved(state: dict[str, Tensor], path: Path) -> Path:
    if path.suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save(state, path)
    return path


@pytest.fixture
def imagenet(vgg) -> dict[str, Tensor]:
    """A state dict as the usual weights files hold it; its classifier is smaller than there."""
    heads = {f"classifier.{n}.{kind}": torch.ones(2) for n in (0, 3, 6) for kind in ("weight", "bias")}
    return {**vgg.state_dict(), **heads}


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize("name", ["tile", "near"])
def test_weights_of_vgg16_are_read_without_the_classifier(tmp_path, imagenet, suffix, name):
    path = _saved(imagenet, tmp_path / f"vgg16{suffix}")
    specs = {"tile": SPECS["tile"], "near": InputSpec("image", (1, 16, 16))}
    config = ModelConfig(modalities=[name], encoders={name: EncoderConfig(name="vgg16", weights=path)})
    trunk = build(config, specs, 3, seed=0).branch(name).trunk
    assert trunk is not None
    for key, tensor in trunk.state_dict().items():
        expected = imagenet[key]
        if key == "features.0.weight" and name == "near":
            expected = expected.sum(dim=1, keepdim=True)  # a grey image in all three channels gives the same values
        assert torch.equal(tensor, expected), key
    assert trunk.state_dict().keys() == {key for key in imagenet if key.startswith("features.")}


def test_weights_of_another_network_are_refused(tmp_path, imagenet):
    path = _saved(ResNet18(3).state_dict(), tmp_path / "resnet.pth")
    with pytest.raises(CheckpointError, match=r"resnet\.pth is not of a VGG16 with 3 input channels") as caught:
        load_weights(VGG16(3), path, name="VGG16", without=("classifier.",), key="model.encoders.tile.weights")
    assert str(caught.value) == (
        f"model.encoders.tile.weights: weights file {path} is not of a VGG16 with 3 input channels: it holds "
        "conv1.weight, bn1.weight, bn1.bias and 97 more; missing: features.0.weight, features.0.bias, "
        "features.2.weight and 23 more"
    )
    whole = _saved(imagenet, tmp_path / "vgg.pth")
    with pytest.raises(
        CheckpointError,
        match=r"2 input channels: features\.0\.weight is of shape \(64, 3, 3, 3\), expected \(64, 2, 3, 3\)$",
    ):
        load_weights(VGG16(2), whole, name="VGG16", without=("classifier.",))
    with pytest.raises(CheckpointError, match=r"it also holds classifier\.0\.weight, .* and 3 more$"):
        load_weights(VGG16(3), whole, name="VGG16")


def test_weights_that_were_saved_from_parallel_training_are_read(tmp_path, imagenet):
    wrapped = _saved({f"module.{name}": tensor for name, tensor in imagenet.items()}, tmp_path / "ddp.pth")
    trunk = VGG16(3)
    load_weights(trunk, wrapped, name="VGG16", without=("classifier.",))
    for name, tensor in trunk.state_dict().items():
        assert torch.equal(tensor, imagenet[name]), name
    some = _saved({"module.a": torch.ones(1), "b": torch.ones(1)}, tmp_path / "some.pth")
    with pytest.raises(CheckpointError, match=r"it holds module\.a, b; missing: features\.0\.weight"):
        load_weights(VGG16(3), some, name="VGG16")


def test_a_weights_file_that_is_none_is_named_with_its_key(tmp_path):
    def message(path: Path) -> str:
        encoder = EncoderConfig(name="vgg16", weights=path)
        with pytest.raises(CheckpointError) as caught:
            build(ModelConfig(modalities=["tile"], encoders={"tile": encoder}), SPECS, 3, seed=0)
        return str(caught.value)

    absent = tmp_path / "absent.pth"
    assert message(absent) == (
        f"model.encoders.tile.weights: weights file {absent} does not exist; make it as docs/models.md shows, or start "
        "from random weights with --model.encoders.tile.weights null"
    )
    assert message(tmp_path) == (
        f"model.encoders.tile.weights: weights file {tmp_path} is a folder; name the file in it"
    )


@pytest.mark.parametrize("level", [None, -2])
def test_the_size_of_a_map_is_known_without_computing_it(level):
    for trunk, shape in (
        (VGG16(3), (3, 33, 48)),
        (CNN(1, (4, 5), norm="sync"), (1, 7, 12)),
        (ResNet18(3), (3, 40, 64)),
    ):
        trunk.inner = level
        with torch.no_grad():
            last, inner = trunk.eval()(torch.zeros(1, *shape))
        assert trunk.train().map_size(shape) == tuple((last if inner is None else inner).shape[2:])
        assert trunk.training


def test_an_image_of_which_vgg16_leaves_nothing_is_refused():
    config = ModelConfig(modalities=["tile"], encoders={"tile": EncoderConfig(name="vgg16")})
    with pytest.raises(ConfigError) as caught:
        build(config, {"tile": InputSpec("image", (3, 15, 40))}, 3, seed=0)
    assert str(caught.value) == "model.encoders.tile: vgg16 needs images of at least 16 px, 'tile' has 15 x 40; use cnn"
    least = build(config, {"tile": InputSpec("image", (3, 16, 16))}, 3, seed=0)
    assert least(make_batch(SPECS, 1, dtype=torch.float32)).map_BKHW.shape == (1, 512, 1, 1)


# heads


@pytest.mark.parametrize("encoder", [{"name": "cnn", "head": "pooled", "widths": [4, 6]}, {"name": "vgg16"}])
def test_a_pooled_head_is_the_mean_of_the_map_and_one_linear_layer(encoder):
    model = _model({"tile": encoder})
    out = model(make_batch(SPECS, 3))
    branch = model.mapped
    assert branch is model.branch("tile")
    assert branch.trunk is not None
    places = out.map_BKHW.shape[2] * out.map_BKHW.shape[3]
    assert model.feature_dim == branch.feature_dim == branch.trunk.width == out.map_BKHW.shape[1]
    torch.testing.assert_close(out.feature_BD, out.map_BKHW.mean(dim=(2, 3)), atol=0, rtol=0)
    shares = torch.einsum("ck,bkhw->bchw", branch.classifier.weight, out.map_BKHW) / places
    logits = shares.sum(dim=(2, 3)) + branch.classifier.bias
    torch.testing.assert_close(out.logits_BC, logits, atol=1e-12, rtol=0)
    assert (out.map_BKHW < 0).any()
    assert (out.map_BKHW > 0).any()


@pytest.mark.parametrize(
    "name, head, pooled",
    [
        ("cnn", "auto", False),
        ("cnn", "pooled", True),
        ("resnet18", "auto", False),
        ("resnet18", "pooled", True),
        ("vgg16", "auto", True),
        ("vgg16", "projected", False),
    ],
)
def test_a_map_is_handed_out_where_the_head_is_pooled(name, head, pooled):
    model = _model({"tile": {"name": name, "head": head}})
    out = model(make_batch(SPECS, 2))
    assert (out.map_BKHW is not None) is (model.mapped is not None) is pooled
    assert out.inner_BKHW is None
    if not pooled:
        assert model.feature_dim == 5
        assert (out.feature_BD >= 0).all()


@pytest.mark.parametrize("fusion", ["gated_bilinear", "concat"])
def test_a_pooled_branch_of_another_width_is_fused(fusion):
    encoders = {"tile": {"name": "cnn", "head": "pooled", "widths": [4, 6]}, "omic": {"name": "mlp"}}
    model = _model(encoders, fusion=fusion)
    out = model(make_batch(SPECS, 4))
    assert [branch.feature_BD.shape[1] for branch in out.branches.values()] == [6, 5]
    assert out.feature_BD.shape == (4, model.feature_dim) == (4, 5)
    assert out.map_BKHW is None
    assert model.mapped is model.branch("tile")
    assert model.mapped_outputs(out) is out.branches["tile"]
    torch.stack([head.logits_BC.square().sum() for head in [out, *out.branches.values()]]).sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


def test_no_branch_is_the_mapped_one_where_none_or_several_are():
    pooled = {"name": "cnn", "head": "pooled"}
    assert _model({"tile": pooled, "near": pooled}).mapped is None
    assert _model({"tile": {"name": "cnn"}, "near": pooled}).mapped is not None
    flat = _model({"omic": {"name": "mlp"}})
    out = flat(make_batch(SPECS, 2))
    assert flat.mapped is None
    assert flat.mapped_outputs(out) is out


# earlier stages


@pytest.mark.parametrize(
    "make, size", [(lambda: CNN(3, (4, 6, 5), norm="sync"), 16), (lambda: ResNet18(3), 40), (lambda: VGG16(3), 33)]
)
@pytest.mark.parametrize("inner", [-2, -3])
def test_an_earlier_stage_is_handed_out(make, size, inner):
    trunk: Trunk = make().eval()
    x = torch.randn(2, 3, size, size)
    map_BKhw, kept = trunk(x)
    assert kept is None
    trunk.inner = inner
    again, kept = trunk(x)
    assert torch.equal(again, map_BKhw)
    assert kept is not None
    expected = x
    for stage in trunk.stages()[: inner + 1]:
        expected = stage(expected)
    assert torch.equal(kept, expected)
    torch.testing.assert_close(torch.autograd.grad(again.sum(), kept)[0].shape, kept.shape)


def test_a_graph_of_a_frozen_network_starts_at_the_inner_map_and_not_below():
    trunk = VGG16(3).eval().requires_grad_(False)
    trunk.inner = -2
    image = torch.randn(1, 3, 16, 16)
    with torch.no_grad():
        map_BKhw, kept = trunk(image)
    assert not map_BKhw.requires_grad
    assert not kept.requires_grad
    map_BKhw, kept = trunk(image)
    assert kept.is_leaf
    (gradient,) = torch.autograd.grad(map_BKhw.sum(), kept)
    assert gradient.any()
    assert not image.requires_grad
    assert all(p.grad is None for p in trunk.parameters())


def test_an_encoder_hands_the_inner_map_to_the_outputs():
    model = _model({"tile": {"name": "cnn", "head": "pooled", "widths": [4, 6]}})
    trunk = model.branch("tile").trunk
    assert trunk is not None
    trunk.inner = -2
    out = model(make_batch(SPECS, 2))
    assert out.inner_BKHW.shape == (2, 4, 8, 8)
    assert out.map_BKHW.shape == (2, 6, 4, 4)


def test_a_trunk_says_what_its_stages_are():
    with pytest.raises(NotImplementedError):
        Trunk()(torch.zeros(1, 3, 4, 4))
    assert ImageEncoder(VGG16(3), 7, norm="group").feature_dim == 7


# refusals


def _message(encoder: dict[str, object], name: str = "tile") -> str:
    with pytest.raises(ConfigError) as caught:
        _model({name: encoder})
    return str(caught.value)


def test_settings_of_another_encoder_are_refused():
    assert re.fullmatch(
        r"model\.encoders\.omic\.head=pooled is for images, 'omic' is a vector; leave it out",
        _message({"name": "mlp", "head": "pooled"}, "omic"),
    )
    assert "tile.widths: those of vgg16 are fixed; leave it out or use cnn" in _message(
        {"name": "vgg16", "widths": [3]}
    )
    assert "omic: vgg16 does not take a modality of kind vector; use mlp or snn" in _message({"name": "vgg16"}, "omic")
    for library, example in (("timm", "convnext_tiny"), ("monai", "densenet121")):
        assert f"tile: {library} needs the name of one of its networks; set backbone, such as {example}" in _message(
            {"name": library}
        )
        assert f"tile.widths: those of {library} are fixed" in _message(
            {"name": library, "backbone": example, "widths": [3]}
        )
    for name, chosen in (("auto", "cnn"), ("vgg16", "vgg16")):
        assert (
            f"tile.backbone=resnet50 is for timm and monai, not for {chosen}; set name=timm or name=monai, or leave it"
        ) in _message({"name": name, "backbone": "resnet50"})
