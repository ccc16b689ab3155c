"""Towers: networks that give embeddings of images in place of logits, such as CLIP's and DINO's."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from safer_fast.config.messages import shortened
from safer_fast.config.schema import ModelConfig, ObjectiveConfig
from safer_fast.models.initial_weights import read_weights
from safer_fast.models.robust_model import RobustModel
from safer_fast.models.teacher import Teacher, load_original
from safer_fast.models.text_head import TextHead, read_text_head
from safer_fast.models.weights_source import find_source
from safer_fast.runtime.cuda_graphs import Replays
from safer_fast.runtime.micro_batch import MicroBatch


def embedding_rows(config: ModelConfig, timm_value: Callable[[str, str], Any]) -> int:
    """Outputs of the projection behind a tower, as timm's `num_classes`; 0: there is none.

    A CLIP tower has the projection of its weights, others give pooled features; `num_classes` among
    `model.arguments` says otherwise. timm_value: (name, key) -> what timm knows of its weights.
    Raises ValueError for another `num_classes`, and for weights that cannot be read.
    """
    chosen = config.arguments.get("num_classes")
    if chosen is not None:
        if type(chosen) is not int or chosen < 0:
            raise ValueError(
                "--model.arguments: expected num_classes as the width of the projection or 0, got "
                f"{shortened(str(chosen))}"
            )
        return chosen
    if "clip" not in config.name or "siglip" in config.name:
        return 0
    if config.checkpoint is None:
        return int(timm_value(config.name, "num_classes") or 0) if config.pretrained else 0
    weights, _ = read_weights(find_source(config.checkpoint).weights)
    for name, axis in {"head.weight": 0, "visual.proj": 1, "visual.head.proj.weight": 0}.items():
        if name in weights and weights[name].ndim == 2:
            return weights[name].shape[axis]
    return 0


@dataclass(frozen=True)
class Tower:
    """Parts beside a network that give its outputs a meaning.

    classifier: gives logits, or embeddings where there is no text head. text: the zero-shot head of
    the classifier. teacher: the frozen original, None where labels are those of the data.
    """

    classifier: RobustModel
    text: TextHead | None = None
    teacher: Teacher | None = None

    @property
    def judge(self) -> Teacher | None:
        """The teacher that embeddings are compared with where nothing classifies them."""
        return None if self.text is not None else self.teacher

    def labels(self, images: Tensor, labels: Tensor) -> Tensor:
        """The labels of a training batch, or the teacher's embeddings, in a buffer of its own."""
        return labels if self.teacher is None else self.teacher(images)

    def fixed_labels(self, images: Tensor, labels: Tensor) -> Tensor:
        """The same in a tensor of their own."""
        return labels if self.teacher is None else self.teacher.embed(images)

    def save(self, teacher: Path, text: Path) -> None:
        """Write the files from which the run is resumed and evaluated."""
        if self.teacher is not None:
            self.teacher.save(teacher)
        if self.text is not None:
            self.text.save(text)

    def forget_weights(self) -> None:
        """Free what only `save` needs."""
        if self.teacher is not None:
            self.teacher.forget_weights()


def find_text_head(
    config: ObjectiveConfig, class_names: Sequence[str], kept: Path | None
) -> TextHead | None:
    """The text head of the settings, in the order of the data's classes; None without one.

    kept: the file of a resumed run. Raises ValueError as `read_text_head` does, and for a head of
    other classes.
    """
    if config.text_embeddings is None:
        return None
    head = read_text_head(kept or config.text_embeddings, config.temperature)
    return head.for_classes(class_names)


def build_tower(
    model: RobustModel,
    text: TextHead | None,
    savings: Iterable[str] = (),
    *,
    has_teacher: bool,
    file: Path | None,
    micro_batch: MicroBatch,
    replays: Replays,
    is_compiled: bool,
) -> Tower:
    """Stand a text head and, with `has_teacher`, the frozen original beside a model.

    Without a teacher the model itself becomes the zero-shot classifier. file: the weights of the
    original in a resumed run; None: the model has them now. The rest: see `Teacher`. Raises
    ValueError for a text head of another width, and for files that cannot be read.
    """
    if text is not None:
        text.check_width(model.width)
        text = text.to(model.mean.device)
    if not has_teacher:
        model.text = text
        return Tower(model, text)
    if file is not None:
        load_original(model, file)
    teacher = Teacher(
        model, savings, micro_batch=micro_batch, replays=replays, is_compiled=is_compiled
    )
    return Tower(model if text is None else model.with_text(text), text, teacher)
