"""Scores equal a brute-force oracle, ranking restores every weight, selecting is exact."""

import math
from collections.abc import Iterator, Mapping
from copy import deepcopy
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from safer_fast import pgd, rank_layers, select_layers
from safer_fast.attacks.pgd import cross_entropies
from safer_fast.config.schema import AttackConfig, Config, Names, Radius, SelectionConfig
from safer_fast.data.batch import Batch, Loader
from safer_fast.models.arenas import ParameterArenas
from safer_fast.models.robust_model import find_layers
from safer_fast.runtime.ranks import Ranks
from safer_fast.selection.candidates import candidates, match_layers
from safer_fast.selection.criticality import criticality
from safer_fast.selection.probe import Probe
from safer_fast.selection.scoring import choose_layers
from tests.support.networks import PlainNetwork, build, images_and_labels

RHO = 0.1
Batches = list[tuple[Tensor, Tensor]]


def batches() -> Batches:
    return [images_and_labels(5, seed=1), images_and_labels(3, seed=2)]


class InDictionary(PlainNetwork):
    """A network that returns its logits by name, as those of other libraries do."""

    def forward(self, images: Tensor) -> Any:
        return {"logits": super().forward(images)}


class Loaded:
    """A loader whose probe is `batches`."""

    def probe(self, num_images: int, number: int) -> Iterator[Batch]:
        return (Batch(*batch, position=5 * index) for index, batch in enumerate(batches()))


def attack(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    return pgd(model, images, labels, epsilon=0.05, step_size=0.02, steps=2, start=images)


def oracle(model: nn.Module, network: nn.Module, radius: str) -> dict[str, float]:
    """Sharpness as its definition says, in fp64: perturb a copy, run everything, subtract."""
    attacked = [(attack(model, images, labels).double(), labels) for images, labels in batches()]
    images, labels = (torch.cat(parts) for parts in zip(*attacked, strict=True))
    exact = deepcopy(model).double().requires_grad_(True)
    if hasattr(exact, "compute_dtype"):
        exact.compute_dtype = torch.float32
    loss = nn.functional.cross_entropy(_logits(exact, images), labels)
    scores = {}
    for name in find_layers(network):
        trial = deepcopy(exact)
        inner = trial.network if hasattr(trial, "network") else trial
        outer = exact.network if hasattr(exact, "network") else exact
        weights = list(inner.get_submodule(name).parameters(recurse=False))
        originals = list(outer.get_submodule(name).parameters(recurse=False))
        gradients = torch.autograd.grad(loss, originals, retain_graph=True)
        length = torch.cat([g.flatten() for g in gradients]).norm()
        size = torch.cat([w.detach().flatten() for w in weights]).norm()
        reach = RHO * (size if radius == "relative" else 1.0)
        with torch.no_grad():
            for weight, gradient in zip(weights, gradients, strict=True):
                weight.add_(reach * gradient / length)
            worst = nn.functional.cross_entropy(_logits(trial, images), labels)
        scores[name] = float(worst - loss.detach())
    return scores


def _logits(model: nn.Module, images: Tensor) -> Tensor:
    """Logits in fp64, also of a model that hands out float32."""
    if not hasattr(model, "_blocks"):
        return model(images)
    x = (images - model.mean) / model.std
    return model.network(x)


@pytest.mark.parametrize("radius", ["absolute", "relative"])
@pytest.mark.parametrize("kind", ["plain module", "cut model", "arenas"])
def test_sharpness_equals_the_brute_force_oracle(kind: str, radius: Any) -> None:
    model: Any = PlainNetwork().eval() if kind == "plain module" else build()
    network = model if kind == "plain module" else model.network
    expected = oracle(model, network, radius)
    arenas = None
    if kind == "arenas":
        arenas = ParameterArenas(network, model.layers, torch.float32)
    before = {n: p.detach().clone() for n, p in network.named_parameters()}
    scores = rank_layers(model, batches(), rho=RHO, radius=radius, attack=attack, arenas=arenas)
    assert list(scores) == list(expected)
    largest = max(abs(score) for score in expected.values())
    for name, score in scores.items():
        assert score == pytest.approx(expected[name], rel=2e-3, abs=1e-4 * largest), name
    for name, parameter in network.named_parameters():
        assert torch.equal(parameter, before[name])


def test_least_sharp_turns_the_ranking_round() -> None:
    sharp = rank_layers(build(), batches(), rho=RHO)
    least = rank_layers(build(), batches(), rho=RHO, criterion="least-sharp")
    assert least == {name: -score for name, score in sharp.items()}


@pytest.mark.parametrize("radius", ["absolute", "relative"])
def test_gradient_norm_is_the_limit_of_sharpness_for_a_small_radius(radius: Any) -> None:
    model = PlainNetwork().eval().double()
    data = [(images.double(), labels) for images, labels in batches()]
    first_order = rank_layers(model, data, criterion="gradient-norm", rho=1e-4, radius=radius)
    exact = rank_layers(model, data, rho=1e-4, radius=radius)
    for name, score in exact.items():
        assert first_order[name] == pytest.approx(score, rel=2e-2), name


def test_criticality_is_the_change_of_features_relative_to_the_layer_below() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 6), nn.Tanh(), nn.Linear(6, 4))
    images, labels = torch.rand(5, 1, 3, 4), torch.zeros(5, dtype=torch.int64)
    flat = nn.Sequential(nn.Flatten(), model)
    noise = 0.1 * torch.randn_like(images)
    scores = rank_layers(
        flat, [(images, labels)], criterion="criticality", attack=lambda _m, x, _y: x + noise
    )
    with torch.no_grad():
        clean, moved = images.flatten(1), (images + noise).flatten(1)
        first = (model[0](moved) - model[0](clean)).norm(dim=1).mean() / 6
        last = (model(moved) - model(clean)).norm(dim=1).mean() / 4
        below = (moved - clean).norm(dim=1).mean() / 12
    expected = {"1.0": float(first / below), "1.2": float(last / first)}
    assert scores == pytest.approx(expected, rel=1e-5)


