"""Penalties equal their closed forms and gradients; one in a file of one's own is as good as those of tljax."""

import re
import shlex
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_programs import arguments, command, refused

from experiments import transfer
from experiments.runs import process
from tljax import masks, models, objective, optimizers, penalties, train
from tljax.types import InputError

TRAINED = {"a": np.array([1.0, -2.0]), "b": None, "head": {"bias": np.array([[3.0]])}}
START = {"a": np.array([0.5, -2.5]), "b": np.ones(3), "head": {"bias": np.array([[9.0]])}}
FISHER = {"a": np.array([2.0, 4.0])}
FRESH = {"head/bias": True}

CLOSED = {
    "l2:weight=0.5": (0.25 * (1 + 4 + 9), {"a": [0.5, -1.0], "head/bias": [[1.5]]}),
    "l1:weight=0.5": (0.5 * 6, {"a": [0.5, -0.5], "head/bias": [[0.5]]}),
    "l2_sp:weight=2:beta=0.1": (0.25 + 0.25 + 0.05 * 9, {"a": [1.0, 1.0], "head/bias": [[0.3]]}),
    "ewc:weight=3": (1.5 * (2 * 0.25 + 4 * 0.25), {"a": [3.0, 6.0], "head/bias": [[0.0]]}),
    "l2:weight=1:on=head/**": (0.5 * 9, {"a": [0.0, 0.0], "head/bias": [[3.0]]}),
}


def value_of(text):
    [term], [weights] = penalties.read(text)
    return lambda trained: penalties.on_leaves(term, weights, trained, START, FISHER, FRESH)


@pytest.mark.parametrize("text", CLOSED)
def test_a_penalty_and_its_gradient_equal_the_closed_form_and_finite_differences(text):
    """In float64; R covers trained leaves only, so the frozen 'b' has no part in it."""
    with jax.enable_x64(True):
        value, (expected, slopes) = value_of(text), CLOSED[text]
        np.testing.assert_allclose(value(TRAINED), expected, rtol=1e-12)
        gradient = jax.grad(value)(TRAINED)
        np.testing.assert_allclose(gradient["a"], slopes["a"], rtol=1e-12)
        np.testing.assert_allclose(gradient["head"]["bias"], slopes["head/bias"], rtol=1e-12)
        step = np.array([1e-6, 0.0])
        up, down = ({**TRAINED, "a": TRAINED["a"] + sign * step} for sign in (1, -1))
        np.testing.assert_allclose((value(up) - value(down)) / 2e-6, slopes["a"][0], atol=1e-8)


def test_l2_sp_is_zero_at_the_start_but_for_the_fresh_leaves():
    start = {"a": START["a"], "b": None, "head": {"bias": np.zeros((1, 1))}}
    assert value_of("l2_sp:weight=2")(start) == 0


def test_behaviour_is_half_the_squared_distance_of_features_and_padding_has_no_part():
    now, then = np.array([[1.0, 2.0], [0.0, 0.0], [9.0, 9.0]]), np.array([[0.0, 0.0], [3.0, 0.0], [0.0, 0.0]])
    mask = jnp.array([1.0, 1.0, 0.0])
    value = lambda now: penalties.behaviour([(now, then)], mask, mask.sum(), weight=0.5)  # noqa: E731
    np.testing.assert_allclose(value(jnp.asarray(now)), 0.25 * (5 + 9) / 2)
    np.testing.assert_allclose(jax.grad(value)(jnp.asarray(now)), 0.5 * (now - then) * [[1], [1], [0]] / 2)


def test_a_weight_of_zero_builds_no_term():
    assert penalties.read("l2:weight=0") == ((), ())
    assert penalties.read("") == ((), ())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("l3:weight=1", "unknown penalty 'l3:weight=1'; nearest: 'l2'"),
        ("l2", "needs option 'weight'"),
        ("l2:weight=-1", "must be finite and at least 0"),
        ("l2:weight=nan", "is float, not 'nan'|must be finite"),
        ("l2:wieght=1", "has no option 'wieght'; nearest: 'weight'"),
    ],
)
def test_penalties_that_cannot_be_are_refused(text, message):
    with pytest.raises(InputError, match=message):
        penalties.read(text)


