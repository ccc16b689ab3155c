"""The model in blocks computes what timm's does, and its layers are those that own matrices."""

import pytest
import timm
import torch
from safetensors.torch import save_file

from safer_fast.config.schema import ModelConfig
from safer_fast.models import families
from safer_fast.models.arenas import ParameterArenas
from safer_fast.models.build import build_model, freeze, prepare
from safer_fast.models.families import STEM, VitParts, split_into_blocks
from safer_fast.models.robust_model import training_mode
from safer_fast.training.reference import PlainModel
from tests.support.networks import FAMILIES, UNCUTTABLE, build, images_and_labels

ALL_FAMILIES = [*FAMILIES, UNCUTTABLE]


@pytest.mark.parametrize("name", ALL_FAMILIES)
def test_the_parts_together_are_the_network_of_timm_bit_for_bit(name: str) -> None:
    model = build(name)
    images, _ = images_and_labels()
    expected = PlainModel(model, torch.float32)(images)
    assert torch.equal(model(images), expected)
    assert (model.num_blocks == 0) == (name == UNCUTTABLE)
    for cut in range(STEM, model.num_blocks + 1 if model.num_blocks else 1):
        assert torch.equal(model.suffix(model.prefix(images, cut), cut), expected), cut


@pytest.mark.parametrize("name", ALL_FAMILIES)
def test_frozen_bf16_weights_equal_autocast_bit_for_bit(name: str) -> None:
    model = build(name)
    autocast = PlainModel(model, torch.float32, torch.bfloat16)
    ParameterArenas(model.network, model.layers, torch.bfloat16)
    model.compute_dtype = torch.bfloat16
    images, labels = images_and_labels()
    results = []
    for network in (model, autocast):
        pixels = images.clone().requires_grad_()
        logits = network(pixels)
        loss = torch.nn.functional.cross_entropy(logits, labels)
        results.append((logits, torch.autograd.grad(loss, pixels)[0]))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])
    assert results[0][1].abs().sum() > 0


@pytest.mark.parametrize(
    ("name", "count"), [("vit_small_patch16_224", 50), ("vit_large_patch16_224", 98)]
)
def test_a_vit_has_four_layers_in_each_block_and_two_outside(name: str, count: int) -> None:
    with torch.device("meta"):
        network = timm.create_model(name, embed_dim=64, num_heads=1)
    from safer_fast.models.robust_model import find_layers

    layers = find_layers(network)
    assert len(layers) == count
    assert layers["blocks.3.attn.qkv"] == ("blocks.3.attn.qkv.weight", "blocks.3.attn.qkv.bias")


def test_swin_counts_its_reductions_as_layers_of_the_block_that_follows() -> None:
    model = build("swin_tiny_patch4_window7_224")
    assert model.num_blocks == 5
    assert model.block_of("layers.1.downsample.reduction") == 1
    assert model.block_of("layers.2.blocks.1.mlp.fc1") == 3
    assert model.block_of("head.fc") == 5
    assert model.block_of("patch_embed.proj") == STEM


def test_norms_go_with_the_layer_that_follows_them() -> None:
    layers = build(norms=True).layers
    assert "blocks.1.norm1.weight" in layers["blocks.1.attn.qkv"]
    assert "blocks.1.norm2.bias" in layers["blocks.1.mlp.fc1"]
    assert "norm.weight" in layers["head"]
    assert layers["blocks.1.mlp.fc2"] == ("blocks.1.mlp.fc2.weight", "blocks.1.mlp.fc2.bias")


def test_the_cut_is_the_deepest_block_below_which_nothing_is_selected() -> None:
    model = build()
    assert model.cut_of(["blocks.3.mlp.fc1", "blocks.2.attn.qkv"]) == 2
    assert model.cut_of(["head"]) == 4
    assert model.cut_of(["patch_embed.proj", "head"]) == STEM
    assert model.cut_of(["pos_embed"]) == STEM


