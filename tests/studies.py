"""Studies made up for the tests of their report."""

from dataclasses import replace
from types import MappingProxyType
from typing import Any

import numpy as np
from test_report import curve, fit

from experiments.pages import compare as compare_page
from experiments.pages import export, report
from experiments.pages.report import Provenance
from tljax import evaluate
from tljax.study.results import Result
from tljax.study.verdicts import Comparison, Study

PROVENANCE = Provenance({"jax": "0.8"}, "--seeds=0", "run")
NAMES = ("zero", "one", "two")
LEAVES = [("hidden_0/kernel", 30, 0), ("hidden_1/kernel", 20, 20), ("head/kernel", 10, 10)]
CUTS = [{"redraw": "above", "copy": n, "freeze": frozen} for n in (1, 2) for frozen in (True, False)]


def comparison(strategy: str, mean: float, word: str, **changes: Any) -> Comparison:
    """Of 5 pairs of fits on 2,000 images, half a point wide on each side, with a margin of one point."""
    usual = Comparison(
        source="digits",
        target="clothes",
        strategy=strategy,
        budgets=(10, 1000),
        against="scratch at equal target steps",
        fits=5,
        items=2000,
        mean=mean,
        low=mean - 0.005,
        high=mean + 0.005,
        word=word,
        margin=0.01,
        power=(0.834, 0.912),
        p=0.0213,
        size={"positive": "beyond", "negative": "within", "equivalent": "within", "undecided": "open"}.get(word, ""),
        power_equivalent=(0.1, 0.254),
    )
    return usual._replace(**changes)


FAMILY = [
    comparison("full", 0.0123, "positive", p=0.0004),
    comparison("last_k:k=2", -0.0213, "negative"),
    comparison("lora:rank=4", 0.0011, "equivalent", low=-0.0039, high=0.0061),
    comparison("bias_only", 0.00204, "undecided", low=-0.0096, high=0.01368, power=None),
]


def bins(rng: np.random.Generator) -> dict[str, Any]:
    """Of 40 examples of three classes, as a fit's line of results holds them."""
    return evaluate.calibration(rng.dirichlet([1.0] * 3, 40), rng.integers(0, 3, 40))


def rows(extra: bool = True) -> list[Result]:
    """Fits of scratch and four cuts over two seeds and two budgets; with all that a fit may have, or without."""
    result = []
    for number, options in enumerate([None, *CUTS]):
        for budget in (10, 1000):
            for seed in (0, 1):
                accuracy = 0.4 + 0.1 * np.log10(budget) + 0.03 * number + 0.02 * seed
                more = {
                    "evals": {"turned": accuracy - 0.2},
                    "step_flops": 1000.0 * (number + 1),
                    "retention": 0.9 - 0.1 * number,
                    "calibration": bins(np.random.default_rng([number, seed])),
                    "leaves": LEAVES,
                }
                name = "stages" if options else "scratch"
                about = {"source": "digits", "target": "clothes", "options": options or {}, "train_examples": budget}
                row = fit(name, seed, accuracy, **about, **(more if extra else {}))
                result.append(replace(row, name=f"{number}-{budget}-{seed}"))
    return result


def study(extra: bool = True, **changes: Any) -> Study:
    """Of those fits and that family."""
    fits = rows(extra)
    milestone = {
        "source": "digits",
        "target": "clothes",
        "strategy": "full",
        "train_examples": 10,
        "jump_start": "not defined",
        "asymptote": 0.8125,
        "time_to_threshold": ">600",
        "area": 0.75,
        "examples_saved": None,
        "flops": 1.5e12,
        "flops_with_source": 4.5e13,
        "seconds": 12.34,
        "seconds_with_source": 80.0,
    }
    usual = Study(
        rows=[fit("pretrain", 0, 0.97, source=None, target="digits", train_examples=5000), *fits],
        curves={row.name: curve(0.3, 0.6, 0.7) for row in fits},
        family=FAMILY,
        others=[
            comparison("full", 0.031, "", budgets=(10,), p=None, power=None),
            comparison("full", -0.004, "", budgets=(1000,), p=None, power=None),
            comparison("full", -0.05, "", against="scratch at equal source and target steps"),
        ],
        milestones=[milestone],
        verdict="Digits help clothes where labels are few.",
        notes=["untuned", "looked once of 1 planned"],
        images={"clothes": (np.full((2, 4, 4, 1), 99, np.uint8), ["coat taken for shirt", "bag taken for coat"])},
    )
    return usual._replace(**changes)


def page(shown: Study, classes: Any = MappingProxyType({}), title: str = "Digits", provenance: Any = PROVENANCE) -> str:
    """Its report, as HTML."""
    return report.render(compare_page.sections(shown, classes), title=title, lead=shown.verdict, provenance=provenance)


def files(shown: Study, classes: Any = MappingProxyType({}), title: str = "Digits") -> dict[str, bytes]:
    """The files beside the report."""
    return export.files(shown, compare_page.sections(shown, classes), title)


def nothing() -> Study:
    """A study that has not begun."""
    return Study([], {}, [], [], [], "Nothing has been measured.", [], {})