def test_random_scores_come_from_the_generator_alone() -> None:
    draws = [
        rank_layers(
            build(), batches(), criterion="random", generator=torch.Generator().manual_seed(seed)
        )
        for seed in (0, 0, 1)
    ]
    assert draws[0] == draws[1]
    assert draws[0] != draws[2]
    assert len(set(draws[0].values())) == 18


def test_only_the_layers_asked_for_are_scored() -> None:
    model = build()
    names = ["blocks.3.mlp.fc2", "head"]
    some, every = (rank_layers(model, batches(), rho=RHO, names=n) for n in (names, None))
    assert some == {name: every[name] for name in names}


@pytest.mark.parametrize(
    ("count", "fraction", "expected"),
    [(18, 0.05, 1), (50, 0.05, 3), (98, 0.05, 5), (22, 0.05, 1), (4, 1.0, 4), (3, 0.001, 1)],
)
def test_the_share_of_layers_is_rounded_and_at_least_one(
    count: int, fraction: float, expected: int
) -> None:
    scores = {f"layer{index}": float(index) for index in range(count)}
    selected = select_layers(scores, fraction=fraction)
    assert selected == [f"layer{index}" for index in range(count - 1, count - 1 - expected, -1)]


def test_equal_scores_are_ordered_by_name() -> None:
    assert select_layers({"b": 1.0, "a": 1.0, "c": 2.0}, fraction=0.7) == ["c", "a"]


@pytest.mark.parametrize(
    ("scores", "fraction", "message"),
    [
        ({}, 0.1, "scores: expected at least one layer"),
        ({"a": float("nan"), "b": 1.0}, 0.1, "scores: expected numbers, got NaN for a"),
        ({"a": 1.0}, 0.0, "fraction: expected above 0"),
        ({"a": 1.0}, 1.1, "fraction: expected above 0 and at most 1"),
        ({"a": 1.0}, "0.5", "fraction: expected a number, got '0.5'"),
        ({"a": 1.0}, None, "fraction: expected a number, got None"),
        ({"a": 1.0, "b": "0.5"}, 0.5, "scores: expected numbers, got '0.5' for b"),
        ({"a": None}, 0.5, "scores: expected numbers, got None for a"),
    ],
)
def test_scores_that_rank_nothing_are_refused(
    scores: Mapping[str, Any], fraction: Any, message: str
) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        select_layers(scores, fraction=fraction)


