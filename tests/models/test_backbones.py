"""Networks of timm and MONAI: their maps, the laws that are put on them, and the words of every refusal."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from distkd.base import InputSpec, World
from distkd.comm.world import all_reduce_sum
from distkd.errors import CheckpointError, ConfigError
from distkd.models import backbones
from distkd.models.backbones import Backbone, adopt
from distkd.models.build import Classifier, EncoderConfig, ModelConfig, build
from distkd.models.dropout import KeyedDropout
from distkd.models.norm import SyncBatchNorm, set_world
from distkd.models.trunk import chain
from tests.models.common import make_batch, rows_of
from tests.models.timm_stand_in import import_timm

SPECS = {"tile": InputSpec("image", (3, 32, 32))}
NO_TIMM = "timm is not installed: pip install --no-deps timm"
NETWORKS = [
    # library, name, map at 32 px, stages, parameters
    ("timm", "test_efficientnet", (256, 1, 1), 1, 99_196),
    ("timm", "test_convnext", (64, 1, 1), 1, 207_000),
    ("monai", "resnet18", (512, 2, 2), 5, 11_176_512),
    ("monai", "densenet121", (1024, 1, 1), 5, 6_953_856),
]


@pytest.fixture
def timm():
    if not import_timm():
        pytest.skip(NO_TIMM)
    return sys.modules["timm"]


def _built(library: str, name: str, spec: InputSpec = SPECS["tile"], *, seed: int = 0, **kwargs: object) -> Classifier:
    if library == "timm" and not import_timm():
        pytest.skip(NO_TIMM)
    norm = kwargs.pop("norm", "sync")
    encoder = {"name": library, "backbone": name, **kwargs}
    config = ModelConfig.model_validate({"modalities": ["tile"], "encoders": {"tile": encoder}, "norm": norm})
    return build(config, {"tile": spec}, 3, seed=seed)


def _trunk(model: Classifier) -> Backbone:
    trunk = model.branch("tile").trunk
    assert isinstance(trunk, Backbone)
    return trunk


def _message(library: str, name: str, spec: InputSpec = SPECS["tile"], **kwargs: object) -> str:
    with pytest.raises(ConfigError) as caught:
        _built(library, name, spec, **kwargs)
    return str(caught.value)


# networks of the libraries


@pytest.mark.parametrize("library, name, shape, stages, parameters", NETWORKS)
def test_a_backbone_hands_out_its_map_and_trains_every_parameter(library, name, shape, stages, parameters):
    torch.manual_seed(3)
    state = torch.get_rng_state()
    model = _built(library, name)
    out = model(make_batch(SPECS, 2, dtype=torch.float32))
    out.logits_BC.square().sum().backward()
    assert torch.equal(torch.get_rng_state(), state)
    assert out.map_BKHW.shape == (2, *shape)
    assert torch.equal(out.feature_BD, out.map_BKHW.mean(dim=(2, 3)))
    assert model.feature_dim == shape[0]
    trunk = _trunk(model)
    assert len(trunk.stages()) == stages
    assert sum(p.numel() for p in trunk.parameters()) == parameters
    assert [key for key, p in model.named_parameters() if p.grad is None] == []
    for layer in trunk.modules():
        assert not isinstance(layer, nn.modules.batchnorm._BatchNorm) or isinstance(layer, SyncBatchNorm)


@pytest.mark.parametrize("library, name", [network[:2] for network in NETWORKS[1:3]])
def test_initial_weights_follow_the_seed_and_all_weights_load_again(library, name, tmp_path):
    model = _built(library, name, seed=1, weights=None)
    state = torch.get_rng_state()
    other = _built(library, name, seed=2)
    assert torch.equal(torch.get_rng_state(), state)
    same = _built(library, name, seed=1).state_dict()
    assert all(torch.equal(tensor, same[key]) for key, tensor in model.state_dict().items())
    assert any(not torch.equal(tensor, same[key]) for key, tensor in other.state_dict().items())
    model.eval()(make_batch(SPECS, 2, dtype=torch.float32))
    encoder = model.config.encoders["tile"].model_copy(update={"weights": tmp_path / "gone.safetensors"})
    config = ModelConfig(**model.config.model_copy(update={"encoders": {"tile": encoder}}).model_dump(mode="json"))
    again = build(config, SPECS, 3, seed=9, pretrained=False)
    again.load_state_dict(model.state_dict())
    batch = make_batch(SPECS, 2, dtype=torch.float32)
    assert torch.equal(again.eval()(batch).logits_BC, model(batch).logits_BC)


def _differences(world: World, networks: list[tuple[str, str]]) -> dict[str, float]:
    """How far a pass of all ranks is from one of a single rank over the whole batch: outputs and gradients."""
    batch, found = make_batch(SPECS, 4), {}
    for library, name in networks:
        whole = _built(library, name).double()
        parts = copy.deepcopy(whole)
        set_world(parts, world)
        mine = torch.arange(4).chunk(world.size)[world.rank]
        logits = whole(batch).logits_BC
        out = parts(rows_of(batch, mine))
        (logits.square().sum() / 4).backward()
        (out.logits_BC.square().sum() / 4).backward()
        far = [(out.logits_BC - logits[mine]).abs().max().item()]
        for p, q in zip(parts.parameters(), whole.parameters(), strict=True):
            assert p.grad is not None
            assert q.grad is not None
            far.append((all_reduce_sum(p.grad, world) - q.grad).abs().max().item())
        far += [(a - b).abs().max().item() for a, b in zip(parts.buffers(), whole.buffers(), strict=True)]
        found[f"{library} {name}"] = max(far)
    return found


def test_outputs_and_gradients_of_backbones_are_equal_at_any_world_size(ranks):
    networks = [network[:2] for network in NETWORKS if network[0] == "monai" or import_timm()]
    for found in ranks(2).run(_differences, networks=networks):
        assert len(found) == len(networks)
        assert max(found.values()) < 1e-9, found


@pytest.mark.parametrize("name, stages", [("efficientnet-b0", 8), ("SEResNet50", 5)])
def test_other_families_of_monai_equal_their_own_forward_up_to_the_classifier(name, stages):
    trunk = _trunk(_built("monai", name)).eval()
    image = torch.randn(1, 3, 32, 32)
    map_BKhw, _ = trunk(image)
    torch.testing.assert_close(map_BKhw.mean(dim=(2, 3)), trunk.network(image), atol=1e-5, rtol=1e-5)
    assert len(trunk.stages()) == stages
    trunk.inner = -2
    assert trunk(image)[1].dim() == 4


@pytest.mark.parametrize("name", ["resnet18", "densenet121"])
def test_a_trunk_of_monai_equals_the_network_that_it_was_cut_from(name):
    from monai.networks import nets

    trunk = _trunk(_built("monai", name)).eval()
    kwargs = {"in_channels": 3, "out_channels": 4}
    if name == "resnet18":
        kwargs = {"n_input_channels": 3, "num_classes": 4, "bias_downsample": False}
    whole = getattr(nets, name)(spatial_dims=2, **kwargs).eval()
    missing, unexpected = whole.load_state_dict(trunk.network.state_dict(), strict=False)
    head = whole.fc if name == "resnet18" else whole.class_layers.out
    assert (len(missing), unexpected) == (2, [])
    image = torch.randn(2, 3, 32, 32)
    logits = head(trunk(image)[0].mean(dim=(2, 3)))
    torch.testing.assert_close(whole(image), logits, atol=1e-4, rtol=1e-4)


def test_a_trunk_of_timm_equals_the_features_of_the_network(timm):
    trunk = _trunk(_built("timm", "test_efficientnet")).eval()
    whole = timm.create_model("test_efficientnet", num_classes=0).eval()
    whole.load_state_dict(trunk.network.state_dict())
    image = torch.randn(2, 3, 40, 40)
    torch.testing.assert_close(trunk(image)[0], whole.forward_features(image), atol=1e-5, rtol=1e-5)


def test_maps_with_channels_last_are_turned(timm):
    model = _built("timm", "test_mambaout", InputSpec("image", (3, 64, 64)))
    trunk = _trunk(model)
    image = torch.randn(1, 3, 64, 64)
    map_BKhw = trunk(image)[0]
    assert map_BKhw.shape == (1, 64, 2, 2)
    assert torch.equal(map_BKhw, trunk.network.forward_features(image).permute(0, 3, 1, 2))


def test_networks_of_one_image_size_are_made_for_that_of_the_data(timm):
    model = _built("timm", "test_maxvit", InputSpec("image", (1, 64, 64)))
    assert model(make_batch({"tile": InputSpec("image", (1, 64, 64))}, 1, dtype=torch.float32)).map_BKHW.shape[2:] == (
        2,
        2,
    )


# weights from files


def test_weights_of_timm_are_read_without_their_classifier(timm, tmp_path):
    source = timm.create_model("test_convnext", num_classes=10)
    path = tmp_path / "convnext.safetensors"
    save_file(source.state_dict(), path)
    trunk = _trunk(_built("timm", "test_convnext", weights=path, norm="group"))  # has no batch norm
    expected = source.state_dict()
    assert {key for key in expected if key not in trunk.network.state_dict()} == {
        "head.norm.weight", "head.norm.bias", "head.fc.weight", "head.fc.bias",
    }  # fmt: skip
    for key, tensor in trunk.network.state_dict().items():
        assert torch.equal(tensor, expected[key]), key
    grey = _trunk(_built("timm", "test_convnext", InputSpec("image", (1, 32, 32)), weights=path)).eval()
    image = torch.randn(1, 1, 32, 32)
    torch.testing.assert_close(grey(image)[0], trunk.eval()(image.expand(-1, 3, -1, -1))[0], atol=1e-4, rtol=1e-4)
    with pytest.raises(
        CheckpointError, match=r"is not of a timm test_efficientnet with 3 input channels: .*; missing: "
    ):
        _built("timm", "test_efficientnet", weights=path)


def test_weights_of_monai_keep_their_batch_statistics(tmp_path):
    from monai.networks import nets

    source = nets.densenet121(spatial_dims=2, in_channels=3, out_channels=4)
    source.features.norm0.running_mean += 1
    path = tmp_path / "densenet.pth"
    torch.save(source.state_dict(), path)
    trunk = _trunk(_built("monai", "densenet121", weights=path))
    assert torch.equal(trunk.network.features.norm0.running_mean, source.features.norm0.running_mean)
    assert "tile.weights were trained with batch norm; set model.norm=sync, not group" in _message(
        "monai", "densenet121", weights=path, norm="group"
    )


# the laws, on a network made for it


class _Toy(nn.Module):
    def __init__(self, middle: nn.Module, channels: int = 3):
        super().__init__()
        self.conv = nn.Conv2d(channels, 8, 3, padding=1)
        self.middle = middle
        self.head = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2))


class _Random(nn.Module):
    def __init__(self, draw):
        super().__init__()
        self.draw = draw

    def forward(self, x: Tensor) -> Tensor:
        return self.draw(x)


class _DropPath(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.drop_prob = 0.5

    def forward(self, x: Tensor) -> Tensor:
        return x if self.drop_prob == 0 else x * torch.rand(()).round()


class _NormAct(nn.BatchNorm2d):
    def __init__(self) -> None:
        super().__init__(8)
        self.drop, self.act = nn.Identity(), nn.PReLU()

    def forward(self, input: Tensor) -> Tensor:
        return self.act(self.drop(super().forward(input)))


@pytest.fixture
def toy(monkeypatch):
    """`toy(middle)` makes a network with this layer in the middle known as `toy` of monai."""

    def register(middle: nn.Module) -> None:
        family = backbones._Family(
            ("toy",),
            lambda _, channels: _Toy(copy.deepcopy(middle), channels),
            lambda network: [chain((network.conv, network.middle))],
            "head.",
        )
        monkeypatch.setattr(backbones, "_FAMILIES", (family,))

    return register


@pytest.mark.parametrize("norm, kind", [("sync", SyncBatchNorm), ("group", nn.GroupNorm)])
@pytest.mark.parametrize("make", [lambda: nn.BatchNorm2d(8, 1e-3, 0.2), _NormAct])
def test_batch_norm_is_replaced_under_its_name_with_its_weights(toy, norm, kind, make):
    before = make()
    for p in before.parameters():
        nn.init.normal_(p)
    toy(before)
    layer = _trunk(_built("monai", "toy", norm=norm)).network.middle
    assert isinstance(layer, kind)
    kept = layer.state_dict()
    for name, tensor in before.state_dict().items():
        if norm == "sync" or name in ("weight", "bias", "act.weight"):
            assert torch.equal(kept.pop(name), tensor), name
    assert not kept
    if norm == "sync":
        assert (layer.eps, layer.momentum) == (before.eps, before.momentum)
        x = torch.randn(4, 8, 3, 3)
        for mode in (True, False):
            assert torch.equal(layer.train(mode)(x), before.train(mode)(x))
        assert torch.equal(layer.running_var, before.running_var)


def test_dropout_follows_the_keys_of_the_samples(toy):
    toy(nn.Dropout(0.5))
    model = _built("monai", "toy", norm="group")
    layer = _trunk(model).network.middle
    assert isinstance(layer, KeyedDropout)
    assert layer.p == 0.5
    assert layer.salt != KeyedDropout.salt
    batch, order = make_batch(SPECS, 4, dtype=torch.float32), torch.tensor([3, 1])
    out = model(batch).logits_BC
    torch.testing.assert_close(model(rows_of(batch, order)).logits_BC, out[order], atol=1e-6, rtol=0)


def test_stochastic_depth_has_rate_zero(toy):
    toy(_DropPath())
    assert _trunk(_built("monai", "toy")).network.middle.drop_prob == 0


def test_what_is_left_of_a_classifier_is_dropped(toy):
    toy(nn.ReLU())
    trunk = _trunk(_built("monai", "toy"))
    assert isinstance(trunk.network.head, nn.Identity)
    assert [name for name, _ in trunk.network.named_parameters()] == ["conv.weight", "conv.bias"]
    assert "head." in trunk.without


@pytest.mark.parametrize(
    "draw, operation",
    [
        (lambda x: x * torch.rand_like(x), "rand_like"),
        (lambda x: F.dropout2d(x, 0.1), "bernoulli_"),
        (lambda x: F.scaled_dot_product_attention(x, x, x, dropout_p=0.1), ""),
    ],
)
def test_a_network_that_draws_from_the_global_generator_is_refused(toy, draw, operation):
    toy(_Random(draw))
    message = _message("monai", "toy")
    assert "model.encoders.tile: monai toy draws from the global generator in training (" in message
    assert operation in message
    assert message.endswith("so ranks would not train one model; use another backbone")


def test_attention_without_dropout_is_no_draw(toy):
    toy(_Random(lambda x: F.scaled_dot_product_attention(x, x, x)))
    assert isinstance(_built("monai", "toy"), Classifier)


@pytest.mark.parametrize(
    "layer",
    [
        nn.BatchNorm2d(8, affine=False),
        nn.BatchNorm2d(8, track_running_stats=False),
        nn.BatchNorm2d(8, momentum=None),
        nn.InstanceNorm2d(8, affine=True, track_running_stats=True),
        nn.LazyBatchNorm2d(),
    ],
)
def test_batch_statistics_of_another_kind_are_refused(layer):
    with pytest.raises(
        ConfigError, match=f"a net has batch statistics that cannot be shared .* {type(layer).__name__}"
    ):
        adopt(nn.Sequential(layer), "sync", "a net")


def test_a_parameter_without_a_part_in_the_map_is_refused(toy):
    middle = nn.ReLU()
    middle.register_module("side", nn.Linear(2, 2))
    middle.register_parameter("spare", nn.Parameter(torch.ones(1)))
    toy(middle)
    # what ran stays where it is, though its parameter serves nothing; what did not run is dropped
    assert "monai toy has parameters that have no part in its map: network.middle.spare; use" in _message(
        "monai", "toy"
    )


def test_features_that_are_no_map_are_refused(toy):
    toy(nn.Flatten(2))
    assert _message("monai", "toy") == (
        "model.encoders.tile: monai toy makes no map of an image but features of shape (B, 8, 1024); use a "
        "convolutional network such as convnext_tiny or resnet50"
    )


def test_images_that_are_too_small_are_refused_with_a_size_that_is_not(toy):
    toy(nn.Sequential(nn.Conv2d(8, 8, 40), nn.Flatten(1), nn.Unflatten(1, (8, 25, 25))))
    message = _message("monai", "toy", InputSpec("image", (3, 8, 8)))
    assert message.startswith("model.encoders.tile: monai toy makes no map of images of 8 x 8 px: Calculated padded")
    assert message.endswith("; it takes 64 x 64 px")
    toy(nn.Conv2d(7, 7, 1))
    assert _message("monai", "toy").endswith("; use another backbone")


# refusals of names


def test_an_unknown_network_is_refused_with_close_names(timm):
    assert "tile.backbone: timm has no network 'resnet_50'; did you mean resnet50" in _message("timm", "resnet_50")
    assert "timm has no network 'hf-hub:timm/x'; timm.list_models() lists" in _message("timm", "hf-hub:timm/x")
    assert "timm makes no test_resnet.nope for images of shape (3, 32, 32): Invalid pretrained tag" in _message(
        "timm", "test_resnet.nope"
    )
    assert "timm test_vit makes no map of an image but features of shape (B, 5, 64)" in _message("timm", "test_vit")


def test_an_unknown_network_of_monai_is_refused_with_those_that_are():
    assert "tile.backbone: monai has no network 'densenet12'; did you mean densenet121" in _message(
        "monai", "densenet12"
    )
    assert "monai has no network 'unet'; it has resnet10, resnet18" in _message("monai", "unet")


def test_a_missing_timm_is_named_with_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    encoder = EncoderConfig(name="timm", backbone="resnet50")
    with pytest.raises(ConfigError, match=r"timm cannot be imported .*; pip install 'distkd\[timm\]', or use monai"):
        build(ModelConfig(modalities=["tile"], encoders={"tile": encoder}), SPECS, 3, seed=0)


def test_neither_library_nor_torchvision_is_imported_before_it_is_asked_for():
    code = (
        "import sys; from distkd.models.build import *; from distkd.base import InputSpec\n"
        "build(ModelConfig(modalities=['x']), {'x': InputSpec('image', (3, 64, 64))}, 2, seed=0)\n"
        "print(sorted({'timm', 'monai', 'torchvision'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parents[2], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
