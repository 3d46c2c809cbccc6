"""Element masks: each preset of the page against its paper's rule in NumPy, to the element."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_strategies import CONTEXT, PARAMS, answer, fisher, gradient, leaves

from tljax import masks, models, objective, plugins, train
from tljax.strategies import top
from tljax.train import gradients
from tljax.types import Context, InputError

PAGE = Path(__file__).parent.parent / "tljax" / "strategies" / "README.md"
PRESETS = dict(re.findall(r"^\| `(\w+)=(top:[^`]+)` \|", PAGE.read_text(encoding="utf-8"), re.M))
KERNELS = ("hidden_0/kernel", "hidden_1/kernel")
BELOW = (*KERNELS, "hidden_0/bias", "hidden_1/bias")


def best(scores, count):
    """bool, True at the `count` largest of an array: one after another, the first of equal ones."""
    left, chosen = np.array(scores, np.float64), np.zeros(np.shape(scores), bool)
    for _ in range(count):
        at = np.unravel_index(np.argmax(left), left.shape)
        chosen[at], left[at] = True, -np.inf
    return chosen


def selected(mask):
    """{path: bool array} of the leaves below the head."""
    return {path: np.broadcast_to(leaves(mask)[path], leaves(PARAMS)[path].shape) for path in BELOW}


def drawn_by_numpy():
    """The numbers that rank elements at random: one draw over all leaves, in the order of the tree."""
    sizes = [leaf.size for leaf in jax.tree.leaves(PARAMS)]
    flat = np.split(np.asarray(jax.random.uniform(CONTEXT.key, (sum(sizes),))), np.cumsum(sizes)[:-1])
    return {path: piece.reshape(leaf.shape) for (path, leaf), piece in zip(leaves(PARAMS).items(), flat, strict=True)}


W, G = leaves(PARAMS), leaves(gradient(PARAMS))
OF_PAPERS = {
    "sift": {path: np.abs(G[path]) for path in KERNELS},
    "shira_rand": {path: drawn_by_numpy()[path] for path in KERNELS},
    "shira_wm": {path: np.abs(W[path]) for path in KERNELS},
    "shira_grad": {path: np.abs(G[path]) for path in KERNELS},
    "shira_snip": {path: np.abs(W[path] * G[path]) for path in KERNELS},
}
"""{preset: {matrix: score of each element}}; each matrix has a share of its own."""


@pytest.mark.parametrize("name", OF_PAPERS)
def test_of_each_matrix_the_share_with_the_largest_scores_trains(name):
    share = float(re.search(r"share=([\d.]+)", PRESETS[name])[1])
    for wanted in (share, 0.3):
        chosen = selected(answer(PRESETS[name].replace(f"share={share:g}", f"share={wanted}")))
        for path in BELOW:
            scores = OF_PAPERS[name].get(path)
            expected = np.zeros(W[path].shape, bool)
            if scores is not None:
                expected = best(scores, max(1, round(wanted * scores.size)))
            np.testing.assert_array_equal(chosen[path], expected, err_msg=path)


def test_gps_trains_the_top_inputs_of_each_neuron_and_the_biases():
    """Of each output of each matrix the inputs with the largest gradients of the loss that was asked for."""
    losses = []

    def of_loss(params, *, loss=None):
        losses.append(loss)
        return gradient(params)

    text = PRESETS["gps"]
    for count in (1, 2):
        chosen = selected(answer(text.replace("count=1", f"count={count}"), gradient=of_loss))
        for path in KERNELS:
            columns = [best(np.abs(column), count) for column in G[path].T]
            np.testing.assert_array_equal(chosen[path], np.array(columns).T)
            assert chosen[path.replace("kernel", "bias")].all()
    assert losses == [objective.supervised_contrastive] * 2


def test_pafi_trains_the_smallest_magnitudes_of_all():
    selection = selected(answer(PRESETS["pafi"].replace("share=0.005", "share=0.2")))
    flat = np.concatenate([np.abs(W[path]).ravel() for path in BELOW])
    count = sum(mask.sum() for mask in selection.values())
    assert count == round(0.2 * flat.size)
    chosen = np.concatenate([np.abs(W[path])[selection[path]] for path in BELOW])
    np.testing.assert_array_equal(np.sort(chosen), np.sort(flat)[:count])


@pytest.mark.parametrize(
    ("score", "name"), [("random", "random_mask"), ("gradient", "gradient_mask"), ("fisher", "fisher")]
)
def test_what_has_a_file_of_its_own_is_the_same_mask(score, name):
    for share in (0.05, 0.3):
        assert masks.equal(answer(f"top:score={score}:share={share}"), answer(f"{name}:fraction={share}"))


def test_a_share_may_be_of_each_stage_and_of_leaves_that_globs_choose():
    selection = selected(answer("top:score=magnitude:per=stage:share=0.3"))
    for stage in ("hidden_0", "hidden_1"):
        sizes = [selection[path].size for path in BELOW if path.startswith(stage)]
        assert sum(selection[path].sum() for path in BELOW if path.startswith(stage)) == round(0.3 * sum(sizes))
    chosen = leaves(answer("top:score=magnitude:on=hidden_1/*:also=hidden_0/bias:count=3"))
    assert chosen["hidden_0/bias"] is True and chosen["hidden_0/kernel"] is False and chosen["head/kernel"] is True
    assert sum(np.sum(chosen[f"hidden_1/{leaf}"]) for leaf in ("bias", "kernel")) == 3


RNG = np.random.default_rng(0)
TIED = {
    "a": {"kernel": RNG.integers(0, 3, (6, 4)).astype(float), "bias": RNG.integers(0, 3, 4).astype(float)},
    "b": {"kernel": RNG.integers(0, 3, (2, 3, 5)).astype(float)},
}


@pytest.mark.parametrize("smallest", [False, True])
@pytest.mark.parametrize("size", [{"count": 3}, {"fraction": 0.4}, {"count": 100}])
def test_ties_go_to_the_first_and_the_number_is_exact(smallest, size):
    sign = -1 if smallest else 1

    def number(total):
        return min(size["count"], total) if "count" in size else max(1, round(size["fraction"] * total))

    mask = leaves(masks.top(TIED, **size, per="leaf", smallest=smallest))
    for path, score in leaves(TIED).items():
        np.testing.assert_array_equal(mask[path], best(sign * score, number(score.size)), err_msg=path)
    matrices = {"a": TIED["a"]["kernel"], "b": TIED["b"]["kernel"]}
    mask = masks.top(matrices, **size, per="unit", smallest=smallest, inputs={"b": 1})
    for name, axes in (("a", 1), ("b", 1)):
        flat = matrices[name].reshape(np.prod(matrices[name].shape[:axes]), -1)
        columns = [best(sign * column, number(len(column))) for column in flat.T]
        np.testing.assert_array_equal(mask[name].reshape(flat.shape), np.array(columns).T)
    for per, groups in (("stage", ("a", "b")), ("tree", ("",))):
        mask = leaves(masks.top(TIED, **size, per=per, smallest=smallest))
        for group in groups:
            parts = [path for path in mask if path.startswith(group)]
            flat = np.concatenate([leaves(TIED)[path].ravel() for path in parts])
            parts_chosen = [np.broadcast_to(mask[path], leaves(TIED)[path].shape).ravel() for path in parts]
            np.testing.assert_array_equal(
                np.concatenate(parts_chosen), best(sign * flat, number(flat.size)), err_msg=per
            )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "fraction=0.0: it must be above 0"),
        ({"fraction": 0.5, "count": 2}, "give a fraction, or a count"),
        ({"count": -1}, "give a fraction, or a count"),
        ({"count": 1, "per": "row"}, "per=row: it is one of tree, stage, leaf, unit"),
        ({"count": 1, "per": "unit"}, r"'a/bias' \(4,\) has no output units"),
        ({"count": 1, "per": "unit", "inputs": {"a/bias": 1}}, r"'a/bias' \(4,\) has no output units"),
        ({"count": 1, "per": "stage", "stages": ("a",)}, r"'b/kernel' is in none of the stages 'a'"),
    ],
)
def test_what_cannot_be_meant_is_refused(arguments, message):
    with pytest.raises(InputError, match=message):
        masks.top(TIED, **arguments)


@pytest.mark.parametrize("per", masks.PER)
def test_a_score_that_is_not_a_number_is_refused_with_its_path(per):
    with pytest.raises(InputError, match="the score at 'b' is NaN"):
        masks.top({"a": np.ones((2, 2)), "b": np.array([[1.0, np.nan]])}, 0.5, per=per)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("top:score=gradiant", "score=gradiant: it is one of random"),
        ("top:loss=contrastive", "or give supervised_contrastive"),
        ("top:score=magnitude:loss=supervised_contrastive", "score=magnitude has no use for it"),
        ("top:share=0", "above 0 and at most 1"),
        ("top:count=-1", "at least 1, or 0 for a share"),
        ("top:on=**/kernal", "matches no leaf; nearest"),
    ],
)
def test_options_of_the_strategy_are_refused(text, message):
    with pytest.raises(InputError, match=message):
        answer(text)


@pytest.mark.parametrize(("score", "field"), [("random", "key"), ("gradient", "gradient"), ("fisher", "fisher")])
def test_a_score_says_what_it_needs(score, field):
    with pytest.raises(InputError, match=rf"top:score={score} needs context\.{field}: a"):
        answer(f"top:score={score}", **{field: None})


def test_units_of_attention_and_convolutions_have_all_their_inputs():
    """Query [width, heads, channels], out [heads, channels, width], a convolution [3, 3, in, out]; norms have none."""
    shape = {"query": (6, 2, 3), "key": (6, 2, 3), "value": (6, 2, 3), "out": (2, 3, 6)}
    attention = {name: {"kernel": RNG.normal(size=each)} for name, each in shape.items()}
    body = {"attention": attention, "conv": {"kernel": RNG.normal(size=(3, 3, 2, 4))}, "norm": {"scale": np.ones(6)}}
    mask = top.strategy({"body": body}, Context(), score="magnitude", per="unit", count=2)["body"]
    assert mask["norm"]["scale"] is False
    assert (mask["attention"]["query"]["kernel"].sum(0) == 2).all()
    assert (mask["attention"]["out"]["kernel"].sum((0, 1)) == 2).all()
    assert (mask["conv"]["kernel"].sum((0, 1, 2)) == 2).all()


def contrastive(z, classes):
    """The loss of a batch by its formula, one example after another."""
    z = z / np.linalg.norm(z, axis=1, keepdims=True)
    total = 0.0
    for i in range(len(z)):
        others = [j for j in range(len(z)) if j != i]
        shares = np.exp([z[i] @ z[j] / 0.07 for j in others])
        same = [
            np.log(share / shares.sum()) for j, share in zip(others, shares, strict=True) if classes[j] == classes[i]
        ]
        total -= np.mean(same) if same else 0.0
    return total


def test_the_supervised_contrastive_loss_is_that_of_its_paper_and_padding_has_no_say():
    z, classes = RNG.normal(size=(7, 2, 3)), np.array([0, 1, 0, 2, 1, 0, 0])
    weight = np.array([1, 1, 1, 1, 1, 1, 0.0])
    with jax.enable_x64(True):
        function = jax.jit(jax.value_and_grad(objective.supervised_contrastive))
        got, slopes = function(jnp.asarray(z), jnp.asarray(classes), jnp.asarray(weight))
        alone = function(jnp.asarray(z), jnp.asarray(classes), jnp.eye(7)[0])
    np.testing.assert_allclose(got, contrastive(z[:6].reshape(6, 6), classes), rtol=1e-12)
    assert slopes[:6].any() and not slopes[6].any()
    assert not alone[0] and not alone[1].any()
    with pytest.raises(InputError, match="no classes"):
        objective.supervised_contrastive(jnp.asarray(z), jnp.ones((7, 2)), jnp.ones(7))


def test_a_gradient_may_be_of_a_loss_of_the_features_below_the_head():
    """Against differences of the formula in NumPy; the head has no gradient."""
    rng = np.random.default_rng(2)
    model = models.build("mlp", 3, hidden=(4,), activation="tanh")
    x, classes = rng.uniform(size=(9, 5)).astype(np.float32), np.arange(9) % 3
    with jax.enable_x64(True):
        params = models.init(model, jax.random.key(0), (5,))
        params = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape)), params)
        data = train.load(x, classes.astype(np.int32))
        gradient_of = gradients.mean_gradient(model, objective.loss("softmax_cross_entropy"), data, np.arange(9))
        slopes = leaves(gradient_of(params, loss=objective.supervised_contrastive))
    assert not slopes["head/kernel"].any() and not slopes["head/bias"].any()
    kernel, bias = (np.asarray(params["hidden_0"][name]) for name in ("kernel", "bias"))

    def mean(kernel):
        return contrastive(np.tanh(x.astype(np.float64) @ kernel + bias), classes) / 9

    for at in ((0, 0), (3, 2), (4, 1)):
        step = np.zeros_like(kernel)
        step[at] = 1e-6
        expected = (mean(kernel + step) - mean(kernel - step)) / 2e-6
        assert slopes["hidden_0/kernel"][at] == pytest.approx(expected, rel=1e-6)
    with pytest.raises(InputError, match="no stage below its head 'hidden_0'"):
        gradients.mean_gradient(model[:1], None, data, np.arange(9))(params, loss=objective.supervised_contrastive)


def test_every_preset_of_the_page_is_a_strategy():
    assert {*OF_PAPERS, "gps", "pafi"} == PRESETS.keys()
    for text in PRESETS.values():
        assert plugins.method(text)[0].strategy is top.strategy
    assert top.scores(PARAMS, CONTEXT, "fisher")["head"]["bias"] == pytest.approx(fisher(PARAMS)["head"]["bias"])
