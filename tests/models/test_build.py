"""From config to classifier: sizes of the card, structure, seeds, and the words of every refusal."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from distkd.base import InputSpec, World
from distkd.errors import CheckpointError, ConfigError, ShapeError
from distkd.models.build import Branch, Classifier, EncoderConfig, ModelConfig, build, parameter_table
from distkd.models.cnn import CNN
from distkd.models.dropout import KeyedDropout
from distkd.models.fusion import ConcatFusion, GatedBilinearFusion
from distkd.models.mlp import MLP
from distkd.models.norm import set_world
from distkd.models.resnet import ResNet18
from distkd.models.snn import SNN
from distkd.models.trunk import ImageEncoder
from tests.models.common import make_batch, rows_of

PATH, OMIC = InputSpec("image", (3, 512, 512)), InputSpec("vector", (80,))
SMALL = {"tile": InputSpec("image", (1, 16, 16)), "omic": InputSpec("vector", (7,)), "note": InputSpec("vector", (4,))}
TINY = {"tile": EncoderConfig(name="cnn", widths=(4, 6)), "omic": EncoderConfig(name="snn", widths=(6,))}


def _small(modalities: list[str], seed: int = 0, **kwargs: object) -> Classifier:
    encoders = {name: TINY[name] for name in modalities if name in TINY}
    config = ModelConfig.model_validate(
        {"modalities": modalities, "encoders": encoders, "feature_dim": 5, "dropout": 0.3, **kwargs}
    )
    return build(config, SMALL, 3, seed=seed).double()


# the networks of the card


def test_networks_have_the_parameters_of_the_card():
    encoders = {"path": EncoderConfig(name="resnet18"), "omic": EncoderConfig(name="snn")}
    config = ModelConfig(modalities=["path", "omic"], encoders=encoders, detach_branches=True)
    teacher = build(config, {"path": PATH, "omic": OMIC}, 3, seed=0)
    assert dict(parameter_table(teacher)) == {
        "path": 11_242_819,
        "omic": 14_483,
        "fusion": 6_407_808,
        "fused head": 387,
        "all": 17_665_497,
    }
    student = build(ModelConfig(modalities=["path"]), {"path": PATH}, 3, seed=0)
    assert parameter_table(student) == [("path", 11_242_819), ("all", 11_242_819)]
    snn = build(ModelConfig(modalities=["omic"], encoders={"omic": encoders["omic"]}), {"omic": OMIC}, 3, seed=0)
    assert not snn.classifier.bias.any()  # the head of the genomic network starts like its layers


@pytest.mark.parametrize(
    "spec, encoder",
    [
        (InputSpec("vector", (9,)), MLP),
        (InputSpec("image", (1, 28, 28)), CNN),
        (InputSpec("image", (3, 63, 200)), CNN),
        (InputSpec("image", (3, 64, 64)), ResNet18),
    ],
)
def test_the_default_encoder_fits_the_input(spec, encoder):
    model = build(ModelConfig(modalities=["x"]), {"x": spec}, 2, seed=0)
    found = model.branch("x").encoder
    assert isinstance(found.trunk if isinstance(found, ImageEncoder) else found, encoder)


@pytest.mark.parametrize(
    "modalities, fusion, expected",
    [
        (["tile", "omic"], "auto", GatedBilinearFusion),
        (["omic", "tile"], "auto", GatedBilinearFusion),
        (["omic", "note"], "auto", ConcatFusion),
        (["omic", "note"], "gated_bilinear", GatedBilinearFusion),
        (["tile", "omic"], "concat", ConcatFusion),
        (["tile", "omic", "note"], "auto", ConcatFusion),
    ],
)
def test_the_default_fusion_fits_the_modalities(modalities, fusion, expected):
    assert isinstance(_small(modalities, fusion=fusion).fusion, expected)


# outputs


def test_one_modality_gives_feature_and_logits():
    model = _small(["omic"])
    out = model(make_batch(SMALL, 6))
    assert (out.feature_BD.shape, out.logits_BC.shape, out.branches) == ((6, 5), (6, 3), {})
    assert torch.equal(model.classifier(out.feature_BD), out.logits_BC)
    assert (model.feature_dim, model.n_classes, model.modalities) == (5, 3, ["omic"])
    assert (out.feature_BD >= 0).all()
    assert isinstance(model.branches["omic"].encoder, SNN)
    assert {id(p) for p in model.branch_parameters("omic")} == {id(p) for p in model.parameters()}


@pytest.mark.parametrize("modalities", [["tile", "omic"], ["tile", "omic", "note"]])
def test_several_modalities_give_a_branch_each_and_a_fused_head(modalities):
    model = _small(modalities)
    batch = make_batch(SMALL, 6)
    out = model(batch)
    assert list(out.branches) == modalities
    assert torch.equal(model.classifier(out.feature_BD), out.logits_BC)
    for name, branch in out.branches.items():
        part = model.branches[name]
        assert isinstance(part, Branch)
        alone = part.classifier(branch.feature_BD)
        assert torch.equal(branch.logits_BC, alone)
        assert branch.feature_BD.shape == (6, 5)


@pytest.mark.parametrize("fusion", ["gated_bilinear", "concat"])
def test_an_absent_modality_counts_as_zeros_in_the_fusion(fusion):
    model = _small(["tile", "omic"], fusion=fusion).eval()
    batch = make_batch(SMALL, 4, present={"omic": torch.tensor([True, False, True, False])})
    out = model(batch)
    features = [out.branches["tile"].feature_BD, out.branches["omic"].feature_BD.clone()]
    features[1][[1, 3]] = 0
    assert model.fusion is not None
    torch.testing.assert_close(out.feature_BD, model.fusion(features), atol=0, rtol=0)
    batch.inputs["omic"][[1, 3]] += 1.0
    assert torch.equal(model(batch).logits_BC, out.logits_BC)


@pytest.mark.parametrize("name", ["tile", "omic"])
@pytest.mark.parametrize("detach", [True, False])
def test_the_fused_loss_reaches_the_encoders_only_where_branches_are_not_detached(detach, name):
    model = _small(["tile", "omic"], detach_branches=detach)
    model(make_batch(SMALL, 6)).logits_BC.square().sum().backward()
    reached = [p.grad is not None and bool(p.grad.any()) for p in model.branch_parameters(name)]
    assert any(reached) is not detach
    assert model.fusion is not None
    assert all(p.grad is not None for p in [*model.fusion.parameters(), *model.classifier.parameters()])


@pytest.mark.parametrize("detach", [True, False])
def test_every_parameter_gets_a_gradient_from_the_losses_of_all_heads(detach):
    model = _small(["tile", "omic"], detach_branches=detach)
    out = model(make_batch(SMALL, 6))
    torch.stack([head.logits_BC.square().sum() for head in [out, *out.branches.values()]]).sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []
    own = [p.grad for p in model.branch_parameters("tile") if p.grad is not None]
    alone = _small(["tile", "omic"])
    alone(make_batch(SMALL, 6)).branches["tile"].logits_BC.square().sum().backward()
    theirs = [p.grad for p in alone.branch_parameters("tile") if p.grad is not None]
    assert all(torch.equal(a, b) for a, b in zip(own, theirs, strict=True)) is detach


# randomness


def test_initial_weights_are_a_function_of_the_seed_alone():
    torch.manual_seed(0)
    first = _small(["tile", "omic"], seed=-7).state_dict()
    torch.manual_seed(1)
    state = torch.get_rng_state()
    again, other = _small(["tile", "omic"], seed=-7).state_dict(), _small(["tile", "omic"], seed=8).state_dict()
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(tensor, again[name]) for name, tensor in first.items())
    assert any(not torch.equal(tensor, other[name]) for name, tensor in first.items())


def test_a_forward_leaves_the_generator_alone():
    model = _small(["tile", "omic"])
    state = torch.get_rng_state()
    model(make_batch(SMALL, 4))
    assert torch.equal(torch.get_rng_state(), state)


def test_dropout_follows_the_key_of_the_sample_and_the_role():
    model = _small(["tile", "omic"], norm="group")  # no statistics over the batch: a sample is on its own
    batch = make_batch(SMALL, 6)
    out = model(batch).logits_BC
    order = torch.tensor([4, 1, 0])
    torch.testing.assert_close(model(rows_of(batch, order)).logits_BC, out[order], atol=1e-12, rtol=0)
    model.role = "mean_teacher"
    assert not torch.allclose(model(batch).logits_BC, out)
    assert torch.equal(model.eval()(batch).logits_BC, copy.deepcopy(model)(batch).logits_BC)


def test_every_dropout_layer_of_a_model_has_its_own_draws():
    def salts(model: Classifier) -> list[int]:
        return [layer.salt for layer in model.modules() if isinstance(layer, KeyedDropout)]

    both, alone = salts(_small(["tile", "omic"])), salts(_small(["omic"], seed=1))
    assert len(both) == len({*both, KeyedDropout.salt}) - 1 == 2 + 2 + 3  # snn, gates, fusion
    assert set(alone) < set(both)  # the genomic network is at the same path in both


def _train_pass(
    world: World, *, modalities: list[str], n: int, encoders: dict[str, object] | None = None
) -> tuple[dict[str, Tensor], Tensor]:
    """Gradients of the mean loss of the global batch, and this rank's logits."""
    model = _small(modalities) if encoders is None else _small(modalities, encoders=encoders)
    set_world(model, world)
    batch = make_batch(SMALL, n)
    mine = torch.arange(n).chunk(world.size)[world.rank]
    out = model(rows_of(batch, mine))
    heads = [out, *out.branches.values()]
    (torch.stack([head.logits_BC.square().sum() for head in heads]).sum() / n).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}, out.logits_BC.detach()


