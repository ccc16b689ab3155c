"""Cost of a run, estimated from up to 20 timed steps of each of its stages."""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import count, islice, pairwise
from tempfile import TemporaryDirectory

import torch

from safer_fast.attacks.adaptive import STRONG_STEPS
from safer_fast.attacks.named import ThreatModel
from safer_fast.attacks.radii import radii_at
from safer_fast.config.attack_names import num_attack_steps
from safer_fast.config.checks import check_new
from safer_fast.config.resolution import Resolution
from safer_fast.config.schema import Config
from safer_fast.data import Batch, Loader, prefetch_to_device
from safer_fast.evaluation.accuracy import evaluate
from safer_fast.models.flops import costs, ideal_flops, matmul_rate
from safer_fast.runs.cost import RunCost, StageCost, table
from safer_fast.runs.resume import Found
from safer_fast.runtime.ranks import Ranks
from safer_fast.runtime.signals import ending_at_once
from safer_fast.runtime.timing import DeviceTime
from safer_fast.training.schedule import Stage
from safer_fast.training.trainer import Trainer
from safer_fast.training.validation import NUM_IMAGES_SHOWN, attack_shown

NUM_STEPS = 20
NUM_FULL_STEPS = 4
"""Steps that are timed with `attack.max_steps` where audits find fewer iterations enough."""
NUM_WARM_UP = 6
"""First steps, which compile and capture; they are left out of the median if others are taken."""
MOST_S = 60.0
"""Seconds that the steps of all stages may take together; each stage takes at least one step."""
BETWEEN_LINES_S = 10.0
"""Seconds between lines of progress without a terminal."""
NUM_PROBED_ON_CPU = 8
"""Images of each rank that score layers on a CPU, where scoring may take longer than the steps."""
LONG_STEP_S = 10.0
"""Seconds that an evaluation may take; it gets fewer images than a batch if steps take longer."""


def dry_run(config: Config, ranks: Ranks | None = None, notes: Iterable[str] = ()) -> RunCost:
    """Estimate and print the cost of a run, from 20 steps of each stage or a minute of them.

    Leaves no files. Steps run at full epsilon, so clean epochs take less, and include the wait for
    data. Layers are selected by the weights that the run starts with, on a CPU by fewer images than
    in the run, so they may differ from those of the run. Compiling, capturing and selecting layers
    are left out of the estimate. notes: see `train_model`.
    """
    check_new(config)
    ranks = ranks or Ranks()
    with (
        TemporaryDirectory() as folder,
        Trainer(_as_tried(config, folder, ranks), ranks, Found(notes=tuple(notes))) as trainer,
        ending_at_once("stopped; nothing was written"),
    ):
        trainer.stops.awaited = "at the end of a step within checkpoint.grace_s="
        planned = _parts_of(trainer)
        stages = [_cost_of(trainer, *part, MOST_S / len(planned)) for part in planned]
        trainer.log.say("evaluation: of one batch")
        rate = matmul_rate(trainer.runtime.device, trainer.runtime.compute_dtype)
        rate *= trainer.ranks.num_ranks
        cost = RunCost(stages, _evaluation_seconds(trainer, stages[-1]), rate)
        trainer.log.say(table(cost))
    return cost


def passes_of_evaluation(trainer: Trainer) -> int:
    """Forward passes of one image that all evaluations of the run amount to.

    An iteration of an attack counts as two: gradients of pixels take about as long as the pass. All
    images count as attacked, though final figures attack only those that are right without.
    """
    config, data, plan = trainer.config, trainer.data, trainer.plan
    num_ranks = trainer.ranks.num_ranks
    num_validation = _num_evaluated(data.validation, num_ranks, config.evaluation.max_images)
    epochs = range(1, config.epochs + 1)
    evaluated = [epoch for epoch in epochs if plan.evaluates_after(epoch)]
    num_watched = min(config.evaluation.sentinel_images, data.train.num_images)
    watched = 2 * (config.attack.most_steps + STRONG_STEPS + 1) if config.attack.most_steps else 0
    num_times = sum(radii_at(config.attack, epoch)[0] > 0 for epoch in evaluated)
    final_split = data.test or data.validation
    num_final = _num_evaluated(final_split, num_ranks, config.evaluation.final_images)
    final = num_final * _passes(config.evaluation.attacks)
    # final figures are those of the start of SAFER, of the best and of the last weights
    during = len(evaluated) * num_validation * _passes(_attacks_during(config))
    # a gallery at each selection of layers, and one at the end
    num_galleries = 1 + sum(
        plan.selects_before(epoch) and plan.stage_of(epoch).name == "safer" for epoch in epochs
    )
    shown = num_galleries * min(NUM_IMAGES_SHOWN, (data.test or data.validation).num_images)
    gallery = shown * 2 * (num_attack_steps(attack_shown(config.evaluation)) + 1)
    return during + num_times * num_watched * watched + 3 * final + gallery


