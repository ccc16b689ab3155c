"""Every setting of a run: typed dataclasses, one level of groups, each with unit and meaning."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from safer_fast.config import ranges
from safer_fast.config.ranges import above_zero, at_least, between, ranged

SAVINGS = ("patch-order", "class-token", "prefix", "stored-bf16")
"""patch-order: pixels are stored in patches during a step, the patch embedding is a matrix product.
class-token: the last block computes only the tokens that the head reads.
prefix: blocks below the first selected layer run once for both SAM passes.
stored-bf16: matrices are stored in bf16 in place of being cast in every forward pass."""


class Radius(float):
    """A float that is also accepted as a fraction, such as `8/255`."""


class Names(list[str]):
    """A list of names that is also accepted as one comma-separated string."""


@dataclass
class ModelConfig:
    """The network: any timm vision transformer."""

    name: str = "vit_small_patch16_224"
    """Model name in timm."""
    pretrained: bool = False
    """Start from timm's pretrained weights, fetched from its hub."""
    checkpoint: str | None = None
    """Start from these weights, in the network that they were trained in: a run folder, a folder of
    the Hugging Face hub or hf-hub:NAME, or a file with timm's names (.safetensors, .pth, .bin).
    Tensors that do not fit the data are adapted: docs/fine-tuning.md."""
    patch_size: int | None = ranged(None, at_least(1, ranges.EDGE))
    """Edge of a patch in pixels; default: the model's own."""
    drop_path_rate: float = ranged(0.0, between(0, 0.99))
    """Stochastic depth rate in [0, 1)."""
    arguments: dict[str, Any] = field(default_factory=dict)
    """Further keyword arguments for timm.create_model, e.g. {depth: 4, embed_dim: 64}."""


@dataclass
class DataConfig:
    """Source of the images, their augmentation, and the backend that loads them."""

    path: str | None = None
    """A .parquet file or folder of them (Hugging Face image schema), a folder of images
    (train/CLASS/*.jpg), webdataset tar files (DIR or DIR/train-{000..099}.tar), an .npz file,
    digits or synthetic (noise that costs nothing); default: digits, those of scikit-learn."""
    validation_path: str | None = None
    """Validation data in the same formats; default: found with the training data or split off."""
    test_path: str | None = None
    """Data for the final figures, in the same formats; default: found with the training data."""
    validation_fraction: float = ranged(0.1, between(0.001, 0.9))
    """Share of training rows used as validation split if the data has none, in (0, 1)."""
    max_images: int | None = ranged(None, at_least(1, ranges.IMAGES))
    """Use at most this many training images, drawn with the seed, covering as many classes as
    possible; default: all."""
    image_column: str | None = None
    """Column of images in parquet files; default: image or img, or the only one of images."""
    label_column: str | None = None
    """Column of labels in parquet files, integers or text, such as fine_label; default: label, or
    the only one that metadata or name calls labels."""
    image_size: int | None = ranged(None, at_least(2, ranges.EDGE))
    """Edge in pixels that images are resized to; default: their own, the same for all."""
    augmentation: Literal["auto", "none", "shift", "crop", "random-resized-crop"] = "auto"
    """auto: none up to 16 pixels, crop (pad 4, crop, flip) up to 64, random-resized-crop (and
    flip) above."""
    randaugment: int = ranged(0, between(0, 30, "a magnitude"))
    """Magnitude of RandAugment, 0 to 30, two operations for each training image; 0: none."""
    random_erasing: float = ranged(0.0, between(0, 1))
    """Probability that a rectangle of a training image is erased."""
    mixup: float = ranged(0.0, at_least(0, ranges.FACTOR))
    """Alpha of Mixup, which blends pairs of training images and their labels; 0: none."""
    cutmix: float = ranged(0.0, at_least(0, ranges.FACTOR))
    """Alpha of CutMix, which pastes a rectangle of another image; with mixup, every other batch on
    average; 0: none."""
    backend: Literal["auto", "dali", "torch", "device"] = "auto"
    """Backend that prepares batches. device: data that fits (1 GiB decoded) is decoded once, held
    on the device, and shuffled, cropped and flipped there. dali: NVIDIA DALI, on the GPU or on the
    CPU. torch: worker processes. auto: device if the data fits, else dali if it is installed, else
    torch."""
    num_workers: int = ranged(2, at_least(0, 1024))
    """Worker processes, or threads of dali, that decode images; 0: none. Data on the device is
    decoded once, at the start."""
    prefetch: int = ranged(2, at_least(1, 1024))
    """Batches prepared in advance, by dali or by each worker process."""
    bad_images: Literal["error", "skip"] = "error"
    """Images that cannot be read. error: the run ends and names the first. skip: they are left out,
    counted and reported."""


