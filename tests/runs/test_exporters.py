"""Exports load where they are meant to, in processes that know nothing of this package."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from textwrap import indent
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file

from safer_fast.config.command_line import parse_config
from safer_fast.config.commands import ExportConfig
from safer_fast.data import load_data
from safer_fast.evaluate import main as evaluate
from safer_fast.export import main
from safer_fast.models.build import build_model
from safer_fast.runs import exporters
from safer_fast.runs.accuracies import interval
from safer_fast.runs.exporters import export, onnx
from safer_fast.runs.exporters.submission import radius
from safer_fast.runs.folder import LoadedRun, export_model, load_run, save_config
from tests.support.small_runs import TEST_IMAGES

VIT = "{depth: 2, embed_dim: 48, num_heads: 3}"
SWIN = "{depths: [1, 1, 1, 1], embed_dim: 24, num_heads: [1, 2, 4, 8], window_size: 2}"
COLOUR = ["--data.path=synthetic", "--data.image_size=32"]
RUNS: dict[str, list[str]] = {
    "digits": ["--amp=bf16"],
    "vit": [
        *COLOUR,
        "--model.name=vit_tiny_patch16_224",
        "--model.patch_size=8",
        f"--model.arguments={VIT}",
    ],
    "swin": [
        *COLOUR,
        "--model.name=swin_tiny_patch4_window7_224",
        "--model.patch_size=2",
        f"--model.arguments={SWIN}",
    ],
}
ALONE = "import sys; sys.modules['safer_fast'] = None\n"
TIMM = """
import json, timm, torch
from pathlib import Path
from safetensors.torch import load_file
torch.set_num_threads(1)
for run in sys.argv[1:]:
    known = load_file(run + "/known.safetensors")
    images, expected = known["images"], known["logits"]
    for form in ("timm", "hub"):
        folder = run + "/" + form
        config = json.loads(Path(folder, "config.json").read_text())
        alone = timm.create_model(
            config["architecture"],
            checkpoint_path=folder + "/model.safetensors",
            **config["model_args"],
        )
        for model in (timm.create_model("local-dir:" + folder, pretrained=True), alone):
            mean, std = (
                torch.tensor(config["pretrained_cfg"][name]).view(1, -1, 1, 1)
                for name in ("mean", "std")
            )
            logits = model.eval()((images - mean) / std)
            assert torch.equal(logits, expected), (run, form, (logits - expected).abs().max())
    sys.path.insert(0, run + "/robustbench")
    import robust_model
    del sys.path[0], sys.modules["robust_model"]
    assert torch.equal(robust_model.load()(images), expected), run
print("equal", "safer_fast" in [n for n, m in sys.modules.items() if m is not None])
"""
ONNX = """
import numpy, onnxruntime
from safetensors.numpy import load_file
for run in sys.argv[1:]:
    known = load_file(run + "/known.safetensors")
    session = onnxruntime.InferenceSession(run + "/onnx/model.onnx")
    for count in (1, 3, len(known["images"])):
        [logits] = session.run(None, {"images": known["images"][:count]})
        difference = numpy.abs(logits - known["logits"][:count]).max()
        assert difference < 1e-4, (run, difference)
        assert (logits.argmax(1) == known["logits"][:count].argmax(1)).all(), run
print("equal", "torch" in sys.modules)
"""


def make_run(folder: Path, flags: list[str]) -> Path:
    """A run folder with weights that were not trained, but that all matter."""
    torch.manual_seed(0)
    config = parse_config(flags)
    data = load_data(config.data, batch_size=config.batch_size, seed=0)
    model = build_model(
        config.model,
        num_classes=data.num_classes,
        image_size=data.image_size,
        num_channels=data.num_channels,
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    folder.mkdir(parents=True)
    save_config(config, folder)
    export_model(model, model.network.state_dict(), folder, config=config, data=data)
    best = {name: value + 0.01 for name, value in model.network.state_dict().items()}
    save_file(best, folder / "best.safetensors")
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder for each run, with images and what the run's model makes of them in float32."""
    folders = {}
    for name, flags in RUNS.items():
        folder = make_run(tmp_path_factory.mktemp("runs") / name, flags)
        loaded = load_run(folder, "last", "cpu")
        loaded.model.compute_dtype = torch.float32
        images = torch.rand(7, loaded.num_channels, loaded.image_size, loaded.image_size)
        if name == "digits":
            data = load_data(loaded.config.data, batch_size=7, seed=0)
            assert data.test is not None
            images = next(iter(data.test.epoch(1))).images.float() / 255
        # as a process begins: one thread, and attention by the kernel of torch's choice
        torch.set_num_threads(1)
        torch.backends.cuda.enable_flash_sdp(True)
        with torch.no_grad():
            known = {"images": images, "logits": loaded.model(images)}
        save_file(known, folder / "known.safetensors")
        folders[name] = folder
    return folders


