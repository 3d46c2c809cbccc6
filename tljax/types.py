"""The contracts that every room shares: types, no logic."""

import functools
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np

Params = Any
"""A pytree of arrays. None and integer leaves are never trained."""

Mask = Any
"""The tree of the parameters with a bool, a number or an array (broadcastable to its leaf) for each leaf. True means
trained, everywhere; a number scales the leaf's update; an array of bools selects elements; an array of floats scales
by element, and 0 freezes exactly. See `masks.canonical`."""

OptState = Any
"""The state of an optax transformation: a pytree."""


PyTree = Any
"""A tree of arrays."""

ModelState = Any
"""{stage: its state} of the stages that have one, such as the running statistics of batch norms: arrays that training
changes, and the optimizer does not. {} of a model without state."""


class InputError(ValueError):
    """Bad input: one line that names the thing, the place and the remedy.

    Where one argument is at fault, `field` is its name and `value` what was given for it; the line then begins with
    both. A message names other arguments as `data_dir=` or `data_dir=DIR`, in backquotes. Programs write all of them
    as flags.

    >>> str(InputError("it must be below 1", field="momentum", value=2.0))
    'momentum=2.0: it must be below 1'
    """

    def __init__(self, message: str, *, field: str = "", value: Any = None) -> None:
        super().__init__(f"{field}={value}: {message}" if field else message)
        self.message = message
        self.field = field
        self.value = value


class Context(NamedTuple):
    """What a strategy may know; every field is optional, so that any training loop can build one."""

    stages: tuple[str, ...] = ()
    """Path prefixes, in the order of the model, of all stages with parameters (a dict forgets its order in JAX calls).
    A strategy that counts stages refuses a leaf that can train and is in none of them."""
    source_params: Params | None = None
    """The source's parameters as they were trained, before the graft."""
    fresh: Mask | None = None
    """Which leaves the graft (or adapt) drew anew: True means drawn."""
    key: jax.Array | None = None
    """A key of the strategy's own, from the seed."""
    gradient: Callable[..., Params] | None = None
    """params -> mean gradient of L on the target's training split. With `loss=` it is that of another loss, of what the
    stage below the head gives: (features [batch, ...], targets [batch, ...], weight float32 [batch]) -> its sum over
    the examples whose weight is 1, as `objective.supervised_contrastive` is."""
    fisher: Callable[[Params], Params] | None = None
    """params -> mean over the target's training split of the squared gradient of each example's L."""
    contracted: Mapping[str, int] = {}
    """{path of a kernel: how many of its first axes the model contracts with its inputs}, as `models.contracted` finds
    it; `adapt` and `left_out` are told it."""


class Strategy(Protocol):
    """A pure function from parameters to a mask of what trains, to phases, or to a schedule of masks."""

    def __call__(self, params: Params, context: Context, **options: Any) -> "Mask | Sequence[Phase] | MaskSchedule": ...


class Seen(NamedTuple):
    """What a `MaskSchedule` chooses by. Trees are like the parameters, with None for leaves outside its scope."""

    step: Any
    """int32: the steps since its phase began."""
    key: Any
    """A key of this step."""
    params: Params
    """Before the step's update."""
    gradients: Params | None = None
    """Of this step's objective, if the schedule sees them: after the gradient, never before it."""
    loss: Any = None
    """float32, if the schedule sees it: of this step, or of the one before it (nan at step 0) before the gradient."""
    moments: Mapping[str, Params] = {}
    """{field of the optimizer's state: its tree} of those that the schedule sees. They are this step's where it
    chooses after the gradient and `off` is 'live'; else those that the step began with."""
    groups: Any = None
    """The schedule's groups: a tree of ints, none of them traced."""
    start: Params | None = None
    """The parameters at the phase's beginning, if `returns` says that what is dropped returns to them."""


NEVER = 2**31 - 1
"""Since which step a group is off for good that may be on again."""


