"""Searches by Optuna: trials are asked for and told in groups, by one process or by many that share a storage.

Optuna's heartbeat serves databases alone, and not ask-and-tell; so each trial under way carries a lease (its owner,
and when that was last heard of), and one whose lease is old is failed and put to be tried again.
"""

import contextlib
import functools
import os
import platform
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from tljax import heartbeat, plugins
from tljax.study.space import Range
from tljax.types import InputError


class Running(NamedTuple):
    """A trial under way in this process."""

    handle: Any
    """Optuna's trial."""
    chosen: Mapping[str, Any]
    """{name in the space: value}."""


class Search(NamedTuple):
    """A study, and how its next values are drawn."""

    study: Any
    """Optuna's study."""
    sampler: plugins.Spec
    seed: int
    lease: float
    """Seconds without news after which the owner of a trial is taken for dead."""


def opened(
    name: str,
    storage: str | None,
    sampler: str,
    pruner: str,
    seed: int,
    lease: float,
    about: Mapping[str, Any],
    say: Callable[[str], None] = warnings.warn,
    maximize: bool = True,
) -> Search:
    """The study of a name: in memory, in a journal file, or in the database of a URL; new, or taken up.

    Values are the better the larger they are, or without `maximize` the smaller.
    `about` says what is searched. Raises InputError for a storage that cannot be reached, an unknown sampler or
    pruner, a journal that was altered, and a study of another search. `say` gets a line on what of a journal was never
    finished, and is cut off.
    """
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    spec = plugins.parse(sampler)
    options = {
        "sampler": _component(optuna.samplers, "sampler", spec, seed),
        "pruner": _component(optuna.pruners, "pruner", plugins.parse(pruner), None),
        "study_name": name,
        "direction": "maximize" if maximize else "minimize",
        "load_if_exists": True,
    }
    for attempt in range(_ATTEMPTS):
        try:
            study = optuna.create_study(storage=_storage(storage, say), **options)
            break
        except InputError:
            raise
        except Exception as error:  # of the storage's own libraries, which have no type in common
            at_once = any(word in str(error) for word in ("UNIQUE", "already exists", "locked"))
            if not at_once or attempt == _ATTEMPTS - 1:
                reason = f"it cannot be reached: {plugins.describe(error)}"
                raise InputError(reason, field="storage", value=storage) from error
            time.sleep(0.5 * (attempt + 1))
    before = study.user_attrs.get("about")
    if before is None:
        study.set_user_attr("about", dict(about))
    elif before != about:
        differ = [key for key in about if before.get(key) != about[key]]
        listed = "; ".join(f"{key} {before.get(key)} there, {about[key]} here" for key in differ)
        reason = f"its study '{name}' is of another search ({listed}): name another with `study=`"
        raise InputError(reason, field="storage", value=storage)
    return Search(study, spec, seed, lease)


_ATTEMPTS = 6
"""How often a new database is opened that other processes make at the same moment."""


def _storage(text: str | None, say: Callable[[str], None]) -> Any:
    from optuna.storages import JournalStorage

    from tljax.study.journal import Journal

    if not text or "://" in text:
        return text or None
    Path(text).absolute().parent.mkdir(parents=True, exist_ok=True)
    return JournalStorage(Journal(text, say))


def _component(module: Any, kind: str, spec: plugins.Spec, seed: int | None) -> Any:
    """A sampler or pruner of Optuna by its name, with or without the word for its kind."""
    ending = kind.capitalize()
    known = sorted(name.removesuffix(ending) for name in module.__all__ if name.endswith(ending))
    name = spec.name.removesuffix(ending)
    if name not in known or spec.words or name == "Base":
        raise InputError(f"--{kind}={spec.name}{plugins.nearest(name, set(known) - {'Base'})}")
    from optuna.exceptions import ExperimentalWarning

    what = f"{kind} '{name}'"
    options = plugins.bind(getattr(module, name + ending), spec.options, what)
    seeded = plugins.taken(getattr(module, name + ending), {"seed": seed}) if seed is not None else {}
    try:
        with warnings.catch_warnings():  # that an interface of Optuna may change is no concern of who names a sampler
            warnings.simplefilter("ignore", ExperimentalWarning)
            return getattr(module, name + ending)(**{**seeded, **options})
    except Exception as error:
        raise InputError(f"{what} cannot be made: {plugins.describe(error)}") from error


