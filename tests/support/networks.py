"""Small networks of every family, with weights that make all parts matter."""

import torch
from torch import Tensor, nn

from safer_fast.config.schema import ModelConfig
from safer_fast.models.build import build_model
from safer_fast.models.robust_model import RobustModel

FAMILIES: dict[str, dict[str, object]] = {
    "vit_tiny_patch16_224": {"depth": 4, "embed_dim": 48},
    "deit_tiny_distilled_patch16_224": {"depth": 3, "embed_dim": 48},
    "deit3_small_patch16_224": {"depth": 3, "embed_dim": 48, "num_heads": 3},
    "convit_tiny": {"depth": 4, "local_up_to_layer": 2},
    "swin_tiny_patch4_window7_224": {
        "depths": (1, 1, 2, 1),
        "embed_dim": 24,
        "num_heads": (1, 2, 4, 8),
        "window_size": 2,
    },
    "eva02_tiny_patch14_224": {"depth": 3, "embed_dim": 48},
    "vit_small_patch16_dinov3": {"depth": 3, "embed_dim": 48, "num_heads": 3},
}
SHORT_SWIN = "swin of two stages"
"""All that blocks of Swin are, in three of them, which compile to code of their own: one, one that
shifts its windows, and one behind a merging of patches, whose window is all that is left."""
UNCUTTABLE = "xcit_nano_12_p16_224"
NUM_CLASSES = 10


def build(
    name: str = "vit_tiny_patch16_224",
    *,
    seed: int = 0,
    compute_dtype: torch.dtype = torch.float32,
    norms: bool = False,
    drop_path_rate: float = 0.0,
) -> RobustModel:
    """A small model of a family for 10 classes of 32x32 colour images."""
    torch.manual_seed(seed)
    arguments = dict(FAMILIES.get(name, {}))
    if is_short := name == SHORT_SWIN:
        name = "swin_tiny_patch4_window7_224"
        arguments = FAMILIES[name] | {"depths": (2, 1), "num_heads": (1, 2)}
    patched = name != UNCUTTABLE and not name.startswith("swin")
    config = ModelConfig(
        name=name,
        patch_size=8 if patched or is_short else 2 if name.startswith("swin") else None,
        drop_path_rate=drop_path_rate,
        arguments=arguments,
    )
    model = build_model(
        config,
        num_classes=NUM_CLASSES,
        image_size=32,
        compute_dtype=compute_dtype,
        norms=norms,
    )
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn_like(parameter)
            parameter.add_(noise, alpha=0.08 if parameter.ndim > 1 else 0.03)
    return model


def images_and_labels(num_images: int = 6, seed: int = 1) -> tuple[Tensor, Tensor]:
    """Random pixels [B, 3, 32, 32] in [0, 1] and labels [B]."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(num_images, 3, 32, 32, generator=generator)
    return images, torch.randint(NUM_CLASSES, (num_images,), generator=generator)


class PlainNetwork(nn.Module):
    """A module of no family that we know: convolution, linear layers, a batch norm."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.stem = nn.Conv2d(3, 8, 4, stride=4)
        self.norm = nn.BatchNorm2d(8)
        self.hidden = nn.Linear(8 * 64, 32)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(32, NUM_CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        features = self.norm(self.stem(images)).relu().flatten(1)
        logits: Tensor = self.head(self.drop(self.hidden(features).tanh()))
        return logits
