"""The compiled segment in either mode: `jit`, or `jax.pmap` over the devices that share a batch."""

import functools
from collections.abc import Callable
from typing import Any

import jax

from tljax.train.step import Layout, Log, Program, segment, trials
from tljax.types import OptState, Params


def run(layout: Layout) -> Callable[..., Any]:
    """The compiled segment of a layout: `segment`, or what takes and gives the same under `jax.pmap`."""
    return segment if layout.axis is None else _by_pmap


def _by_pmap(program: Program, layout: Layout, *given: Any) -> tuple[Params, OptState, Log]:
    trained, opt_state, frozen, numbers, data, order, rates, steps = given
    devices = tuple(layout.mesh.devices.flat)
    parts = order.reshape(*order.shape[:2], len(devices), -1)
    return _pmapped(devices)(program, layout, trained, opt_state, parts, (frozen, numbers, data, rates, steps))


@functools.lru_cache
def _pmapped(devices: tuple[Any, ...]) -> Callable[..., Any]:
    """State and the rest go in whole and come out once: they have the shapes that they have under `jit`."""
    return jax.pmap(
        _part,
        axis_name="data",
        in_axes=(None, None, None, None, 2, None),
        out_axes=None,
        static_broadcasted_argnums=(0, 1),
        donate_argnums=(2, 3),
        devices=devices,
    )


def _part(
    program: Program, layout: Layout, trained: Params, opt_state: OptState, order: jax.Array, rest: Any
) -> tuple[Params, OptState, Log]:
    """On one device, with its part of the order."""
    frozen, numbers, data, rates, steps = rest
    own = (trained, opt_state, frozen, numbers, rates)
    return trials(program, layout, own, order, data[0], data[1], steps)
