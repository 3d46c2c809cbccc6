"""An atlas on a planted truth: one stage of the source is replaced by noise, and the atlas is to name it.

    python tests/planted_atlas.py [DRAWS] [--independent]

A source learns MNIST, and its target is MNIST again with its head kept, so that it knows all but what is wrong. Each
draw has another stage, noise, masks and labels. Prints a line a draw, and in how many the planted stage adds most.
"""

import json
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from experiments import atlas as program
from experiments import pretrain
from experiments.pages import figures
from experiments.runs import fit

INDEPENDENT = "--independent" in sys.argv
STAGES = [f"hidden_{i}" for i in range(5)]


def source(folder: Path) -> Path:
    """A run directory with a source of five hidden stages under two seeds."""
    recipe = ("--seeds=0,1", "--epochs=3", "--learning_rate=0.1", "--momentum=0.9", "--hidden=16,16,16,16,16")
    pretrain.main(["pretrain", "--source=mnist_10k", *recipe, f"--workdir={folder / 'source'}"])
    return folder / "source"


def with_noise(trained, stage: str, seed: int):
    """Sources in which every unit of a stage reads one direction of noise, with a weight of its own.

    The stage then passes one number on, which no stage above it can mend. Of noise that is drawn anew for each unit
    enough passes through, and to train the stage above mends as much (`main` counts that with --independent).
    """
    rng = np.random.default_rng(seed)

    def noise(path: str, leaf):
        leaf = np.asarray(leaf)
        if not path.startswith(f"{stage}/kernel"):
            return leaf
        rank_one = np.outer(rng.normal(size=leaf.shape[0]), rng.normal(size=leaf.shape[1]))
        drawn = rng.normal(size=leaf.shape) if INDEPENDENT else rank_one
        return (drawn * leaf.std() / drawn.std()).astype(leaf.dtype)

    return {
        key: source._replace(flat={path: noise(path, leaf) for path, leaf in source.flat.items()})
        for key, source in trained.items()
    }


def ranked(place: Path, folder: Path, draw: int, *more: str) -> tuple[str, dict[str, float]]:
    """(The stage that is wrong, {stage: what its cells add in sum}) of a draw."""
    stage, obtained = STAGES[draw % len(STAGES)], fit.obtain_source
    fit.obtain_source = lambda *arguments: with_noise(obtained(*arguments), stage, draw)
    flags = {
        **{
            "source_checkpoint": place,
            "target": "mnist_10k",
            "train_examples": 1000,
            "seeds": "0,1",
            "draw_seed": draw,
        },
        **{"hidden": "16,16,16,16,16", "steps": 50, "batch_size": 50, "learning_rate": 0.03, "momentum": 0.9},
        **{"masks": 32, "mask_seed": draw, "rates": "1,3", "group": 32, "pairs": 0, "strategies": "full"},
        "workdir": folder / f"draw{draw}",
    }
    try:
        values = [f"--{name}={value}" for name, value in flags.items()]
        program.main(["atlas", *values, *more])
    finally:
        fit.obtain_source = obtained
    numbers = json.loads((folder / f"draw{draw}" / "atlas.json").read_text())
    return stage, {row["stage"]: row["value"] for row in numbers["stages"]}


def main(draws: int) -> None:
    """Print a line a draw, and the count."""
    figures.svg = lambda figure: ""  # the pages are not looked at
    right = 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        place = source(folder)
        for draw in range(draws):
            began = time.process_time()
            stage, adds = ranked(place, folder, draw)
            first = max(adds, key=lambda name: adds[name])
            right += first == stage
            listed = ", ".join(f"{name} {100 * value:+.1f}" for name, value in adds.items())
            took = time.process_time() - began
            print(f"planted {stage}, first {first}: {listed}; {took:.1f} s of CPU", file=sys.stderr, flush=True)
    print(f"{right} of {draws} draws: the planted stage adds most", file=sys.stderr)


if __name__ == "__main__":
    main(int(next(iter(text for text in sys.argv[1:] if text.isdecimal()), 20)))
