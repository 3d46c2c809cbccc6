"""The flags of a study: what is compared, and how it is judged."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from absl import flags

from experiments import commandline, options
from tljax import plugins
from tljax.study import study
from tljax.types import InputError

HELP = """
Study (flags of experiments.transfer beside it; --source, --source_checkpoint and --target take several, with commas):
  --eval      further test sets, with commas: names of data sets, or source (its own, its head put back)
  --margin    points of accuracy below which a difference does not matter (default 0.5)
  --level     of all intervals and verdicts together (default 0.95)
  --family    what is judged: area under the budget curve of each strategy, or all budgets (default area)
  --looks     how often the results are to be looked at while seeds are added (default 1)
  --longer_scratch  scratch with the source's steps added to its own, for the second comparison (default true)
  --tuned     the run directory of a search --per_strategy: each strategy with what was best for it"""


class Judging(NamedTuple):
    """How fits are judged."""

    margin: float
    """A fraction of accuracy."""
    level: float
    family: str
    looks: int


class Asked(NamedTuple):
    """What is compared beside the flags of a transfer, and how it is judged."""

    evals: tuple[str, ...]
    longer: bool
    tuned: str | None
    judging: Judging


def define(values: flags.FlagValues) -> None:
    """The flags of `Judging`."""
    for name, number in (("margin", 0.5), ("level", 0.95)):
        flags.DEFINE_float(name, number, "", flag_values=values)
    flags.DEFINE_string("family", "area", "", flag_values=values)
    flags.DEFINE_integer("looks", 1, "", flag_values=values)


def judging(values: flags.FlagValues) -> Judging:
    """How fits are judged; raises InputError for what cannot be."""
    if not 0 < values.margin < 100:
        raise InputError(f"--margin={values.margin:g}: give points above 0 and below 100")
    if not 0.5 <= values.level < 1:
        raise InputError(f"--level={values.level:g}: give 0.5 or more, below 1")
    if values.looks < 1:
        raise InputError(f"--looks={values.looks}: give 1 or more")
    study.check_family(values.family)
    return Judging(values.margin / 100, values.level, values.family, values.looks)


def read(argv: Sequence[str], about: str) -> tuple[dict[str, Any], Asked]:
    """(the flags of a run, what is compared) of a command line; raises InputError."""
    values = flags.FlagValues()
    define(values)
    flags.DEFINE_string("eval", "", "", flag_values=values)
    flags.DEFINE_string("tuned", None, "", flag_values=values)
    flags.DEFINE_bool("longer_scratch", True, "", flag_values=values)
    given = options.parse(commandline.read_known(values, argv), about) or {}
    evals = tuple(name for name in plugins.split(values.eval, ",") if name)
    return given, Asked(evals, values.longer_scratch, values.tuned, judging(values))


def to_flags(asked: Asked) -> Mapping[str, str]:
    """{flag: value} that give it again."""
    own = asked.judging
    return {
        "eval": ",".join(asked.evals),
        "longer_scratch": str(asked.longer).lower(),
        "margin": f"{100 * own.margin:g}",
        "level": f"{own.level:g}",
        "family": own.family,
        "looks": str(own.looks),
        **({"tuned": asked.tuned} if asked.tuned else {}),
    }
