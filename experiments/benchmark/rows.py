"""What each row of the benchmark measures: its cases, their sides, and what is told of them."""

import functools
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from experiments.benchmark import processes
from experiments.benchmark.processes import CHECKOUT, SIDES, Patience, Running, Taken
from experiments.benchmark.sides import BATCH, CLASSES, OF_PYTORCH, Work
from tljax import switches

ON_HOST = ("full", "cnn", "probe", "probes", "trials", "stream", "whole", "growth")
"""One fit of everything; of a convolutional network; of the head alone; 32 of the head; a search; streamed data;
`reference.flags`; larger fits."""
ON_ACCELERATOR = ("full", "fits", "most_fits", "study", "probe", "vit", "vits", "cnn", "deterministic")
"""One fit; 8 and 64; 512; `study.flags`; the head alone; a vision transformer; 8 of them; a convolutional network; what
determinism costs: the most important first, for whoever has a device for some minutes."""
OF_PROGRAMS = {"whole": ("transfer", "reference.flags"), "study": ("compare", "study.flags")}
"""{row: (program, its flagfile)} of the rows that run whole programs."""
PRECISIONS = ("float32", "tf32", "bfloat16")
OF_TLJAX = ("tljax", "stream", "probes", "trials")
"""Sides that another checkout of tljax can be measured by."""
DETERMINISM = {
    "deterministic operations": switches.DETERMINISTIC,
    "operations as they come": switches.DETERMINISTIC.replace("true", "false"),
    "none chosen by timing": "xla_gpu_deterministic_ops=true",
}
"""{what is asked of XLA: its flag}: deterministic operations alone; any; and no kernel chosen by timing either."""


class Measurement(NamedTuple):
    """One line of the table."""

    row: str
    side: str
    value: float
    """The median, in the unit that `row` names: seconds, GFLOP/s, MB or a share."""
    ratio: float | None = None
    """The median over rounds of its ratio to that of the side `over`: how many times as long, or as much, it takes."""
    values: Sequence[float] = ()
    """Of each round."""
    device: str = ""
    """The kind of the device."""
    over: str = ""
    ratios: Sequence[float] = ()


class Options(NamedTuple):
    """What is measured of each row."""

    rounds: int = 7
    steps: int = 600
    """Of a turn."""
    fits: tuple[int, ...] = (8, 64, 512)
    """How many fits side by side: the last number is the row most_fits, the others are the row fits."""
    precisions: tuple[str, ...] = ("float32",)
    """'float32', 'tf32', and 'bfloat16' of tljax alone, with parameters, losses and sums in float32."""
    torch_python: str = ""
    """The Python that has PyTorch; "" for none."""
    baseline: Path | None = None
    """Another checkout of tljax, whose sides are measured too."""
    cuda: bool = False
    """Whether there is a GPU, so that PyTorch's steps are captured in CUDA graphs."""
    keras: bool = False
    """Whether Keras is installed."""
    program_rounds: int = 3
    """How often whole programs run."""
    manual_dir: Path | None = None


class Side(NamedTuple):
    """One side of a case."""

    work: Work | None
    """What it trains; None of a whole program."""
    over: str = ""
    """The side over which its ratio is; "" for the first of the case."""
    times: float = 1.0
    """By which its seconds are multiplied: a share of several fits, or a part for a whole."""
    variables: Mapping[str, str] = {}
    """Environment variables of its own."""
    checkout: Path = CHECKOUT
    program: tuple[str, str] | None = None
    """(Program, flagfile); ("", "") is the reference experiment in PyTorch."""


def cases(row: str, options: Options) -> dict[str, dict[str, Side]]:
    """{what is measured: {side: what it does}} of a row, tljax first, and another checkout's after its own."""
    sides_by_row: dict[str, Callable[[Options], dict[str, dict[str, Side]]]] = {
        "full": _full,
        "probe": _probe,
        "probes": _probes,
        "trials": _trials,
        "stream": _stream,
        "growth": _growth,
        **{name: functools.partial(_one_fit, name) for name in NAMES},
        "deterministic": _deterministic,
        **{name: functools.partial(_fits, name) for name in ("fits", "most_fits", "vits")},
        **{name: functools.partial(_programs, name) for name in OF_PROGRAMS},
    }
    every_side = sides_by_row[row](options)
    return {case: _with_baseline(_possible(sides, options), options) for case, sides in every_side.items()}