@dataclass(frozen=True, eq=False)
class MaskSchedule:
    """A mask with memory, chosen anew inside the compiled step: what a phase may have in a mask's place.

    Not a pytree, so never mistaken for a mask or for phases. Equal ones compile once: functions are equal if they are
    the same, or `functools.partial` of the same with equal options, so define them in a module; what differs by seed
    is in memory. `optimizer.scheduled` is the optimizer under one.
    """

    init: Callable[[Params, Any], Any]
    """(params, key) -> memory, a tree of arrays; the parameters have None outside the scope."""
    choose: Callable[[Any, Seen], Any]
    """(memory, Seen) -> (mask, memory): the mask is a tree like `Seen.params`, its leaves are bools or arrays of them,
    which may be traced; the memory has the form that it had."""
    scope: Any
    """A Mask, of all that may train in the phase. Outside it a leaf is frozen for good: it has no state, and is seen
    by no clipping and no norm. Its numbers are rates, as in any mask."""
    when: str = "before"
    """'before' or 'after' the gradient of the step is taken."""
    every: int = 1
    """`choose` is called every so many steps; the mask stays between."""
    sees: frozenset[str] = frozenset()
    """What of `Seen` it needs: 'gradients', 'loss', and fields of the optimizer's state, such as 'mu' or 'trace'."""
    off: str = "gated"
    """What becomes of the moments of what is off: 'live', they go on with its gradients; 'gated', they see zeros
    instead; 'kept', they stand still; 'dropped', they begin anew when it is on again."""
    groups: Any = None
    """A tree of ints: leaves of one number are switched together, and have counters of their own, as Adam's for the
    correction of its bias, which count the steps in which any of them is on ('live': all steps). None: one group."""
    slots: int = 0
    """If more groups than so many are alike in the shapes of their leaves, they share the optimizer's state of so many:
    no more of them are on at once. 0: each leaf of the scope has its own."""
    returns: bool = False
    """Whether what is switched off returns to the bytes with which its phase began."""
    off_since: Callable[[Any], Any] | None = None
    """memory -> int32 [largest number of a group + 1]: since which step each group is off for good, `NEVER` of one that
    may be on again. Where fits run one after another, the features of leading stages that are off for good are then
    computed once, and from there on `choose` sees zeros as their gradients. None: of no group is it known."""

    @functools.cached_property
    def identity(self) -> Hashable:
        """What equal schedules have in common."""

        def function(value: Any) -> Hashable:
            if isinstance(value, functools.partial):
                return function(value.func), value.args, tuple(sorted(value.keywords.items()))
            return value

        def tree(value: Any) -> Hashable:
            leaves, structure = jax.tree.flatten(value)
            plain = (bool, int, float, str)
            rows = (
                m if isinstance(m, plain) else (np.shape(m), str(np.asarray(m).dtype), np.asarray(m).tobytes())
                for m in leaves
            )
            return structure, tuple((type(m).__name__, m) for m in rows)

        functions = function(self.init), function(self.choose), function(self.off_since)
        rest = (self.when, self.every, frozenset(self.sees), self.off, self.slots, self.returns)
        return functions, tree(self.scope), tree(self.groups), rest

    def __eq__(self, other: object) -> bool:
        return isinstance(other, MaskSchedule) and self.identity == other.identity

    def __hash__(self) -> int:
        return hash(self.identity)


@dataclass(frozen=True)
class Phase:
    """A mask and when it begins. Not a pytree, so never mistaken for a mask."""

    start: float
    """The fraction of training at which it begins: 0.0 for the first phase, then strictly increasing."""
    mask: Any
    """A Mask, a Strategy that is evaluated at the boundary, or a MaskSchedule."""
    until: Callable[[Sequence[float]], bool] | None = None
    """The validation scores of the phase so far, one a point of the curve, the latest last -> whether the phase is
    over: `plateau.plateau(patience=3)`. The `start` of the next phase is then the latest at which that begins, and the
    steps that are left are its; after the last phase none are taken."""
    restore: str | None = None
    """'best': at the phase's end the parameters become those of its point with the best validation score."""
    rate: float = 1.0
    """The learning rate is multiplied by it in the phase."""


class PhaseRule(NamedTuple):
    """How a phase ends, at which rate it trains, how its mask moves: what a `Phase` says beside its start and mask."""

    until: Callable[[Sequence[float]], bool] | None = None
    restore: bool = False
    rate: float = 1.0
    schedule: MaskSchedule | None = None
    """How its mask moves; the phase's mask is then the schedule's scope."""


END_NAMES = ("last", "best", "average")
"""What any fit may end with: its parameters after the last step, those of the point with the best validation score, the
average of what trained. A strategy's `finish` gives ends of other names."""

SELECTED_END = "selected"
"""Of the ends that a strategy's `finish` gives, the one with the best validation score, where there is a split for it;
of equal scores the first."""


