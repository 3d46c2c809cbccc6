"""What fits cost and in which precision they are computed."""

from dataclasses import replace
from types import SimpleNamespace

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_programs import arguments

from experiments import transfer
from experiments.runs import directory, plan
from experiments.runs.settings import Settings, parse_flags
from tljax import batch_stats, masks, models, objective, optimizers, penalties, train
from tljax.models import linen
from tljax.train import cost
from tljax.types import InputError

pytestmark = pytest.mark.usefixtures("no_pictures")

MODEL = models.build("mlp", 4, hidden=(16,), activation="relu")
BATCH = 8


def a_fit(mask="full", optimizer="sgd", steps=6, model=MODEL, phases=None, **recipe):
    """(spec, fit) on inputs of 5 numbers and 4 classes."""
    params = models.init(model, jax.random.key(0), (5,))
    tree = masks.under(params, "head") if mask == "head" else masks.by_path(params, lambda path: True)
    optimizer_spec, numbers = optimizers.spec(optimizer, **recipe)
    spec = train.Spec(model, objective.loss("softmax_cross_entropy"), optimizer_spec)

    def order(start, stop):
        return np.arange(start * BATCH, stop * BATCH, dtype=np.int32).reshape(-1, BATCH) % 40

    fit = train.Fit(
        params,
        phases or ((0, tree),),
        order,
        np.full(steps, 0.1, np.float32),
        (),
        {**numbers, "label_smoothing": 0.0},
        jax.random.key(1),
    )
    return spec, fit


def data(examples=40):
    rng = np.random.default_rng(0)
    return train.load(rng.normal(size=(examples, 5)).astype(np.float32), (np.arange(examples) % 4).astype(np.int32))


# ---- Which leaves decay


def test_a_dry_run_shows_what_decays(tasks, tmp_path, capsys):
    flags = {"optimizer": "adamw", "weight_decay": 0.1, "dry_run": True, "strategies": ("head_only",)}
    transfer.run(**arguments(tasks, tmp_path / "w", **flags))
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if "hidden_0/" in line or "head/" in line]
    decays = {row[0]: row[3] for row in rows if row[2] in ("trained", "frozen") and row[3] in ("yes", "no", "-")}
    assert decays == {"head/kernel": "yes", "head/bias": "no", "hidden_0/kernel": "-", "hidden_0/bias": "-"}


def test_a_rule_of_decay_that_matches_nothing_is_refused_by_the_name_of_its_flag(tasks, tmp_path):
    flags = {"optimizer": "adamw", "weight_decay": 0.1, "source_decay": "all"}
    with pytest.raises(InputError, match=r"^--decay=heads/\*\*: pattern 'heads/\*\*' matches no leaf; nearest: 'head/"):
        transfer.run(**arguments(tasks, tmp_path / "w", decay="heads/**", **flags))
    assert not (tmp_path / "w").exists()


# ---- What a fit costs


@pytest.mark.counts
def test_a_peak_has_the_examples_in_it_and_the_moments_once():
    spec, fit = a_fit()
    of_sgd, of_more = (train.cost_of(spec, fit, data(n), [fit.phases[0][1]]) for n in (40, 1040))
    assert of_more.peak_bytes - of_sgd.peak_bytes == 1000 * (5 * 4 + 4)
    adam, fit_of_adam = a_fit(optimizer="adam")
    of_adam = train.cost_of(adam, fit_of_adam, data(), [fit.phases[0][1]])
    numbers = sum(leaf.size for leaf in jax.tree.leaves(fit.params))
    assert 2 * 4 * numbers <= of_adam.peak_bytes - of_sgd.peak_bytes < 3.5 * 4 * numbers  # not twice, in and out
    products = 2 * BATCH * (2 * 5 * 16 + 3 * 16 * 4)
    assert products <= of_sgd.flops <= 2 * products


