"""A search that is repeated under other tuning seeds: what it draws, what is refused, and the spread that pages say."""

import numpy as np
import pytest
from test_programs import command, results

from experiments import compare, search
from experiments.runs import directory, tunings
from experiments.runs.search_flags import FIRST_SEED, Search
from tljax.study import ledger
from tljax.study.verdicts import Comparison
from tljax.types import InputError

pytestmark = pytest.mark.usefixtures("no_pictures")


def test_tuning_seeds_have_no_trial_seed_in_common():
    seeds = [set(Search(search_seeds=3, tuning_seed=seed).trial_seeds) for seed in (None, 1, 2)]
    assert seeds[0] == {FIRST_SEED, FIRST_SEED + 1, FIRST_SEED + 2} and len(set.union(*seeds)) == 9
    assert len({Search(tuning_seed=seed).sampler_seed for seed in (None, 1, 2)}) == 3


def searched(folder, name, *lines):
    (folder / name).mkdir()
    text = "# python -m experiments.search\n" + "".join(f"--{line}\n" for line in lines)
    (folder / name / "flags.flags").write_text(directory.signed(text))
    return str(folder / name)


def test_only_one_search_repeated_under_other_seeds_is_taken(tmp_path):
    alike = ["space=learning_rate:in:0.1,0.2", "trials=4"]
    a, b, c, d = (
        searched(tmp_path, name, *alike[:1], f"trials={trials}", *more)
        for name, trials, more in (("a", 4, []), ("b", 4, ["tuning_seed=1"]), ("c", 4, ["tuning_seed=1"]), ("d", 5, []))
    )
    assert tunings.searches(f"{a},{b}") == [a, b] and tunings.searches(None) == []
    with pytest.raises(InputError, match="one --tuning_seed"):
        tunings.searches(f"{a},{b},{c}")
    with pytest.raises(InputError, match="another --trials"):
        tunings.searches(f"{a},{d}")
    assert tunings.notes([a], [], [], None)[0] == "searched: learning_rate:in:0.1,0.2, 4 trials each"


def test_a_confirmation_is_of_one_search(tmp_path):
    """The others' fits would be seen on the half that confirms, which the ledger then has not counted."""
    both = [searched(tmp_path, name, f"tuning_seed={seed}") for seed, name in enumerate("ab")]
    line = ["compare", "--confirm", "--registration=claim.json", f"--ledger={tmp_path / 'l'}"]
    with pytest.raises(InputError, match="a claim is of one recipe"):
        compare.main([*line, f"--tuned={','.join(both)}"])
    assert not (tmp_path / "l").exists()


def comparison(strategy, mean, word):
    known = {"source": "a", "target": "b", "budgets": (10,), "against": "scratch at equal target steps", "fits": 5}
    return Comparison(
        strategy=strategy, mean=mean, word=word, items=9, low=0.0, high=0.2, margin=0.1, power=None, p=None, **known
    )


def test_the_spread_is_the_range_of_the_differences_and_names_words_that_differ():
    family = [comparison("full", 0.012, "positive"), comparison("head_only", -0.01, "negative")]
    others = [
        [comparison("full", mean, word), comparison("head_only", -0.02, "negative")]
        for mean, word in ((0.002, "undecided"), (0.03, "positive"))
    ]
    repeated = [
        {(each.source, each.target, each.strategy, each.budgets): each for each in family_of} for family_of in others
    ]
    (text,) = tunings.spread(family, repeated)
    assert "tuned 3 times" in text
    assert (
        "full +1.20 points, +0.20 points, +3.00 points (a range of 2.80 points: positive, undecided, positive)" in text
    )
    assert "head_only -1.00 points, -2.00 points, -2.00 points (a range of 1.00 points)" in text.replace(
        "\N{MINUS SIGN}", "-"
    )
    (text,) = tunings.spread([each._replace(fits=8) for each in family], repeated)
    assert "full +1.20 points, +0.20 points (5 seeds), +3.00 points (5 seeds)" in text
    assert tunings.spread(family, []) == []


@pytest.mark.slow
def test_a_study_under_two_tuning_seeds_is_judged_by_the_first_and_says_both(tasks, tmp_path):
    flags = {"strategies": ("full",), "train_examples": ("all",), "steps": 6, "hidden": (4,), "learning_rate": None}
    space = ["--space=learning_rate:log:0.001:1", "--trials=2", "--per_strategy", "--validation=0.2"]
    for seed in (0, 1):
        line = command(tasks, tmp_path, **flags, workdir=tmp_path / f"s{seed}")
        search.main(["search", *line, *space, *([f"--tuning_seed={seed}"] if seed else [])])
    rates = [
        directory.flags_text(next((tmp_path / f"s{seed}" / "best").glob("full*.flags")))
        .split("--learning_rate=")[1]
        .split()[0]
        for seed in (0, 1)
    ]
    assert rates[0] != rates[1]
    both, book = f"--tuned={tmp_path / 's0'},{tmp_path / 's1'}", f"--ledger={tmp_path / 'l'}"
    flags |= {"steps": None, "epochs": None, "hidden": None, "batch_size": None, "workdir": tmp_path / "both"}
    compare.main(["compare", *command(tasks, tmp_path, **flags), both, "--nolonger_scratch", book])
    with ledger.opened(tmp_path / "l") as of_run:
        (look,) = of_run.of_kind("look")
    assert len(look["methods"]) == 2  # the recipes of both searches were tried
    text = (tmp_path / "both" / "report.md").read_text()
    assert "tuned 2 times under other tuning seeds" in text and "2 trials each" in text
    fits = [row for row in results(tmp_path / "both") if row.strategy == "full"]
    judged = {
        row["name"] for part in directory.read_record(tmp_path / "both" / "study.json")["parts"] for row in part["rows"]
    }
    assert len(fits) == 4 and len(judged & {row.name for row in fits}) == 2
    means = [np.mean([row.test_accuracy for row in fits if (row.name in judged) == first]) for first in (True, False)]
    scratch = [row for row in results(tmp_path / "both") if row.strategy == "scratch"]
    bases = [
        np.mean([row.test_accuracy for row in scratch if (row.name in judged) == first]) for first in (True, False)
    ]
    shown = [f"{100 * (mean - base):+.2f} points" for mean, base in zip(means, bases, strict=True)]
    assert ", ".join(shown) in text.replace("\N{MINUS SIGN}", "-")
