"""The abstract interpreter: what is known of an element of a program, and that numbers agree with it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tljax.audit import program
from tljax.audit.program import CONSTANT, EQUAL, EQUAL_IF_FINITE, IDENTICAL, UNKNOWN

A, B = (np.arange(12, dtype=np.float32).reshape(3, 4) + shift for shift in (1, 101))
ROW = np.ones(4, np.float32)
MASK = A < 6
LONG = np.ones((20, 4), np.float32)
"""More rows than a loop is read for turn by turn."""
BOOLS = jax.ShapeDtypeStruct((3, 4), bool)
COUNT = np.int32(3)


def read(function, *arguments):
    """The values of a function's outputs; input i has the label 1 << i and the name 'i'."""
    closed = jax.make_jaxpr(function)(*arguments)
    count = len(closed.jaxpr.invars)
    return program.read(closed, [program.whole(i, 1 << i) for i in range(count)], names=[str(i) for i in range(count)])


def facts(value):
    """(content, grade) of each piece, and whether symbols' elements stand in order."""
    wheres = [None if value.selector is None else value.selector == number for number in range(len(value.pieces))]
    return [
        (piece.content, piece.grade) if piece.content < 0 or program.in_order(piece, where) else "moved"
        for piece, where in zip(value.pieces, wheres, strict=True)
    ]


ZEROS = np.zeros_like(A)


def norm(a):
    return jnp.sqrt(jnp.sum(jnp.square(a)))


def clipped(a, function):
    """`a` with a function of its norm added."""
    return a + function(norm(a))


def clipped_by_the_row_before(a):
    """0 over the norm of a row, which is 0 / 0 where a row is 0 and the one before is not small."""

    def turn(small, row):
        return norm(row) < 1, jnp.where(small, 0.0, 0.0 * row / norm(row))

    return a + jax.lax.scan(turn, np.bool_(True), a)[1]


def loop(body, *start):
    return jax.lax.fori_loop(0, 50, lambda _, carry: body(*carry), start)


KEPT = {
    "itself": (lambda a: a, IDENTICAL),
    "plus zero": (lambda a: a + 0.0, EQUAL),
    "minus zero": (lambda a: a - 0.0, EQUAL),
    "times one": (lambda a: a * 1.0, EQUAL),
    "minus zero times": (lambda a: a - 0.0 * jnp.sin(a), EQUAL_IF_FINITE),
    "minus what is subtracted from itself": (lambda a: a - (a - a), EQUAL_IF_FINITE),
    "plus zero over a number": (lambda a: a + jnp.zeros_like(a) / (jnp.sqrt(jnp.zeros_like(a)) + 1e-8), EQUAL),
    "plus zero over a norm and a little": (lambda a: a + ZEROS / (norm(a) + 1e-6), EQUAL_IF_FINITE),
    "plus zero over at least 1": (lambda a: a + ZEROS / jnp.maximum(1.0, norm(a) / 3), EQUAL_IF_FINITE),
    "plus zero, clipped": (
        lambda a: clipped(a, lambda norm: jnp.where(norm < 2, ZEROS, ZEROS / norm * 2)),
        EQUAL_IF_FINITE,
    ),
    "plus zero, clipped above": (
        lambda a: clipped(a, lambda norm: jnp.where(norm > 0, ZEROS / norm, 0.0)),
        EQUAL_IF_FINITE,
    ),
    "to a wider float and back": (lambda a: a.astype(jnp.bfloat16).astype(jnp.float32).astype(jnp.bfloat16), EQUAL),
    "transposed twice": (lambda a: a.T.T, IDENTICAL),
    "reshaped": (lambda a: a.reshape(2, 6).reshape(3, 4), IDENTICAL),
    "reversed twice": (lambda a: jnp.flip(jnp.flip(a)), IDENTICAL),
    "cut and put together": (lambda a: jnp.concatenate([a[:1], a[1:]]), IDENTICAL),
    "padded and cut": (lambda a: jnp.pad(a, ((1, 1), (0, 2)))[1:4, :4], IDENTICAL),
    "gathered in order": (lambda a: a[jnp.array([2, 1, 0])][jnp.array([2, 1, 0])], IDENTICAL),
    "raveled": (lambda a: jax.flatten_util.ravel_pytree((a, ROW))[0][:12].reshape(3, 4), IDENTICAL),
    "a barrier": (lambda a: jax.lax.optimization_barrier((a, a))[1], IDENTICAL),
    "jit that donates": (lambda a: jax.jit(lambda a: a, donate_argnums=0)(a), IDENTICAL),
    "remat": (lambda a: jax.checkpoint(lambda a: a * 1.0)(a), EQUAL),
    "custom derivative": (lambda a: a + jax.nn.relu(a) * 0, EQUAL_IF_FINITE),
    "vmap": (lambda a: jax.vmap(lambda row: row + 0.0)(a), EQUAL),
    "a row at a time": (lambda a: jax.lax.scan(lambda c, row: (c, row + 0.0), 0.0, a)[1], EQUAL),
    "carried": (lambda a: loop(lambda x, y: (x, y * 2), a, a)[0], IDENTICAL),
    "carried, with zero added": (lambda a: loop(lambda x, y: (x + 0.0, y * 2), a, a)[0], EQUAL),
    "either branch": (lambda a: jax.lax.cond(a[0, 0] > 0, lambda a: a, lambda a: a + 0, a), EQUAL),
    "the branch that is constant": (lambda a: jax.lax.cond(np.bool_(True), lambda a: a, lambda a: 2 * a, a), IDENTICAL),
    "both cases": (lambda a: jnp.where(a > 0, a, a), IDENTICAL),
}


