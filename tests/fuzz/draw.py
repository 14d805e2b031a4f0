"""What is drawn first: sizes, and arrays of every type, each as Python text and as a name that the oracle reads."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from fuzz.oracle import Sizes

INTEGERS = ("int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64")


@dataclasses.dataclass
class Drawing:
    """A program while it is drawn: its arrays by name, as text; what is known and what is an argument of the program.

    Attributes:
      x: floats that have derivatives; d: integers, booleans that are arguments; c: what the program closes over.
      x_axes, d_axes: along which axis `vmap` maps each of them; `mapped`: how often, 0 is not at all.
      tiny: logits may be so small that their squares are 0.
      order: how often the call is differentiated.
      divided: arrays are divided over devices; cached: a cache holds the keys.
      one_sided: the mask is causal whatever else it says, so functions need no meaning at keys behind the query.
    """

    rng: np.random.Generator
    sizes: Sizes
    dtype: str
    x64: bool = False
    mode: str = ""
    mapped: int = 0
    one_sided: bool = False
    rounds: int = 1
    cached: bool = False
    divided: bool = False
    order: int = 0
    tiny: bool = False
    x: dict[str, str] = dataclasses.field(default_factory=dict)
    d: dict[str, str] = dataclasses.field(default_factory=dict)
    c: dict[str, str] = dataclasses.field(default_factory=dict)
    x_axes: dict[str, int | None] = dataclasses.field(default_factory=dict)
    d_axes: dict[str, int | None] = dataclasses.field(default_factory=dict)
    helpers: list[str] = dataclasses.field(default_factory=list)

    def chance(self, share: float) -> bool:
        return bool(self.rng.random() < share)

    def one_of(self, options: Sequence[Any], weights: Sequence[float] | None = None) -> Any:
        p = None if weights is None else np.asarray(weights) / np.sum(weights)
        return options[int(self.rng.choice(len(options), p=p))]

    def between(self, low: int, high: int) -> int:
        """Both ends included."""
        return int(self.rng.integers(low, high + 1))

    def number(self) -> int:
        """The seed of an array."""
        return int(self.rng.integers(10**6))

    def name(self) -> str:
        return f"a{len(self.x) + len(self.d) + len(self.c)}"

    def floating(self, shape: tuple[int, ...], dtype: str, form: str = "{}", *, name: str = "") -> str:
        """An array of normal numbers, differentiated; `form` changes its text. Its name."""
        name = name or self.name()
        axis = self._axis(len(shape)) if self.mapped and self.chance(0.5) else None
        self.x[name] = form.format(f"normal({self.number()}, {self._grown(shape, axis)}, {dtype!r})")
        self.x_axes[name] = axis
        return name

    def known_float(self, shape: tuple[int, ...], dtype: str, form: str = "{}") -> str:
        """The same, closed over; other numbers in each round."""
        name = self.name()
        self.c[name] = form.format(f"normal({self.number()}, {shape}, {dtype!r})")
        self.rounds = 2
        return name

    def per_round(self, values: Sequence[Any]) -> str:
        """A Python number that is another one in each round."""
        name = self.name()
        self.c[name] = f"{tuple(values)!r}[r]"
        self.rounds = 2
        return name

    def array(self, make: Callable[[], np.ndarray], *, traced: bool | None = None, numpy: bool | None = None) -> str:
        """Integers or booleans: `make` draws them, once for each mapped example. Its name."""
        name = self.name()
        traced = self.chance(0.5) if traced is None else traced
        numpy = self.chance(0.4) if numpy is None else numpy
        one = make()
        axis = self._axis(one.ndim) if traced and self.mapped and self.chance(0.5) else None
        if axis is not None:
            one = np.stack([one, *(make() for _ in range(self.mapped - 1))], axis % (one.ndim + 1))
        wide = one.dtype.itemsize == 8 and one.dtype.kind in "iu"
        numpy = numpy or (wide and not self.x64)
        numpy = numpy and self.mode != "transfer"
        if wide and not numpy and not self.x64:
            one = one.astype(np.int32)
        text = f"np.array({one.tolist()}, {one.dtype.name!r})"
        if 0 in one.shape:
            text = f"np.zeros({one.shape}, {one.dtype.name!r})"
        if traced and numpy and wide and not self.x64:
            traced = False
        where = self.d if traced else self.c
        where[name] = text if numpy else f"jnp.asarray({text})"
        if traced:
            self.d_axes[name] = axis
        return name

    def dtype_of_integers(self) -> str:
        wide = self.x64 or (self.chance(0.3) and self.mode != "transfer")
        return self.one_of(INTEGERS if wide else INTEGERS[:6])

    def integer(self, low: int, high: int, least: int | None = None, *, traced: bool | None = None) -> tuple[str, Any]:
        """An integer leaf of a mask or score: a number or an array over the batch, of any type, at times extreme.

        Args:
          low, high: where it usually lies; least: the smallest that is allowed.

        Returns:
          Its text, and what the oracle reads: a number, or a name.
        """
        extreme = self.chance(0.12)
        if self.chance(0.4):
            value = self.between(low, high)
            if extreme:
                large = [2**31 - 1, 2**31, 2**32 + 1, 2**63 - 1, 2**64]
                small = [] if least is not None else [-(2**31), -(2**31) - 1, -(2**63)]
                value = self.one_of(large + small)
            return repr(value), value
        dtype = self.dtype_of_integers()
        if self.mode == "transfer" and dtype in INTEGERS[6:]:
            dtype = "int32"
        info = np.iinfo(dtype)
        bottom = int(info.min) if least is None else max(least, int(info.min))
        ends = [int(info.max), int(info.max) - 1] + ([int(info.min), int(info.min) + 1] if least is None else [])
        value = lambda: self.one_of(ends) if extreme else min(max(self.between(low, high), bottom), int(info.max))
        if self.chance(0.25) and self.mode != "transfer":
            value = value()
            return f"np.{dtype}({value})", value
        batch = self.sizes.batch
        shape = (
            ()
            if self.chance(0.5)
            else tuple(1 if self.chance(0.2) else n for n in batch[self.between(0, len(batch)) :])
        )
        make = lambda: np.array([value() for _ in range(int(np.prod(shape)))], dtype).reshape(shape)
        name = self.array(make, traced=traced)
        return name, name

    def _axis(self, rank: int) -> int:
        return self.between(-rank - 1, rank)

    def _grown(self, shape: tuple[int, ...], axis: int | None) -> tuple[int, ...]:
        if axis is None:
            return shape
        place = axis % (len(shape) + 1)
        return (*shape[:place], self.mapped, *shape[place:])


def integers_of(read: Any, index: Any, get: Callable) -> Any:
    """An integer leaf laid out as [B, 1, 1, 1], exact: int64 where that is enough, else Python's own integers."""
    value = np.asarray(get(read) if isinstance(read, str) else read, object)
    small = all(abs(int(n)) < 2**40 for n in value.ravel())
    return index.per(value.astype(np.int64) if small else value, "")