@pytest.mark.slow
def test_a_fit_asks_what_it_compiled_and_compiles_nothing_for_it(monkeypatch):
    """Two phases, of which the second trains on features and then more: one executable each, as without asking."""
    params = models.init(MODEL, jax.random.key(0), (5,))
    phases = ((0, masks.under(params, "head")), (4, masks.by_path(params, lambda path: True)))
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(lambda name, _, **about: compiled.append(name))

    def compilations(ask, hidden):
        model = models.build("mlp", 4, hidden=(hidden,), activation="relu")
        spec, fit = a_fit(model=model, steps=9)
        phases = ((0, masks.under(fit.params, "head")), (4, masks.by_path(fit.params, lambda path: True)))
        costs = []
        execution = train.Execution(
            cache=train.FeatureCache(10**6), on_compiled=lambda fits, program_cost: costs.append(program_cost)
        )
        with monkeypatch.context() as patch:
            if not ask:
                patch.setattr(train.vectorize, "executable", lambda *arguments, **options: None)
            compiled.clear()
            for state, _ in train.fit(spec, [fit._replace(phases=phases)], data(), [2, 4, 9], execution=execution):
                jax.block_until_ready(state.params)
        return sum("backend_compile" in name for name in compiled), costs, (spec, fit, phases)

    compilations(True, 31)  # what any fit compiles once
    compilations_when_asked, costs, (spec, fit, phases) = compilations(True, 33)
    silent, nothing, _ = compilations(False, 34)
    assert compilations_when_asked == silent > 1
    assert nothing == [train.Cost(None, None)] * 2
    fit = fit._replace(phases=phases)
    history = [mask for _, mask in phases]
    cache = train.FeatureCache(10**6)
    assert costs == [train.cost_of(spec, fit, data(), history[:n], cache) for n in (1, 2)]
    assert costs[0].peak_bytes != costs[1].peak_bytes


def test_where_a_backend_does_not_say_what_a_program_takes_nothing_is_known():
    for flops in ({"flops": 0.0}, {"flops": -1.0}, {}, None):
        program = SimpleNamespace(cost_analysis=lambda flops=flops: flops, memory_analysis=lambda: None)
        assert cost.analyze(program) == cost.analyze(None) == train.Cost(None, None)


def test_peak_memory_is_in_the_dry_run_the_report_and_the_results_and_cannot_be_changed(tasks, tmp_path, capsys):
    flags = {"strategies": ("head_only",), "seeds": (0,), "devices": 1, "ema": 0.9}
    transfer.run(**arguments(tasks, tmp_path / "w", dry_run=True, **flags))
    dry = [line.split("peak memory ")[1].split()[0] for line in capsys.readouterr().out.splitlines() if "peak" in line]
    transfer.run(**arguments(tasks, tmp_path / "w", **flags))
    fits = {fit.strategy: fit for fit in directory.results(tmp_path / "w")}
    written = [f"{fits[name].peak_bytes / 1e6:.1f}" for name in ("scratch", "head_only")]
    assert dry == written and "0.0" not in written
    file, peak = tmp_path / "w" / "results.jsonl", fits["scratch"].peak_bytes
    text = file.read_text()
    file.write_text(text.replace(f'"peak_bytes": {peak}', f'"peak_bytes": {peak + 1}'))
    with pytest.raises(InputError, match=r"line \d is not as it was written \(peak_bytes\)"):
        directory.results(tmp_path / "w")
    page = (tmp_path / "w" / "report.html").read_text()
    assert "Peak memory (MB)" in page and all(f">{number}<" in page for number in written)


# ---- Microbatches


def trained(spec, fit, execution=None, ends=(6,), examples=None):
    """The last state of a fit and its whole log, in NumPy."""
    logs = []
    for state, log in train.fit(spec, [fit], examples or data(), list(ends), execution=execution):
        logs.append(log)
        last = jax.device_get(state)
    return last, jax.tree.map(lambda *curves: np.hstack(curves), *logs)


PENALTIES = "l2:weight=0.01,behaviour:weight=0.3"


def padded(start, stop):
    """Batches of 8 of which every second ends with three rows of padding."""
    rows = np.arange(start * BATCH, stop * BATCH, dtype=np.int32).reshape(-1, BATCH) % 40
    rows[start % 2 :: 2, -3:] = -1
    return rows


@pytest.mark.slow
@pytest.mark.parametrize(
    "axes",
    [
        {},
        *(
            pytest.param({"devices": 4, **how}, marks=pytest.mark.devices(4))
            for how in ({"devices_per_batch": 4}, {"mode": "pmap"})
        ),
    ],
    ids=str,
)
def test_microbatches_give_what_the_whole_batch_gives(axes):
    """Clipped AdamW with decay of kernels, penalties of leaves and of features, smoothed labels; float64."""
    terms, weights = penalties.read(PENALTIES)
    with jax.enable_x64(True):
        spec, fit = a_fit(optimizer="adamw", weight_decay=0.1, clip=0.3, decay="auto")
        spec = replace(spec, penalties=terms, smooth_labels=True)
        params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), fit.params)
        fit = fit._replace(
            params=params, order=padded, weights=weights, fresh=masks.under(params, "head"), numbers={**fit.numbers}
        )
        fit.numbers["label_smoothing"] = 0.1
        execution = train.Execution(**{**axes, "devices": tuple(jax.devices()[: axes.get("devices", 1)])})
        examples = train.load(np.asarray(data().inputs[0], np.float64), np.asarray(data().targets))
        (whole, log), (parts, log_of_parts) = (
            trained(replace(spec, microbatch=size), fit, execution, examples=examples) for size in (0, 4)
        )
        assert jax.tree.leaves(whole.params)[0].dtype == np.float64
        for value, other in zip(jax.tree.leaves(whole.params), jax.tree.leaves(parts.params), strict=True):
            np.testing.assert_allclose(value, other, rtol=0, atol=1e-6)
        for value, other in zip(jax.tree.leaves(log), jax.tree.leaves(log_of_parts), strict=True):
            np.testing.assert_allclose(value, other, rtol=1e-6)
        assert np.abs(params["head"]["kernel"] - whole.params["head"]["kernel"][0]).max() > 1e-2