def _possible(sides: Mapping[str, Side], options: Options) -> dict[str, Side]:
    """The sides for which everything is there; bfloat16 is tljax's alone."""

    def possible(side: Side) -> bool:
        if side.work is None:
            return side.program != ("", "") or bool(options.torch_python)
        work = side.work
        if work.precision == "bfloat16" and work.side != "tljax":
            return False
        if work.side in OF_PYTORCH:
            return bool(options.torch_python) and (work.side != "captured" or options.cuda)
        return work.side != "keras" or options.keras

    return {name: side for name, side in sides.items() if possible(side)}


def _with_baseline(sides: Mapping[str, Side], options: Options) -> dict[str, Side]:
    """The sides, and after each of tljax the same of the other checkout."""
    result: dict[str, Side] = {}
    for name, side in sides.items():
        result[name] = side
        is_tljax = side.work.side in OF_TLJAX if side.work else side.program != ("", "")
        if options.baseline and is_tljax:
            result[f"{name}, before"] = side._replace(checkout=options.baseline, over=name)
    return result


# ---- The rows


def _full(options: Options) -> dict[str, dict[str, Side]]:
    result = {}
    for precision in options.precisions:
        work = functools.partial(Work, precision=precision, steps=options.steps, turns=options.rounds + 2)
        sides = {
            "tljax": Side(work("tljax")),
            "plain JAX": Side(work("plain")),
            "PyTorch, eager": Side(work("eager")),
            "PyTorch, compiled": Side(work("compiled")),
            "PyTorch, captured in a CUDA graph": Side(work("captured")),
        }
        if not options.cuda:
            sides |= {
                "a jitted step": Side(work("jitted_step")),
                "Keras on JAX": Side(work("keras")),
                "tljax, 4 at once, each": Side(work("tljax", fits=4), times=1 / 4),
            }
        result[f"784-512-10, 1 fit, {precision}"] = sides | {"large product": Side(work("product"))}
    return result


def _probe(options: Options) -> dict[str, dict[str, Side]]:
    result = {}
    for precision in options.precisions:
        work = functools.partial(Work, precision=precision, steps=options.steps, turns=options.rounds + 2)
        graph = "captured" if options.cuda else "eager"
        result[f"784-512-10, head alone, 1 fit, {precision}"] = {
            "tljax": Side(work("tljax", trains="head")),
            "plain JAX, on features": Side(work("plain", trains="head")),
            "PyTorch, eager, on features": Side(work("eager", trains="head")),
            f"PyTorch, {graph}, layer frozen": Side(work(graph, trains="head_in_step")),
            **({"PyTorch, captured, on features": Side(work(graph, trains="head"))} if options.cuda else {}),
        }
    return result


def _probes(options: Options) -> dict[str, dict[str, Side]]:
    work = functools.partial(Work, steps=10 * options.steps, turns=options.rounds + 2)
    return {
        "784-512-10, 32 heads of 10 epochs with compilation": {
            "tljax": Side(work("probes", trains="head", fits=32)),
            "PyTorch, eager, layer frozen (1 x 32)": Side(work("eager", trains="head_in_step"), times=32),
        }
    }


def _trials(options: Options) -> dict[str, dict[str, Side]]:
    return {
        "64 trials of a linear probe": {
            "tljax, together": Side(Work("trials")),
            "tljax, one by one": Side(Work("trials", many="alone")),
        }
    }


def _stream(options: Options) -> dict[str, dict[str, Side]]:
    work = functools.partial(Work, "stream", steps=options.steps, turns=options.rounds + 2)
    costs = {"nothing": 0.0, "a tenth of a step": 0.1, "a fifth of a step": 0.2}
    return {
        "784-512-10, 1 fit of a stream": {
            "tljax, resident": Side(work()),
            **{f"tljax, streamed, a batch costs {name}": Side(work(share=share)) for name, share in costs.items()},
        }
    }