class Method(NamedTuple):
    """What a strategy's module offers, as `plugins.method` reads it."""

    strategy: Callable[..., Any]
    adapt: Callable[..., Params] | None = None
    """(params, key, **options) -> params with more leaves in the same stages; the new ones are fresh. With a parameter
    `context` it gets the stages, the fresh leaves and `contracted`."""
    merge: Callable[..., Params] | None = None
    """(params, **options) -> ordinary params with the same outputs."""
    reinit: Callable[..., Sequence[str]] | None = None
    """(context, **options) -> path prefixes to draw anew beside the head. With a parameter `params` it is (params, key,
    context, **options) -> params of the same structure: what a fit starts from in the place of what the graft gave."""
    left_out: Callable[..., Sequence[str]] | None = None
    """(params, context, **options) -> paths of the leaves that it cannot treat though it is meant to; a dry run lists
    them."""
    finish: Callable[..., Mapping[str, Params]] | None = None
    """(params, start, context, **options) -> {name: parameters of the same structure}, after training; `start` is where
    the fit began, after graft and adapt. Each of them is evaluated and kept. With a parameter `phases` it gets the
    parameters with which each phase began, the first of which are `start`."""
    batch_stats: Callable[..., Mapping[str, str]] | None = None
    """(context, **options) -> {stage: what becomes of its state: one of `batch_stats.MODES`}; stages that it does not
    name are as all others are."""
    factored: Callable[..., Params] | None = None
    """(params, **options) -> ordinary params with a `low_rank.LowRank` in the place of kernels: what `merge` gives, but
    for the sums. The model is applied with it, in training and evaluation; without it, with what `merge` gives."""
    data_driven: bool = False
    """The module's DATA_DRIVEN: the strategy needs context.gradient or context.fisher."""
    code: str = ""
    """Digest of the files that it is made of: an edit changes it."""


class Stage(NamedTuple):
    """A named piece of a model.

    A stage without state may have the short form, `init: (key, x) -> params` and `apply: (params, x, *, key=None) ->
    y`: which of the two it is, the signature of `apply` says (`models.full_form`).
    """

    name: str
    init: Callable[[jax.Array, PyTree], Any]
    """(key, x) -> (parameters, state); the state is {} where there is none."""
    apply: Callable[..., Any]
    """(params, state, x, *, key, train, weight) -> (y, state); x and y are trees of arrays [batch, ...].

    A key means training (dropout); a frozen stage is run without one. `train` concerns the state alone: True normalises
    by the statistics of the batch, and returns the state after it; False uses the state, and returns it as it is.
    `weight` float32 [batch] says which examples count (0 is padding); it is None in evaluation. With an optional
    keyword `momentum`, a float, its running averages keep that much of the old value: under 0 they are those of the
    batch. With an optional keyword `contracted`, a dict, its parameters may have `low_rank.LowRank` in the place of
    kernels, and it notes there how many axes of which kernels it contracts (`models.contracted`)."""
    alike: Hashable = None
    """Neighbours with equal values, other than None, are one function of parameters of the same shapes, which gives
    what it takes in shape and dtype: it is compiled once for all of them (`jax.lax.scan`), where none has a state."""
    fixed: bool = False
    """Whether it has no parameters and no state, makes no draws, and gives for each example what depends on that alone:
    a network that never trains, closed over. Leading ones are of the frozen prefix under every mask: computed once."""


Model = tuple[Stage, ...]
"""Its parameters are {stage.name: parameters of the stage}; the last stage is the head."""


class Batch(NamedTuple):
    """What a step sees of the examples."""

    inputs: PyTree
    """Leaves [batch, ...] of any dtype: pixels uint8, tokens int32, features float32, or a dict of such."""
    targets: PyTree
    """Leaves [batch, ...]; what they mean is the objective's: classes int32 [batch], several labels bool [batch,
    labels], values float32 [batch, values], tokens int32 [batch, length]."""
    weight: jax.Array
    """float32 [batch]; 0 is padding."""


class Examples(Protocol):
    """A split of a task, as arrays or read by row."""

    @property
    def arrays(self) -> Any:
        """All inputs, leaves [n, ...], where they are arrays or memory maps; None where they are read by row alone."""

    @property
    def targets(self) -> Any:
        """All targets, leaves [n, ...]: label budgets and validation splits read no inputs."""

    @property
    def groups(self) -> np.ndarray | None:
        """int32 [n]: which items are alike (a writer, a patient, a font family); one numbering for both splits of a
        task. None if that is not known."""

    @property
    def spec(self) -> Any:
        """Shapes and dtypes of the inputs of one example: a tree of `jax.ShapeDtypeStruct`."""

    def __len__(self) -> int: ...

    def inputs(self, rows: np.ndarray) -> Any:
        """The inputs of some rows (int [k]), leaves [k, ...], in NumPy, on the host, in any thread."""