@pytest.mark.parametrize(
    "modalities, encoders, sizes",
    [
        (["tile"], None, (2, 4)),
        (["tile", "omic"], None, (2, 4)),
        (["omic", "note"], {"omic": {"widths": [6, 6]}}, (2, 4)),
        (["tile"], {"tile": {"name": "resnet18"}}, (2,)),
    ],
)
def test_outputs_and_gradients_are_equal_at_any_world_size(ranks, modalities, encoders, sizes):
    job = {"modalities": modalities, "encoders": encoders, "n": 8}
    [(expected, logits)] = ranks(1).run(_train_pass, **job)
    for size in sizes:
        results = ranks(size).run(_train_pass, **job)
        torch.testing.assert_close(torch.cat([part for _, part in results]), logits, atol=1e-11, rtol=0)
        for name, gradient in expected.items():
            found = torch.stack([gradients[name] for gradients, _ in results]).sum(dim=0)
            torch.testing.assert_close(found, gradient, atol=1e-11, rtol=0)


# refusals


def _message(specs: dict[str, InputSpec] | None = None, **config: object) -> str:
    with pytest.raises(ConfigError) as caught:
        build(ModelConfig.model_validate(config), SMALL if specs is None else specs, 3, seed=0)
    return str(caught.value)


def test_what_does_not_fit_is_refused_with_what_would():
    tile, omic = ["tile"], ["omic"]
    assert "names one twice: ['tile', 'tile']" in _message(modalities=["tile", "tile"])
    assert _message(modalities=["tiles"]) == (
        "model.modalities names 'tiles', the data has note, omic, tile; did you mean 'tile'?"
    )
    assert _message(modalities=omic, encoders={"omics": {}}) == (
        "model.encoders.omics: no such modality in model.modalities ['omic']; did you mean 'omic'?"
    )
    assert "tile: snn does not take a modality of kind image; use cnn, resnet18, vgg16, timm or monai" in _message(
        modalities=tile, encoders={"tile": {"name": "snn"}}
    )
    assert "omic: resnet18 does not take a modality of kind vector; use mlp or snn" in _message(
        modalities=omic, encoders={"omic": {"name": "resnet18"}}
    )
    assert "gated_bilinear takes two modalities, found 3: ['tile', 'omic', 'note']; use concat" in _message(
        modalities=["tile", "omic", "note"], fusion="gated_bilinear"
    )
    assert "gated_bilinear takes two modalities, found 1" in _message(modalities=tile, fusion="gated_bilinear")
    assert "tile.weights: cnn has no pretrained weights; use resnet18, vgg16, timm or monai, or leave it" in _message(
        modalities=tile, encoders={"tile": {"weights": "w.pth"}}
    )
    assert "set model.norm=sync, not group" in _message(
        modalities=tile, norm="group", encoders={"tile": {"name": "resnet18", "weights": "w.pth"}}
    )
    assert "tile.widths: those of resnet18 are fixed" in _message(
        modalities=tile, encoders={"tile": {"name": "resnet18", "widths": [3]}}
    )
    for name in ("a.b", "", "items", "forward", "training", "_modules"):
        assert f"names {name!r}, which cannot be the name of a module" in _message({name: OMIC}, modalities=[name])