def test_only_the_suffix_is_random_while_its_layers_are_trained() -> None:
    model = build(drop_path_rate=0.5)
    modules = model.random_modules(["blocks.2.mlp.fc1.weight"])
    with training_mode(modules):
        assert model.network.blocks[2].drop_path1.training
        assert not model.network.blocks[1].drop_path1.training
        features = model.prefix(images_and_labels()[0], 2)
        assert not torch.equal(model.suffix(features, 2), model.suffix(features, 2))
    assert not any(module.training for module in model.modules())
    assert build().random_modules(["blocks.2.mlp.fc1.weight"]) == []


def test_a_random_prefix_is_refused() -> None:
    model = build(drop_path_rate=0.5).train()
    with pytest.raises(AssertionError, match="must not be random"):
        model.prefix(images_and_labels()[0], 2)


def test_frozen_batch_norms_keep_their_statistics() -> None:
    model = build(UNCUTTABLE)
    norms = [m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert norms
    head = model.random_modules(["head.weight"])
    assert not any(norm in head for norm in norms)
    every = [name for name, _ in model.network.named_parameters()]
    assert all(norm in model.random_modules(every) for norm in norms)


def test_the_second_pass_does_not_move_the_statistics_of_batch_norms() -> None:
    model = build(UNCUTTABLE)
    every = [name for name, _ in model.network.named_parameters()]
    norm = next(m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d))
    modules, before = model.random_modules(every), norm.running_mean.clone()
    with training_mode(modules, keeps_statistics=True):
        model(images_and_labels()[0])
    assert torch.equal(norm.running_mean, before)
    assert norm.momentum == 0.1
    with training_mode(modules):
        model(images_and_labels()[0])
    assert not torch.equal(norm.running_mean, before)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (ModelConfig(name="resnet18"), "expected a vision transformer"),
        (ModelConfig(name="vit_tinny"), "expected a model of timm, got 'vit_tinny'"),
        (ModelConfig(name="vit_tiny_patch16_224", arguments={"hight": 3}), "hight"),
        (
            ModelConfig(name="vit_tiny_patch16_224", arguments={"num_heads": 5, "depth": 1}),
            "takes no 3x32x32",
        ),
        (ModelConfig(name="vit_tiny_patch16_224", arguments={"num_classes": 3}), "num_classes"),
        (ModelConfig(name="vit_tiny_patch16_224", arguments={"in_chans": 1}), "in_chans"),
        (ModelConfig(name="vit_tiny_patch16_224", checkpoint="missing.safetensors"), "missing"),
    ],
)
def test_models_that_cannot_be_built_are_refused_in_one_line(
    config: ModelConfig, message: str
) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        build_model(config, num_classes=10, image_size=32)
    assert "\n" not in str(caught.value)


def test_weights_of_another_model_are_refused(tmp_path) -> None:  # type: ignore[no-untyped-def]
    small = ModelConfig(name="vit_tiny_patch16_224", arguments={"depth": 1})
    network = build_model(small, num_classes=10, image_size=32).network
    file = tmp_path / "weights.safetensors"
    save_file(network.state_dict(), file)
    loaded = ModelConfig(**vars(small) | {"checkpoint": str(file)})
    model = build_model(loaded, num_classes=10, image_size=32)
    for name, tensor in network.state_dict().items():
        assert torch.equal(model.network.state_dict()[name], tensor)
    deeper = ModelConfig(**vars(loaded) | {"arguments": {"depth": 2}})
    with pytest.raises(ValueError, match=r"those of another.*blocks\.1"):
        build_model(deeper, num_classes=10, image_size=32)
    wider = ModelConfig(**vars(loaded) | {"arguments": {"depth": 1, "embed_dim": 96}})
    with pytest.raises(ValueError, match=r"cls_token of shape \[1, 1, 192\], not \[1, 1, 96\]"):
        build_model(wider, num_classes=10, image_size=32)
    file.write_bytes(b"no weights at all")
    with pytest.raises(ValueError, match="does not load"):
        build_model(loaded, num_classes=10, image_size=32)
    pickled = file.with_suffix(".pth")
    pickled.write_bytes(b"no weights at all")
    damaged = ModelConfig(**vars(loaded) | {"checkpoint": str(pickled)})
    with pytest.raises(ValueError, match=r"pth, which is damaged or no such file$"):
        build_model(damaged, num_classes=10, image_size=32)


