"""Where tokens stand: rotary and sinusoidal positions, and the fixed rules behind position scores. No parameters."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from attnjax.core.checks import check_count, number_of

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class LinearScaling:
    """RoPE for longer contexts: positions are divided by `factor`.

    Args:
      factor: number > 0, how many times longer the context is.

    Example:
      >>> from attnjax.positions import LinearScaling, RoPE
      >>> RoPE(scaling=LinearScaling(4.0)).frequencies(4).tolist()
      [0.25, 0.0024999999441206455]

    References:
      Chen et al., "Extending Context Window of Large Language Models via Positional Interpolation", 2023.
    """

    factor: float

    def __post_init__(self) -> None:
        _check_positive(self, "factor")

    def scale(self, frequencies: np.ndarray, theta: float) -> np.ndarray:
        return frequencies / self.factor


@dataclasses.dataclass(frozen=True)
class NTKScaling:
    """RoPE for longer contexts: theta grows, so that the slowest frequency is divided by `factor`, the fastest by 1.

        theta' = theta * factor^(R / (R - 2)), where R numbers of a head are rotated.

    Args:
      factor: number > 0, how many times longer the context is.

    Example:
      >>> from attnjax.positions import NTKScaling, RoPE
      >>> RoPE(scaling=NTKScaling(4.0)).frequencies(4).tolist()
      [1.0, 0.0024999999441206455]

    References:
      bloc97, "NTK-Aware Scaled RoPE", 2023; Peng et al., "YaRN", 2023, section 3.1.
    """

    factor: float

    def __post_init__(self) -> None:
        _check_positive(self, "factor")

    def scale(self, frequencies: np.ndarray, theta: float) -> np.ndarray:
        count = len(frequencies)
        return frequencies / self.factor ** (np.arange(count) / max(count - 1, 1))


@dataclasses.dataclass(frozen=True)
class YaRN:
    """RoPE for longer contexts: slow frequencies are divided by `factor`, fast ones stay, a ramp lies between.

    A frequency is fast when it turns more than `beta_fast` times within `original_length`, slow when less than
    `beta_slow` times. Query and key are multiplied by the attention factor.

    Args:
      factor: number > 0, how many times longer the context is.
      original_length: tokens of the context that the model was trained with.
      beta_fast, beta_slow: turns at the ends of the ramp.
      attention_factor: default 0.1 * ln(factor) + 1, or 1 where factor <= 1.
      truncate: round the ends of the ramp outwards to whole frequencies.

    Example:
      >>> from attnjax.positions import RoPE, YaRN
      >>> RoPE(scaling=YaRN(4.0, original_length=64)).frequencies(4).tolist()
      [1.0, 0.0024999999441206455]

    References:
      Peng et al., "YaRN: Efficient Context Window Extension of Large Language Models", 2023, sections 3.2 to 3.4.
    """

    factor: float
    original_length: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    truncate: bool = True

    def __post_init__(self) -> None:
        given = () if self.attention_factor is None else ("attention_factor",)
        _check_positive(self, "factor", "original_length", "beta_fast", "beta_slow", *given)
        if self.beta_fast <= self.beta_slow:
            raise ValueError(
                f"YaRN: beta_fast must be greater than beta_slow, got {self.beta_fast} and {self.beta_slow}."
            )

    def scale(self, frequencies: np.ndarray, theta: float) -> np.ndarray:
        count = len(frequencies)
        # The (real) number of the frequency that turns `turns` times within the original length.
        number = lambda turns: count * math.log(self.original_length / (turns * 2 * math.pi)) / math.log(theta)
        low, high = number(self.beta_fast), number(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, 2 * count - 1)
        high += 0.001 if low == high else 0  # a ramp of one step, not a division by zero
        slow = np.clip((np.arange(count) - low) / (high - low), 0, 1)
        return frequencies * (1 - slow) + frequencies / self.factor * slow

    @property
    def magnitude(self) -> float:
        """By which query and key are multiplied."""
        if self.attention_factor is not None:
            return self.attention_factor
        return 0.1 * math.log(self.factor) + 1.0 if self.factor > 1 else 1.0


@dataclasses.dataclass(frozen=True)
class Llama3Scaling:
    """RoPE for longer contexts as in Llama 3.1: slow frequencies are divided by `factor`, fast ones stay.

    Args:
      factor: number > 0, by which slow frequencies are divided.
      low_frequency_factor: frequencies that turn less often than this within `original_length` are slow.
      high_frequency_factor: those that turn more often than this are fast; a ramp lies between.
      original_length: tokens of the context that the model was trained with.

    Example:
      >>> from attnjax.positions import Llama3Scaling, RoPE
      >>> RoPE(scaling=Llama3Scaling(8.0, 1.0, 4.0, 8192)).frequencies(4).tolist()
      [1.0, 0.009999999776482582]

    References:
      "The Llama 3 Herd of Models", Meta AI, 2024, and its code.
    """

    factor: float
    low_frequency_factor: float
    high_frequency_factor: float
    original_length: int

    def __post_init__(self) -> None:
        _check_positive(self, "factor", "low_frequency_factor", "high_frequency_factor", "original_length")
        if self.high_frequency_factor <= self.low_frequency_factor:
            raise ValueError(
                "Llama3Scaling: high_frequency_factor must be greater than low_frequency_factor, got "
                f"{self.high_frequency_factor} and {self.low_frequency_factor}."
            )

    def scale(self, frequencies: np.ndarray, theta: float) -> np.ndarray:
        turns = self.original_length * frequencies / (2 * math.pi)
        low, high = self.low_frequency_factor, self.high_frequency_factor
        fast = np.clip((turns - low) / (high - low), 0, 1)
        return frequencies * fast + frequencies / self.factor * (1 - fast)


Scaling = LinearScaling | NTKScaling | YaRN | Llama3Scaling


@dataclasses.dataclass(frozen=True)
class RoPE:
    """Rotary positions: pairs of numbers in a query or key turn by position times a frequency of their own.

        (a, b) -> (a cos(p f) - b sin(p f), b cos(p f) + a sin(p f)),   f_i = theta^(-2i / R)

    The logit of a query and a key that were both rotated depends on the distance of their positions only.

    Args:
      theta: base of the frequencies.
      fraction: share of each head that is rotated, the first R = fraction * H numbers; the others stay as they are.
      scaling: `LinearScaling`, `NTKScaling`, `YaRN` or `Llama3Scaling`.
      interleaved: pairs are neighbours (a_0, b_0, a_1, b_1, ...), as in the paper; default: halves
        (a_0, a_1, ..., b_0, b_1, ...), as in Llama and most checkpoints.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from attnjax.positions import RoPE
      >>> query = jax.random.normal(jax.random.key(0), (2, 16, 4, 8))
      >>> RoPE(theta=10000.0)(query, jnp.arange(16)).shape
      (2, 16, 4, 8)

    References:
      Su et al., "RoFormer: Enhanced Transformer with Rotary Position Embedding", 2021, section 3.4.
    """

    theta: float = 10000.0
    fraction: float = 1.0
    scaling: Scaling | None = None
    interleaved: bool = False

    def __post_init__(self) -> None:
        for name in ("theta", "fraction"):
            value = getattr(self, name)
            number = number_of(value)
            if number is None:
                raise TypeError(f"RoPE: {name} must be a number, got {value!r}.")
            object.__setattr__(self, name, number)
        if not 1 < self.theta < math.inf:
            raise ValueError(f"RoPE: theta must be greater than 1 and finite, got {self.theta}.")
        if not 0 < self.fraction <= 1:
            raise ValueError(f"RoPE: fraction must be in (0, 1], got {self.fraction}.")
        if self.scaling is not None and not isinstance(self.scaling, Scaling):
            raise TypeError(
                "RoPE: scaling must be LinearScaling, NTKScaling, YaRN or Llama3Scaling, got "
                f"{type(self.scaling).__name__} {self.scaling!r}."
            )

    def rotated(self, head_size: int) -> int:
        """R, how many numbers of a head are rotated.

        Raises:
          ValueError: it is odd, or none.
        """
        rotated = int(head_size * self.fraction)
        if rotated < 2 or rotated % 2:
            raise ValueError(
                f"RoPE rotates pairs: fraction * head size must be even and at least 2, got {self.fraction} * "
                f"{head_size} = {rotated}."
            )
        return rotated

    def frequencies(self, head_size: int) -> Float[Array, " F"]:
        """The frequencies in radians per token, scaling included: float32 `[R / 2]`.

        Args:
          head_size: H.
        """
        return jnp.asarray(self._frequencies(head_size), jnp.float32)

    def _frequencies(self, head_size: int) -> np.ndarray:
        rotated = self.rotated(head_size)
        frequencies = float(self.theta) ** (-np.arange(0, rotated, 2) / rotated)
        return frequencies if self.scaling is None else self.scaling.scale(frequencies, float(self.theta))

    def __call__(self, x: Float[Array, "*B T N H"], positions: Int[Array, ...]) -> Float[Array, "*B T N H"]:
        """Rotates x. Computed in float32 (float64 for float64).

        Args:
          x: queries or keys `[*B, T, N, H]`.
          positions: integers `[T]` or `[*B, T]`, where they stand.

        Returns:
          `[*B, T, N, H]` in x's dtype.

        Raises:
          TypeError, ValueError: positions that are not integers or do not fit.
        """
        positions = jnp.asarray(positions)
        if not jnp.issubdtype(positions.dtype, jnp.integer):
            raise TypeError(f"RoPE: positions must be integers, got {positions.dtype.name}.")
        outer = x.shape[:-2]
        pairs = zip(reversed(positions.shape), reversed(outer), strict=False)
        if (
            not 0 < positions.ndim <= len(outer)
            or positions.shape[-1] != outer[-1]
            or any(a not in (1, b) for a, b in pairs)
        ):
            raise ValueError(
                f"RoPE: positions have shape {list(positions.shape)} and must be [T] or [*B, T], with *B = "
                f"{list(outer[:-1])} and T = {outer[-1]}."
            )
        dtype = jnp.dtype(jnp.float64 if x.dtype == jnp.float64 else jnp.float32)
        rotated = self.rotated(x.shape[-1])
        positions = positions.reshape((1,) * (len(outer) - positions.ndim) + positions.shape)
        frequencies = np.asarray(self._frequencies(x.shape[-1]), dtype)
        angles = positions[..., None].astype(dtype) * frequencies.reshape((1,) * len(outer) + frequencies.shape)
        cos, sin = jnp.cos(angles)[..., None, :], jnp.sin(angles)[..., None, :]
        if isinstance(self.scaling, YaRN):
            magnitude = jnp.asarray(self.scaling.magnitude, dtype)
            cos, sin = cos * magnitude, sin * magnitude
        turned, rest = x[..., :rotated].astype(dtype), x[..., rotated:]
        count = rotated // 2
        shape, axis = ((count, 2), -1) if self.interleaved else ((2, count), -2)
        a, b = jnp.moveaxis(turned.reshape(*turned.shape[:-1], *shape), axis, 0)
        turned = jnp.stack([a * cos - b * sin, b * cos + a * sin], axis).reshape(turned.shape).astype(x.dtype)
        return jnp.concatenate([turned, rest], axis=-1) if rotated < x.shape[-1] else turned


def sinusoidal(length: int, features: int) -> Float[Array, "T D"]:
    """The fixed positions of the first Transformer, sines and cosines in turn.

        [p, 2i] = sin(p / 10000^(2i / D)),   [p, 2i + 1] = cos(p / 10000^(2i / D))

    Args:
      length: T, the number of positions.
      features: D, even.

    Returns:
      float32 `[T, D]`.

    Raises:
      ValueError: sizes below 1 (features: 2), or odd features.

    Example:
      >>> from attnjax.positions import sinusoidal
      >>> sinusoidal(2, 2).round(3).tolist()
      [[0.0, 1.0], [0.8410000205039978, 0.5400000214576721]]

    References:
      Vaswani et al., "Attention Is All You Need", 2017, section 3.5.
    """
    length, features = check_count("length", length), _even(features)
    angles = np.arange(length)[:, None] * sinusoidal_frequencies(features)
    table = np.stack([np.sin(angles), np.cos(angles)], axis=-1).reshape(length, features)
    return jnp.asarray(table, jnp.float32)


def sinusoidal_frequencies(features: int) -> np.ndarray:
    """Radians per token of each pair of `sinusoidal`: float64 `[features / 2]`."""
    features = _even(features)
    return 10000.0 ** (-np.arange(0, features, 2) / features)


def _even(features: Any) -> int:
    number = number_of(features)
    if not isinstance(number, int) or number < 2 or number % 2:
        raise ValueError(f"features must be an even integer of at least 2, got {features!r}.")
    return number


def alibi_slopes(num_heads: int) -> Array:
    """The slopes of ALiBi, one per head: a geometric sequence that starts at 2^(-8/n) with that ratio.

    When the number of heads n is not a power of two, the slopes of the next lower power come first, then every other
    slope of twice that power.

    Args:
      num_heads: integer >= 1.

    Returns:
      float32 `[N]`.

    Example:
      >>> from attnjax.positions import alibi_slopes
      >>> alibi_slopes(4).tolist()
      [0.25, 0.0625, 0.015625, 0.00390625]

    References:
      Press et al., "Train Short, Test Long: Attention with Linear Biases", 2022, section 3 and its code.
    """
    num_heads = check_count("num_heads", num_heads)
    power = 2 ** int(np.floor(np.log2(num_heads)))
    geometric = lambda n: 2.0 ** (-8.0 / n * np.arange(1, n + 1))
    slopes = np.concatenate([geometric(power), geometric(2 * power)[::2][: num_heads - power]])
    return jnp.asarray(slopes, jnp.float32)


def relative_position_bucket(
    relative_position: Array, *, bidirectional: bool = True, num_buckets: int = 32, max_distance: int = 128
) -> Array:
    """T5's bucket of a relative position: exact for near tokens, logarithmic up to `max_distance` for far ones.

    Args:
      relative_position: integers, key position minus query position.
      bidirectional: half of the buckets for keys that come later; otherwise those all fall into bucket 0.
      num_buckets: how many buckets.
      max_distance: distances from here on share the last bucket.

    Returns:
      int32 of the same shape, in [0, num_buckets).

    Example:
      >>> import jax.numpy as jnp
      >>> from attnjax.positions import relative_position_bucket
      >>> relative_position_bucket(jnp.array([-200, -3, 0, 3])).tolist()
      [15, 3, 0, 19]

    References:
      Raffel et al., "Exploring the Limits of Transfer Learning", 2020, section 2.1 and its code.
    """
    relative_position = jnp.asarray(relative_position).astype(jnp.int32)
    if bidirectional:
        num_buckets //= 2
        start = jnp.where(relative_position > 0, num_buckets, 0)
        distance = jnp.abs(relative_position)
    else:
        start = jnp.zeros_like(relative_position)
        distance = jnp.maximum(-relative_position, 0)
    # The ends of the logarithmic buckets are integers, found here once in float64, so that a logarithm that is
    # rounded differently on another device cannot move a token into another bucket.
    exact = num_buckets // 2
    far = exact + sum(
        ((distance >= int(end)).astype(jnp.int32) for end in _bucket_ends(exact, num_buckets, max_distance)),
        jnp.zeros_like(distance),
    )
    return start + jnp.where(distance < exact, distance, far)


def _bucket_ends(exact: int, num_buckets: int, max_distance: int) -> np.ndarray:
    """Where each bucket above number `exact` begins, by bisection; those that begin beyond int32 are left out."""
    last = min(max(max_distance, exact), 2**31 - 1)
    buckets = np.arange(exact + 1, num_buckets)
    low, high = np.full(len(buckets), exact), np.full(len(buckets), last + 1)
    while (low < high).any():
        middle = low + (high - low) // 2
        share = np.log(middle / exact) / np.log(max_distance / exact) if max_distance > exact else np.ones(1)
        reached = exact + np.floor(share.astype(np.float32) * np.float32(num_buckets - exact)) >= buckets
        low, high = np.where(reached, low, np.minimum(middle + 1, high)), np.where(reached, middle, high)
    return low[low <= last]


def _check_positive(scaling: object, *names: str) -> None:
    for name in names:
        value = getattr(scaling, name)
        number = number_of(value)
        if number is None or not 0 < number < math.inf:
            raise ValueError(f"{type(scaling).__name__}: {name} must be a positive number, got {value!r}.")
        object.__setattr__(scaling, name, number)