def test_an_unknown_encoder_is_refused_when_the_config_is_read():
    with pytest.raises(ValueError, match=r"encoders\.tile\.name\n.*'mlp', 'snn', 'cnn', 'resnet18', 'vgg16', 'timm'"):
        ModelConfig.model_validate({"modalities": ["tile"], "encoders": {"tile": {"name": "resnet"}}})


def test_a_batch_that_does_not_fit_is_refused():
    model = _small(["tile", "omic"])
    batch = make_batch(SMALL | {"omic": InputSpec("vector", (8,))}, 4)
    with pytest.raises(ShapeError, match=r"batch 'omic' has shape \(4, 8\), the model expects \(B, 7\)"):
        model(batch)
    flat = make_batch(SMALL | {"tile": InputSpec("vector", (1,))}, 4)
    with pytest.raises(ShapeError, match=r"batch 'tile' has shape \(4, 1\), the model expects \(B, 1, 16, 16\)"):
        model(flat)
    with pytest.raises(ShapeError, match="batch has no modality 'tile', found omic; the model takes all of"):
        model(make_batch({"omic": SMALL["omic"]}, 4))


def test_weights_files_are_read_unless_all_weights_follow_anyway(tmp_path):
    encoder = EncoderConfig(name="resnet18", weights=tmp_path / "none.pth")
    config = ModelConfig(modalities=["tile"], encoders={"tile": encoder})
    with pytest.raises(CheckpointError, match=r"weights file .*none\.pth does not exist"):
        build(config, SMALL, 3, seed=0)
    assert isinstance(build(config, SMALL, 3, seed=0, pretrained=False), nn.Module)


def test_config_survives_json():
    config = ModelConfig(modalities=["tile", "omic"], encoders=TINY, norm="group")
    assert ModelConfig(**config.model_dump(mode="json")) == config