@pytest.mark.parametrize("name", KEPT)
def test_what_keeps_an_input(name):
    function, grade = KEPT[name]
    argument = jax.ShapeDtypeStruct(A.shape, jnp.bfloat16) if "wider" in name else LONG if "row" in name else A
    (value,) = read(function, argument).outputs
    assert facts(value) == [(0, grade)] and value.depends == 1


CHANGED = {
    "a narrower float and back": lambda a: a.astype(jnp.bfloat16).astype(jnp.float32),
    "whole numbers and back": lambda a: a.astype(jnp.int32).astype(jnp.float32),
    "less a little": lambda a: a * (1 - 1e-6),
    "plus a tiny number": lambda a: a + 1e-30,
    "plus zero over what may be 0": lambda a: a + ZEROS / a,
    "plus zero over a norm": lambda a: a + ZEROS / norm(a),
    "plus zero over what is rounded to 0": lambda a: a + ZEROS / (norm(a) + np.float32(1e-39)),
    "plus zero, clipped the wrong way": lambda a: clipped(a, lambda n: jnp.where(n < 2, ZEROS / n, ZEROS)),
    "plus zero over another norm": lambda a: a + jnp.where(norm(a) < 2, ZEROS, ZEROS / norm(a[:1])),
    "plus zero over the norm of another row": clipped_by_the_row_before,
    "plus a power of zero": lambda a: a + ZEROS**a,
    "plus a remainder of zero": lambda a: a + jax.lax.rem(ZEROS, a),
    "plus an angle of zero": lambda a: a + jax.lax.atan2(ZEROS, a),
    "plus the greatest of nothing": lambda a: a + jax.lax.reduce_max_p.bind(ZEROS[:0, 0], axes=(0,), out_sharding=None),
    "a loop that doubles": lambda a: loop(lambda x, y: (x * 2, y), a, a)[0],
    "a loop that swaps": lambda a: loop(lambda x, y: (y, x), a, a + 1)[0],
    "the row before": lambda a: jax.lax.scan(lambda c, row: (row, c), a[0], a)[1],
    "parts of rows": lambda a: jax.lax.scan(lambda c, row: (c, row[:1]), 0.0, a)[1],
    "one branch": lambda a: jax.lax.cond(a[0, 0] > 0, lambda a: a, lambda a: 2 * a, a),
    "a while loop": lambda a: jax.lax.while_loop(lambda c: c[0, 0] < 9, lambda c: c * 2, a),
    "sorted": lambda a: jnp.sort(a),
    "updates of one place": lambda a: a.at[jnp.array([0, 0])].set(a[1:]),
    "a slice at an index that is traced": lambda a: jax.lax.dynamic_slice_in_dim(a, a[0, 0].astype(int), 2),
}


