"""`Operations`: a traced function of scalars as a flat list of operations, to be compared, run, and taken apart."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Literal

from attnjax.core.fingerprint import fingerprint, of_array

Array = jax.Array

HARMLESS = 0.5  # every function has a finite derivative there (but acosh)
SAME = ("broadcast_in_dim", "reshape", "squeeze", "copy")  # of a scalar: the scalar
_CALLS = ("pjit", "jit", "closed_call", "core_call", "remat2", "checkpoint")
_ELSEWHERE = ("sharding_constraint", "reshard", "mesh_cast", "pvary", "pcast")  # where a value lies, not what it is
# Moves numbers and computes none: takes them in any type.
_READS = frozenset((*SAME, "gather", "dynamic_slice", "slice", "transpose", "rev", "expand_dims"))
_CONVERTS = _READS | {"convert_element_type"}
# Their derivatives are sums and choices, finite whatever their inputs are.
_LINEAR = frozenset(
    "add sub neg add_any select_n convert_element_type max min stop_gradient reduce_sum concatenate".split()
)
# Their results are finite where their inputs are, but for overflow.
_TAME = frozenset(
    "mul square abs sign tanh logistic sin cos exp exp2 erf floor ceil round clamp lt le gt ge eq ne and or not xor "
    "is_finite iota rem erfc atan2 expm1 pow sqrt custom_jvp_call custom_vjp_call".split()
)


class Name:
    """A variable; each call of an inner function has its own."""

    def __init__(self, aval: Any):
        self.dtype, self.shape = aval.dtype, aval.shape


class Operation(NamedTuple):
    """A primitive with its parameters, the names (or numbers) that it reads, and those that it makes."""

    primitive: Any
    parameters: dict[str, Any]
    inputs: tuple[Any, ...]
    outputs: tuple[Name, ...]

    @property
    def name(self) -> str:
        return self.primitive.name

    def bind(self, values: Sequence[Any]) -> list[Any]:
        """The results for these inputs, each of any type that it was traced for or, where it only reads, of another."""
        values = [typed(x, v, self) for x, v in zip(values, self.inputs, strict=True)]
        made = self.primitive.bind(*values, **self.primitive.get_bind_params(self.parameters))
        return list(made) if self.primitive.multiple_results else [made]


class Visible(NamedTuple):
    """Whether a pair counts; whether any pair of its query does, of its key, any at all."""

    pair: Any
    query: Any
    key: Any
    any: Any

    @classmethod
    def of(cls, pairs: Array) -> Visible:
        """From the pairs of a tile [..., q, k]; the others have size 1 where they are taken over an axis."""
        return cls(pairs, *(pairs.any(axes, keepdims=True) for axes in (-1, -2, (-2, -1))))

    def to(self, letters: frozenset[str]) -> Any:
        """What matters to a number that depends on these of score, b, h, q and k."""
        if "score" in letters or {"q", "k"} <= letters:
            return self.pair
        return self.query if "q" in letters else self.key if "k" in letters else self.any


class Captured:
    """The arrays that a function captured, in the order in which they were found; each once."""

    def __init__(self) -> None:
        self.arrays: list[Any] = []
        self._numbers: dict[int, int] = {}

    def number(self, array: Any) -> int:
        """Where the array stands; it is added when it is new."""
        if id(array) not in self._numbers:
            self._numbers[id(array)] = len(self.arrays)
            self.arrays.append(array)
        return self._numbers[id(array)]


class Operations:
    """A traced function.

    Calls of inner functions are taken apart, so that the arrays which those hold count as captured, too.

    Attributes:
      captured: which of the captured arrays it reads, by name.
      inputs: names of its arguments; depends: which of them, by letter, each name depends on.
      steps: what it does; out: the name, or number, of its result.
    """

    def __init__(self, closed: Any, captured: Captured, letters: Sequence[str]):
        self.captured: dict[Name, int] = {}
        self.steps: list[Operation] = []
        self._of_number: dict[int, Name] = {}
        self._arrays = captured
        self.inputs = [Name(v.aval) for v in closed.jaxpr.invars]
        (self.out,) = self._unfold(closed, self.inputs)
        del self._arrays, self._of_number  # caches keep what is static for good, and arrays with it
        self._effects = [step for step in self.steps if not step.outputs]
        self.steps = self.needed((self.out, *(v for step in self._effects for v in step.inputs)), set())
        self.depends = {v: frozenset((letter,)) for v, letter in zip(self.inputs, letters, strict=True)}
        self.depends |= dict.fromkeys(self.captured, frozenset())
        for step in self.steps:
            read = (self.depends[v] for v in step.inputs if isinstance(v, Name))
            self.depends |= dict.fromkeys(step.outputs, frozenset().union(*read))
        self.reads = frozenset().union(*(self.depends[v] for v in self._ends()))

    def key(self) -> tuple:
        """What it computes, hashable."""
        numbers = {v: ("captured", n) for v, n in self.captured.items()}
        numbers |= {v: ("input", n) for n, v in enumerate(self.inputs)}
        kinds = lambda some: tuple((v.shape, str(v.dtype)) for v in some)
        read = lambda v: numbers[v] if isinstance(v, Name) else of_array(v)
        steps = []
        for step in (*self.steps, *self._effects):
            own = step.primitive, fingerprint(step.parameters), tuple(map(read, step.inputs)), kinds(step.outputs)
            steps.append(own)
            for v in step.outputs:
                numbers[v] = ("made", len(numbers))
        return kinds(self.captured), tuple(steps), read(self.out)

    def run(self, captured: Sequence[Any], arguments: Sequence[Any], visible: Visible | None = None) -> Any:
        """The result.

        Args:
          captured: all captured arrays. Those of floats may be wider than they were: they are read as they come, and
            rounded to their own type where they are computed with, so that their gradients add up in the wider one.
          visible: where it is false inputs are replaced by harmless ones, so that derivatives are exactly 0 there,
            whatever the function is at those; None: everywhere true.
        """
        env: dict[Any, Any] = {v: captured[n] for v, n in self.captured.items()}
        env.update(zip(self.inputs, arguments, strict=True))
        for step in (*self.steps, *self._effects):
            values = [env[v] if isinstance(v, Name) else v for v in step.inputs]
            if visible is not None:
                values = self.guarded(step, values, visible)
            env.update(zip(step.outputs, step.bind(values), strict=True))
        return env[self.out] if isinstance(self.out, Name) else self.out

    def guarded(self, step: Operation, values: list[Any], visible: Any) -> list[Any]:
        """The inputs of an operation, harmless where its result does not count."""
        if not step.outputs or step.name in _READS or step.name in _LINEAR:
            return values
        if not any(jnp.issubdtype(v.dtype, jnp.inexact) for v in step.outputs):
            return values
        counts = visible.to(self.depends[step.outputs[0]])
        if counts is None:
            return values
        return [
            _harmless(step, x, counts) if isinstance(v, Name) else x for x, v in zip(values, step.inputs, strict=True)
        ]

    def needed(self, wanted: Sequence[Any], known: set[Any]) -> list[Operation]:
        """The operations that these are made of, from what is known."""
        made = {v: n for n, step in enumerate(self.steps) for v in step.outputs}
        found: set[int] = set()
        waiting = list(wanted)
        while waiting:
            v = waiting.pop()
            if v in known or v not in made or made[v] in found:
                continue
            found.add(made[v])
            waiting += [x for x in self.steps[made[v]].inputs if isinstance(x, Name)]
        return [self.steps[n] for n in sorted(found)]

    def infinities(self, given: bool) -> tuple[bool, bool]:
        """Whether it may give infinities, and whether it may do more to them than add: their derivatives are NaN then.

        Args:
          given: whether its score may be infinite. Captured arrays may be, where they are added: so pairs are hidden.
        """
        table = {v for v in self.captured if jnp.issubdtype(v.dtype, jnp.inexact)}
        endless = set(self.inputs[:1]) if given else set()
        multiplied = False
        for step in self.steps:
            names = [v for v in step.inputs if isinstance(v, Name)]
            if step.name in _READS:
                table |= set(step.outputs) if table & set(names) else set()
                endless |= set(step.outputs) if endless & set(names) else set()
                continue
            adds = step.name in _LINEAR
            numbers = any(not isinstance(v, Name) and not np.all(np.isfinite(v)) for v in step.inputs)
            some = bool(endless & set(names)) or numbers or (adds and bool(table & set(names)))
            floats = any(jnp.issubdtype(v.dtype, jnp.inexact) for v in step.outputs)
            multiplied |= floats and some and not adds
            if floats and (some or not (adds or step.name in _TAME or self._divides_by_one_side(step))):
                endless |= set(step.outputs)
        return self.out in endless or self.out in table, multiplied

    def _divides_by_one_side(self, step: Operation) -> bool:
        """Whether it is a division by what does not change from pair to pair, as is a temperature."""
        divisor = step.inputs[-1]
        by = self.depends[divisor] if isinstance(divisor, Name) else frozenset()
        return step.name == "div" and "score" not in by and not {"q", "k"} <= by

    def _ends(self) -> list[Name]:
        ends = [self.out, *(v for step in self._effects for v in step.inputs)]
        return [v for v in ends if isinstance(v, Name)]

    def _capture(self, array: Any, aval: Any) -> Name:
        number = self._arrays.number(array)
        name = self._of_number.setdefault(number, Name(aval))
        self.captured[name] = number
        return name

    def _unfold(self, closed: Any, inputs: Sequence[Any]) -> list[Any]:
        """Lists the operations, those of called functions in place of the calls; gives the results."""
        jaxpr, constants = getattr(closed, "jaxpr", closed), getattr(closed, "consts", ())
        names: dict[Any, Any] = {v: self._capture(x, v.aval) for v, x in zip(jaxpr.constvars, constants, strict=True)}
        names |= dict(zip(jaxpr.invars, inputs, strict=True))

        def read(v: Any) -> Any:
            aval: Any = v.aval
            return np.asarray(v.val, aval.dtype)[()] if isinstance(v, Literal) else names[v]

        for equation in jaxpr.eqns:
            primitive, parameters, given = equation.primitive, equation.params, tuple(map(read, equation.invars))
            if primitive.name in _CALLS:
                inner = parameters["jaxpr"] if "jaxpr" in parameters else parameters["call_jaxpr"]
                outputs = self._unfold(inner, given)
            elif primitive.name in _ELSEWHERE:
                outputs = list(given)
            else:
                outputs = [Name(v.aval) for v in equation.outvars]
                nowhere = {name: None for name in ("sharding", "out_sharding") if name in parameters}
                self.steps.append(Operation(primitive, parameters | nowhere, given, tuple(outputs)))
            names.update(zip(equation.outvars, outputs, strict=True))
        return [read(v) for v in jaxpr.outvars]


def typed(value: Any, name: Any, step: Operation) -> Any:
    """A value in the type that an operation was traced for; what only reads, or converts, takes every type."""
    if not isinstance(name, Name) or step.name in _CONVERTS or value.dtype == name.dtype:
        return value
    return value.astype(name.dtype) if jnp.issubdtype(name.dtype, jnp.inexact) else value


def _harmless(step: Operation, value: Any, counts: Any) -> Any:
    """A value, and where it does not count a number at which the operation has a finite derivative."""
    dtype = value.dtype
    if jnp.issubdtype(dtype, jnp.inexact):
        return jnp.where(counts, value, jnp.asarray(1.5 if step.name == "acosh" else HARMLESS, dtype))
    return jnp.where(counts, value, jnp.ones((), dtype)) if jnp.issubdtype(dtype, jnp.integer) else value