@dataclass
class AttackConfig:
    """The threat model and the attack that training runs against."""

    norm: Literal["linf", "l2"] = "linf"
    """Shape of the ball around each image."""
    epsilon: Radius = ranged(Radius(8 / 255), ranges.EPSILON)
    """Radius of the ball; pixels are in [0, 1]."""
    steps: int | Literal["auto"] = ranged("auto", at_least(0, ranges.ITERATIONS))
    """Iterations of PGD; 1 is FGSM-RS, 0 is clean training. auto: as few as attack nearly as well
    as PGD-20, by audits while training. The papers train with 10."""
    strength: float = ranged(0.99, between(0, 1))
    """auto: least loss after the attack, as a share of that after PGD-20 from the same start."""
    max_steps: int = ranged(10, at_least(1, ranges.ITERATIONS))
    """auto: most iterations, and their number until the first audit."""
    step_size: Radius | None = ranged(None, ranges.STEP_SIZE)
    """Length of one step; default: 1.25 epsilon for one step, 2.5 epsilon / steps for more."""
    clean_epochs: int = ranged(0, at_least(0, ranges.EPOCHS))
    """Epochs at epsilon 0 before the ramp."""
    epsilon_warmup_epochs: int = ranged(0, at_least(0, ranges.EPOCHS))
    """Epochs after the clean ones over which epsilon, and step_size with it, rises from 0."""
    precision: Literal["amp", "bf16", "fp8"] = "amp"
    """Precision of the attack in training, nowhere else. amp: that of --amp. bf16: features between
    blocks too, which amp keeps in fp32. fp8: as bf16, and the large matrices of the blocks are
    multiplied in FP8; for GPUs that have it (Hopper, Ada), simulated on a CPU."""
    fp8_from: int | Literal["auto"] = ranged("auto", at_least(0, 2**40))
    """With fp8, matrices of fewer elements stay in bf16; auto: on a GPU those that a timing, made
    once, shows no faster; on a CPU those of less than 2^21."""
    audit_every: int = ranged(250, at_least(1, ranges.STEPS))
    """Steps between two audits of steps auto, bf16 and fp8: a stronger attack on a few images."""
    audit_images: int = ranged(64, at_least(1, ranges.IMAGES))
    """Images of an audit, on each rank; of steps auto at most a quarter of a batch."""
    audit_ratio: float = ranged(0.98, between(0, 1))
    """Least loss after bf16 or fp8, as a share of that in amp; below it amp is used; 0: never."""

    @property
    def most_steps(self) -> int:
        """Iterations of the attack at its full strength."""
        return self.max_steps if self.steps == "auto" else self.steps


@dataclass
class ObjectiveConfig:
    """The loss on adversarial examples."""

    name: str = "pgd-at"
    """pgd-at: cross-entropy; trades, mart: with a regulariser towards the clean prediction; or the
    name of one of your own (docs/extending.md)."""
    beta: float = ranged(6.0, at_least(0, ranges.FACTOR))
    """Weight of the TRADES or MART regulariser."""
    label_smoothing: float = ranged(0.0, between(0, 0.99))
    """Label smoothing of the cross-entropy, in [0, 1)."""


@dataclass
class SelectionConfig:
    """Choice of the layers that SAFER fine-tunes."""

    criterion: str = "sharpness"
    """Score that ranks the layers: sharpness, gradient-norm, criticality, random, least-sharp; all:
    every parameter, norms and embeddings too; or one of your own (docs/extending.md)."""
    fraction: float = ranged(0.05, ranges.FRACTION)
    """Share of the layers that is selected, in (0, 1]; at least one layer."""
    every_epochs: int = ranged(10, at_least(0, ranges.EPOCHS))
    """Epochs between two selections; 0: select once."""
    warmup_epochs: int = ranged(0, at_least(0, ranges.EPOCHS))
    """Epochs of ordinary adversarial training of all parameters before SAFER; part of --epochs."""
    layers: Names | None = None
    """Explicit layer names or patterns (`blocks.1?.attn.*`) in place of a ranking."""
    norms: bool = False
    """Select with each layer the norms right before it."""
    radius: Literal["absolute", "relative"] = "absolute"
    """absolute: a layer is perturbed by rho; relative: by rho times the norm of its weights."""
    rho: float | None = ranged(None, above_zero(ranges.FACTOR))
    """Radius of the perturbation that measures sharpness; default: sam.rho, or 0.05 for 0."""
    from_block: int = ranged(0, at_least(0, ranges.EDGE))
    """Only layers of this block and above (and the head) are candidates; above 0 the blocks below
    can be skipped in a SAM pass."""
    candidates: Names | None = None
    """Only layers of these names or patterns are candidates: `blocks.*` leaves out patch embedding
    and head; default: all."""
    num_images: int = ranged(512, at_least(1, ranges.IMAGES))
    """Number of training images that the scores are measured on."""
    lora_rank: int = ranged(0, at_least(0, ranges.EDGE))
    """Train low-rank factors of this rank beside the selected layers (LoRA, by PEFT) in place of
    their weights; they are added to the weights at the next selection and at the end; 0: train the
    weights themselves."""

    @property
    def takes_all(self) -> bool:
        """True if every parameter is trained, without a selection."""
        return self.criterion == "all" and self.layers is None