@pytest.mark.parametrize("name", CHANGED)
def test_what_changes_an_input(name):
    (value,) = read(CHANGED[name], LONG if "row" in name else A).outputs
    assert facts(value) == [(UNKNOWN, IDENTICAL)] and value.depends == 1


@pytest.mark.parametrize("function", [jnp.flip, jnp.transpose, lambda a: jnp.concatenate([a[1:], a[:1]])])
def test_elements_that_change_places(function):
    (value,) = read(function, np.ones((4, 4), np.float32)).outputs
    assert facts(value) == ["moved"]


def test_leaves_that_change_places():
    values = read(lambda a, b: (b, a), A, B).outputs
    assert [facts(value) for value in values] == [[(1, IDENTICAL)], [(0, IDENTICAL)]]


def test_a_short_loop_is_read_turn_by_turn():
    def swapped(turns):
        return lambda a, b: jax.lax.fori_loop(0, turns, lambda _, pair: pair[::-1], (a, b))

    assert [facts(value) for value in read(swapped(3), A, B).outputs] == [[(1, IDENTICAL)], [(0, IDENTICAL)]]
    assert [facts(value) for value in read(swapped(4), A, B).outputs] == [[(0, IDENTICAL)], [(1, IDENTICAL)]]
    on = np.array([True, False, True])
    rows = lambda a, b: jax.lax.scan(lambda c, r: (c, jnp.where(r[2], r[1], r[0])), 0.0, (a, b, on))[1]  # noqa: E731
    (value,) = read(rows, A, B).outputs
    assert facts(value) == [(1, IDENTICAL), (0, IDENTICAL)] and np.array_equal(value.selector[:, 0] == 0, on)


def test_a_constant_mask_tells_elements_apart():
    where, product, at = read(
        lambda a, b: (jnp.where(MASK, b, a), a - b * MASK.astype(np.float32), a.at[1].set(b[0])), A, B
    ).outputs
    assert [facts(value) for value in (where, product)] == [
        [(0, IDENTICAL), (1, IDENTICAL)],
        [(0, EQUAL_IF_FINITE), (UNKNOWN, IDENTICAL)],
    ]
    for value in (where, product):
        assert np.array_equal(value.selector == 1, MASK)
    assert facts(at) == [(0, IDENTICAL), "moved"] and np.array_equal(np.flatnonzero(at.selector.any(1)), [1])


def test_an_axis_of_length_1_stands_for_all_of_another():
    """Of a row beside an array each column has its own facts, and those of a later row are where that row is."""
    row = np.array([[0, 1, 1, 0]], np.float32)
    product, padded = read(lambda a, b: (jax.lax.mul(a, row), jnp.pad(jax.lax.mul(b, row), 1)), A, B).outputs
    assert product.selector.shape == A.shape and padded.selector.shape == (5, 6)
    kept = {number for number, piece in enumerate(product.pieces) if piece.content == 0}
    assert np.array_equal(np.isin(product.selector, list(kept)), np.broadcast_to(row == 1, A.shape))
    assert {piece.depends for piece in product.pieces} == {0, 1}