OWN = """
import jax.numpy as jnp
from tljax.penalties import needs


def penalty(leaves, *, weight, power=3.0):
    return weight * sum((jnp.abs(leaf.value) ** power).sum() for leaf in leaves)


@needs("start", "fisher")
def towards(leaves, *, weight):
    return weight * sum((leaf.fisher * (leaf.value - leaf.start) ** 2).sum() for leaf in leaves if not leaf.fresh)


@needs("features")
def drift(features, mask, count, *, weight):
    return weight * sum(jnp.vdot(jnp.abs(now - then).sum(1), mask) for now, then in features) / count


def vector(leaves, *, weight):
    return weight * leaves[0].value


def unweighted(leaves):
    return 0.0


@needs("features", "start")
def torn(features, mask, count, *, weight):
    return weight
"""


@pytest.fixture
def mine(tmp_path):
    """A file of penalties."""
    file = tmp_path / "mine.py"
    file.write_text(OWN)
    return file


def test_a_penalty_of_ones_own_and_its_gradient_equal_the_closed_form(mine):
    [term], [weights] = penalties.read(f"{mine}:penalty:weight=0.5:on=a")
    assert (term.name, term.on, term.needs, weights) == ("mine", "a", (), {"weight": 0.5})
    with jax.enable_x64(True):
        gradient = jax.grad(lambda trained: penalties.on_leaves(term, weights, trained, None, None, {}))(TRAINED)
        np.testing.assert_allclose(gradient["a"], 1.5 * TRAINED["a"] * np.abs(TRAINED["a"]), rtol=1e-12)
        assert not gradient["head"]["bias"].any()
    penalties.require_scalar(term, weights, TRAINED, {})


def test_equal_texts_give_equal_terms_until_the_file_is_edited(mine):
    [first], _ = penalties.read(f"{mine}:weight=0.5")
    [second], _ = penalties.read(f"{mine}:weight=0.7")
    assert first == second and hash(first) == hash(second)
    digests = penalties.digests(f"l2:weight=1,{mine}:weight=1")
    mine.write_text(OWN.replace("power=3.0", "power=4.0"))
    [third], _ = penalties.read(f"{mine}:weight=0.5")
    assert third != first
    assert len(digests) == 1 and digests != penalties.digests(f"l2:weight=1,{mine}:weight=1")
    assert penalties.digests("l2:weight=1") == penalties.digests("") == []


MODEL = models.build("mlp", 3, hidden=(4,), activation="tanh")
X, Y = np.array([[1.0, -1.0], [0.5, 2.0], [3.0, 0.0]], np.float32), np.array([0, 1, 2], np.int32)


def trained(text, fisher=None):
    """(parameters at the start, those after a step of SGD, the penalty's terms before both steps) of a small fit."""
    terms, weights = penalties.read(text)
    optimizer, numbers = optimizers.spec("sgd")
    spec = train.Spec(MODEL, objective.loss("softmax_cross_entropy"), optimizer, terms)
    params = models.init(MODEL, jax.random.key(0), (2,))

    def order(start, stop):
        return np.tile(np.array([0, 1, 2, -1], np.int32), (stop - start, 1))

    fit = train.Fit(
        *(params, ((0, masks.by_path(params, lambda path: True)),), order, np.full(2, 0.1, np.float32)),
        *(weights, numbers, jax.random.key(0), jax.tree.map(lambda leaf: False, params), fisher),
    )
    afters, values = [], []
    for state, log in train.fit(spec, [fit], train.load(X, Y), [1, 2]):
        afters.append(jax.tree.map(lambda leaf: np.array(leaf)[0], state.params))
        values.append(float(log.terms[0][0, 0]))
    return params, afters[0], values


def test_a_penalty_of_features_sees_those_of_each_trained_stage_now_and_at_the_start(mine):
    """Zero before the first step; then the mean over the three examples, not four, of what the hidden stage moved."""
    start, after, values = trained(f"{mine}:drift:weight=0.5")
    moved = models.features(MODEL, after, X)[0] - models.features(MODEL, start, X)[0]
    np.testing.assert_allclose(values, [0, 0.5 * np.abs(moved).sum(1).mean()], rtol=1e-5)
    assert values[1] > 0