def test_scores_may_be_numbers_of_torch() -> None:
    scores = cast(Any, {"a": torch.tensor(1.0), "b": torch.tensor(2.0)})
    assert select_layers(scores, fraction=0.5) == ["b"]


def test_wrong_arguments_of_the_ranking_are_refused() -> None:
    with pytest.raises(ValueError, match="names: expected layers of the model, got blocks"):
        rank_layers(build(), batches(), names=["blocks.9.mlp.fc1"])
    for rho in (-1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=rf"rho: expected at .*, got {rho}"):
            rank_layers(build(), batches(), rho=rho)
    with pytest.raises(ValueError, match="batches: expected at least one batch"):
        rank_layers(build(), [])
    with pytest.raises(ValueError, match="criterion: expected one that scores layers"):
        rank_layers(build(), batches(), criterion="all")
    with pytest.raises(ValueError, match=r"^names: expected at least one layer, got none$"):
        rank_layers(build(), batches(), names=[])


def test_criticality_without_an_attack_is_refused_before_any_batch_is_read() -> None:
    def unread() -> Iterator[tuple[Tensor, Tensor]]:
        raise AssertionError("read")
        yield

    with pytest.raises(ValueError, match=r"^attack: .* which criticality .*: give attack=$"):
        rank_layers(build(), unread(), criterion="criticality")


def test_criticality_of_an_attack_that_changes_nothing_is_nan() -> None:
    scores = rank_layers(
        build(), batches(), criterion="criticality", attack=lambda _m, images, _y: images
    )
    assert all(math.isnan(score) for score in scores.values())


@pytest.mark.parametrize(
    ("model", "batch", "message"),
    [
        (None, images_and_labels(2), r"model: expected a torch\.nn\.Module, got NoneType$"),
        (nn.ReLU(), images_and_labels(2), "model: expected linear layers or .*, got ReLU without"),
        (
            PlainNetwork(),
            (torch.zeros(2, 3, 32, 32, dtype=torch.uint8), torch.tensor([0, 1])),
            r"batches: expected images that are floats, got uint8 \[2, 3, 32, 32\] on cpu$",
        ),
        (
            PlainNetwork(),
            (torch.rand(2, 3, 32, 32), [0, 1]),
            "batches: expected labels that are tensors, got list$",
        ),
        (
            PlainNetwork(),
            (torch.rand(2, 3, 32, 32).double(), torch.tensor([0, 1])),
            "images: expected float32 as the model has, got float64$",
        ),
        (
            InDictionary(),
            (torch.rand(2, 3, 32, 32), torch.tensor([0, 1])),
            r"model: expected logits \[2, K\], got dict$",
        ),
    ],
    ids=str,
)
def test_models_and_batches_that_cannot_be_scored_are_refused(
    model: Any, batch: Any, message: str
) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        rank_layers(model, [batch])


def test_losses_that_cannot_be_differentiated_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^loss: expected a loss that is a 0-d tensor, got float"):
        rank_layers(build(), batches(), loss=cross_entropies)
    with pytest.raises(ValueError, match=r"^loss: expected a function of .*, got 'margin'$"):
        rank_layers(build(), batches(), loss="margin")  # type: ignore[arg-type]
    message = r"^rank_layers: expected a call outside of torch\.inference_mode\(\)"
    with torch.inference_mode(), pytest.raises(ValueError, match=message):
        rank_layers(build(), batches())


def test_labels_may_be_whole_numbers_of_fewer_bits() -> None:
    fewer = [(images, labels.to(torch.uint8)) for images, labels in batches()]
    assert rank_layers(build(), fewer, attack=attack) == rank_layers(
        build(), batches(), attack=attack
    )