def test_of_a_row_beside_an_array_no_column_is_taken_for_another():
    """Each column is said to be the input's where it is so by numbers, and nowhere else."""
    row = A[:1]
    for function in (
        lambda a: jax.lax.add(np.zeros_like(A), a)[1:2],
        lambda a: jnp.flip(jax.lax.add(np.zeros_like(A), a))[:1],
        lambda a: jnp.concatenate([jax.lax.add(np.zeros_like(A), a)[:1, 1:], a[:, :1]], 1),
        lambda a: jnp.concatenate([jax.lax.add(np.zeros_like(A), a)[:1, 3:], a[:, 1:]], 1),
        lambda a: jnp.broadcast_to(jax.lax.add(np.zeros_like(A), a)[:1, 1:2], (1, 4)),
    ):
        (value,) = read(function, row).outputs
        assert {piece.content for piece in value.pieces} == {0}
        straight = np.arange(4).reshape(1, 4)
        places = [straight if piece.places is None else piece.places for piece in value.pieces]
        chosen = places[0] if value.selector is None else np.choose(value.selector, places)
        assert np.array_equal(row.reshape(-1)[chosen], np.asarray(function(row)))


FILLED = {
    "zero": lambda a, i: a.at[i].get(mode="fill", fill_value=0),
    "another number": lambda a, i: a.at[i].get(mode="fill", fill_value=7),
    "no number": lambda a, i: jnp.take(a, i, axis=0),
}


@pytest.mark.parametrize("name", FILLED)
def test_beyond_an_array_a_gather_gives_its_filling_and_nothing_of_the_array(name):
    function = FILLED[name]
    places = np.array([2, 0, 9])
    (value,) = read(lambda a: function(a, places), A).outputs
    moved, filling = value.pieces
    assert (moved.content, filling.content, moved.depends, filling.depends) == (0, CONSTANT, 1, 0)
    assert np.array_equal(value.selector == 1, np.broadcast_to(places[:, None] == 9, A.shape))
    numbers = np.asarray(function(jnp.asarray(A), places))
    assert np.array_equal(A.reshape(-1)[moved.places][:2], numbers[:2])
    assert np.array_equal(np.full(4, filling.constant), numbers[2], equal_nan=True)


def test_zeros_gathered_at_places_that_are_not_known_are_not_0_where_the_filling_is_not():
    index = np.array([0, 9])
    filled, kept, inside = read(
        lambda a, i: (
            a[:2] + jnp.take(jnp.zeros_like(a), i, axis=0),
            a[:2] + jnp.zeros_like(a).at[i].get(mode="fill", fill_value=0),
            a[:2] + jnp.take(jnp.zeros_like(a), np.array([0, 1]), axis=0),
        ),
        A,
        index,
    ).outputs
    assert np.isnan(jnp.take(ZEROS, index, axis=0)).any()
    assert facts(filled) == [(UNKNOWN, IDENTICAL)]
    assert facts(kept) == facts(inside) == [(0, EQUAL)]


@pytest.mark.parametrize(
    "function, condition",
    [
        (lambda a, b, m: jnp.where(m, b, a), "'2' is False"),
        (lambda a, b, m: jnp.where(m, a, 2 * b), "'2' is True"),
        (lambda a, b, m: a - b * m, "'2' is False"),
        (lambda a, b, m: a + jnp.where(m, b, 0.0), "'2' is False"),
    ],
)
def test_a_traced_mask_is_a_condition(function, condition):
    (value,) = read(function, A, np.ones((3, 4), np.float32), BOOLS).outputs
    (piece,) = value.pieces
    assert piece.content == 0 and piece.condition == {condition} and value.depends == 0b111


def test_a_computed_choice_is_no_condition():
    (value,) = read(lambda a, b: jnp.where(b.sum() > 3, a * 2, a), A, B).outputs
    assert facts(value) == [(UNKNOWN, IDENTICAL)]


def test_a_zero_cuts_a_dependence():
    values = read(lambda a, b: (a + 0.0 * b, jnp.zeros(3) @ b, a + b[0, 0] * 0, a * b), A, B).outputs
    assert [value.depends for value in values] == [1, 0, 1, 3]


