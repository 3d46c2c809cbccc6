"""The state of a model, such as the running statistics of batch norms: apart from the parameters, and together.

In memory they are two trees: {stage: its parameters} and {stage: its state}, the latter of the stages that have one. As
`models.init` draws them, as a graft copies them and as files keep them they are one, the *variables*: the state of a
stage is under 'STAGE/batch_stats', beside its parameters.
"""

from collections.abc import Mapping

from tljax.types import InputError, ModelState, Params

MODES = ("auto", "frozen", "tracked", "reestimated")
"""What becomes of the state of a stage in training. 'frozen': it is used as it is. 'tracked': the stage normalises by
the batch, and its running averages follow. 'reestimated': a stage that trains normalises by the batch, and the state is
computed anew wherever the parameters are evaluated or saved; one that is frozen whole has it computed where its phase
begins (`train.vectorize.reestimate`). 'auto': tracked where every leaf of the stage trains, else frozen."""

NAME = "batch_stats"
"""What stands between a stage and its state in the path of a leaf."""


def split(variables: Params) -> tuple[Params, ModelState]:
    """(parameters, state) of variables; a tree without state is all parameters.

    >>> split({"norm": {"scale": 1.0, "batch_stats": {"mean": 0.0}}, "head": {"bias": 2.0}})
    ({'norm': {'scale': 1.0}, 'head': {'bias': 2.0}}, {'norm': {'mean': 0.0}})
    """
    if not isinstance(variables, Mapping):
        return variables, {}
    stateful = [stage for stage, tree in variables.items() if isinstance(tree, Mapping) and NAME in tree]
    if not stateful:
        return variables, {}
    params = {
        stage: {name: leaf for name, leaf in tree.items() if name != NAME} if stage in stateful else tree
        for stage, tree in variables.items()
    }
    return params, {stage: variables[stage][NAME] for stage in stateful}


def join(params: Params, state: ModelState) -> Params:
    """The variables of parameters and state: what `split` parts. Raises InputError for a stage whose parameters are no
    dict, so that its state has no place among them.

    >>> join({"norm": {"scale": 1.0}, "head": {"bias": 2.0}}, {"norm": {"mean": 0.0}})
    {'norm': {'scale': 1.0, 'batch_stats': {'mean': 0.0}}, 'head': {'bias': 2.0}}
    """
    if not state:
        return params
    for stage in state:
        if not isinstance(params[stage], Mapping):
            kind = type(params[stage]).__name__
            raise InputError(f"stage '{stage}' has a state, and a {kind} for its parameters: let `init` give a dict")
    return {stage: {**tree, NAME: state[stage]} if stage in state else tree for stage, tree in params.items()}
