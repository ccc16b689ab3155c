"""A learner that loads another's state trains as the other does, bit for bit."""

from pathlib import Path

import torch

from safer_fast.config.command_line import parse_config
from safer_fast.training.trainer import Trainer

FLAGS = [
    "--epochs=1",
    "--batch-size=16",
    "--selection.warmup_epochs=0",
    "--selection.layers=blocks.2.mlp.fc1",
    "--attack.steps=1",
    "--attack.clean_epochs=0",
    "--attack.epsilon_warmup_epochs=0",
    "--optim.ema_decay=0.8",
    "--data.max_images=64",
    "--evaluation.attacks=clean",
    "--runtime.device=cpu",
    "--runtime.num_threads=1",
]


def test_a_loaded_state_is_trained_on_bit_for_bit(tmp_path: Path) -> None:
    trainers = [
        Trainer(parse_config([*FLAGS, f"--output={tmp_path / name}"]))
        for name in ("first", "second")
    ]
    first, second = (trainer.learner for trainer in trainers)
    for trainer in trainers:
        with trainer:
            trainer.begin_epoch(1)
    batches = list(trainers[0].data.train.epoch(1))
    stage, count = trainers[0].stage, len(batches)
    for index in (0, 1):
        first.take_step(stage, 1, index, count, batches[index], index)
    state, moved = first.state_dict(), first.step.model.layers["blocks.2.mlp.fc1"]
    assert {name.partition(".")[0] for name in state} == {
        "master",
        "average",
        "optimizer",
        "skips",
        "sums",
    }
    # parameters that did not move come from elsewhere
    start = {name: second.arenas.view(name, second.arenas.master).clone() for name in moved}
    start = second.arenas.state_dict() | {name: torch.zeros_like(t) for name, t in start.items()}
    second.load_state_dict(first.state_dict(moved), start)
    assert second.state_dict().keys() == state.keys()
    for learner in (first, second):
        learner.take_step(stage, 1, 2, count, batches[2], 2)
    after = second.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in first.state_dict().items())
    assert not torch.equal(
        after["master.blocks.2.mlp.fc1.weight"], start["blocks.2.mlp.fc1.weight"]
    )
    assert first.step.health.sums.take() == second.step.health.sums.take()