SIZES = ((6_000, 512), (60_000, 512), (600_000, 512), (60_000, 128), (60_000, 1024), (60_000, 4096))
"""(Examples, width) of the row growth."""


def _growth(options: Options) -> dict[str, dict[str, Side]]:
    result = {}
    for examples, width in SIZES:
        work = functools.partial(Work, examples=examples, width=width, steps=options.steps, turns=options.rounds + 2)
        result[f"{examples:,} examples, width {width}"] = {
            "tljax": Side(work("tljax")),
            "PyTorch, eager": Side(work("eager")),
        }
    return result


NAMES = {"vit": "vit, 6 blocks, width 64", "cnn": "cnn, 16 and 32 channels"}
"""What rows are called that train a model other than the perceptron."""


def _one_fit(model: str, options: Options) -> dict[str, dict[str, Side]]:
    result = {}
    for precision in options.precisions:
        work = functools.partial(
            Work, model=model, precision=precision, steps=_sixth(options), turns=options.rounds + 2
        )
        result[f"{NAMES[model]}, 1 fit, {precision}"] = {
            "tljax": Side(work("tljax")),
            "plain JAX": Side(work("plain")),
            "PyTorch, eager": Side(work("eager")),
            "PyTorch, compiled": Side(work("compiled")),
            "PyTorch, captured in a CUDA graph": Side(work("captured")),
        }
    return result