def _draw(trial: Any, dimension: Range) -> Any:
    """The value that Optuna suggests for one dimension of a trial."""
    if dimension.kind == "in":
        return trial.suggest_categorical(dimension.name, dimension.choices)
    if dimension.kind == "int":
        return trial.suggest_int(dimension.name, int(dimension.low), int(dimension.high))
    return trial.suggest_float(dimension.name, dimension.low, dimension.high, log=dimension.kind == "log")


_Called = TypeVar("_Called", bound=Callable[..., Any])


def _in_one_line(called: _Called) -> _Called:
    """`called`, with an InputError in one line where a database that is full or away raises its own."""

    @functools.wraps(called)
    def wrapped(*args: Any, **options: Any) -> Any:
        from optuna.exceptions import StorageInternalError

        try:
            return called(*args, **options)
        except StorageInternalError as error:
            cause = getattr(error.__cause__, "orig", None) or error.__cause__ or error
            raise InputError(f"`storage=` fails ({cause}): see to it, and run the same command again") from error

    return wrapped  # type: ignore[return-value]  # it takes and gives what `called` does


@_in_one_line
def ask(search: Search, space: Sequence[Range], count: int, trials: int) -> list[Running]:
    """At most `count` new trials of a study that is to have `trials` in all; none where all are taken or done."""
    import optuna
    from optuna.trial import TrialState

    study: Any = search.study
    begun: list[Running] = []
    _take_over(study, search.lease)
    for _ in range(count):
        waiting = study.get_trials(deepcopy=False, states=(TrialState.WAITING,))
        if not waiting and len(_counted(study)) >= trials:
            break
        trial = study.ask()
        _hold(trial)
        if trial.number not in [counted.number for counted in _counted(study)[:trials]]:
            study.tell(trial, state=TrialState.FAIL)  # another process was quicker
            continue
        # Seeded by the trial, so that processes never draw the same, and a resumed study draws what it would have.
        study.sampler = _component(optuna.samplers, "sampler", search.sampler, search.seed + trial.number)
        begun.append(Running(trial, {dimension.name: _draw(trial, dimension) for dimension in space}))
    return begun


def _counted(study: Any) -> list[Any]:
    """The trials that count, in their order: not those that failed, nor one that is tried again twice.

    Two processes may find an owner dead at once, as SQLite lets them.
    """
    from optuna.trial import TrialState

    counted, again = [], set()
    for trial in study.get_trials(deepcopy=False):
        first = trial.user_attrs.get("again", f"new {trial.number}")
        if trial.state != TrialState.FAIL and first not in again:
            counted.append(trial)
        again.add(first)
    return counted


def held(trials: Sequence[Running], lease: float) -> contextlib.AbstractContextManager[None]:
    """Say now and then that this process has these trials under way, and lives."""

    def beat() -> None:
        for trial in trials:
            with contextlib.suppress(Exception):  # finished, or the storage is away for a moment
                _hold(trial.handle)

    return heartbeat.every(lease / 4, beat)


def _hold(trial: Any) -> None:
    trial.set_user_attr("lease", [f"process {os.getpid()} on {platform.node()}", time.time()])


def _take_over(study: Any, lease: float) -> None:
    """Trials whose owner has not been heard of are failed, and their values tried again."""
    from optuna.trial import TrialState

    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        _, heard = trial.user_attrs.get("lease", ["", trial.datetime_start.timestamp()])
        if time.time() - heard <= lease:
            continue
        _try_again(study, trial)


