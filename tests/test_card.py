"""Strategy cards: scores as bits, what a card says of them against NumPy, and cards of a tiny version end to end."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest

from experiments import card
from experiments.card import CardFlags
from experiments.pages import strategy_card as page
from experiments.runs import confirmation, directory, strategy_cards
from experiments.runs.strategy_cards import Arm, JudgedItems, Masks, OnTransfer, Reference, Transfer
from experiments.strategy_cards import tail
from tljax import models, paths, plugins, weights
from tljax.audit.lines import Check
from tljax.models import efficientnet_lite
from tljax.study import statistics
from tljax.types import InputError

SEEDS, ITEMS = (0, 1, 2, 3), 60
ENVIRONMENT = {"python": "3", "platform": "here", "versions": {"tljax": "0", "jax": "1"}, "cores": 2}


def arm(name, chance, seed, source=True, diverged=()):
    """An arm whose fits get each test item right with this chance."""
    rng = np.random.default_rng(seed)
    right = [rng.random((len(SEEDS), count)) < chance for count in (ITEMS, 30, 20)]
    cost = {"trained": 10, "total": 40, "beside": 7, "steps": 5, "step_flops": 1e6, "seconds": 0.5, "peak_bytes": None}
    explored = rng.random((2, 2, 2))
    kept = right[1] if source else None
    return Arm(name, 0.1, right[0], kept, right[2], diverged, ((0.5, 0.6), (0.7, 0.8)), explored, cost, "last")


def part(mine, others, groups=None, masks=None):
    rng = np.random.default_rng(9)
    order = rng.permutation(ITEMS)
    halves = {"explore": np.sort(order[:30]), "confirm": np.sort(order[30:])}
    if groups is not None:
        halves = {"explore": np.flatnonzero(groups % 2 == 0), "confirm": np.flatnonzero(groups % 2 == 1)}
    flags = {"seeds": SEEDS}
    transfer = Transfer("a_b", "a to b", flags, "b:blur=1", (0.1, 1.0), (7, 8), 1.0, "")
    items = JudgedItems("a", "b", np.arange(ITEMS) % 3, groups, halves, 15)
    arms = {each.strategy: each for each in others}
    reference = Reference(arms, {}, masks, ("b", "a", "c"), (0.9,) * len(SEEDS), ENVIRONMENT, "")
    return OnTransfer(transfer, items, mine, reference)


def contents(parts, explore=False, proofs=(), strategy="mine", order=1, environment=ENVIRONMENT):
    anchors = {each.transfer.name: 0 for each in parts}
    more = strategy, f"{strategy}.py:strategy", "c0de", tuple(parts), {}, proofs, anchors
    return page.Contents("tiny-cards-1", *more, explore, "", order, environment, 1.0)


OTHERS = (arm("scratch", 0.5, 1, source=False), arm("full", 0.6, 2), arm("head_only", 0.8, 3))


@pytest.mark.parametrize("items", [1, 7, 8, 61])
def test_bits_are_those_that_were_packed(items):
    right = np.random.default_rng(items).random((3, items)) < 0.5
    record = json.loads(json.dumps(strategy_cards.packed(right)))
    assert (strategy_cards.unpacked(record) == right).all()
    record["bits"][0] = record["bits"][0][:-4]
    with pytest.raises(ValueError, match="not of its items"):
        strategy_cards.unpacked(record)


def test_an_arm_is_read_as_it_was_written_and_one_other_item_changes_its_digest():
    mine = arm("mine", 0.7, 4, diverged=(2,))
    again = strategy_cards.arm_from_record(json.loads(json.dumps(strategy_cards.arm_to_record(mine))))
    assert strategy_cards.digest(again) == strategy_cards.digest(mine)
    assert (
        again.cost == mine.cost
        and again.trials == mine.trials
        and np.allclose(again.explored, mine.explored, atol=1e-6)
    )
    mine.source[1, 3] ^= True
    assert strategy_cards.digest(again) != strategy_cards.digest(mine)


@pytest.mark.parametrize("grouped", [False, True])
def test_gains_are_differences_of_items_of_their_half_and_intervals_those_of_statistics(grouped):
    groups = np.arange(ITEMS) // 3 if grouped else None
    mine = arm("mine", 0.9, 4)
    this = part(mine, OTHERS, groups)
    record = page.numbers(contents([this]))["transfers"]["a_b"]
    for half in ("explore", "confirm"):
        rows = this.items.halves[half]
        wanted = mine.target[:, rows].astype(float) - OTHERS[0].target[:, rows]
        interval = statistics.crossed(wanted, 0.95, None if groups is None else groups[rows])
        compared = record["from_scratch"][half]
        assert compared["mean"] == pytest.approx(wanted.mean(), abs=1e-12)
        assert (compared["low"], compared["high"]) == pytest.approx(interval[1:3], abs=1e-9)
        assert record["accuracy"][half] == pytest.approx(mine.target[:, rows].mean())
    assert record["from_scratch"]["confirm"]["word"] == "positive" and record["from_scratch"]["explore"]["word"] == ""
    rows = this.items.halves["confirm"]
    for other in OTHERS[1:]:
        wanted = (mine.target[:, rows].astype(float) - other.target[:, rows]).mean()
        assert record["from_others"][other.strategy]["mean"] == pytest.approx(wanted, abs=1e-12)
    assert record["rank"] == {"place": 1, "of": 4, "best": "head_only"}
    assert record["retention"] == pytest.approx(mine.source.mean(1), abs=1e-6)
    assert record["shift"] == pytest.approx(mine.shift.mean(1), abs=1e-6)


def test_the_best_and_the_rank_are_of_the_items_that_explore_alone():
    mine, best = arm("mine", 0.7, 4), arm("best", 0.5, 5)
    this = part(mine, [*OTHERS, best])
    best.target[:, this.items.halves["explore"]] = True
    best.target[:, this.items.halves["confirm"]] = False
    place, many, name = strategy_cards.rank(this)
    means = [each.target[:, this.items.halves["explore"]].mean() for each in (*OTHERS, best)]
    wanted = 1 + sum(mean > mine.target[:, this.items.halves["explore"]].mean() for mean in means)
    assert (place, many, name) == (wanted, 5, "best")


def test_a_fit_that_diverged_counts_as_the_commonest_class_of_its_half():
    mine = arm("mine", 0.9, 4, diverged=(1,))
    mine.target[1] = False
    this = part(mine, OTHERS)
    rows = this.items.halves["confirm"]
    share = np.bincount(this.items.labels[rows]).max() / len(rows)
    of_fits = [share if i == 1 else mine.target[i, rows].mean() for i in range(len(SEEDS))]
    wanted = np.mean(of_fits) - OTHERS[0].target[:, rows].mean()
    record = page.numbers(contents([this]))
    assert record["transfers"]["a_b"]["from_scratch"]["confirm"]["mean"] == pytest.approx(wanted, abs=1e-12)
    assert record["transfers"]["a_b"]["diverged"] == 1
    assert any("1 fits of a_b diverged" in line for line in page.notes(record, contents([this])))


def test_the_percentile_is_among_masks_of_nearest_size():
    mine = arm("mine", 0.9, 4)
    mine.explored[:] = 0.65
    masks = Masks(np.array([7] * 8 + [900] * 8), np.stack([np.full((2, 2, 2), value) for value in np.arange(16) / 10]))
    this = part(mine, OTHERS, masks=masks)
    assert strategy_cards.percentile(this) == (100 * 7 / 8, 8, 7, 7)
    assert strategy_cards.percentile(part(mine, OTHERS)) is None


def test_who_explores_is_told_nothing_of_the_items_that_confirm():
    mine = arm("mine", 0.9, 4)
    this = part(mine, OTHERS)
    before = json.dumps(page.numbers(contents([this], explore=True))["transfers"]["a_b"]["from_scratch"])
    record = page.numbers(contents([this], explore=True))
    mine.target[:, this.items.halves["confirm"]] = False
    after = page.numbers(contents([this], explore=True))
    assert json.dumps(after["transfers"]["a_b"]["from_scratch"]) == before and "confirm" not in before
    for name in ("accuracy", "from_others", "rank"):
        assert after["transfers"]["a_b"][name] == record["transfers"]["a_b"][name]
    rotated = np.random.default_rng(3).random((len(SEEDS), ITEMS)) < 0.5
    arms = {name: each._replace(shift=~rotated) for name, each in this.reference.arms.items()}
    of_same_items = this.reference._replace(test_sets=("b", "a", "b"), arms=arms)
    this = this._replace(arm=mine._replace(shift=rotated), reference=of_same_items)
    rows = this.items.halves["explore"]
    for explore, wanted in ((True, rotated[:, rows]), (False, rotated)):
        shown = page.numbers(contents([this], explore=explore))["transfers"]["a_b"]["shift"]
        assert shown == pytest.approx(wanted.mean(1), abs=1e-6)


def test_the_page_says_other_versions_a_refuted_check_other_rounding_and_how_many_were_looked_at(tmp_path, capsys):
    this = part(arm("mine", 0.9, 4), OTHERS)
    newer = {**ENVIRONMENT, "versions": {"tljax": "0", "jax": "2"}}
    card_contents = contents([this], proofs=(Check("frozen stays", False, "it moved"),), order=3, environment=newer)
    page.write(tmp_path, card_contents._replace(anchors={"a_b": 4}))
    text, html = capsys.readouterr().out, (tmp_path / page.NAME).read_text(encoding="utf-8")
    for words in (
        "jax 2 here, 1 in the shipped scores",
        "on some test items, as versions differ: 4 of 60 of a_b",
        "strategy 3 whose verdict",
        "REFUTED by 1 of 1 checks (frozen stays)",
    ):
        assert words in text and words in html
    assert "REFUTED: frozen stays: it moved" in text and "refuted by its own checks" in html
    assert (tmp_path / "card.bib").read_text(encoding="utf-8") in text.replace("\r", "")
    assert directory.read_record(tmp_path / "card.json")["other_versions"] == ["jax 2 here, 1 in the shipped scores"]


def test_rows_of_halves_are_those_of_halved_tasks(tasks):
    from tljax import data

    task = data.load(str(tasks / "digits.npz"))
    rows = {half: confirmation.rows_of_half(task, half) for half in ("explore", "confirm")}
    assert sorted(np.concatenate(list(rows.values()))) == list(range(len(task.test)))
    for half, of_half in rows.items():
        assert (np.asarray(confirmation.halved(task, half).test.targets) == task.test.targets[of_half]).all()


FAULTY = {
    "syntax.py": ("def strategy(params, context)\n", "SyntaxError"),
    "other.py": ("def policy(params, context):\n    return params\n", "strategy"),
    "bare.py": ("strategy = 3\n", "strategy"),
}


@pytest.mark.parametrize("name", FAULTY)
def test_a_file_that_is_no_strategy_is_one_line(name, tmp_path):
    text, words = FAULTY[name]
    (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=words) as error:
        card.run(CardFlags(strategy=f"{tmp_path / name}:strategy", output=str(tmp_path / "out")))
    assert "\n" not in str(error.value)


BAD = {
    "output": (dict(strategy="full"), "--output is not given"),
    "strategy": (dict(output="{}/out"), "--strategy is not given"),
    "scratch": (dict(strategy="scratch", output="{}/out"), "scratch is what every card compares with"),
    "named as a shipped": (dict(strategy="full=last_k:k=2", output="{}/out"), "'full' is a strategy's own name"),
    "transfer": (dict(strategy="full", output="{}/out", transfers=("capitals",)), "has no such transfer"),
    "version": (dict(strategy="full", output="{}/out", reference="{}"), "has no transfers"),
    "folder": (dict(strategy="full", output="{}"), "holds other files and no card"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_card_is_refused_in_one_line(name, tmp_path):
    (tmp_path / "letter.txt").write_text("Dear reader")
    flags, words = BAD[name]
    placed = {key: value.format(tmp_path) if isinstance(value, str) else value for key, value in flags.items()}
    with pytest.raises(InputError, match=words) as error:
        card.run(CardFlags(**placed))
    assert "\n" not in str(error.value)


def test_every_shipped_transfer_can_be_read_and_its_scores_are_of_its_flags():
    known = strategy_cards.flagfiles(strategy_cards.SHIPPED)
    assert len(known) == 6
    size = 0
    for name, file in known.items():
        transfer = strategy_cards.read_transfer(file, "MANUAL")
        assert transfer.title and transfer.margin == 1 and not set(transfer.tuning_seeds) & set(transfer.flags["seeds"])
        reference = strategy_cards.read_reference(strategy_cards.SHIPPED, transfer)
        assert reference is not None, f"{name} has no scores"
        size += (strategy_cards.SHIPPED / f"{name}.json").stat().st_size
        assert {"scratch", *plugins.names("tljax.strategies", "strategy")} == {*reference.arms, *reference.left_out}
        shapes = {each.target.shape for each in reference.arms.values()}
        assert len(shapes) == 1 and shapes.pop()[0] == len(transfer.flags["seeds"])
    assert size <= 2e6


COLUMNS = (
    *("capitals_digits_5", "capitals_digits_100", "capitals_mnist_all", "digits_blurred_5", "letters_20"),
    "photographs_20",
)
"""The transfers of the table of experiments/RESULTS.md, in its order."""


def test_the_table_of_the_results_has_the_shipped_scores():
    text = (strategy_cards.SHIPPED.parent.parent / "RESULTS.md").read_text(encoding="utf-8")
    section = text.partition("\n## 9. Every strategy on the transfers of cards\n")[2]
    rows = [line.strip("| ").split(" | ") for line in section.splitlines() if line.startswith("| `")]
    table = {name.strip("`"): dict(zip(COLUMNS, cells, strict=True)) for name, *cells in rows}
    ends = arms = 0
    means = {}
    for name, file in strategy_cards.flagfiles(strategy_cards.SHIPPED).items():
        transfer = strategy_cards.read_transfer(file, "MANUAL")
        known = strategy_cards.read_reference(strategy_cards.SHIPPED, transfer).arms
        means[name] = {label: 100 * each.target.mean() for label, each in known.items()}
        assert {label for label, cells in table.items() if cells[name] != "-"} == known.keys()
        assert all(table[label][name] == f"{mean:.1f}" for label, mean in means[name].items())
        ends += sum(each.rate in (min(transfer.rates), max(transfer.rates)) for each in known.values())
        arms += len(known)
    assert f"{ends} of the {arms} arms" in section
    above = {name: [v for v in of.values() if v > of["scratch"]] for name, of in means.items()}
    assert [len(above[name]) for name in COLUMNS[::2]] == [22, 4, 19] and len(above["digits_blurred_5"]) == 29
    assert (
        not above["photographs_20"] and max(above["capitals_mnist_all"]) < means["capitals_mnist_all"]["scratch"] + 0.2
    )


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["efficientnet_lite", "efficientnet_lite_pytorch"])
def test_the_tail_above_a_file_s_bottom_is_the_whole_network(layout, tmp_path):
    whole = efficientnet_lite.model(1000, momentum=0.9)
    params = jax.tree.map(np.asarray, models.init(whole, jax.random.key(0), (64, 64, 3)))
    arrays = weights.exported(dict(paths.items(params)), weights.read_rules(layout))
    weights.write(tmp_path / "lite.safetensors", arrays)
    short = models.build(
        f"experiments.strategy_cards.tail:model:bottom={tmp_path}/lite.safetensors", 1000, hidden=(), activation="relu"
    )
    assert models.names(short) == ("bottom", *tail.TAIL) == ("bottom", *models.names(whole)[-4:])
    images = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3)).astype(np.uint8)
    of_tail = {"bottom": {}, **{name: params[name] for name in tail.TAIL}}
    wanted = models.apply(whole, params, images)
    assert np.allclose(models.apply(short, of_tail, images), wanted, rtol=1e-5, atol=1e-5) and np.ptp(wanted) > 0.1


def test_a_bottom_in_no_known_layout_is_refused_with_what_to_do(tmp_path):
    np.savez(tmp_path / "other.npz", kernel=np.ones(3, np.float32))
    with pytest.raises(InputError, match=r"other.npz' is not of EfficientNet-Lite in a layout that tljax knows"):
        tail.model(6, bottom=str(tmp_path / "other.npz"))


# ---- A tiny version, end to end


@pytest.fixture(scope="module")
def version(tasks, tmp_path_factory):
    """The folder of a version of one transfer, with the scores of four shipped strategies."""
    folder = tmp_path_factory.mktemp("versions") / "tiny-cards-1"
    folder.mkdir()
    lines = [
        *("--title=digits to clothes", f"--source={tasks / 'digits.npz'}", f"--target={tasks / 'clothes.npz'}"),
        *(f"--shift={tasks / 'clothes.npz'}:noise=0.1", "--train_examples=30", "--model=mlp", "--hidden=8,8"),
        *("--steps=6", "--source_steps=6", "--validation=0.4", "--seeds=0-2", "--rates=0.01,0.3", "--points=1"),
        *("--tuning_seeds=1000000,1001000", "--optimizer=adam", "--batch_size=10", "--margin=1"),
    ]
    (folder / "digits_clothes.flags").write_text("\n".join(lines) + "\n", encoding="utf-8")
    output = tmp_path_factory.mktemp("scores") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(card, "MASKS", 6)
        flags = CardFlags(make_reference=True, strategy="full,head_only,attention_only", reference=str(folder))
        card.run(dataclasses.replace(flags, output=str(output)))
    shutil.copy(output / "reference" / "digits_clothes.json", folder)
    return folder


MINE = '''"""Train the biases."""

from tljax import masks


def strategy(params, context):
    return masks.union(masks.by_glob(params, "**/bias"), context.fresh)
'''


def scores_alone(record):
    """What card.json says, without what a machine took, and without how many programs a process had compiled before."""
    transfers = {name: {**each, "cost": None} for name, each in record["transfers"].items()}
    proofs = [(check["check"], check["passed"]) for check in record["proofs"]]
    return {**record, "transfers": transfers, "proofs": proofs, "took": None}


@pytest.fixture
def no_proofs(monkeypatch):
    """Cards without the checks of the strategy, which take longer than all else of these."""
    monkeypatch.setattr("tljax.audit.check_strategy", lambda text: [])


@pytest.mark.slow
def test_a_newcomers_card_is_the_same_twice_and_its_numbers_follow_from_the_bits(version, tmp_path, no_pictures):
    (tmp_path / "mine.py").write_text(MINE)
    flags = CardFlags(strategy=f"{tmp_path / 'mine.py'}:strategy", reference=str(version), output=str(tmp_path / "one"))
    first = card.run(flags)
    second = card.run(dataclasses.replace(flags, output=str(tmp_path / "two")))
    again = card.run(flags)
    assert scores_alone(first) == scores_alone(second) == scores_alone(again)
    assert first["strategies_looked_at"] == again["strategies_looked_at"] >= 1
    of_transfer = first["transfers"]["digits_clothes"]
    assert of_transfer["anchor_items_differ"] == 0 and first["other_versions"] == []
    [file] = (tmp_path / "one" / "arms" / "digits_clothes").glob("*.json")
    mine, reference = json.loads(file.read_text()), json.loads((version / "digits_clothes.json").read_text())
    scratch = next(each for each in reference["arms"] if each["strategy"] == "scratch")
    right, base = (strategy_cards.unpacked(each["target"]) for each in (mine, scratch))
    folder = tmp_path / "one" / "fits" / "digits_clothes"
    [run] = [each for each in folder.iterdir() if each.name != "anchor"]
    lines = [json.loads(line) for line in (run / "results.jsonl").read_text().splitlines()]
    assert right.mean(1) == pytest.approx([line["test_accuracy"] for line in lines])
    chosen = np.mean(mine["trials"], axis=1).argmax()
    assert mine["rate"] == (0.01, 0.3)[chosen]
    task_rows = {half: of_transfer["from_scratch"][half] for half in ("explore", "confirm")}
    means = (right.astype(float) - base).mean()
    counts = {half: each["items"] for half, each in task_rows.items()}
    assert sum(counts[half] * each["mean"] for half, each in task_rows.items()) / sum(counts.values()) == pytest.approx(
        means, abs=1e-12
    )
    assert len(of_transfer["retention"]) == 3 and len(of_transfer["shift"]) == 3 and of_transfer["masks"]["peers"] >= 5
    assert reference["left_out"].keys() == {"attention_only"}


@pytest.mark.slow
def test_transfers_that_train_otherwise_share_a_source(version, tmp_path):
    shutil.copytree(version, tmp_path / "two-cards-1")
    text = (version / "digits_clothes.flags").read_text(encoding="utf-8")
    longer = text.replace("--steps=6", "--steps=9").replace("--train_examples=30", "--train_examples=all")
    (tmp_path / "two-cards-1" / "digits_all.flags").write_text(longer, encoding="utf-8")
    places = set()
    for name in ("digits_clothes", "digits_all"):
        transfer = strategy_cards.read_transfer(tmp_path / "two-cards-1" / f"{name}.flags")
        place = card._prepared_for(transfer, card.Place(tmp_path, "two-cards-1", {}))
        values = card._values(transfer, place)
        assert values["steps"] == {"digits_clothes": 6, "digits_all": 9}[name]
        places.add(values["source_checkpoint"])
    assert len(places) == 1 and len(list((tmp_path / "sources").iterdir())) == 1


@pytest.mark.slow
def test_the_card_of_a_shipped_strategy_has_its_shipped_bits(version, tmp_path, no_pictures, no_proofs):
    record = card.run(CardFlags(strategy="full", reference=str(version), output=str(tmp_path / "out")))
    of_transfer = record["transfers"]["digits_clothes"]
    assert of_transfer["shipped_bits"] is True and "full" not in of_transfer["from_others"]
    assert of_transfer["rank"]["of"] == 3


REFUTED = '''"""Freeze all but the head, and move the rest in merge."""

import jax
from tljax import masks


def strategy(params, context):
    return masks.under(params, context.stages[-1:])


def adapt(params, key):
    return params


def merge(params):
    return jax.tree.map(lambda leaf: leaf + 1, params)
'''
NOTHING = '''"""Train nothing."""

from tljax import masks


def strategy(params, context):
    return masks.by_path(params, lambda path: False)
'''


@pytest.mark.slow
def test_a_strategy_that_breaks_a_promise_has_a_red_card_or_one_line(version, tmp_path, no_pictures, capsys):
    (tmp_path / "moves.py").write_text(REFUTED)
    with pytest.raises(InputError, match="is refuted by"):
        card.run(CardFlags(f"{tmp_path / 'moves.py'}:strategy", str(tmp_path / "out"), reference=str(version)))
    assert "refuted by its own checks" in (tmp_path / "out" / page.NAME).read_text(encoding="utf-8")
    assert "REFUTED: adapt and merge keep the outputs" in capsys.readouterr().out
    (tmp_path / "nothing.py").write_text(NOTHING)
    with pytest.raises(InputError) as error:
        card.run(CardFlags(f"{tmp_path / 'nothing.py'}:strategy", str(tmp_path / "none"), reference=str(version)))
    assert "\n" not in str(error.value)
    changed = tmp_path / "moves.py"
    changed.write_text(MINE)
    with pytest.raises(InputError, match="holds a card of other code"):
        card.run(CardFlags(f"{changed}:strategy", str(tmp_path / "out"), reference=str(version)))


@pytest.mark.slow
def test_scores_that_were_altered_are_refused(version, tmp_path, no_proofs):
    folder = tmp_path / "tiny-cards-1"
    shutil.copytree(version, folder)
    file = folder / "digits_clothes.json"
    file.write_text(file.read_text().replace('"strategy": "full"', '"strategy": "fuller"'))
    with pytest.raises(InputError, match="is not as it was written"):
        card.run(CardFlags("head_only", str(tmp_path / "out"), reference=str(folder)))
    shutil.copy(version / "digits_clothes.json", folder)
    flags = folder / "digits_clothes.flags"
    flags.write_text(flags.read_text().replace("--steps=6", "--steps=7"))
    with pytest.raises(InputError, match="scores of other flags"):
        card.run(CardFlags("head_only", str(tmp_path / "out"), reference=str(folder)))
