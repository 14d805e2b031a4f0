"""`FeedForward`: two or three projections and an activation."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Float

from attnjax.nn.checks import check_input, check_name, check_rate, check_rngs, check_size, dropout_stream
from attnjax.nn.layers import Projection, default_bias_init, default_kernel_init

Array = jax.Array

ACTIVATIONS: dict[str, Callable] = {
    "gelu": jax.nn.gelu,
    "gelu_exact": functools.partial(jax.nn.gelu, approximate=False),
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
}
GATED: dict[str, Callable] = {"swiglu": jax.nn.silu, "geglu": jax.nn.gelu}


class FeedForward(nnx.Module):
    """The same two layers for every token.

        down(activation(up(x))),   gated: down(activation(gate(x)) * up(x))

    Parameters are `up.kernel [features, hidden]`, `gate.kernel` where there is a gate, `down.kernel [hidden, features]`
    and their biases.

    Args:
      features: size of each token.
      hidden: size between the layers.
      activation: "gelu" (by tanh), "gelu_exact", "relu", "silu"; with a gate "swiglu", "geglu" (by tanh); or a
        function.
      use_bias: of the projections.
      dropout: share of hidden numbers that are dropped in training.
      dtype: of the computation; default: that of x and parameters.
      param_dtype: of the parameters.
      kernel_init, bias_init: initializers.
      rngs: `nnx.Rngs`; the streams "params" and, where there is dropout, "dropout".

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from attnjax.nn import FeedForward
      >>> FeedForward(64, 256, activation="swiglu", use_bias=False, rngs=nnx.Rngs(0))(jnp.ones((2, 16, 64))).shape
      (2, 16, 64)

    References:
      Shazeer, "GLU Variants Improve Transformer", 2020.
    """

    def __init__(
        self,
        features: int,
        hidden: int,
        *,
        activation: str | Callable = "gelu",
        use_bias: bool = True,
        dropout: float = 0.0,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        kernel_init: Callable = default_kernel_init,
        bias_init: Callable = default_bias_init,
        rngs: nnx.Rngs,
    ) -> None:
        for argument, size in dict(features=features, hidden=hidden).items():
            check_size("FeedForward", argument, size)
        check_rate("FeedForward", "dropout", dropout)
        if not callable(activation):
            check_name("FeedForward", "activation", activation, [*ACTIVATIONS, *GATED])
        self.features, self.activation = features, activation
        shared: dict[str, Any] = dict(use_bias=use_bias, dtype=dtype, param_dtype=param_dtype, kernel_init=kernel_init)
        shared |= dict(bias_init=bias_init, rngs=rngs)
        self.up = Projection((features,), (hidden,), axes=("embed", "mlp"), **shared)
        self.gate: Projection | None = nnx.data(None)
        if activation in GATED:
            self.gate = Projection((features,), (hidden,), axes=("embed", "mlp"), **shared)
        self.down = Projection((hidden,), (features,), axes=("mlp", "embed"), **shared)
        self.dropout = nnx.Dropout(dropout, rngs=dropout_stream("FeedForward", dropout, rngs))

    def __call__(
        self, x: Float[Array, "*B T D"], *, deterministic: bool | None = None, rngs: Any = None
    ) -> Float[Array, "*B T D"]:
        """Args:
        x: `[..., features]`.
        deterministic: no dropout; default: as `eval()` and `train()` have set it.
        rngs: `nnx.Rngs` or a stream, for dropout in this call.
        """
        check_input("FeedForward", "x", x, self.features, "...")
        check_rngs("FeedForward", rngs)
        hidden = self.up(x)
        if self.gate is not None:
            hidden = GATED[str(self.activation)](self.gate(x)) * hidden
        else:
            activation = self.activation if callable(self.activation) else ACTIVATIONS[self.activation]
            hidden = activation(hidden)
        return self.down(self.dropout(hidden, deterministic=deterministic, rngs=rngs))