def test_a_penalty_that_needs_fisher_information_gets_it_or_is_refused_by_name(mine):
    fisher = {f"{stage}/{leaf}": jnp.float32(2) for stage in ("hidden_0", "head") for leaf in ("kernel", "bias")}
    start, after, values = trained(f"{mine}:towards:weight=0.5", fisher)
    squares = [np.square(a - b).sum() for a, b in zip(jax.tree.leaves(after), jax.tree.leaves(start), strict=True)]
    np.testing.assert_allclose(values, [0, sum(squares)], rtol=1e-5)
    with pytest.raises(InputError, match="penalty 'mine' needs the source's Fisher information: train the source with"):
        trained(f"{mine}:towards:weight=0.5")


@pytest.mark.slow
def test_transfer_refuses_and_trains_by_what_a_penalty_needs(tasks, tmp_path, mine, capsys):
    values = {"seeds": (0,), "strategies": ("full",), "epochs": 1}
    text = refused(command(tasks, tmp_path, **values, penalty=f"{mine}:towards:weight=0.1"), capsys)
    assert "mine holds a fit to what another's Fisher information says" in text
    text = refused(command(tasks, tmp_path, **values, penalty=f"{mine}:towards:weight=0.1", source_penalty=""), capsys)
    assert "--penalty=mine needs the source's Fisher information: train the source with --save_fisher" in text
    penalty = f"{mine}:penalty:weight=0.01,{mine}:drift:weight=0.01,{mine}:towards:weight=0.1"
    flags = arguments(tasks, tmp_path / "r", **values, penalty=penalty, source_penalty="", save_fisher=True)
    lines = transfer.run(**flags)
    assert set(lines[-1].penalties) == {"0_mine", "1_mine", "2_mine"} and all(lines[-1].penalties.values())
    names = {line.name for line in lines}
    mine.write_text(OWN.replace("power=3.0", "power=4.0"))
    assert not names & {line.name for line in transfer.run(**flags | {"workdir": str(tmp_path / "s")}) if line.source}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("penalty:weight=1:on=heed/**", "matches no leaf"),
        ("penalty:weight=1:powr=2", "penalty '.*mine.py' has no option 'powr'; nearest: 'power'"),
        ("vector:weight=1", "penalty 'mine' gives no scalar"),
        ("unweighted:weight=1", "penalty '.*mine.py' takes no weight: write def penalty"),
        ("drift:weight=1:on=head/**", "has no option 'on': it is on features"),
        ("torn:weight=1", "write @needs"),
        ("missing:weight=1", "has no function 'missing'"),
    ],
)
def test_a_penalty_of_ones_own_that_cannot_be_is_refused_before_training(text, message, tasks, tmp_path, mine, capsys):
    flags = {"seeds": (0,), "strategies": ("full",)}
    assert re.search(message, refused(command(tasks, tmp_path, **flags, penalty=f"{mine}:{text}"), capsys))
    assert not (tmp_path / "w" / "checkpoints").exists()


@pytest.mark.slow
def test_the_penalty_of_the_page_is_one_and_its_command_runs(tmp_path, monkeypatch, capsys):
    text = (Path(__file__).parent.parent / "tljax/README.md").read_text(encoding="utf-8")
    [code, *_], [line, *_] = re.findall(r"```python\n(.*?)```", text, re.S), re.findall(r"```sh\n(.*?)```", text, re.S)
    monkeypatch.chdir(tmp_path)
    Path("relative.py").write_text(code)
    [term], [weights] = penalties.read("relative.py:penalty:weight=4")
    value = penalties.on_leaves(term, weights, {"a": jnp.array([2.0, 0.0])}, {"a": jnp.array([1.0, 0.0])}, None, {})
    np.testing.assert_allclose(value, 2, rtol=1e-5)
    _, _, program, *argv = shlex.split(line)
    assert program == "experiments.transfer"
    process.run_main(transfer.main, ["transfer", *argv, "--dry_run"])
    assert not capsys.readouterr().err


def test_a_need_that_there_is_not_is_refused_by_name():
    with pytest.raises(InputError, match="penalties need no 'fischer'; nearest: 'fisher'"):
        penalties.needs("fischer")
