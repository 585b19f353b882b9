"""Call batching: pipelines run in lockstep, and each halts at a network call until all can be made as one."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from diffusers.hooks import ModelHook
from greenlet import getcurrent, greenlet

from sdpipeline.engine.stepwise.forward_hooks import hooked_forward

Made = TypeVar("Made")

PER_ROW = "timestep"
"""Pipelines give one timestep for all their rows; networks take one for each as well."""
SCALE = "conditioning_scale"
"""Factor by which a ControlNet multiplies its residuals at the end, one number for all its rows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """Pending network call of a halted pipeline; ``arguments`` are by name, and the first has a row for each input."""

    network: torch.nn.Module
    forward: Callable[..., Any]
    arguments: Mapping[str, Any]

    @property
    def rows(self) -> int:
        """Number of inputs in this call: two for a guided picture, without a prompt and with it."""
        return int(next(iter(self.arguments.values())).shape[0])

    def later_half(self) -> Call:
        """Return the same call with only the rows that have the prompt."""
        half = {name: _part(value, self.rows // 2, self.rows, self.rows) for name, value in self.arguments.items()}
        return replace(self, arguments=half)

    def kind(self) -> tuple[Any, ...]:
        """Return a key that has to be equal for calls that are made as one."""
        own = tuple((name, _kind(value, self.rows)) for name, value in self.shared().items())
        return (self.network, own)

    @property
    def scale(self) -> float | None:
        """Factor of the whole output; None if there is none, as for a network that scales several control maps."""
        scale = self.arguments.get(SCALE)
        if isinstance(scale, list):
            return scale[0] if len(scale) == 1 else None
        return scale

    def shared(self) -> Mapping[str, Any]:
        """Return the arguments without the factor of the output, which each call applies by itself."""
        return {name: value for name, value in self.arguments.items() if name != SCALE or self.scale is None}


def in_lockstep(
    bodies: Sequence[Callable[[], Made]],
    networks: Sequence[torch.nn.Module],
    answer: Callable[[Mapping[int, Call]], Mapping[int, Any]],
) -> list[Made]:
    """Run the bodies concurrently on this thread, and return their results.

    ``answer`` gets the calls of all bodies that halt at the same network, by the body's number, and returns the
    network's output for each. ``networks`` are in the order in which a step calls them, so that slower bodies catch up.
    """
    ended: dict[int, Made] = {}
    halted: dict[int, Call] = {}
    running = [greenlet(body) for body in bodies]

    def go_on(n: int, *given: Any) -> None:
        came = running[n].switch(*given)
        halted.pop(n, None)
        (ended if running[n].dead else halted)[n] = came

    with _halting(networks):
        try:
            for n in range(len(bodies)):
                go_on(n)
            while halted:
                first = min((call.network for call in halted.values()), key=networks.index)
                for n, output in answer({n: call for n, call in halted.items() if call.network is first}).items():
                    go_on(n, output)
        finally:
            for each in running:
                each.throw()  # ends bodies that are still halted because another one failed
    return [ended[n] for n in range(len(bodies))]


def make_as_one(calls: Sequence[Call], size: int) -> list[Any]:
    """Call the network once, padded to ``size`` rows with copies of the last row; return each call's output."""
    rows = [call.rows for call in calls]
    arguments = {
        name: _joined([_rowwise(name, call.arguments[name], call.rows) for call in calls], rows, size)
        for name in calls[0].shared()
    }
    scaled = calls[0].scale is not None
    output = calls[0].forward(**arguments, **{SCALE: 1.0} if scaled else {})
    parts = split(output, rows, size)
    return [_times(part, call.scale or 0.0) for call, part in zip(calls, parts, strict=True)] if scaled else parts


def split(output: Any, rows: Sequence[int], size: int) -> list[Any]:
    """Split the output of a call of ``size`` rows into parts of ``rows`` each, from its first row on."""
    starts = [sum(rows[:n]) for n in range(len(rows))]
    return [_part(output, start, start + count, size) for start, count in zip(starts, rows, strict=True)]


def join(tensors: Sequence[torch.Tensor], size: int) -> torch.Tensor:
    """Concatenate tensors, padded to ``size`` rows with copies of the last row."""
    missing = size - sum(tensor.shape[0] for tensor in tensors)
    whole = torch.cat([*tensors, *[tensors[-1][-1:]] * missing])
    # The memory layout of a concatenation depends on its parts, and the order of arithmetic on the layout.
    return whole.contiguous()


@contextmanager
def _halting(networks: Sequence[torch.nn.Module]) -> Iterator[None]:
    """Have the networks pass every call to the current greenlet."""
    hub = getcurrent()
    with ExitStack() as hooked:
        for network in networks:
            hooked.enter_context(hooked_forward(network, _Halt(hub, inspect.signature(network.forward))))
        yield


class _Halt(ModelHook):  # type: ignore[misc]  # diffusers is not typed
    def __init__(self, hub: greenlet, signature: inspect.Signature) -> None:
        super().__init__()
        self._hub = hub
        self._signature = signature

    def new_forward(self, module: torch.nn.Module, *inputs: Any, **keywords: Any) -> Any:
        arguments = self._signature.bind(*inputs, **keywords).arguments
        return self._hub.switch(Call(network=module, forward=self.fn_ref.original_forward, arguments=arguments))


def _rowwise(name: str, value: Any, rows: int) -> Any:
    if name == PER_ROW and torch.is_tensor(value) and value.ndim == 0:
        return value.expand(rows)
    return value


def _has_rows(value: Any, rows: int) -> bool:
    return torch.is_tensor(value) and value.ndim > 0 and value.shape[0] == rows


def _kind(value: Any, rows: int) -> Any:
    if torch.is_tensor(value):
        shape = ("rows", *value.shape[1:]) if _has_rows(value, rows) or value.ndim == 0 else tuple(value.shape)
        return (*shape, value.dtype)
    if isinstance(value, Mapping):
        return tuple((name, _kind(each, rows)) for name, each in value.items())
    return tuple(_kind(each, rows) for each in value) if isinstance(value, tuple | list) else value


def _joined(values: Sequence[Any], rows: Sequence[int], size: int) -> Any:
    """Concatenate tensors with a row for each input; of all other values, which are equal, return the first."""
    first = values[0]
    if _has_rows(first, rows[0]):
        return join(values, size)
    if isinstance(first, Mapping):
        return {name: _joined([value[name] for value in values], rows, size) for name in first}
    if isinstance(first, tuple | list):
        return type(first)([_joined(each, rows, size) for each in zip(*values, strict=True)])
    return first


def _part(value: Any, start: int, stop: int, rows: int) -> Any:
    if _has_rows(value, rows):
        return value[start:stop]
    if isinstance(value, Mapping):
        return {name: _part(each, start, stop, rows) for name, each in value.items()}
    return type(value)([_part(each, start, stop, rows) for each in value]) if isinstance(value, tuple | list) else value


def _times(value: Any, scale: float) -> Any:
    if isinstance(value, tuple | list):
        return type(value)([_times(each, scale) for each in value])
    return value * scale if torch.is_tensor(value) else value