def without_source(model):
    return {"model": model, "source": None, "strategies": ("scratch",)}


@pytest.mark.devices(4)
def test_microbatches_that_cannot_be_are_refused_before_anything_is_trained(tasks, tmp_path):
    def refused(message, **flags):
        with pytest.raises(InputError, match=message):
            transfer.run(**arguments(tasks, tmp_path / "w", **flags))
        assert not (tmp_path / "w").exists()

    refused(r"^--microbatch=7: it does not divide the batch of 20 examples: give 5 or 10, say", microbatch=7)
    refused(r"^--source_microbatch=30: it does not divide", microbatch=10, source_microbatch=30)
    refused("^--microbatch=5: 4 devices share each batch", microbatch=5, mesh=("data:4",))
    (tmp_path / "own.py").write_text(OWN)
    model = f"{tmp_path / 'own.py'}:model"
    whole = ": stage 'norm' normalises by the whole batch"
    refused(rf"source_microbatch=10{whole} while the source is trained", microbatch=10, model=model)
    refused(rf"microbatch=10{whole}: leave it at 0, or give --batch_stats=froz", microbatch=10, **without_source(model))
    norm = nn.BatchNorm(use_running_average=False)
    stages = (linen.stage("norm", norm), linen.stage("head", nn.Dense(4)))
    spec, fit = a_fit(model=stages)
    params, state = batch_stats.split(fit.params)
    fit = fit._replace(params=params, model_state=state, phases=((0, masks.by_path(params, lambda path: True)),))
    with pytest.raises(InputError, match="microbatch=4: stage 'norm' normalises by the whole batch: leave it at 0"):
        trained(replace(spec, microbatch=4), fit)
    frozen = replace(spec, microbatch=4, batch_stats=(("norm", "frozen"),))
    assert np.isfinite(trained(frozen, fit)[1].loss).all()


@pytest.mark.counts
def test_microbatches_take_less_memory():
    model = models.build("mlp", 4, hidden=(2000, 2000), activation="relu")
    spec, fit = a_fit(model=model)
    fit = fit._replace(order=lambda start, stop: np.zeros((stop - start, 1000), np.int32))
    mask = [fit.phases[0][1]]
    whole, parts = (train.cost_of(replace(spec, microbatch=size), fit, data(), mask) for size in (0, 100))
    of_parameters = 4 * sum(leaf.size for leaf in jax.tree.leaves(fit.params))
    assert parts.peak_bytes < whole.peak_bytes - 2 * 4 * 2000 * 1000 + of_parameters
    assert whole.flops == pytest.approx(parts.flops, rel=0.5)


# ---- The dtype in which a model computes


def built(name="mlp", **more):
    return models.build(name, 4, hidden=(16,), activation="relu", **more)