def test_grey_images_are_normalised_with_the_mean_of_the_channels() -> None:
    config = ModelConfig(name="deit_tiny_patch16_224", arguments={"depth": 1})
    model = build_model(config, num_classes=10, image_size=32, num_channels=1)
    assert model.mean.flatten().tolist() == pytest.approx([(0.485 + 0.456 + 0.406) / 3])
    assert model(torch.rand(2, 1, 32, 32)).shape == (2, 10)


class OwnNetwork(timm.models.vision_transformer.VisionTransformer):
    """A ViT with a forward pass that is not timm's."""

    def forward_features(self, x: torch.Tensor, *_: object, **__: object) -> torch.Tensor:
        return -super().forward_features(x)


class OwnParts(VitParts):
    """The same function in parts."""

    def tail(self, x: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.network.forward_head(-self.network.norm(x))
        return logits


def test_a_family_of_its_own_is_divided_once_it_has_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    network = OwnNetwork(img_size=32, patch_size=16, embed_dim=48, depth=2, num_heads=3).eval()
    images, _ = images_and_labels()
    expected = network(images)
    assert len(split_into_blocks(network).blocks) == 0
    name = f"{OwnNetwork.__module__}.{OwnNetwork.__qualname__}"
    monkeypatch.setitem(families.FAMILIES, name, OwnParts)
    parts = split_into_blocks(network)
    x = parts.stem(images)
    for index in range(len(parts.blocks)):
        x = parts.block(index, x)
    assert len(parts.blocks) == 2
    assert torch.equal(parts.tail(x), expected)


@pytest.mark.parametrize("savings", [[], ["patch-order", "class-token", "stored-bf16"]])
def test_a_prepared_model_is_on_its_device_in_arenas_and_computes_the_same(
    savings: list[str],
) -> None:
    arguments = {"depth": 2, "embed_dim": 48, "num_heads": 3}
    config = ModelConfig(name="vit_tiny_patch16_224", arguments=arguments)
    sizes = {"num_classes": 10, "image_size": 32}
    images, _ = images_and_labels()
    results = []
    for prepared in (False, True):
        torch.manual_seed(0)
        dtype = torch.bfloat16
        if prepared:
            cpu = torch.device("cpu")
            model, off = prepare(config, cpu, savings=savings, compute_dtype=dtype, **sizes)
            stored = freeze(model, savings).layer_dtype
            assert off == []
            assert not any(parameter.requires_grad for parameter in model.parameters())
            assert stored == (dtype if savings else torch.float32)
            assert (model.patch_size is not None) == bool(savings)
        else:
            model = build_model(config, compute_dtype=dtype, **sizes)
        with torch.no_grad():
            results.append(model(images))
    assert torch.equal(results[0], results[1]) or savings
    torch.manual_seed(0)
    with torch.no_grad():
        exact = build_model(config, compute_dtype=torch.float32, **sizes)(images)
    plain, own = ((logits - exact).norm() for logits in results)
    assert own <= 2 * plain


def test_images_too_small_for_a_network_of_any_size_are_refused() -> None:
    sizes = {"depths": [1, 1, 1, 1], "embed_dims": [8, 16, 16, 16], "num_heads": [1, 2, 2, 2]}
    config = ModelConfig(name="pvt_v2_b0", arguments=sizes)
    message = r"^--data\.image_size: expected a size that pvt_v2_b0 takes, got 16: .*Kernel size"
    with pytest.raises(ValueError, match=message):
        build_model(config, num_classes=3, image_size=16)
    model = build_model(config, num_classes=3, image_size=32)
    assert model(torch.rand(2, 3, 32, 32)).shape == (2, 3)
