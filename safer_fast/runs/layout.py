"""Layout of a run folder: where each file of a run lies."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from safer_fast.config.messages import meant, shortened

CONFIG = "run.yaml"
METRICS = "metrics.jsonl"
CHECKPOINTS = "checkpoints"
GALLERY = "gallery.safetensors"
LOCK = "run.lock"
TEACHER = "teacher.safetensors"
TEXT_EMBEDDINGS = "text_embeddings.safetensors"
WANDB = "wandb"
WANDB_ID = "wandb-id.txt"


@dataclass(frozen=True)
class RunFolder:
    """Paths of the files of a run; none of them need exist."""

    path: Path

    @property
    def config(self) -> Path:
        """The resolved configuration."""
        return self.path / CONFIG

    @property
    def metrics(self) -> Path:
        """One JSON object for each event of the run."""
        return self.path / METRICS

    def weights(self, name: str = "last") -> Path:
        """Weights with timm's names: `last` or `best`; raise ValueError for others."""
        from safer_fast.models.weights_file import BEST_WEIGHTS, WEIGHTS

        files = {"last": WEIGHTS, "best": BEST_WEIGHTS}
        if name not in files:
            got = shortened(repr(name)) + meant(name, files)
            raise ValueError(f"--weights: expected last or best, got {got}")
        return self.path / files[name]

    @property
    def model_config(self) -> Path:
        """The model as timm describes it, with facts of the run."""
        from safer_fast.models.weights_file import MODEL_CONFIG

        return self.path / MODEL_CONFIG

    @property
    def later_metrics(self) -> Path:
        """Evaluations of a finished run, kept while files that it has lost are written again."""
        return self.path / "metrics-after-end.jsonl"

    @property
    def checkpoints(self) -> Path:
        """The folder of checkpoints to resume from."""
        return self.path / CHECKPOINTS

    @property
    def teacher(self) -> Path:
        """Weights of the frozen original network, of a run whose objective needs them."""
        return self.path / TEACHER

    @property
    def text_embeddings(self) -> Path:
        """Text embeddings of the classes in the data's order, of a run that has them."""
        return self.path / TEXT_EMBEDDINGS

    @property
    def of_tower(self) -> tuple[Path, Path]:
        """The files of a tower: weights of its original, and text embeddings."""
        return self.teacher, self.text_embeddings

    @property
    def lock(self) -> Path:
        """The file that keeps the folder to one process."""
        return self.path / LOCK

    @property
    def gallery(self) -> Path:
        """A few images before and after an attack, if the run has made them."""
        return self.path / GALLERY

    @property
    def evaluation(self) -> Path:
        """The folder of outcomes of each image, from which evaluations are resumed."""
        return self.path / "evaluation"

    @property
    def selection(self) -> Path:
        """Scores that `safer_fast.select` writes."""
        return self.path / "selection.json"

    @property
    def selection_map(self) -> Path:
        """The drawing of these scores."""
        return self.path / "selection.svg"

    @property
    def report(self) -> Path:
        """The page about the run."""
        return self.path / "report.html"

    @property
    def wandb(self) -> Path:
        """The folder that Weights & Biases writes."""
        return self.path / WANDB

    @property
    def wandb_id(self) -> Path:
        """The name of the run at Weights & Biases."""
        return self.path / WANDB_ID

    def export(self, form: str) -> Path:
        """The folder of an export where `--output` names no other."""
        return self.path / f"export-{form}"