def _try_again(study: Any, trial: Any) -> None:
    """Fail a trial that is under way, and leave its values to whoever asks next."""
    from optuna.trial import TrialState

    with contextlib.suppress(ValueError, RuntimeError, KeyError):  # it has ended meanwhile
        study.tell(trial.number, state=TrialState.FAIL)
        study.enqueue_trial(trial.params, user_attrs={"again": trial.number})


def under_way(study: Any) -> int:
    """How many trials are with some process, or wait for one."""
    from optuna.trial import TrialState

    return len(study.get_trials(deepcopy=False, states=(TrialState.RUNNING, TrialState.WAITING)))


@_in_one_line
def tell(
    study: Any,
    trial: Running,
    value: float | None,
    pruned: bool = False,
    loss: float | None = None,
    worst: float = 0.0,
) -> None:
    """Hand in a trial's value, or that it diverged (None); nothing where it was taken from this process meanwhile.

    `loss`, which the sampler does not learn from, is kept beside it. `worst` is the value of one that diverged.
    """
    from optuna.trial import TrialState

    with contextlib.suppress(ValueError, RuntimeError):
        if pruned:
            study.tell(trial.handle, state=TrialState.PRUNED)
            return
        # A fit that diverged is a bad one, which the sampler is to learn from.
        trial.handle.set_user_attr("diverged", value is None)
        trial.handle.set_user_attr("loss", loss)
        study.tell(trial.handle, worst if value is None else value)


@_in_one_line
def report(trial: Running, value: float, step: int) -> bool:
    """Hand in a trial's value so far; returns whether its pruner gives it up, False where another process ended it.

    SQLite may hand one trial that is tried again to two processes at once; the first to tell is believed.
    """
    with contextlib.suppress(RuntimeError):
        trial.handle.report(value, step)
        return bool(trial.handle.should_prune())
    return False


@_in_one_line
def give_back(study: Any, trial: Running) -> None:
    """Leave a trial under way to whoever asks next."""
    _try_again(study, trial.handle)


def best(study: Any) -> Any:
    """The best finished trial; raises InputError where there is none, or all have diverged."""
    from optuna.trial import TrialState

    finished = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    finite = [trial for trial in finished if not trial.user_attrs.get("diverged")]
    if not finite:
        name = study.study_name
        raise InputError(f"all {len(finished)} trials of study '{name}' diverged: lower the rates of `space=`")
    sign = 1 if study.direction.name == "MAXIMIZE" else -1
    return max(finite, key=lambda trial: (sign * trial.value, -trial.number))


class TrialRecord(NamedTuple):
    """A trial of a study, whatever became of it."""

    number: int
    state: str
    """COMPLETE, PRUNED, FAIL, RUNNING or WAITING, as Optuna names them."""
    value: float | None
    """What the sampler learnt from: the worst of one that diverged, of a pruned one the last it reported."""
    accuracy: float | None
    """On validation examples, a fraction (or another primary metric); None where the trial diverged or did not end."""
    loss: float | None
    """On validation examples, mean cross-entropy in nats (of other targets than classes the loss of their kind)."""
    diverged: bool
    owner: str
    """The process that had it last: 'process 12 on x'."""
    begin: str
    end: str
    """Local times, as 2026-11-23T08:00:00; '' where there is none."""
    values: Mapping[str, Any]
    """{name in the space: value}."""


def trials(study: Any) -> list[TrialRecord]:
    """The trials of a study of Optuna, in their order."""
    listed = []
    for trial in study.get_trials(deepcopy=False):
        state, known = trial.state.name, trial.user_attrs
        diverged = bool(known.get("diverged"))
        accuracy = trial.value if state == "COMPLETE" and not diverged else None
        owner, _ = known.get("lease", ("", 0.0))
        times = (trial.datetime_start, trial.datetime_complete)
        begin, end = (moment.isoformat(timespec="seconds") if moment else "" for moment in times)
        measured = (trial.value, accuracy, known.get("loss"), diverged)
        listed.append(TrialRecord(trial.number, state, *measured, owner, begin, end, trial.params))
    return listed