@dataclass
class SAMConfig:
    """Sharpness-aware minimization over the selected layers."""

    rho: float = ranged(0.05, at_least(0, ranges.FACTOR))
    """Radius of the weight perturbation; 0: no second pass."""
    adaptive: bool = False
    """ASAM: perturbation in proportion to each weight's size."""
    layerwise: bool = False
    """One radius for each layer (see selection.radius) instead of one for all together."""
    sync: Literal["global", "local"] = "global"
    """Gradient by which each rank of torchrun perturbs the weights. global: of the whole batch, so
    that the number of ranks does not matter; local: of its own part of it (as SAM's authors do),
    which saves one of two all-reduces."""


@dataclass
class OptimConfig:
    """The optimizer and its schedule; each stage (warm-up, SAFER) runs the whole schedule."""

    name: Literal["adamw", "sgd", "apex-adam", "apex-sgd", "apex-lamb"] = "adamw"
    """torch's fused AdamW or SGD, or NVIDIA apex's fused optimizers if apex is built."""
    learning_rate: float = ranged(1e-3, above_zero(ranges.FACTOR))
    """Peak learning rate."""
    safer_learning_rate: float | None = ranged(None, above_zero(ranges.FACTOR))
    """Peak learning rate of the SAFER stage; default: learning_rate."""
    weight_decay: float = ranged(0.05, at_least(0, ranges.FACTOR))
    """Decay of weight matrices; norms, biases and embeddings are not decayed."""
    momentum: float = ranged(0.9, between(0, 0.9999))
    """Momentum of SGD, in [0, 1)."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Running-average coefficients of Adam and LAMB."""
    schedule: Literal["cosine", "step", "constant"] = "cosine"
    """Shape of the learning rate after its warm-up."""
    warmup_epochs: float = ranged(0.0, at_least(0, ranges.EPOCHS))
    """Epochs over which the learning rate of a stage rises linearly from 0."""
    milestones: tuple[float, ...] = (0.875, 0.95)
    """step: shares of the stage after which the learning rate is multiplied by decay."""
    decay: float = ranged(0.1, between(0, 1, "a factor"))
    """step: factor at each milestone."""
    min_learning_rate: float = ranged(0.0, at_least(0, ranges.FACTOR))
    """cosine: learning rate at the end."""
    clip_norm: float | None = ranged(None, above_zero(10**9))
    """Clip the gradient to this norm; default: no clipping."""
    ema_decay: float | None = ranged(None, between(0, 0.999999))
    """Average the weights with this decay per step, evaluate and export that; default: not."""


@dataclass
class RuntimeConfig:
    """Use of the machine; no setting changes results beyond rounding."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: CUDA if there is a GPU."""
    compile: Literal["auto", "on", "off"] = "auto"
    """torch.compile of the blocks; auto: if the run is long enough to win back the time."""
    cuda_graph: Literal["auto", "on", "off"] = "auto"
    """Capture attack iteration, SAM passes and update as CUDA graphs; auto: on CUDA, if the run is
    long enough to win back the time of capturing."""
    attention: Literal["auto", "flash", "cudnn", "math"] = "auto"
    """Attention kernel; auto: the fastest for the run's shape, timed once and cached."""
    deterministic: bool = True
    """Use only kernels that give the same bits each time."""
    tf32: bool = False
    """With --amp off on a GPU: multiply in TF32, faster and to three decimal digits."""
    attack_micro_batch: int | Literal["auto"] = ranged("auto", at_least(1, ranges.IMAGES))
    """Images attacked at a time; auto: all of a batch, fewer if memory does not suffice."""
    train_micro_batch: int | Literal["auto"] = ranged("auto", at_least(1, ranges.IMAGES))
    """Images at a time in the two SAM passes, whose gradients add up; auto: as in the attack."""
    exact_savings: Names = field(default_factory=lambda: Names(SAVINGS))
    """Work to skip without changing results beyond rounding: docs/performance.md."""
    num_threads: int | None = ranged(None, at_least(1, 4096))
    """CPU threads of torch; default: torch's own choice."""
    log_every_steps: int = ranged(50, at_least(1, ranges.STEPS))
    """Steps between two step lines in metrics.jsonl."""
    max_skipped_steps: int = ranged(10, at_least(1, ranges.STEPS))
    """Stop after this many steps in a row were skipped: loss or gradient were not finite."""