def _num_evaluated(loader: Loader, num_ranks: int, max_images: int | None = None) -> int:
    """Number of images that each rank evaluates."""
    num_images = min(max_images or loader.num_images, loader.num_images)
    return -(-num_images // num_ranks)


def _as_tried(config: Config, folder: str, ranks: Ranks) -> Config:
    """Return the settings for the dry run, which selects layers by fewer images on a CPU."""
    selection = config.selection
    if config.runtime.device == "cpu" or not torch.cuda.is_available():
        most = NUM_PROBED_ON_CPU * ranks.num_ranks
        selection = replace(selection, num_images=min(selection.num_images, most))
    return replace(config, output=f"{folder}/run", resume="never", selection=selection)


def _parts_of(trainer: Trainer) -> list[tuple[Stage, int | None, int]]:
    """Each stage with each of its sizes of images, and the number of epochs of both together."""
    resolution, epochs = Resolution.of(trainer.config), range(1, trainer.config.epochs + 1)
    parts = Counter((trainer.plan.stage_of(epoch), resolution.at(epoch)) for epoch in epochs)
    return [(stage, size, num_epochs) for (stage, size), num_epochs in parts.items()]


def _cost_of(
    trainer: Trainer, stage: Stage, size: int | None, num_epochs: int, most_s: float
) -> StageCost:
    """Time steps of a stage with images of a size; None: as they are loaded."""
    learner, name = trainer.learner, stage.name
    if trainer.runtime.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(trainer.runtime.device)
    if Resolution.of(trainer.config).parts:
        name = f"{name} at {size or trainer.data.image_size} pixels"
    trainer.log.say(f"{name}: up to {NUM_STEPS} steps, {most_s:.0f} s of them at most")
    trainer.choose(stage.first_epoch)
    learner.resolution = Resolution.always(size)
    times, chosen = _step_times(trainer, stage, most_s), trainer.engine.audit.steps
    attack_steps, operations = trainer.step.attack.steps, _operations(trainer, size)
    peak_memory_mib, full_step_s, large_step_s = trainer.runtime.peak_memory_mib(), None, None
    name_attack, large_attack = trainer.config.attack.named, ""
    if size is not None:
        learner.resolution = Resolution()
        large_step_s = _median(_step_times(trainer, stage, most_s / 2))
        large_attack = name_attack(trainer.step.attack.steps)
        learner.resolution = Resolution.always(size)
    if chosen is not None and attack_steps:
        chosen.sound_alarm()
        full_step_s = statistics.median(_step_times(trainer, stage, most_s / 4, NUM_FULL_STEPS))
    return StageCost(
        name=name,
        layers=trainer.step.selection.names,
        cut=trainer.step.cut,
        num_steps=num_epochs * len(trainer.data.train),
        step_s=_median(times),
        num_taken=len(times),
        batch_size=-(-trainer.data.train.images_per_epoch // len(trainer.data.train)),
        operations=operations,
        peak_memory_mib=peak_memory_mib if size else trainer.runtime.peak_memory_mib(),
        attack=name_attack(attack_steps),
        full_step_s=full_step_s,
        large_step_s=large_step_s,
        large_attack=large_attack,
    )


def _median(times: Sequence[float]) -> float:
    """The median of steps, without the first ones."""
    return statistics.median(times[min(NUM_WARM_UP, len(times) - 1) :])


def _step_times(
    trainer: Trainer, stage: Stage, most_s: float, most_steps: int = NUM_STEPS
) -> list[float]:
    """Time steps at full epsilon, back to back as in a run; return the seconds of each.

    Takes as many steps as fit into `most_s`, `most_steps` of them at most; those that compile and
    capture do not count. The first is audited, where audits choose the number of iterations.
    """
    num_batches, device = len(trainer.data.train), trainer.runtime.device
    attack, runtime = trainer.config.attack, trainer.runtime
    full_epoch = max(stage.last_epoch, attack.clean_epochs + attack.epsilon_warmup_epochs + 1)
    batches = islice(_endless(trainer, stage.first_epoch), most_steps)
    least = NUM_WARM_UP + 1 if runtime.is_compiled or runtime.is_captured else 1
    moments, num_steps, shown_s = [DeviceTime(device)], most_steps, time.monotonic()
    for index, batch in enumerate(trainer.log.bar(batches, most_steps, f"{stage.name} steps"), 1):
        place = stage, full_epoch, (index - 1) % num_batches, num_batches
        trainer.learner.take_step(*place, batch, index)
        trainer.stops.check()
        moments.append(DeviceTime(device))
        if index <= NUM_WARM_UP + 1:  # later steps are not waited for: they overlap as in a run
            fitting = _num_fitting(_seconds_between(moments)[least - 1 :], most_s)
            num_steps = trainer.ranks.share(min(most_steps, max(index, least - 1 + fitting)))
        if is_due := time.monotonic() - shown_s > BETWEEN_LINES_S:
            shown_s = time.monotonic()
        line = f"{stage.name}: step {index} of {num_steps}"
        trainer.log.show(line, {}, only_on_terminals=not is_due)
        if index >= num_steps:
            break
    return _seconds_between(moments)


def _seconds_between(moments: Sequence[DeviceTime]) -> list[float]:
    return [start.seconds_until(end) for start, end in pairwise(moments)]


def _num_fitting(times: Sequence[float], most_s: float) -> int:
    """Number of steps that fit into `most_s`, if each takes as long as the last one."""
    if not times:
        return NUM_STEPS
    return len(times) + int(max(most_s - sum(times), 0.0) / max(times[-1], 1e-9))


def _endless(trainer: Trainer, first_epoch: int) -> Iterator[Batch]:
    for epoch in count(first_epoch):
        yield from prefetch_to_device(trainer.data.train.epoch(epoch), trainer.runtime.device)


def _operations(trainer: Trainer, image_size: int | None) -> dict[str, float]:
    """Operations per image of each phase; losses that also read clean images need two passes."""
    step, data, model = trainer.step, trainer.data, trainer.model
    edge = image_size or data.image_size
    image = torch.zeros(1, data.num_channels, edge, edge, device=trainer.runtime.device)
    num_steps, passes = step.attack.steps, 2 if step.sam.rho > 0 else 1
    # hooks on layers may not be called by compiled code
    with model.without_savings(), torch.compiler.set_stance("force_eager"):
        phases = ideal_flops(model, image, step.cut, step.selection.names, num_steps, passes)
        forward = sum(cost.forward for cost in costs(model, image).values())
    if step.objective.needs_clean:
        phases |= {name: 2 * phases[name] for name in ("prefix", "sam")}
    extra = [step.objective.attack_loss.against_clean, step.attack.kind == "apgd"]
    phases["attack"] += forward * sum(extra) * (num_steps > 0)
    return phases


def _evaluation_seconds(trainer: Trainer, stage: StageCost) -> float:
    """Estimate the seconds of all evaluations from the second of two on a batch.

    The first may compile and record. Where steps take long, a single one of fewer images counts.
    """
    config, data, tower = trainer.config, trainer.data, trainer.engine.tower
    threat = ThreatModel(config.attack.norm, float(config.attack.epsilon))
    attacks = _attacks_during(config)
    (batch,) = islice(data.validation.epoch(1), 1)
    is_slow = stage.step_s > LONG_STEP_S
    if is_slow:
        most = max(1, int(batch.num_images * LONG_STEP_S / stage.step_s))
        batch = Batch(batch.images[:most], batch.labels[:most])
    with trainer.engine.evaluating() as attack:
        for _ in range(1 if is_slow else 2):
            started = time.perf_counter()
            evaluate(
                tower.classifier,
                [batch],
                attacks,
                threat,
                attack=attack,
                attacks_wrong=True,
                is_compiled=trainer.engine.runtime.is_compiled,
                teacher=tower.judge and tower.judge.embed,
                ranks=trainer.ranks,
            )
            elapsed = time.perf_counter() - started
    num_passes = max(1, batch.num_images) * _passes(attacks)
    return elapsed * passes_of_evaluation(trainer) / num_passes


def _attacks_during(config: Config) -> list[str]:
    """Attacks on the validation split during training."""
    return ["clean", f"pgd-{config.evaluation.steps}"]


def _passes(attacks: list[str]) -> int:
    """Forward passes that an image takes under these attacks, see `passes_of_evaluation`."""
    names = dict.fromkeys(["clean", *attacks])
    return sum(1 + 2 * num_attack_steps(name) for name in names)
