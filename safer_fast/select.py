"""The table of layers by score: `python -m safer_fast.select CHECKPOINT`; writes selection.json."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from safer_fast.command_configs import SelectConfig
from safer_fast.command_line import new_parser, parse, run, with_underscores


def main(arguments: Sequence[str]) -> None:
    """`python -m safer_fast.select RUN [flags]`: prints the ranked layers, writes them as JSON."""
    parser = new_parser("select", "Rank the layers of a trained model by sharpness.")
    parser.add_class_arguments(SelectConfig, None, skip={"run"})
    parser.add_argument("run", type=str, metavar="RUN", help="run folder")
    config = parse(parser, with_underscores(arguments), SelectConfig)
    for flag, value in (("--num-images", config.num_images), ("--steps", config.steps)):
        if value is not None and value < 1:
            raise ValueError(f"{flag}: expected at least 1, got {value}")
    if not config.rho > 0:
        raise ValueError(f"--rho: expected above 0, got {config.rho}")
    if not 0 < config.fraction <= 1:
        raise ValueError(f"--fraction: expected above 0, at most 1, got {config.fraction}")
    if config.criterion == "all":
        raise ValueError("--criterion: expected one that scores layers, got all")
    select(config)


def select(config: SelectConfig) -> list[str]:
    """Scores the layers of a run's model; prints the table, writes it, gives the selected names."""
    from safer_fast.checkpoint import save_json
    from safer_fast.selection import select_layers

    scores = _scores(config)
    selected = select_layers(scores, fraction=config.fraction)
    ranked = sorted(scores, key=lambda name: (-scores[name], name))
    for place, name in enumerate(ranked, start=1):
        mark = "*" if name in selected else " "
        print(f"{place:>4} {mark} {name:<32} {scores[name]: .6e}")
    output = Path(config.output) if config.output else Path(config.run) / "selection.json"
    content = {
        "criterion": config.criterion,
        "rho": config.rho,
        "radius": config.radius,
        "fraction": config.fraction,
        "selected": selected,
        "scores": {name: scores[name] for name in ranked},
    }
    save_json(content, output)
    print(f"{len(selected)} of {len(scores)} layers selected (*); written to {output}")
    return selected


def _scores(config: SelectConfig) -> dict[str, float]:
    import torch

    from safer_fast.attack import default_step_size, pgd
    from safer_fast.data import as_pixels, load_data
    from safer_fast.run_folder import load_run
    from safer_fast.selection import candidates, rank_layers

    loaded = load_run(Path(config.run), config.weights, config.device)
    threat, device = loaded.config.attack, loaded.model.mean.device
    epsilon = float(threat.epsilon if config.epsilon is None else config.epsilon)
    steps = config.steps or threat.steps
    data = load_data(
        loaded.config.data,
        batch_size=loaded.config.batch_size,
        seed=loaded.config.seed,
        device=device,
    )
    batches = [batch.to(device) for batch in data.train.probe(config.num_images, config.seed)]
    generator = torch.Generator(device).manual_seed(config.seed)

    def attack(model: torch.nn.Module, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        step_size = default_step_size(epsilon, steps)
        return pgd(
            model,
            images,
            labels,
            epsilon=epsilon,
            step_size=step_size,
            steps=steps,
            norm=threat.norm,
            generator=generator,
        )

    return rank_layers(
        loaded.model,
        [(as_pixels(batch.images), batch.labels) for batch in batches],
        criterion=config.criterion,
        rho=config.rho,
        radius=config.radius,
        attack=attack,
        names=candidates(loaded.model, config.from_block),
        generator=torch.Generator().manual_seed(config.seed),
    )


if __name__ == "__main__":
    run(main)