def products(jaxpr):
    """(dtypes of the operands, precision) of each product and convolution of a program, in the order of the program."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name in ("dot_general", "conv_general_dilated"):
            yield tuple(str(v.aval.dtype) for v in eqn.invars), eqn.params["precision"]
        for value in jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda leaf: hasattr(leaf, "eqns")):
            if hasattr(value, "eqns") or hasattr(value, "jaxpr"):
                yield from products(getattr(value, "jaxpr", value))


def program_of_gradient(model, params, x):
    loss = lambda params: jnp.square(models.apply(model, params, x)).sum()  # noqa: E731
    return jax.make_jaxpr(jax.grad(loss))(params)


def rounded(x):
    return np.asarray(jnp.asarray(x, jnp.float32).astype(jnp.bfloat16).astype(jnp.float32))


def test_a_perceptron_in_bfloat16_is_that_of_rounded_numbers():
    """Against NumPy: operands and hidden outputs rounded to bfloat16, logits summed in float32."""
    model, x = built(compute_dtype="bfloat16"), np.random.default_rng(0).normal(size=(6, 5)).astype(np.float32)
    params = models.init(model, jax.random.key(0), (5,))
    drawn = models.init(built(), jax.random.key(0), (5,))
    for value, other in zip(jax.tree.leaves(params), jax.tree.leaves(drawn), strict=True):
        assert value.dtype == jnp.float32
        np.testing.assert_array_equal(value, other)
    params = jax.tree.map(lambda leaf: leaf + 0.1, params)
    hidden = rounded(rounded(x) @ rounded(params["hidden_0"]["kernel"]))
    hidden = np.maximum(rounded(hidden + rounded(params["hidden_0"]["bias"])), 0)
    logits = hidden @ rounded(params["head"]["kernel"]) + rounded(params["head"]["bias"])
    outputs = models.features(model, params, x)
    assert [str(leaf.dtype) for leaf in outputs] == ["float32", "float32"]
    np.testing.assert_allclose(outputs[0], hidden, rtol=2**-7)
    np.testing.assert_allclose(outputs[1], logits, rtol=1e-2, atol=1e-2)
    np.testing.assert_array_equal(outputs[0], rounded(outputs[0]))
    assert not np.array_equal(outputs[1], rounded(outputs[1]))
    assert np.abs(models.apply(built(), params, x) - outputs[1]).max() > 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mlp", "cnn:norm=true", "own"])
def test_every_product_is_of_bfloat16_and_every_gradient_float32(name, tmp_path):
    shape = (5,) if name != "cnn:norm=true" else (4, 4, 1)
    if name == "own":
        (tmp_path / "own.py").write_text(OWN)
        name = f"{tmp_path / 'own.py'}:model"
    model = built(name, compute_dtype="bfloat16")
    params, state = batch_stats.split(models.init(model, jax.random.key(0), shape))
    variables, x = batch_stats.join(params, state), jnp.ones((3, *shape))
    program = program_of_gradient(model, variables, x)
    assert {str(leaf.dtype) for leaf in program.out_avals} == {"float32"}
    dtypes = [dtypes for dtypes, _ in products(program.jaxpr)]
    forward = [dtypes for dtypes, _ in products(jax.make_jaxpr(lambda p: models.apply(model, p, x))(variables).jaxpr)]
    assert len(dtypes) > len(forward) >= 2 and set(forward) == {("bfloat16", "bfloat16")}
    assert all("bfloat16" in pair for pair in dtypes)
    if state:
        _, after = models.run(model, params, state, x, key=jax.random.key(0), tracked=("norm",), weight=jnp.ones(3))
        assert {str(leaf.dtype) for leaf in jax.tree.leaves(after)} == {"float32"}


OWN = """
import flax.linen as nn
from tljax.models import linen


def model(classes):
    head = linen.stage("head", nn.Dense(classes))
    return linen.stage("hidden", nn.Dense(7), before=linen.flat), linen.stage("norm", nn.BatchNorm(momentum=0.5)), head