@dataclass(frozen=True, eq=False)
class ArrayExamples:
    """Examples in arrays, which may be memory-mapped: read only.

    >>> split = ArrayExamples(np.zeros((3, 28, 28, 1), np.uint8), np.array([0, 1, 0], np.int32))
    >>> len(split), split.spec.shape, split.inputs(np.array([2, 0])).shape
    (3, (28, 28, 1), (2, 28, 28, 1))
    """

    arrays: Any
    """uint8 [n, height, width, channels], float32 features [n, ...], int32 tokens [n, length], or a tree of such."""
    targets: Any
    """As `Batch.targets`, of all examples."""
    groups: np.ndarray | None = None

    @property
    def spec(self) -> Any:
        """Shapes and dtypes of the inputs of one example."""
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), self.arrays)

    def __len__(self) -> int:
        return len(jax.tree.leaves(self.arrays)[0])

    def inputs(self, rows: np.ndarray) -> Any:
        """The inputs of some rows (int [k])."""
        return jax.tree.map(lambda leaf: np.asarray(leaf[rows]), self.arrays)


@dataclass(frozen=True, eq=False)
class RowExamples:
    """Examples that are read by row, and never held whole.

    >>> split = RowExamples(lambda rows: np.ones((len(rows), 4)) * rows[:, None], np.array([0, 1, 0], np.int32),
    ...                     jax.ShapeDtypeStruct((4,), np.float32))
    >>> split.arrays is None, len(split), split.inputs(np.array([2, 0]))[:, 0].tolist()
    (True, 3, [2.0, 0.0])
    """

    read: Callable[[np.ndarray], Any]
    """rows (int [k]) -> the inputs of these rows, leaves [k, ...], in any thread."""
    targets: Any
    """As `Batch.targets`, of all examples."""
    spec: Any
    """Shapes and dtypes of the inputs of one example."""
    groups: np.ndarray | None = None

    @property
    def arrays(self) -> None:
        """They are in no arrays."""
        return None

    def __len__(self) -> int:
        return len(jax.tree.leaves(self.targets)[0])

    def inputs(self, rows: np.ndarray) -> Any:
        """The inputs of some rows (int [k])."""
        return self.read(np.asarray(rows))


@dataclass(frozen=True)
class Metric:
    """A measure of outputs against targets. Hashable."""

    name: str
    """As flags and tables call it: accuracy, r_squared."""
    unit: str = "%"
    """'%' for fractions, which tables show a hundredfold; else what the numbers are in, such as nats."""
    larger_is_better: bool = True
    item: Callable[..., Any] | None = None
    """(outputs [n, ...], targets [n, ...], reference) -> a score of each item, float [n], in NumPy; its mean is the
    metric. None for a metric of a whole split, which cannot be primary. `reference` are the targets of the whole test
    split, for scores that are relative to them."""
    whole: Callable[..., float] | None = None
    """(outputs, targets) -> the metric of a split, in NumPy, where it is no mean over items."""


@dataclass(frozen=True)
class Objective:
    """What is minimised, and what is measured. Hashable; `loss` is static in the compiled step."""

    loss: Callable[..., jax.Array]
    """(outputs, targets) -> loss of each example, float32 [batch]; with a third argument the smoothing of labels."""
    num_outputs: int
    """The length of the last axis of the head's outputs."""
    metrics: tuple[Metric, ...] = ()
    """The first is the primary: what verdicts are of, so it has a score an item."""
    kind: str = "classes"
    """What its targets are, as `Task.kind` has it."""


@dataclass(frozen=True, eq=False)
class Task:
    """A data set to learn."""

    name: str
    train: Examples
    test: Examples
    classes: tuple[str, ...]
    """The names of the classes, of the labels of `several`, or of the values; () where they have none."""
    fingerprint: str
    """SHA-256 over shapes, dtypes, bytes, class names and groups of both splits: 64 hexadecimal digits."""
    note: str = ""
    """What every table must say of this data, such as that it is a part of the complete set."""
    findings: tuple[str, ...] = ()
    """Suspicious facts, such as test examples that are in the training set too; the note ends with them."""
    kind: str = "classes"
    """What its targets are: 'classes' (int32 [n]), 'labels' (several labels an item, bool [n, labels]), 'values'
    (float32 [n, values]) or 'tokens' (int32 [n, length], the inputs moved by one; -1 has no weight)."""
    outputs: int = 0
    """How many numbers the head gives an item, or for 'tokens' each position: classes, labels, values, or tokens of the
    vocabulary. 0 stands for as many as there are `classes`."""

    def __post_init__(self) -> None:
        if not self.outputs:
            object.__setattr__(self, "outputs", len(self.classes))
