"""Select: every criterion side by side, measured at once, told as table, JSON and picture."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.dom import minidom

import pytest
import torch
from scipy.stats import spearmanr

from safer_fast import report, train, train_model
from safer_fast.attacks.pgd import default_step_size, pgd
from safer_fast.config.command_line import parse_config
from safer_fast.config.commands import SelectConfig
from safer_fast.config.schema import Names
from safer_fast.data import as_pixels, load_data
from safer_fast.models.arenas import ParameterArenas
from safer_fast.runs.folder import load_run
from safer_fast.runs.layout import METRICS
from safer_fast.runs.loggers.metrics_file import read_metrics
from safer_fast.select import main, select
from safer_fast.selection.comparison import rank_correlation
from safer_fast.selection.criteria import compared_criteria
from safer_fast.selection.inputs import ScoredBy
from safer_fast.selection.scoring import rank_layers, score_layers, select_layers
from tests.support.kills import Server
from tests.support.networks import build, images_and_labels
from tests.support.small_runs import TINY

SMALL = [
    "--epochs=2",
    "--selection.warmup_epochs=1",
    "--attack.clean_epochs=1",
    "--attack.epsilon_warmup_epochs=0",
    "--attack.steps=2",
    "--data.max_images=96",
    "--selection.num_images=16",
    "--evaluation.steps=1",
    "--evaluation.max_images=16",
    "--evaluation.attacks=clean",
    "--evaluation.sentinel_images=0",
    "--runtime.num_threads=1",
]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "run"
    return train_model(parse_config([*SMALL, "--output", str(folder)]))


def chosen(folder: Path, output: Path, **settings: Any) -> dict[str, Any]:
    """What selection.json says after a selection with these settings."""
    config = SelectConfig(run=str(folder), num_images=48, fraction=0.2, output=str(output))
    select(SelectConfig(**vars(config) | settings))
    content: dict[str, Any] = json.loads(output.read_text())
    return content


def test_what_is_not_given_is_as_the_run_selected(tmp_path: Path) -> None:
    own = ["--selection.candidates=blocks.*", "--selection.fraction=0.3"]
    own += ["--selection.radius=relative", "--selection.rho=0.1", "--data.max_images=24"]
    output = tmp_path / "selection.json"
    train_model(parse_config([*TINY, *own, "--output", str(tmp_path / "run")]))
    config = SelectConfig(run=str(tmp_path / "run"), num_images=8, output=str(output))
    config = replace(config, criteria=Names(["sharpness", "gradient-norm"]))
    names = select(config)
    content = json.loads(output.read_text())
    scored = content["criteria"]["sharpness-relative"]["scores"]
    assert set(content["criteria"]) == {"sharpness-relative", "gradient-norm"}
    assert all(name.startswith("blocks.") for name in scored)
    assert len(names) == round(0.3 * len(scored)) > 0
    assert (content["fraction"], content["radius"], content["rho"]) == (0.3, "relative", 0.1)
    select(replace(config, candidates=Names(["*"]), fraction=0.5))
    assert "head" in json.loads(output.read_text())["criteria"]["sharpness-relative"]["scores"]


def test_several_measures_at_once_are_what_each_is_alone() -> None:
    def attack(model: Any, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return pgd(model, images, labels, epsilon=0.05, step_size=0.02, steps=2, start=images)

    criteria: list[Any] = ["sharpness", "least-sharp", "gradient-norm", "criticality", "random"]
    measures = [ScoredBy(name, radius) for name in criteria for radius in ("absolute", "relative")]  # type: ignore[arg-type]
    batches = [images_and_labels(5, seed=1), images_and_labels(3, seed=2)]
    together = score_layers(
        build(), batches, measures, attack=attack, generator=torch.Generator().manual_seed(0)
    )
    for measure in measures:
        alone = rank_layers(
            build(),
            batches,
            criterion=measure.criterion,
            radius=measure.radius,
            attack=attack,
            generator=torch.Generator().manual_seed(0),
        )
        assert together[measure] == alone, measure


def test_equal_scores_alone_rank_nothing() -> None:
    assert rank_correlation([1.0, 1.0, 1.0], [1.0, 2.0, 3.0]) is None
    assert rank_correlation([1.0, 2.0, 3.0], [1.0, 1.0, 1.0]) is None
    assert rank_correlation([1.0], [2.0]) is None


@pytest.mark.parametrize(("second", "expected"), [([1.0, 2.0], 1.0), ([2.0, 1.0], -1.0)])
def test_two_layers_are_ranked_too(second: list[float], expected: float) -> None:
    assert rank_correlation([1.0, 2.0], second) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ([1.0, 2.0, 3.0, 4.0], [10.0, 30.0, 20.0, 40.0]),
        ([1.0, 1.0, 2.0, 2.0, 3.0], [5.0, 4.0, 4.0, 4.0, 1.0]),
        (torch.randn(50).tolist(), torch.randint(0, 9, (50,)).tolist()),
    ],
)
def test_the_rank_correlation_is_that_of_the_average_ranks(
    first: list[float], second: list[float]
) -> None:
    def ranks(values: list[float]) -> list[float]:
        """Mean place of the equal values, from 0."""
        ordered = sorted(values)
        return [ordered.index(v) + (ordered.count(v) - 1) / 2 for v in values]

    expected = torch.corrcoef(torch.tensor([ranks(first), ranks(second)], dtype=torch.float64))
    assert rank_correlation(first, second) == pytest.approx(float(expected[0, 1]))


@pytest.mark.slow
def test_the_json_has_every_criterion_and_what_was_measured(trained: Path, tmp_path: Path) -> None:
    content = chosen(trained, tmp_path / "selection.json")
    assert list(content["criteria"]) == compared_criteria()
    for column in content["criteria"].values():
        assert len(column["scores"]) == 18
        assert column["selected"] == select_layers(column["scores"], fraction=0.2)
    assert content["criterion"] == "sharpness"
    assert content["scores"] == content["criteria"]["sharpness-absolute"]["scores"]
    assert list(content["scores"].values()) == sorted(content["scores"].values(), reverse=True)
    assert content["selected"] == list(content["scores"])[:4]
    facts = {name: content[name] for name in ("images", "attack", "epsilon", "steps", "amp")}
    expected = {"images": 48, "attack": "pgd-2", "epsilon": 0.1, "steps": 2, "amp": "off"}
    assert facts == expected
    assert content["seconds"] > 0
    table = content["rank_correlations"]
    first = list(content["criteria"]["sharpness-relative"]["scores"].values())
    second = list(content["criteria"]["criticality"]["scores"].values())
    assert table["sharpness-relative"]["criticality"] == pytest.approx(
        spearmanr(first, second).statistic
    )


def test_the_scores_are_those_of_the_layers_by_their_definition(
    trained: Path, tmp_path: Path
) -> None:
    content = chosen(trained, tmp_path / "selection.json", radius="relative", rho=0.1)
    run = load_run(trained, "last", "cpu")
    data = load_data(run.config.data, batch_size=run.config.batch_size, seed=run.config.seed)
    batches = [(as_pixels(b.images), b.labels) for b in data.train.probe(48, 0)]
    generator = torch.Generator().manual_seed(0)

    def attack(model: Any, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        size = default_step_size(0.1, 2)
        return pgd(model, images, labels, epsilon=0.1, step_size=size, steps=2, generator=generator)

    for criterion in ("sharpness", "gradient-norm", "criticality"):
        name = "sharpness-relative" if criterion == "sharpness" else criterion
        expected = rank_layers(
            run.model,
            batches,
            criterion=criterion,  # type: ignore[arg-type]
            rho=0.1,
            radius="relative",
            attack=attack,
        )
        generator.manual_seed(0)
        # the class-token saving adds up in another order
        assert content["criteria"][name]["scores"] == pytest.approx(expected, rel=1e-3)


def test_least_sharp_and_random_stand_in_front_where_they_are_asked_for(
    trained: Path, tmp_path: Path
) -> None:
    sharp = chosen(trained, tmp_path / "a.json", criteria=Names(["sharpness-absolute"]))
    least = chosen(
        trained,
        tmp_path / "b.json",
        criterion="least-sharp",
        criteria=Names(["sharpness-absolute"]),
    )
    assert least["scores"] == {name: -score for name, score in sharp["scores"].items()}
    assert list(least["criteria"]) == ["least-sharp", "sharpness-absolute"]
    assert least["rank_correlations"]["least-sharp"]["sharpness-absolute"] == pytest.approx(-1)
    drawn = chosen(trained, tmp_path / "c.json", criterion="random", criteria=Names([]))
    assert list(drawn["criteria"]) == ["random"]


@pytest.mark.slow
def test_the_program_of_the_docs_selects_by_its_own_criterion(
    server: Server, trained: Path, tmp_path: Path
) -> None:
    page = (Path(__file__).parents[2] / "docs" / "extending.md").read_text()
    (program,) = re.findall(r'```python\n("""my_criterion.py.*?)```', page, re.DOTALL)
    script, output = tmp_path / "my_criterion.py", tmp_path / "selection.json"
    script.write_text(program.replace("safer_fast.train", "safer_fast.select"))
    words = [str(trained), "--num-images=16", "--steps=1", "--criterion=gradient-share"]
    words += [f"--output={output}"]
    for others in ("--criteria=gradient-norm", "--criteria=gradient-share"):
        server.run(str(script), *words, others).check_returncode()
        content = json.loads(output.read_text())
        assert content["criterion"] == "gradient-share"
        assert next(iter(content["criteria"])) == "gradient-share"
        assert content["selected"] == list(content["scores"])[:1]
        assert len(set(content["scores"].values())) == 18


def test_the_table_has_a_row_for_each_layer_and_a_column_for_each_criterion(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = chosen(trained, tmp_path / "selection.json")
    lines = capsys.readouterr().out.split("\n")
    assert lines[0].split() == compared_criteria()
    rows = lines[1:19]
    assert [row.split()[0] for row in rows] == list(content["scores"])
    assert [row.split()[2] for row in rows[:5]] == ["1*", "2*", "3*", "4*", "5"]
    assert sum(row.count("*") for row in rows) == 16
    assert any(line.startswith("sharpness-absolute selects 4 of 18 layers") for line in lines)
    assert max(map(len, lines[:25])) <= 100


@pytest.mark.slow
@pytest.mark.parametrize("ending", ["svg", "png"])
def test_the_picture_has_a_map_for_each_criterion(
    trained: Path, tmp_path: Path, ending: str
) -> None:
    file = tmp_path / f"maps.{ending}"
    chosen(trained, tmp_path / "selection.json", plot=str(file))
    if ending == "svg":
        text = file.read_text()
        page = minidom.parseString(text)
        labels = [node.getAttribute("aria-label") for node in page.getElementsByTagName("svg")]
        assert labels[1:] == compared_criteria()
        assert "var(" not in text
    else:
        assert file.read_bytes().startswith(b"\x89PNG")
    assert not list(tmp_path.glob("*.tmp"))


def test_plot_alone_draws_in_the_run_folder(trained: Path, tmp_path: Path) -> None:
    words = ["--num-images=16", "--criteria=gradient-norm", "--criterion=gradient-norm"]
    main(["--plot", str(trained), *words])
    assert (trained / "selection.svg").is_file()
    assert (trained / "selection.json").is_file()


def test_bf16_changes_precision_alone(trained: Path, tmp_path: Path) -> None:
    exact = chosen(trained, tmp_path / "a.json", steps=0)
    rough = chosen(trained, tmp_path / "b.json", steps=0, amp="bf16")
    assert rough["amp"] == "bf16"
    assert exact["scores"] != rough["scores"]
    first, second = (
        [content["criteria"]["gradient-norm"]["scores"][name] for name in exact["scores"]]
        for content in (exact, rough)
    )
    assert spearmanr(first, second).statistic > 0.95


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--num-images=0"], "--num-images: expected at least 1, got 0"),
        (["--steps=-1"], "--steps: expected at least 0, got -1"),
        (["--rho=0"], "--rho: expected above 0"),
        (["--fraction=2"], "--fraction: expected a share above 0, at most 1"),
        (["--criterion=all"], "--criterion: expected one of sharpness, .*least-sharp, got 'all'"),
        (["--criteria=sharp"], "--criteria: expected one of sharpness-absolute, .*, got 'sharp'"),
        (["--plot=maps.pdf"], r"--plot: expected a \.svg or \.png file, got maps\.pdf"),
    ],
)
def test_wrong_flags_are_named(tmp_path: Path, words: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        main([str(tmp_path), *words])


def test_a_file_of_weights_has_no_data_to_score_on(trained: Path) -> None:
    file = trained / "model.safetensors"
    with pytest.raises(ValueError, match=r"RUN: expected a run folder, got .*model\.safetensors"):
        main([str(file)])


def test_weights_of_the_run_are_not_changed(trained: Path, tmp_path: Path) -> None:
    run = load_run(trained, "last", "cpu")
    arenas = ParameterArenas(run.model.network, run.model.layers, torch.float32)
    before = arenas.state_dict()
    measures = [ScoredBy("sharpness", radius) for radius in ("absolute", "relative")]  # type: ignore[arg-type]
    images = torch.rand(4, 1, 8, 8)
    score_layers(run.model, [(images, torch.arange(4))], measures, arenas=arenas)
    for name, tensor in run.model.network.named_parameters():
        assert torch.equal(tensor, before[name]), name


def test_without_an_attack_no_layer_is_critical(trained: Path, tmp_path: Path) -> None:
    content = chosen(trained, tmp_path / "selection.json", steps=0)
    assert list(content["criteria"]) == compared_criteria()[:3]
    assert content["attack"] == "none"
    with pytest.raises(ValueError, match=r"^steps: expected at least 1 for criticality, got 0"):
        chosen(trained, tmp_path / "selection.json", steps=0, criterion="criticality")


@pytest.mark.parametrize("flag", ["--attack.epsilon=0", "--attack.steps=0"])
def test_a_run_without_an_attack_is_selected_from_and_reported(flag: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train.main([*SMALL, flag, "--output", str(run)])
    radii = [event["epsilon"] for event in read_metrics(run / METRICS) if "epsilon" in event]
    assert set(radii) == {0.0}
    main([str(run), "--num-images=48"])
    content = json.loads((run / "selection.json").read_text())
    assert list(content["criteria"]) == compared_criteria()[:3]
    assert (content["attack"], content["steps"]) == ("none", 0)
    report.main([str(run)])
    assert "none, clean training" in (run / "report.html").read_text()


@pytest.mark.parametrize("flag", ["--attack.epsilon=0", "--attack.steps=0"])
def test_criticality_is_refused_where_there_is_no_attack(flag: str, tmp_path: Path) -> None:
    words = [*SMALL, flag, "--selection.criterion=criticality", "--output", str(tmp_path / "run")]
    with pytest.raises(ValueError, match="got criticality in clean training"):
        train.main(words)
    assert not (tmp_path / "run").exists()