"""
"""A model that knows nothing of dtypes."""


@pytest.mark.parametrize("precision", ["high", "highest"])
def test_products_have_the_precision_forwards_and_backwards(precision):
    x = jnp.ones((3, 5))
    params = models.init(built(), jax.random.key(0), (5,))
    wanted = getattr(jax.lax.Precision, precision.upper())
    for model, expected in ((built(matmul_precision=precision), wanted), (built(), None)):
        precisions = [each for _, each in products(program_of_gradient(model, params, x).jaxpr)]
        assert len(precisions) == 5 and set(precisions) <= {expected, (expected, expected)}
    np.testing.assert_allclose(
        models.apply(built(matmul_precision=precision), params, x), models.apply(built(), params, x)
    )


@pytest.mark.slow
def test_dtype_and_precision_are_in_the_key_and_refused_where_they_are_none(tasks, tmp_path):
    def keys(**flags):
        settings = Settings.from_flags(**arguments(tasks, tmp_path / "w", **flags))
        return set(plan.planned(plan.prepare(settings, train.Execution())))

    plain = keys()
    assert plain == keys(compute_dtype="float32", matmul_precision="default", microbatch=0)
    for flags in ({"compute_dtype": "bfloat16"}, {"matmul_precision": "highest"}, {"microbatch": 10}):
        assert not plain & keys(**flags)
    for name, message in (
        ("float16", "are 0 without a scale of the loss: give bfloat16"),
        ("int8", "in float32 or bf"),
    ):
        with pytest.raises(InputError, match=f"^--source_compute_dtype={name}: .*{message}"):
            Settings.from_flags(**arguments(tasks, tmp_path / "w", source_compute_dtype=name))
    with pytest.raises(InputError, match=r"^--matmul_precision=tf32"):
        Settings.from_flags(**arguments(tasks, tmp_path / "w", matmul_precision="tf32"))


@pytest.mark.slow
def test_a_fit_in_bfloat16_learns_on_features_as_without_them_and_keeps_float32():
    spec, fit = a_fit("head", "adam", steps=20, model=built(compute_dtype="bfloat16"))
    stages, cache = train.forward(spec.model), train.FeatureCache(10**6)
    (state, log), (on_features, other_log) = (
        trained(spec, fit, train.Execution(cache=kept), ends=(20,)) for kept in (None, cache)
    )
    half = train.Execution(cache=train.FeatureCache(10**6, "bfloat16"))  # which is what the hidden stage gives
    np.testing.assert_array_equal(trained(spec, fit, half, ends=(20,))[1].loss, other_log.loss)
    assert cache.arrays and log.loss[0, -1] < 0.9 * log.loss[0, 0]
    np.testing.assert_allclose(log.loss, other_log.loss, rtol=1e-5)
    kept = jax.tree.leaves((state.params, state.optimizer, on_features.params))
    assert {leaf.dtype.name for leaf in kept} == {"float32", "int32"}
    assert stages(jax.tree.map(lambda leaf: leaf[0], state.params), jnp.ones((1, 5))).dtype == jnp.float32
    in_float32 = trained(*a_fit("head", "adam", steps=20, model=built()), ends=(20,))[1]
    assert (log.loss != in_float32.loss).any()
    np.testing.assert_allclose(log.loss, in_float32.loss, rtol=0.05)


# ---- Rematerialisation


DEEP = """
import flax.linen as nn
import jax
from tljax.models import linen


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, *, train=False):
        for _ in range(2):
            x = jax.nn.tanh(nn.Dense(100)(x))
        return nn.Dropout(0.2, deterministic=not train)(x)


def model(classes):
    return *(linen.stage(f"deep_{i}", Block()) for i in range(4)), linen.stage("head", nn.Dense(classes))
"""
DEEP_STAGES = tuple(f"deep_{i}" for i in range(4))


@pytest.mark.slow
def test_a_stage_that_is_computed_again_gives_the_same_in_less_memory(tmp_path):
    (tmp_path / "deep.py").write_text(DEEP)
    name = f"{tmp_path / 'deep.py'}:model"
    several = [built(name, remat=stages) for stages in ((), DEEP_STAGES)]
    params, key = models.init(several[0], jax.random.key(0), (5,)), jax.random.key(1)

    def gradient(model):
        outputs = lambda params: models.apply(model, params, jnp.ones((3, 5)), key=key)  # noqa: E731
        return jax.jit(jax.grad(lambda params: jnp.square(outputs(params)).sum()))(params)

    for value, other in zip(*map(jax.tree.leaves, map(gradient, several)), strict=True):
        np.testing.assert_allclose(value, other, rtol=1e-5, atol=1e-6)
        assert np.abs(value).max() > 0
    x = jnp.ones((2000, 5))

    def bytes_kept(model):
        """What the gradient keeps of the forward pass, the parameters and the inputs with it."""
        of_params = jax.eval_shape(lambda params: jax.vjp(lambda p: models.apply(model, p, x), params)[1], params)
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(of_params))

    kept, again = map(bytes_kept, several)
    assert kept - again > 4 * 4 * 2000 * 100  # of the outputs of 8 layers those of 4 stages
    programs = [program_of_gradient(model, params, x).jaxpr for model in several]
    assert len(list(products(programs[1]))) == len(list(products(programs[0]))) + 8
    with pytest.raises(InputError, match=r"remat=dep_0: model '.*' has no such stage; nearest: 'deep_0'"):
        built(name, remat=("dep_0",))


@pytest.mark.slow
def test_the_quick_start_in_bfloat16_ends_within_half_a_point(tmp_path):
    flags = ["x", "--flagfile=experiments/flags/quickstart.flags", "--strategies=scratch,full,head_only", "--seeds=0"]
    means = {}
    for name in models.DTYPES:
        settings = parse_flags([*flags, f"--compute_dtype={name}", f"--workdir={tmp_path / name}"])
        fits = transfer.run(**settings)
        means[name] = np.array([fit.test_accuracy for fit in fits] + [fits[-1].source_accuracy])
    assert np.abs(means["bfloat16"] - means["float32"]).max() < 0.005
    assert (means["bfloat16"] != means["float32"]).any()