def _sixth(options: Options) -> int:
    """The steps of a turn of a model that takes longer."""
    return max(1, options.steps // 6)


def _fits(row: str, options: Options) -> dict[str, dict[str, Side]]:
    few, most = options.fits[:-1], options.fits[-1:]
    name = NAMES["vit"] if row == "vits" else "784-512-10"
    result = {}
    for count in {"fits": few, "most_fits": most, "vits": few[:1]}[row]:
        for precision in options.precisions:
            work = functools.partial(
                Work,
                model="vit" if row == "vits" else "mlp",
                fits=count,
                precision=precision,
                steps=_sixth(options) if row == "vits" else options.steps,
                turns=options.rounds + 2,
            )
            ensemble = "PyTorch, torch.func ensemble" + (" in a CUDA graph" if options.cuda else "")
            result[f"{name}, {count} fits, {precision}"] = {
                "tljax, side by side": Side(work("tljax", many="vmap")),
                "plain JAX, vmap": Side(work("plain")),
                **({"tljax, as auto decides": Side(work("tljax"))} if count == few[0] else {}),
                ensemble: Side(work("ensemble")),
            }
    return result


def _deterministic(options: Options) -> dict[str, dict[str, Side]]:
    turns = options.rounds + 2
    works = {
        "784-512-10, 1 fit, float32": Work("tljax", steps=options.steps, turns=turns),
        f"{NAMES['vit']}, 1 fit, float32": Work("tljax", model="vit", steps=_sixth(options), turns=turns),
        "gradients of an embedding": Work("embedding", steps=options.steps, turns=turns),
    }
    return {
        f"{case}, what determinism costs": {
            f"{'tljax' if work.side == 'tljax' else 'plain JAX'}, {name}": Side(
                work, variables={"XLA_FLAGS": f"--{text}"}
            )
            for name, text in DETERMINISM.items()
        }
        for case, work in works.items()
    }


def _programs(row: str, options: Options) -> dict[str, dict[str, Side]]:
    program, flagfile = OF_PROGRAMS[row]
    sides = {"tljax": Side(None, program=(program, flagfile))}
    if row == "whole":
        sides |= {"PyTorch": Side(None, program=("", ""))}
    shorter = " ".join(_shorter(row, options))
    return {f"{flagfile}{' ' if shorter else ''}{shorter} from shell to table": sides}


def _shorter(row: str, options: Options) -> list[str]:
    """Flags that make a program shorter where turns are."""
    if row == "whole":
        return ["--seeds=0", *([] if options.steps == 600 else ["--epochs=1"])]
    steps = options.steps
    return [] if steps == 600 else [f"--steps={steps}", f"--source_steps={steps}", "--seeds=0,1"]


# ---- From a row to its measurements


def shared(rows: Sequence[str], options: Options) -> dict[str, Any]:
    """What the sides of these rows share, as `sides.prepare` takes it."""
    works = [side.work for row in rows for case in cases(row, options).values() for side in case.values() if side.work]
    steps = max([work.steps for work in works], default=options.steps)
    fits: dict[int, int] = {}
    for work in works:
        fits[work.examples] = max(fits.get(work.examples, 1), 1 if work.side == "probes" else work.fits)
    return {
        "manual_dir": str(options.manual_dir) if options.manual_dir else None,
        "sizes": sorted(fits.items()),
        "steps": steps,
        "models": sorted({(work.model, work.width) for work in works}),
    }


def starter(side: Side, row: str, folder: Path, options: Options) -> Callable[[], Running]:
    """The function that starts a side."""
    surroundings = processes.environment(side.checkout, side.variables)
    if side.work is not None:
        python = options.torch_python if side.work.side in OF_PYTORCH else None
        arguments = [str(folder), json.dumps(side.work._asdict())]
        return lambda: processes.Served(arguments, surroundings, *([python] if python else []))
    assert side.program is not None
    program, flagfile = side.program
    if not program:
        epochs = "10" if options.steps == 600 else "1"
        reference = {"warm": lambda _: [str(SIDES), "reference", str(options.manual_dir), epochs]}
        return lambda: processes.Program(reference, surroundings, options.torch_python)

    def command(turn: Path, workdir: str) -> list[str]:
        flags = [f"--flagfile={CHECKOUT / 'experiments' / 'flags' / flagfile}", f"--manual_dir={options.manual_dir}"]
        flags += [f"--data_dir={folder / 'data'}", f"--compilation_cache={turn / 'compiled'}"]
        flags += [f"--workdir={turn / workdir}", *_shorter(row, options)]
        return [str(SIDES), "program", str(turn / "record.json"), str(time.time()), f"experiments.{program}", *flags]

    commands = {name: functools.partial(command, workdir=name) for name in ("cold", "warm")}
    return lambda: processes.Program(commands, surroundings)


def measure(
    row: str,
    case: str,
    sides: Mapping[str, Side],
    folder: Path,
    options: Options,
    patience: Patience,
    at_once: int = 1,
    note: Callable[[str], None] = lambda line: None,
) -> tuple[list[Measurement], dict[str, str]]:
    """(The measurements of a case, versions of libraries in its processes); why a side is left out goes to `note`."""
    programs = row in OF_PROGRAMS
    taken = processes.take_turns(
        {name: starter(side, row, folder, options) for name, side in sides.items()},
        options.program_rounds - 1 if programs else options.rounds,
        patience,
        1 if programs else at_once,
        0 if programs else 1,
        lambda line: note(f"{case}: {line}"),
    )
    versions: dict[str, str] = {}
    for result in taken.values():
        versions |= result.first.get("versions", {})
    measurements = _program_measurements(case, sides, taken) if programs else _turn_measurements(case, sides, taken)
    return measurements, versions


def _turn_measurements(case: str, sides: Mapping[str, Side], taken: Mapping[str, Taken]) -> list[Measurement]:
    """The measurements of sides that trained turns."""
    several = {name: result for name, result in taken.items() if result.turns}
    work = next(iter(sides.values())).work
    steps = work.steps if work else 0
    is_epoch = work is not None and steps * BATCH == work.examples
    unit = "s" if any(word in case for word in ("heads", "trials")) else "s/epoch" if is_epoch else f"s/{steps} steps"
    trained = {name: result for name, result in several.items() if "rate" not in result.first}
    seconds = {name: [sides[name].times * turn["seconds"] for turn in result.turns] for name, result in trained.items()}
    device = {name: str(result.first["device"]) for name, result in several.items()}

    def rows(what: str, values: Mapping[str, Sequence[float] | None], ratios: bool = True) -> list[Measurement]:
        present = {name: list(numbers) for name, numbers in values.items() if numbers}
        return compared(f"{case}: {what}", present, sides, device, ratios)

    def first_turn(key: str, scale: float = 1.0) -> dict[str, list[float] | None]:
        return {
            name: [result.first[key] * scale] if result.first.get(key) else None for name, result in trained.items()
        }

    measurements = rows(unit, seconds)
    measurements += rows("start and first turn, s", first_turn("start"))
    measurements += rows("of it tracing and compiling, s", first_turn("compiling"))
    peaks = {name: [result.peak_bytes / 1e6] if result.peak_bytes else None for name, result in trained.items()}
    measurements += rows("peak, MB", peaks)
    measurements += rows("million FLOPs a step", first_turn("flops", 1e-6))
    measurements += rows("peak of the training program, MB", first_turn("program_bytes", 1e-6))
    measurements += rows(
        "loss after the first turn", {n: result.first.get("loss") for n, result in trained.items()}, False
    )
    rates = [turn["rate"] for result in several.values() for turn in result.turns if "rate" in turn]
    if rates:
        measurements.append(
            Measurement(f"{case}: large product, best GFLOP/s", "JAX", max(rates) / 1e9, None, [r / 1e9 for r in rates])
        )
        flops = steps * BATCH * products_flops(work.width if work else 0)
        share = {
            n: [flops / took / max(rates) for took in s] for n, s in seconds.items() if not n.startswith("PyTorch")
        }
        measurements += rows("share of the large product's best rate", share)
    waits = {n: [t["waited"] / t["seconds"] for t in r.turns] for n, r in trained.items() if "waited" in r.first}
    measurements += rows("share of the time in which data are waited for", waits, False)
    accuracies = [
        np.array(result.turns[-1]["accuracies"]) for result in trained.values() if "accuracies" in result.first
    ]
    if len(accuracies) > 1:
        for other, name in zip(accuracies[1:], list(trained)[1:], strict=False):
            most = float(100 * np.abs(other - accuracies[0]).max())
            measurements.append(
                Measurement(f"{case}: accuracies differ by at most, points", name, most, None, (), device[name])
            )
    return measurements


def products_flops(width: int) -> int:
    """FLOPs of the products for one example of 784-width-10: the input needs no gradient."""
    return 2 * (2 * 784 * width + 3 * width * CLASSES)


def _program_measurements(case: str, sides: Mapping[str, Side], taken: Mapping[str, Taken]) -> list[Measurement]:
    """The measurements of whole programs."""
    turns = {name: [result.first, *result.turns] for name, result in taken.items()}
    device: dict[str, str] = {}
    for name, parts in turns.items():
        device[name] = next((run["device"] for turn in parts for run in turn.values() if run.get("device")), "cpu")
    measurements = []
    for kind in ("cold", "warm"):
        runs = {name: [turn[kind] for turn in parts if kind in turn] for name, parts in turns.items()}
        for key, what in (("seconds", "s"), ("first_step", "until the first step, s"), ("compiling", "compiling, s")):
            values = {n: [run[key] for run in several if run.get(key)] for n, several in runs.items()}
            present = {name: numbers for name, numbers in values.items() if numbers}
            measurements += compared(f"{case}, {kind}: {what}", present, sides, device)
    peaks = {name: [result.peak_bytes / 1e6] for name, result in taken.items() if result.peak_bytes}
    return measurements + compared(f"{case}: peak on the host, MB", peaks, sides, device)


def compared(
    row: str,
    values: Mapping[str, Sequence[float]],
    sides: Mapping[str, Side],
    device: Mapping[str, str],
    ratios: bool = True,
) -> list[Measurement]:
    """Each side's median, and the median over rounds of its ratio to the side over which it is.

    >>> sides = {"tljax": Side(None), "other": Side(None)}
    >>> [(m.value, m.ratio) for m in compared("s", {"tljax": [1.0, 2, 4], "other": [3.0, 4, 20]}, sides, {})]
    [(2.0, 1.0), (4.0, 3.0)]
    """
    first = next(iter(sides))
    measurements = []
    for name, numbers in values.items():
        over = sides[name].over or first
        base = values.get(over, ())
        round_ratios = [x / y for x, y in zip(numbers, base, strict=False) if y] if ratios else []
        ratio = float(np.median(round_ratios)) if round_ratios else None
        value = float(np.median(numbers)) if ratios or "share" in row else float(numbers[0])
        measurements.append(
            Measurement(row, name, value, ratio, list(numbers), device.get(name, ""), over, round_ratios)
        )
    return measurements