def test_zeros_that_are_assumed_cross_an_optimizer():
    def moment(a, m, count):
        m = 0.9 * m + 0.1 * jnp.zeros_like(a)
        return a - 0.1 * (m / (1 - 0.9 ** (count + 1))), m

    closed = jax.make_jaxpr(moment)(A, B, COUNT)
    inputs = [program.whole(i, 1 << i) for i in range(3)]
    assert facts(program.read(closed, inputs).outputs[0]) == [(UNKNOWN, IDENTICAL)]
    inputs[1] = program.zeros(inputs[1], True, np.float32)
    assert facts(program.read(closed, inputs).outputs[0]) == [(UNKNOWN, IDENTICAL)]  # of a count of -1 it is 0 / 0
    inputs[2] = program.bounded(inputs[2], 0, 1000)  # then the divisor is not 0
    leaf, state = program.read(closed, inputs).outputs
    assert facts(leaf) == [(0, EQUAL)] and program.is_zero(state.pieces[0])


def test_bounds_hold_of_numbers():
    def schedule(count):
        fraction = jnp.clip(count, 0, 10) / 10
        return jnp.cos(3.0 * fraction), (1 - fraction) ** 2.0, 1 - 0.999 ** (count + 1), count % 3

    closed = jax.make_jaxpr(schedule)(COUNT)
    outputs = program.read(closed, [program.bounded(program.whole(0, 1), 0, 100)]).outputs
    rows = [jax.core.eval_jaxpr(closed.jaxpr, closed.consts, jnp.int32(n)) for n in range(0, 101, 10)]
    results = [np.stack(column) for column in zip(*rows, strict=True)]
    for value, numbers in zip(outputs, results, strict=True):
        least, greatest = program.extent(value)
        assert least <= numbers.min() and numbers.max() <= greatest
    assert program.extent(outputs[2])[0] > 0


def test_a_callback_is_noted_and_not_known():
    reading = read(lambda a: jax.pure_callback(lambda x: x, jax.ShapeDtypeStruct(A.shape, A.dtype), a), A)
    assert facts(reading.outputs[0]) == [(UNKNOWN, IDENTICAL)] and "pure_callback" in reading.notes[0]


def test_a_mutable_reference_stops_the_reading():
    def function(a):
        reference = jax.new_ref(a)
        reference[0] = a[1]
        return reference[...]

    with pytest.raises(program.Stop, match="reference"):
        read(function, A)


def test_keys_are_no_numbers():
    key = jax.ShapeDtypeStruct((), jax.random.key(0).dtype)
    kept, drawn = read(lambda key: (key, jax.random.normal(key)), key).outputs
    assert facts(kept) == [(0, IDENTICAL)] and facts(drawn) == [(UNKNOWN, IDENTICAL)] and drawn.depends == 1


def test_labels_are_added_where_a_value_is_read():
    closed = jax.make_jaxpr(lambda a: jax.jit(lambda a: (a * 2, a * 3))(a))(A)
    labels = {(0, 0, 1, 0): program.Label(8, MASK, 16)}
    first, second = program.read(closed, [program.whole(0, 1)], labels=labels, watched=24).outputs
    assert first.depends == 1 and {piece.depends for piece in second.pieces} == {1 | 8, 1 | 16}


def test_the_line_of_an_equation_is_the_users():
    import optax

    closed = jax.make_jaxpr(lambda a: optax.apply_updates(a, a * 0.5))(A)
    assert program.line_of(closed.jaxpr.eqns[-1]).startswith("test_audit_interpreter.py:")


def test_constants_are_folded_where_no_rounding_can_change_them():
    values = read(lambda a: (a * (jnp.arange(4) < 2)[None], a * (jnp.float32(0.1) * 3 - jnp.float32(0.3))), A).outputs
    assert facts(values[0]) == [(CONSTANT, EQUAL_IF_FINITE), (0, EQUAL)]
    assert facts(values[1]) == [(UNKNOWN, IDENTICAL)]
