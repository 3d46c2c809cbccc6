"""What is decided by the platform, by FLOPs and by bytes: how fits share a device, and how many examples go at once."""

import contextlib
import dataclasses
import json
import os
import threading
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_programs import arguments

from experiments import transfer
from experiments.runs import directory, fit
from tljax import evaluate, masks, models, objective, optimizer, optimizers, switches, train
from tljax.models import vit
from tljax.train import ahead, features, flops, memory, vectorize
from tljax.train.step import forward
from tljax.types import ArrayExamples, InputError

pytestmark = pytest.mark.usefixtures("no_pictures")

WIDE = models.build("mlp", 10, hidden=(512,), activation="relu")


def shaped(*shape):
    return jax.ShapeDtypeStruct(shape, np.float32)


@pytest.mark.parametrize(
    ("stride", "padding", "hole"), [(1, "VALID", 1), (2, "SAME", 1), (1, [(2, 0), (0, 1)], 2), (3, "SAME", 1)]
)
def test_flops_of_a_convolution_are_those_of_the_numbers_that_meet(stride, padding, hole):
    """Held against a kernel of ones over ones: what it gives is how many numbers meet."""
    convolve = partial(
        jax.lax.conv_general_dilated,
        window_strides=(stride, stride),
        padding=padding,
        lhs_dilation=(hole, hole),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    meet = float(convolve(jnp.ones((3, 7, 6, 4)), jnp.ones((3, 2, 4, 5))).sum())
    assert flops.count(convolve, shaped(3, 7, 6, 4), shaped(3, 2, 4, 5)) == 2 * meet


def test_flops_are_those_of_products_and_of_every_turn_of_a_loop():
    product = lambda a, b: a @ b  # noqa: E731
    assert flops.count(product, shaped(5, 7), shaped(7, 3)) == 2 * 5 * 7 * 3
    turns = lambda a: jax.lax.fori_loop(0, 11, lambda _, x: x @ a, a)  # noqa: E731
    assert flops.count(turns, shaped(4, 4)) == pytest.approx(11 * 2 * 4**3, abs=11)
    choice = lambda a: jax.lax.cond(a[0, 0] > 0, lambda: a @ a, lambda: a)  # noqa: E731
    assert flops.count(choice, shaped(4, 4)) == pytest.approx(2 * 4**3, abs=2)


def test_flops_that_no_result_needs_count_nothing():
    """A loop that takes all gradients and masks them costs what one costs that takes those of the head alone."""
    params, x = {"body": shaped(30, 20), "head": shaped(20, 4)}, shaped(8, 30)
    mask = {"body": False, "head": True}
    tx = optimizer.masked(optax.adam(0.1), mask)
    loss = lambda params, x: jnp.square(jnp.tanh(x @ params["body"]) @ params["head"]).mean()  # noqa: E731

    def step(params, state, x, takes_all):
        trained, frozen = (params, None) if takes_all else masks.split(params, mask)
        whole = (lambda trained: trained) if takes_all else (lambda trained: masks.join(trained, frozen))
        gradients = jax.jit(jax.grad(lambda trained: loss(whole(trained), x)))(trained)
        updates, state = tx.update(gradients, state, params)
        return optimizer.apply(params, updates, mask), state

    state = jax.eval_shape(tx.init, params)
    all_taken, split = (flops.count(partial(step, takes_all=takes), params, state, x) for takes in (True, False))
    assert all_taken == split
    products = 2 * 8 * 30 * 20 + 2 * 2 * 8 * 20 * 4  # forward through both, the gradient of the head
    assert products < split < products + 2 * 8 * 30 * 20 / 2
    assert flops.count(lambda a: (a @ a, a)[1], shaped(4, 4)) == 0


def test_flops_of_sums_of_windows_are_those_of_their_numbers():
    mean = partial(nn.avg_pool, window_shape=(3, 2), strides=(2, 2))  # a sum of six, and a division
    assert flops.count(mean, shaped(5, 9, 8, 4)) == 5 * 4 * 4 * 4 * (3 * 2 + 1)


def test_side_by_side_follows_from_the_platform_and_the_flops_alone():
    params = models.init(WIDE, jax.random.key(0), (28, 28, 1))
    mask = masks.by_path(params, lambda path: True)
    optimizer, numbers = optimizers.spec("sgd")
    order = lambda begin, end: np.zeros((end - begin, 100), np.int32)  # noqa: E731
    member = train.Fit(
        params, ((0, mask),), order, np.ones(9, np.float32), (), {**numbers, "label_smoothing": 0.0}, jax.random.key(0)
    )
    spec = train.specialize(train.Spec(WIDE, objective.loss("softmax_cross_entropy"), optimizer), member, (mask,))
    data = train.load(np.zeros((1, 28, 28, 1), np.uint8))

    def mode(platform, fits=2, width=1, many="auto"):
        return vectorize.choose_mode(spec, [member] * fits, width, data, many, platform)

    assert [mode("cpu"), mode("cpu", width=2), mode("cpu", many="vmap")] == ["map", "map", "vmap"]
    assert [mode("gpu"), mode("tpu", width=2), mode("gpu", fits=1), mode("gpu", many="map")] == [
        *("vmap", "vmap", "map", "map")
    ]
    assert vectorize.is_quicker_side_by_side(1.9e7, "cpu") and not vectorize.is_quicker_side_by_side(1.2e10, "gpu")


@pytest.mark.slow
def test_on_an_accelerator_auto_is_side_by_side_in_the_keys_and_in_the_environment(
    even_tasks, tmp_path, monkeypatch, capsys
):
    def keys_and_bits(name, many="auto", budgets=("all",)):
        flags = {"strategies": ("full",), "seeds": (0, 1), "devices": 1, "many": many, "train_examples": budgets}
        results = transfer.run(**arguments(even_tasks, tmp_path / name, **flags, epochs=None, steps=6))
        many_of_run = json.loads((tmp_path / name / "environment.json").read_text()).get("many")
        return [(fit.key, fit.predictions_sha256) for fit in results], many_of_run

    requested, silent = keys_and_bits("asked", "vmap")
    alone, nothing = keys_and_bits("cpu")
    assert silent is nothing is None and requested[0][0] != alone[0][0]
    capsys.readouterr()
    monkeypatch.setattr(vectorize, "platform_of", lambda devices: "gpu")
    assert keys_and_bits("gpu") == (requested, "vmap")
    assert "on gpu --many=auto trains fits side by side, which is in their keys" in capsys.readouterr().out
    both, _ = keys_and_bits("budgets", budgets=("60", "all"))
    assert "4 fits, side by side on one device" in capsys.readouterr().out.splitlines()
    assert not {key for key, _ in both} & {key for key, _ in requested}
    # The company of a fit is its strategy at all budgets: where one of them is lost, all come back, and the same.
    lost = next(fit for fit in directory.results(tmp_path / "budgets") if fit.strategy == "full")
    (tmp_path / "budgets" / lost.predictions).unlink()
    assert keys_and_bits("budgets", budgets=("60", "all")) == (both, "vmap")


def test_peak_bytes_are_those_of_what_is_held_at_once():
    two_layers = lambda x, a, b: jnp.maximum(x @ a, 0) @ b  # noqa: E731
    hidden, outputs = 4 * 10 * 50, 4 * 10 * 3
    peak = memory.peak_bytes(two_layers, shaped(10, 8), shaped(8, 50), shaped(50, 3))
    assert 2 * hidden <= peak <= 2 * hidden + outputs  # before and after the ReLU
    residual = lambda x: x + jnp.sin(jnp.cos(x + 1))  # noqa: E731
    assert memory.peak_bytes(residual, shaped(10)) == 80


def test_a_large_vit_is_evaluated_in_the_memory_that_there_is_and_small_models_as_ever():
    large, shape = vit.model(10, size="L", scan=True), (224, 224, 3)
    variables, image = models.abstract(large, shape), models.batch_of(shape, 1)
    at_once = memory.examples_at_once(forward(large), variables, image)
    assert memory.EXAMPLES % at_once == 0 and 1 < at_once < memory.EXAMPLES
    needed = memory.peak_bytes(forward(large), variables, models.batch_of(shape, at_once))
    hidden = 4 * 197 * 4096 * at_once  # of one block, float32
    assert hidden < needed <= memory.ACTIVATIONS < memory.EXAMPLES / at_once * needed
    for width in (9, 512, 4096):
        model = models.build("mlp", 10, hidden=(width,), activation="relu")
        small = models.abstract(model, (28, 28, 1))
        assert memory.examples_at_once(forward(model), small, models.batch_of((28, 28, 1), 1)) == evaluate.BATCH == 1000


def test_where_memory_is_short_evaluation_and_features_go_in_smaller_batches_to_the_same(monkeypatch):
    images = np.random.default_rng(0).integers(0, 256, (1500, 8, 8, 1)).astype(np.uint8)
    model = models.build("mlp", 3, hidden=(40,), activation="relu")
    params = models.init(model, jax.random.key(0), (8, 8, 1))
    stacked = jax.tree.map(lambda leaf: np.asarray(leaf)[None], params)

    def outputs():
        data = evaluate.padded(images)
        at_once = evaluate._batch(forward(model), stacked, data, None)
        lowered = evaluate._all_logits.lower(forward(model), None, at_once, stacked, data.inputs, None)
        cache = train.FeatureCache(10**8)
        hidden = features.compute(cache, model[:1], None, stacked, train.load(images))
        temporary = lowered.compile().memory_analysis().temp_size_in_bytes
        return at_once, temporary, evaluate.logits(forward(model), stacked, data, 1500)(), np.asarray(hidden)[0, :1500]

    at_once, temporary, logits, hidden = outputs()
    monkeypatch.setattr(memory, "ACTIVATIONS", 200_000)
    fewer, less, same_logits, same_hidden = outputs()
    assert at_once == 1000 and fewer in (200, 250) and less < temporary / 2
    np.testing.assert_allclose(same_logits, logits, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(same_hidden, hidden, rtol=1e-5, atol=1e-5)


def test_so_many_examples_go_at_once_as_are_asked_for_in_evaluation_and_at_most_for_features(monkeypatch):
    images = np.random.default_rng(0).integers(0, 256, (50, 8, 8, 1)).astype(np.uint8)
    model, lines, sizes = models.build("mlp", 3, hidden=(4,), activation="relu"), [], []
    params = models.init(model, jax.random.key(0), (8, 8, 1))
    whole = models.apply(model, params, images)

    def seen(compiled, place):
        return lambda *arguments: sizes.append(arguments[place]) or compiled(*arguments)

    monkeypatch.setattr(evaluate, "_all_logits", seen(evaluate._all_logits, 2))
    monkeypatch.setattr(features, "_compute", seen(features._compute, 5))
    optimizer, numbers = optimizers.spec("sgd")
    mask, order = masks.under(params, ("head",)), lambda begin, end: np.zeros((end - begin, 25), np.int32)
    numbers = {**numbers, "label_smoothing": 0.0}
    member = train.Fit(params, ((0, mask),), order, np.zeros(2, np.float32), (), numbers, jax.random.key(0))
    spec = train.Spec(model, objective.loss("softmax_cross_entropy"), optimizer)

    def logits(cache):
        examples = ArrayExamples(images, np.zeros(50, np.int32))
        execution = train.Execution(cache=cache, evaluation_batch=24, on_message=lines.append)
        [(state, _)] = train.fit(spec, [member], train.load(images, examples.targets), [2], (), execution)
        return evaluate.logits_of(spec, [member], state, evaluate.held(examples, execution), 50, execution)()[0]

    np.testing.assert_allclose(logits(None), whole, rtol=1e-5, atol=1e-6)
    assert sizes == [24] and lines[-1] == "evaluated 24 examples at a time, as asked"
    np.testing.assert_allclose(logits(train.FeatureCache(10**6, batch=24)), whole, rtol=1e-5, atol=1e-6)
    assert sizes == [24, 17, 24, 24]  # 50 training examples in three even batches; 72 of the test in three, then again
    assert "hidden_0 is frozen: features of 50 examples are computed once, 24 at a time, 0 MB" in lines


@pytest.mark.slow
def test_a_line_of_results_is_checked_once_however_often_fits_are_added(even_tasks, tmp_path, monkeypatch):
    checked, check = [], directory.fault_of_fit
    monkeypatch.setattr(directory, "fault_of_fit", lambda line: checked.append(line["key"]) or check(line))
    directory._fault_of_line.cache_clear()
    results = transfer.run(**arguments(even_tasks, tmp_path / "w", seeds=(0, 1), devices=1))
    again = transfer.run(**arguments(even_tasks, tmp_path / "w", seeds=(0, 1), devices=1))
    assert again == results and len(checked) == len(set(checked)) >= len(results)


@pytest.mark.slow
def test_what_is_known_to_be_run_is_compiled_in_threads_and_no_program_twice(even_tasks, tmp_path, monkeypatch):
    """The source, and scratch with full, in the main thread; the head on features, and the second phase of lp_ft."""
    compiled = []

    def listen(name, _, **about):
        if name.endswith("backend_compile_duration") and "segment" in str(about.get("fun_name")):
            compiled.append(threading.current_thread().name)

    jax.monitoring.register_event_duration_secs_listener(listen)

    def threads(name, hidden):
        compiled.clear()
        flags = {"seeds": (0, 1), "devices": 1, "hidden": (5, hidden), "head": "fresh"}
        flags |= {"strategies": ("full", "head_only", "lp_ft")}
        results = transfer.run(**arguments(even_tasks, tmp_path / name, **flags))
        return sorted("compile" in thread for thread in compiled), [fit.test_loss for fit in results]

    ahead, losses = threads("ahead", 13)
    monkeypatch.setattr(fit.ahead, "compiled_ahead", lambda *_: contextlib.nullcontext(lambda *_: None))
    in_turn, same_losses = threads("in_turn", 14)
    assert not any(in_turn) and len(ahead) == len(in_turn) == 4 and sum(ahead) == 2
    monkeypatch.undo()
    assert threads("again", 14) == ([], same_losses) and losses != same_losses


def test_programs_are_compiled_in_the_order_of_need_and_dropped_once_they_are_behind(monkeypatch):
    """Three groups of two phases each; the first goes on in its second, the second is overtaken in its first."""
    compiled, may_go_on, reached = [], threading.Semaphore(0), threading.Event()

    def programs(spec, fits, data, ends, execution):
        def compile_program(phase):
            reached.set()
            may_go_on.acquire()
            compiled.append((spec, phase))
            if spec == 2:
                raise RuntimeError("it is told where it is trained")

        for phase in (0, 1):
            yield (0,), phase, partial(compile_program, phase)

    monkeypatch.setattr(ahead.loop, "programs", programs)
    data = train.Data(np.zeros((1, 3, 2)), np.zeros(3))
    member = train.Fit({}, ((0, {}),), lambda begin, end: np.zeros((end - begin, 1)), np.ones(2), (), {}, None)
    groups = [ahead.Group(number, [member], [2]) for number in range(3)]
    with ahead.compiled_ahead(groups, data, train.Execution(), workers=1) as before:
        assert reached.wait(10)  # (1, 0) is under way: nothing of the first group is before it begins
        before(0, (0,), 1)
        may_go_on.release()
        before(1, (0,), 0)  # waits for it
        assert compiled == [(1, 0)]
        may_go_on.release(10)
        before(1, (0,), 1)  # not under way, or waited for
        before(2, (0,), 0)
        before(2, (0,), 1)
    assert not {(0, 0), (0, 1)} & {*compiled} and len({*compiled}) == len(compiled)
    reached.clear()
    while may_go_on.acquire(blocking=False):
        pass
    with pytest.raises(KeyboardInterrupt), ahead.compiled_ahead(groups, data, train.Execution(), workers=1):
        reached.wait(10)
        raise KeyboardInterrupt  # though nobody lets the program that is under way go on
    may_go_on.release(10)


def test_what_fails_ahead_of_its_turn_is_left_to_its_turn():
    requested = threading.Semaphore(0)

    def fails(begin, end):
        requested.release()
        raise InputError("no order")

    params = models.init(WIDE, jax.random.key(0), (28, 28, 1))
    mask = masks.by_path(params, lambda path: True)
    spec = train.Spec(WIDE, objective.loss("softmax_cross_entropy"), optimizers.spec("sgd")[0])
    broken = train.Fit(params, ((0, mask),), fails, np.ones(9, np.float32), (), {}, jax.random.key(0))
    data, group = train.load(np.zeros((1, 28, 28, 1), np.uint8)), ahead.Group(spec, [broken], [9])
    with ahead.compiled_ahead([group, group], data, train.Execution()) as before:
        assert requested.acquire(timeout=10)  # the second group
        before(0, (0,), 0)
        assert requested.acquire(timeout=10)
        before(1, (0,), 0)


def test_in_a_thread_of_its_own_code_nothing_of_the_process_is_restored(monkeypatch):
    with switches.trusted(), switches.guarded():
        monkeypatch.setenv("XLA_FLAGS", "--of_another_thread")
    assert os.environ["XLA_FLAGS"] == "--of_another_thread"
    with switches.guarded():
        monkeypatch.setenv("XLA_FLAGS", "--of_a_plugin")
    assert os.environ["XLA_FLAGS"] == "--of_another_thread"


def test_where_a_compiler_says_no_flops_those_of_the_traced_step_are_told(monkeypatch):
    params = models.init(WIDE, jax.random.key(0), (28, 28, 1))
    optimizer, numbers = optimizers.spec("sgd")
    mask, order = masks.by_path(params, lambda path: True), lambda begin, end: np.zeros((end - begin, 100), np.int32)
    numbers = {**numbers, "label_smoothing": 0.0}
    member = train.Fit(params, ((0, mask),), order, np.ones(9, np.float32), (), numbers, jax.random.key(0))
    spec = train.Spec(WIDE, objective.loss("softmax_cross_entropy"), optimizer)
    data = train.load(np.zeros((200, 28, 28, 1), np.uint8), np.zeros(200, np.int32))
    monkeypatch.setattr(vectorize, "executable", lambda *arguments, **further: None)
    products = 2 * 100 * (2 * 784 * 512 + 3 * 512 * 10)  # the first kernel's product and gradient, three of the head
    numbers_of_model = 784 * 512 + 512 + 512 * 10 + 10
    traced = train.cost_of(spec, member, data, [mask]).flops
    assert products < traced < products + 6 * numbers_of_model + 100 * (3 * 784 + 30 * 512)
    halves = train.cost_of(dataclasses.replace(spec, microbatch=50), member, data, [mask]).flops
    assert halves == pytest.approx(traced, rel=0.02)