def write(run: Path, form: Any, **settings: Any) -> Path:
    output = str(run / form)
    return export(ExportConfig(**{"run": str(run), "format": form, "output": output} | settings))


def in_a_process_of_its_own(code: str, *words: object) -> str:
    command = [sys.executable, "-I", "-c", "import sys\n" + ALONE + code, *map(str, words)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


@pytest.mark.slow
def test_timm_and_robustbench_load_the_very_same_model(runs: dict[str, Path]) -> None:
    for run in runs.values():
        for form in ("timm", "hub", "robustbench"):
            write(run, form)
    assert in_a_process_of_its_own(TIMM, *runs.values()) == "equal False"


ROBUSTBENCH = """
import json, numpy, torch
from pathlib import Path
from pyautoattack import AutoAttack
torch.set_num_threads(1)
folder, data = Path(sys.argv[1]), numpy.load(sys.argv[2])
images = torch.from_numpy(data["images"]).float()[:, None] / 255
labels = torch.from_numpy(data["labels"])
claim = json.loads((folder / "claim.json").read_text())
sys.path.insert(0, str(folder))
import robust_model

def without(weights, prefix):
    return {k[len(prefix):] if prefix in k else k: value for k, value in weights.items()}

def accuracy(model, images):
    with torch.no_grad():
        return round(100 * (model(images).argmax(1) == labels).double().mean().item(), 2)

for prefix in ("", "model."):  # the zoo's of CIFAR, and of ImageNet
    weights = torch.load(folder / "model.pt", map_location="cpu", weights_only=True)
    weights = without(without(weights, "module."), "model.")
    model = robust_model.RobustModel()
    model.load_state_dict({prefix + name: value for name, value in weights.items()}, strict=True)
    model = model.eval()
    assert f"{accuracy(model, images):.2f}" == claim["clean_acc"], claim
epsilon = eval(claim["eps"])
adversary = AutoAttack(model, norm="Linf", eps=epsilon, version="custom", device="cpu")
adversary.attacks_to_run = ["apgd-ce"]
adversary.verbose = False
attacked = adversary.run_standard_evaluation(images, labels)[0]
assert (attacked - images).abs().max() <= epsilon + 1e-6
print(claim["n_examples"], accuracy(model, attacked) <= float(claim["clean_acc"]))
"""


def measure(run: Path, *flags: str) -> None:
    """Evaluate on clean images; write a row of AutoAttack, which takes minutes, for each split."""
    metrics = run / "metrics.jsonl"
    before = metrics.read_text().splitlines()
    evaluate([str(run), "--attacks=clean", "--device=cpu", *flags])
    attacked = {"attack": "autoattack", "norm": "linf", "epsilon": 0.1, "accuracy": 0.0}
    rows = [json.loads(line) | attacked for line in metrics.read_text().splitlines()[len(before) :]]
    with metrics.open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


@pytest.mark.slow
def test_the_submission_stands_alone_as_robustbench_measures_it(
    small_run: Path, tmp_path: Path
) -> None:
    run = Path(shutil.copytree(small_run, tmp_path / "run"))
    digits = np.load(TEST_IMAGES)
    few = {name: digits[name][:6] for name in digits.files}
    np.savez(tmp_path / "few.npz", **few)
    measure(run, f"--data.path={tmp_path / 'few.npz'}")
    folder = export(ExportConfig(str(run), format="robustbench", claim_data="few"))
    out = in_a_process_of_its_own(ROBUSTBENCH, folder, tmp_path / "few.npz")
    assert out.splitlines()[-1] == "6 True"


def test_a_submission_claims_what_autoattack_left(
    runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tmp_path / "run", RUNS["digits"])
    bare = write(run, "robustbench", output=str(tmp_path / "bare"))
    assert {path.name for path in bare.iterdir()} == {"model.pt", "robust_model.py", "README.md"}
    expected = "no claim.json: the last weights were not evaluated under clean,autoattack"
    assert expected in capsys.readouterr().out
    about = {"event": "evaluation", "weights": "last", "num_images": 100, "of_images": 797}
    pairs = (("validation", 0.1, 0.9), ("test", 0.05, 0.8), ("test", 0.1, 0.7), ("test", 0.1, 0.4))
    rows = []
    for split, epsilon, accuracy in pairs:
        rows.append({"attack": "clean", "epsilon": 0.0, "accuracy": 0.95, "split": split} | about)
        attacked = {"attack": "autoattack", "epsilon": epsilon, "accuracy": accuracy}
        rows.append(attacked | {"norm": "linf", "split": split} | about)
    rows.append({**rows[-1], "accuracy": 0.1, "source": "another run"})
    rows += [row | {"path": "/home/somebody/x.npz", "split": "x"} for row in rows[-3:-1]]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    folder = write(run, "robustbench", output=str(tmp_path / "out"), license="mit")
    claim = json.loads((folder / "claim.json").read_text())
    assert claim == {
        "link": "",
        "name": "",
        "authors": "",
        "additional_data": False,
        "number_forward_passes": 1,
        "dataset": "digits",
        "venue": "",
        "architecture": "vit_tiny_patch16_224",
        "eps": "0.1",
        "clean_acc": "95.00",
        "reported": "40.00",
        "autoattack_acc": "40.00",
        "n_examples": 100,
    }
    log = [json.loads(line) for line in (folder / "autoattack.jsonl").read_text().splitlines()]
    assert [(row["attack"], row["accuracy"]) for row in log] == [
        ("clean", 0.95),
        ("autoattack", 0.4),
    ]
    texts = [path.read_text() for path in folder.iterdir() if path.suffix != ".pt"]
    facts = json.loads((run / "config.json").read_text())
    facts["safer_fast"]["num_extra"] = 5
    (run / "config.json").write_text(json.dumps(facts))
    more = write(run, "robustbench", output=str(tmp_path / "more"))
    assert json.loads((more / "claim.json").read_text())["additional_data"] is True
    named = write(run, "robustbench", output=str(tmp_path / "named"), claim_data="x")
    texts += [path.read_text() for path in named.iterdir() if path.suffix != ".pt"]
    assert not any("somebody" in text for text in texts)
    issue = (folder / "submission.md").read_text()
    for line in (
        "- **Threat Model**: Linf",
        "- **Robust accuracy**: 40.00",
        "- **Evaluation method**: AutoAttack, standard version, 100 of 797 images of split test",
        "- **License**: mit",
    ):
        assert f"{line}\n" in issue
    card = (folder / "README.md").read_text()
    assert "from robust_model import load" in card
    assert "| test | autoattack | 0.1 | 0.4000 |" in card
    assert 'timm.create_model("local-dir' not in card


def test_a_claim_is_of_the_test_split_or_of_data_that_are_named(
    small_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Path(shutil.copytree(small_run, tmp_path / "run"))
    digits = np.load(TEST_IMAGES)
    for name, number in (("noise", 30), ("cifar10-full-test", 40)):
        np.savez(
            tmp_path / name, images=255 - digits["images"][:number], labels=np.arange(number) % 10
        )
    noise, cifar10 = (tmp_path / f"{name}.npz" for name in ("noise", "cifar10-full-test"))
    words = [str(run), "--format=robustbench", "--output"]

    def claim_of(*flags: str) -> tuple[str, int]:
        output = tmp_path / f"out-{len(list(tmp_path.iterdir()))}"
        main([*words, str(output), *flags])
        claim = json.loads((output / "claim.json").read_text())
        return claim["dataset"], claim["n_examples"]

    measure(run, f"--path={noise}")
    main([*words, str(tmp_path / "none")])
    assert not (tmp_path / "none" / "claim.json").exists()
    assert "on the run's test split, but on other data, which --claim-data names: noise\n" in (
        capsys.readouterr().out
    )
    measure(run, "--num-images=20", f"--other-data={noise},{cifar10}")
    assert claim_of() == ("digits", 20)
    assert "claim.json is of the run's own test split, 20 of 80 images\n" in capsys.readouterr().out
    assert claim_of("--claim-data=cifar10-full-test") == ("cifar10", 20)
    said = f"claim.json is of cifar10-full-test ({cifar10}), 20 of 40 images\nsubmit it"
    assert said in capsys.readouterr().out
    assert claim_of(f"--claim-data={noise}") == ("noise", 30)
    said = "30 images\nnote: RobustBench has no leaderboard of noise, only of cifar10, cifar100, im"
    assert said in capsys.readouterr().out
    with pytest.raises(
        ValueError, match=r"^--claim-data: expected .*: cifar10-full-test, noise, t"
    ):
        claim_of("--claim-data=nois")
    with pytest.raises(ValueError, match=r"^--claim-data: expected --format robustbench"):
        claim_of("--claim-data=noise", "--format=hub")


@pytest.mark.slow
def test_a_card_names_benchmark_for_data_that_robustbench_has_alone(tmp_path: Path) -> None:
    digits = np.load(TEST_IMAGES)
    example = re.compile("```python\n(.*?)\n```", re.DOTALL)
    for name, data in (("cifar10-train", "cifar10"), ("pics-train", "pics-train")):
        np.savez(tmp_path / name, **{part: digits[part] for part in digits.files})
        flags = [f"--data.path={tmp_path / name}.npz", "--model.patch_size=4"]
        run = make_run(tmp_path / data / "run", [*flags, "--attack.epsilon=8/255"])
        folder = write(run, "robustbench")
        card, code = ((folder / file).read_text() for file in ("README.md", "robust_model.py"))
        on_hub = ["uoft-cs/cifar10"] if data == "cifar10" else None
        assert ModelCard(card).data.to_dict().get("datasets") == on_hub
        assert "run.yaml" not in card
        (lines,) = example.findall(card)
        call = 'benchmark(load(), dataset="cifar10", threat_model="Linf", eps=8/255)'
        assert [call in text for text in (lines, code)] == [data == "cifar10"] * 2
        assert ["benchmark" in text for text in (card, code)] == [data == "cifar10"] * 2
        assert indent(lines, "    ") in code
        compile(code, "robust_model.py", "exec")
        if data != "cifar10":
            add = f"sys.path.insert(0, {str(folder)!r})\n"
            said = in_a_process_of_its_own(f"{add}{lines}\nprint(tuple(logits.shape))")
            assert said == "(8, 10)"


@pytest.mark.parametrize("is_kept", [True, False])
def test_training_images_are_no_claim(
    is_kept: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    digits = np.load(TEST_IMAGES)
    for name in ("pics-train", "copy", "pics-test"):
        np.savez(tmp_path / name, **{part: digits[part] for part in digits.files})
    paths = {name: str(tmp_path / f"{name}.npz") for name in ("pics-train", "copy", "pics-test")}
    flags = [f"--data.path={paths['pics-train']}", f"--data.test_path={paths['pics-test']}"]
    run = make_run(tmp_path / "run", [*flags, "--model.patch_size=4"])
    (run / "metrics.jsonl").touch()
    measure(run)
    measure(run, f"--path={paths['pics-train']}", f"--other-data={paths['copy']}")
    if is_kept:
        folder = write(run, "robustbench")
        assert not (folder / "claim.json").exists()
        assert "no claim.json: the test split holds training images" in capsys.readouterr().out
    else:
        for path in paths.values():
            Path(path).unlink()
    for name in ["pics-train", "copy"] if is_kept else ["pics-train"]:
        with pytest.raises(ValueError, match=rf"^claim_data: .*training images: {name} \("):
            write(run, "robustbench", output=str(tmp_path / "out"), claim_data=name)
    assert not (tmp_path / "out").exists()


def test_radii_are_written_as_the_leaderboards_do() -> None:
    assert [radius(value) for value in (8 / 255, 4 / 255, 0.5, 0.1, 1.5 / 255)] == [
        "8/255",
        "4/255",
        "0.5",
        "0.1",
        "0.00588235",
    ]


@pytest.mark.slow
def test_onnx_gives_the_logits_of_the_run_for_any_number_of_images(runs: dict[str, Path]) -> None:
    for run in runs.values():
        write(run, "onnx")
    assert in_a_process_of_its_own(ONNX, *runs.values()) == "equal False"


def test_the_best_weights_are_others(runs: dict[str, Path], tmp_path: Path) -> None:
    folder = write(runs["digits"], "timm", weights="best", output=str(tmp_path / "best"))
    exported = load_file(folder / "model.safetensors")
    best = load_file(runs["digits"] / "best.safetensors")
    assert all(torch.equal(exported[name], best[name]) for name in best)
    assert json.loads((folder / "config.json").read_text())["safer_fast"]["weights"] == "best"


def test_a_card_says_what_was_measured_and_claims_no_license(
    runs: dict[str, Path], tmp_path: Path
) -> None:
    run = make_run(tmp_path / "run|x", RUNS["digits"])
    recipe = (run / "run.yaml").read_text()
    assert "checkpoint: null" in recipe
    (run / "run.yaml").write_text(
        recipe.replace("checkpoint: null", "checkpoint: /home/somebody/w")
    )
    about = {"epoch": 1, "step": 0, "time_s": 1.0, "split": "test", "num_images": 100}
    rows = [
        {"event": "evaluation", "attack": attack, "epsilon": 0.1, "accuracy": accuracy}
        | about
        | {"weights": weights}
        for attack, accuracy, weights in (
            ("pgd-20", 0.1, "last"),
            ("pgd-20", 0.5, "last"),
            ("evil | <b>", 0.2, "last"),
            ("fgsm", 0.9, "best"),
        )
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    folder = write(run, "hub", output=str(tmp_path / "hub"))
    card = ModelCard.load(folder / "README.md")
    front = card.data.to_dict()
    assert front["license"] == "other"
    assert front["library_name"] == "timm"
    assert "datasets" not in front  # the Hub would look for a data set of this name
    low, high = interval(0.5, 100)
    assert f"| test | pgd-20 | 0.1 | 0.5000 | {low:.4f} to {high:.4f} | 100 |" in card.text
    assert "0.9000" not in card.text
    assert "0.1000 |" not in card.text
    assert "| test | evil    b  | 0.1 |" in card.text
    assert "/home/somebody" not in card.text
    assert "checkpoint: w" in card.text
    assert "Linf radius 0.1" in card.text
    settings = json.loads((folder / "config.json").read_text())["pretrained_cfg"]
    assert settings["license"] == "other"
    assert "tag" not in settings
    named = write(run, "hub", output=str(tmp_path / "named"), license="mit")
    assert ModelCard.load(named / "README.md").data.license == "mit"


def test_the_interval_is_wilsons() -> None:
    assert interval(0.5, 100) == pytest.approx((0.40383, 0.59617), abs=1e-5)
    assert interval(0.0, 10) == pytest.approx((0.0, 0.27754), abs=1e-5)


def test_a_folder_in_use_is_refused_and_left_alone(runs: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("x")
    with pytest.raises(ValueError, match=r"^output: expected a new or empty folder"):
        write(runs["digits"], "timm", output=str(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_an_export_that_fails_leaves_nothing(
    runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object) -> float:
        raise ValueError("--format: no")

    monkeypatch.setattr(onnx, "save_onnx", fail)
    with pytest.raises(ValueError, match=r"^format: no"):
        write(runs["digits"], "onnx", output=str(tmp_path / "out"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_another_function_in_onnx_is_noticed(runs: dict[str, Path], tmp_path: Path) -> None:
    model = load_run(runs["digits"], "last", "cpu").model
    model.compute_dtype = torch.float32
    images = torch.rand(3, 1, 8, 8)
    file = tmp_path / "model.onnx"
    assert onnx.save_onnx(model, images, file, {}) < 1e-4
    with torch.no_grad():
        model.network.get_parameter("head.bias").add_(torch.arange(10.0))
    with pytest.raises(ValueError, match="--format: onnx gives logits that differ by"):
        onnx._difference(model, images, file)


def test_an_exporter_is_added_as_a_row_of_the_table(
    runs: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def write_classes(config: ExportConfig, loaded: LoadedRun, folder: Path) -> str:
        (folder / "classes.txt").write_text(" ".join(loaded.class_names))
        return "read it: cat FOLDER/classes.txt"

    monkeypatch.setitem(exporters.EXPORTERS, "classes", exporters.Exporter(write_classes))
    folder = tmp_path / "out"
    main([str(runs["digits"]), "--format=classes", f"--output={folder}"])
    assert (folder / "classes.txt").read_text() == "0 1 2 3 4 5 6 7 8 9"
    assert f"read it: cat {folder}/classes.txt" in capsys.readouterr().out


def test_missing_packages_are_named_with_the_command(
    runs: dict[str, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(onnx, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="got onnx: pip install onnx onnxscript onnxruntime"):
        write(runs["digits"], "onnx", output=str(tmp_path / "out"))


def test_the_command_says_what_it_wrote_and_how_to_load_it(
    runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main([str(runs["digits"]), "--output", str(tmp_path / "out")])
    lines = capsys.readouterr().out.strip().split("\n")
    assert lines[0].endswith("config.json, model.safetensors")
    assert f'timm.create_model("local-dir:{tmp_path / "out"}", pretrained=True)' in lines[1]
    with pytest.raises(ValueError, match="RUN: expected a run folder"):
        main([str(tmp_path)])
    with pytest.raises(ValueError, match="--format: expected one of timm, hub"):
        main([str(runs["digits"]), "--format=caffe"])