def test_candidates_start_at_a_block_and_always_have_the_head() -> None:
    model = build()
    assert len(candidates(model, 0)) == 18
    names = candidates(model, 3)
    assert names == [n for n in model.layers if n.startswith("blocks.3.")] + ["head"]
    with pytest.raises(ValueError, match=r"selection\.from_block: expected less than the 4 blocks"):
        candidates(model, 4)


def test_candidates_can_be_named_by_patterns() -> None:
    model = build()
    blocks = [name for name in model.layers if name.startswith("blocks.")]
    assert candidates(model, 0, ["blocks.*"]) == blocks
    assert candidates(model, 2, ["*.mlp.fc1", "head"]) == [
        "blocks.2.mlp.fc1",
        "blocks.3.mlp.fc1",
        "head",
    ]
    with pytest.raises(ValueError, match=r"selection\.candidates: .*got 'block\.\*', which fits"):
        candidates(model, 0, ["block.*"])
    with pytest.raises(ValueError, match=r"block 2 and above, got patch_embed\.proj"):
        candidates(model, 2, ["patch_embed.*"])


def test_patterns_pick_layers_in_the_order_of_the_network() -> None:
    names = list(build().layers)
    assert match_layers(["head", "blocks.[12].attn.*"], names) == [
        "blocks.1.attn.qkv",
        "blocks.1.attn.proj",
        "blocks.2.attn.qkv",
        "blocks.2.attn.proj",
        "head",
    ]
    with pytest.raises(ValueError, match=r"selection\.layers: .*got 'blocks\.9\.\*'"):
        match_layers(["blocks.9.*"], names)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (SelectionConfig(criterion="all"), 18),
        (SelectionConfig(fraction=0.1), 2),
        (SelectionConfig(criterion="criticality", fraction=0.1), 2),
        (SelectionConfig(criterion="random", from_block=2, fraction=0.2), 2),
        (SelectionConfig(criterion="gradient-norm", norms=True), 1),
        (SelectionConfig(candidates=Names(["blocks.*"]), fraction=0.25), 4),
    ],
)
def test_a_choice_follows_its_configuration(config: SelectionConfig, expected: int) -> None:
    model = build(norms=config.norms)
    arenas = ParameterArenas(model.network, model.layers, torch.float32)
    settings = Config(selection=config, attack=AttackConfig(epsilon=Radius(0.05), steps=2))
    choice = choose_layers(model, arenas, Probe(settings, cast(Loader, Loaded()), number=0))
    assert len(choice.selected) == expected
    named = candidates(model, config.from_block, config.candidates)
    assert set(choice.selected) <= set(named)
    if choice.scores:
        assert list(choice.scores) == named
    assert choice.criterion == config.criterion


def test_criticality_sees_a_product_that_the_network_makes_past_its_layer() -> None:
    model = build("eva02_tiny_patch14_224")
    clean, _ = images_and_labels(4)
    attacked = (clean + 0.03 * torch.randn_like(clean)).clamp(0, 1)
    attention, seen = model.network.blocks[0].attn, []
    handle = attention.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        for images in (clean, attacked):
            model(images)
    handle.remove()
    bias = torch.cat((attention.q_bias, attention.k_bias, attention.v_bias))
    with torch.no_grad():
        before, after = (nn.functional.linear(x, attention.qkv.weight, bias) for x in seen)
        pixels = [
            model.network.patch_embed.proj((x - model.mean) / model.std) for x in (clean, attacked)
        ]
    changes = [
        (b - a).flatten(1).norm(dim=1).sum() / a[0].numel() for a, b in ((before, after), pixels)
    ]
    names = ["patch_embed.proj", "blocks.0.attn.qkv"]
    scores = criticality(model, [(clean, attacked)], names, Ranks())
    assert scores["blocks.0.attn.qkv"] == pytest.approx(float(changes[0] / changes[1]), rel=1e-4)