@dataclass
class CheckpointConfig:
    """Checkpoints to resume a stopped or killed run from; they do not change what is computed."""

    every_steps: int | None = ranged(None, at_least(1, ranges.STEPS))
    """Steps between two checkpoints; default: every_minutes decides alone."""
    every_minutes: float | None = ranged(10.0, above_zero(10**7, smallest=1e-9))
    """Minutes between two checkpoints; null: every_steps decides alone."""
    keep: int = ranged(2, at_least(1, 10**6))
    """Number of newest checkpoints to keep."""
    grace_s: float = ranged(25.0, above_zero(10**7, smallest=1e-3))
    """Seconds from the first SIGINT or SIGTERM after which the run ends even without a checkpoint;
    torchrun and most schedulers kill after 30."""


@dataclass
class EvaluationConfig:
    """Measurement of accuracy during and after training."""

    every_epochs: int = ranged(1, at_least(1, ranges.EPOCHS))
    """Epochs between two evaluations on the validation split; the last epoch always has one."""
    steps: int = ranged(10, at_least(1, ranges.ITERATIONS))
    """PGD steps of the evaluation during training."""
    max_images: int | None = ranged(1000, at_least(1, ranges.IMAGES))
    """Validation images of the evaluation during training, the same at each, stratified by class;
    null: all."""
    attacks: Names = field(default_factory=lambda: Names(["clean", "pgd-20"]))
    """Final figures: clean, fgsm, pgd-K, cw or cw-K, at attack.epsilon."""
    patience: int | None = ranged(None, at_least(1, ranges.EPOCHS))
    """End the run after this many evaluations at full epsilon without a better robust accuracy, in
    its last stage; default: never."""
    sentinel_images: int = ranged(128, at_least(0, ranges.IMAGES))
    """Training images on which every evaluation compares the training attack with PGD-20, to notice
    catastrophic overfitting; 0: none."""


@dataclass
class LogConfig:
    """Further loggers of a run; metrics.jsonl and TensorBoard's event file are always written."""

    wandb: bool = False
    """Send the metrics to Weights & Biases too, where it is installed (pip install wandb); its own
    variables such as WANDB_PROJECT and WANDB_MODE=offline apply."""


@dataclass
class Config:
    """A whole run."""

    amp: Literal["off", "bf16"] = "off"
    """bf16: matrices are stored and multiplied in bfloat16, masters and sums kept in float32."""
    seed: int = ranged(0, ranges.SEED)
    """Seed of everything random."""
    epochs: int = ranged(40, at_least(1, ranges.EPOCHS))
    """All epochs, selection.warmup_epochs among them."""
    batch_size: int = ranged(64, at_least(1, ranges.IMAGES))
    """Images per step, at most: an epoch is divided into the fewest equal batches."""
    output: str | None = None
    """Run folder; default: runs/<date>-<model>-<data>; an existing non-empty one is refused unless
    resumed."""
    resume: Literal["never", "auto", "must"] = "never"
    """Resume the run in --output from its newest checkpoint. auto: start a new run if there is
    none; must: a missing checkpoint is an error."""
    dry_run: bool = False
    """Take 20 steps of each stage, a minute of them at most, print speed, memory, operations and
    the time the run would need, and write nothing."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    attack: AttackConfig = field(default_factory=AttackConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    selection: SelectionConfig = field(default_factory=SelectionConfig)
    sam: SAMConfig = field(default_factory=SAMConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    log: LogConfig = field(default_factory=LogConfig)

    def to_dict(self) -> dict[str, Any]:
        """The configuration as plain nested dictionaries, ready for YAML or JSON."""
        return asdict(self)
