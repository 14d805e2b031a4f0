"""The competitors: attnjax's implementations and other libraries, each in its own best way. Times nothing.

A competitor's `prepare` turns a case and its arrays into a `Prepared`: something to run. It raises `CannotDo`
when it lacks what the case asks for, `Refused` when the run would need more memory than allowed, and
`Skipped` when the run would teach nothing.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import importlib.util
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from attnjax import profiling
from attnjax.attention import attention
from attnjax.bench.cases import Arrays, Case
from attnjax.core.dispatch import KERNELS

# Up to so many logits those run too that are no news: `reference`, which is for checking, and flax, which
# calls jax.nn when nothing is dropped and no weights are recorded. Beyond, only when they are named.
SMALL = 2**22


class CannotDo(Exception):
    """The competitor has no way to do the case; says why."""


class Refused(Exception):
    """The case was not run, on purpose; says why."""


class Skipped(Exception):
    """The case was not run, because nobody would learn from it; says why."""


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A case ready to run.

    Attributes:
      run: does the work once, from the cotangent of that name ("cotangent" or "checked"), and returns when it
        is
        done: the output, and the gradients of query, key and value when the case asks for them.
      to_numpy: what `run` returned as numpy arrays in attnjax's layout, [B, T, N, V] and so on.
      temporary_bytes: what the compiler reserves beside arguments and results; `None` when nobody tells.
      operand_bytes: dense masks and biases that this competitor needs as arrays.
      compile_seconds: time to trace and compile; `None` for what is not compiled.
    """

    run: Callable[[str], Any]
    to_numpy: Callable[[Any], list[np.ndarray]]
    temporary_bytes: int | None = None
    operand_bytes: int = 0
    compile_seconds: float | None = None


@dataclasses.dataclass(frozen=True)
class Competitor:
    """A name for `--impl`, the module that must be importable, and how a case is prepared.

    `prepare(case, arrays, limit, asked)`: limit is the memory in bytes that a run may need; asked is true
    when the user named the competitor, so that it is never skipped.
    """

    name: str
    module: str
    install: str
    prepare: Callable[[Case, Arrays, float, bool], Prepared]

    @property
    def absent(self) -> str | None:
        """Why it cannot take part, or `None`."""
        error = _import_error(self.module)
        return None if error is None else f"{error}: {self.install}"


@functools.cache
def _import_error(module: str) -> str | None:
    if importlib.util.find_spec(module) is None:
        return "not installed"
    try:
        importlib.import_module(module)
    except ImportError as error:
        return f"cannot be imported ({error})"
    return None


def _attnjax(name: str, case: Case, arrays: Arrays, limit: float, asked: bool) -> Prepared:
    """One of attnjax's implementations; mask and score are data, passed as they are."""
    if name == "reference" and case.logits > SMALL and not asked:
        raise Skipped("for checking; needs the T x S matrix")

    def attend(query: Any, key: Any, value: Any, options: dict[str, Any]) -> Any:
        return attention(query, key, value, **{**options, "implementation": name})

    return _compile(case, arrays, limit, attend, lambda: case.options(arrays))


def _jax_nn(case: Case, arrays: Arrays, limit: float, asked: bool) -> Prepared:
    """causal, window and lengths by their own arguments; documents as a dense mask; ALiBi as a dense bias."""
    _no_soft_cap(case, "jax.nn.dot_product_attention")
    _same_value_size(case, "jax.nn.dot_product_attention")

    def attend(query: Any, key: Any, value: Any, operands: dict[str, Any]) -> Any:
        return jax.nn.dot_product_attention(query, key, value, **operands, **_own_rules(case))

    return _compile(case, arrays, limit, attend, lambda: _dense(case, arrays, own=_OWN_RULES))


def _flax(case: Case, arrays: Arrays, limit: float, asked: bool) -> Prepared:
    """causal by its own argument, any other mask dense."""
    _no_soft_cap(case, "flax.nnx.dot_product_attention")
    _same_value_size(case, "flax.nnx.dot_product_attention")
    if case.logits > SMALL and not asked:
        raise Skipped("calls jax.nn.dot_product_attention")
    nnx = importlib.import_module("flax.nnx")

    def attend(query: Any, key: Any, value: Any, operands: dict[str, Any]) -> Any:
        return nnx.dot_product_attention(query, key, value, **operands, is_causal=case.causal)

    return _compile(case, arrays, limit, attend, lambda: _dense(case, arrays, own=("causal",)))


def _tokamax(case: Case, arrays: Arrays, limit: float, asked: bool) -> Prepared:
    """As jax.nn, and soft cap by its own argument; its default implementation."""
    tokamax = importlib.import_module("tokamax")

    def attend(query: Any, key: Any, value: Any, operands: dict[str, Any]) -> Any:
        rules = {**_own_rules(case), "logits_soft_cap": case.soft_cap}
        return tokamax.dot_product_attention(query, key, value, **operands, **rules)

    return _compile(case, arrays, limit, attend, lambda: _dense(case, arrays, own=_OWN_RULES))


def _torch(case: Case, arrays: Arrays, limit: float, asked: bool) -> Prepared:
    """is_causal where that is all, else a dense mask or bias; heads before rows in memory."""
    _no_soft_cap(case, "torch's scaled_dot_product_attention")
    torch = importlib.import_module("torch")
    torch.set_num_threads(profiling.usable_cores())
    on_gpu = jax.default_backend() == "gpu"
    if on_gpu and not torch.cuda.is_available():
        raise CannotDo("this torch cannot use the GPU that JAX uses")
    operands = lambda: _dense(case, arrays, own=("causal",) if _only_causal(case) else (), fold=True)
    shapes = jax.eval_shape(operands)
    itemsize = jnp.dtype(case.dtype).itemsize
    dense = sum(x.size for x in shapes.values())
    # A boolean mask is turned into a float one; heads that differ in number or size make it hold the logits.
    whole = 3 * itemsize * case.logits if case.K != case.N or case.H != case.V else 0
    _check_memory(dense * (1 + itemsize) + whole, limit)

    def tensor(array: Any) -> Any:
        array = np.asarray(array)
        if array.dtype == bool:
            made = torch.from_numpy(np.array(array))
        else:
            wide = np.float64 if array.dtype == np.float64 else np.float32  # numpy's bfloat16 is not torch's
            made = torch.from_numpy(np.array(array, wide)).to(getattr(torch, case.dtype))
        return made.cuda() if on_gpu else made

    heads_first = lambda name: tensor(arrays[name]).transpose(1, 2).contiguous()
    query, key, value = (heads_first(name).requires_grad_(case.backward) for name in ("query", "key", "value"))
    cotangents = {name: heads_first(name) for name in ("cotangent", "checked")}
    masks = [tensor(x) for x in jax.jit(operands)().values()]
    attend = functools.partial(
        torch.nn.functional.scaled_dot_product_attention,
        query,
        key,
        value,
        attn_mask=masks[0] if masks else None,
        is_causal=case.causal and _only_causal(case),
        enable_gqa=case.K != case.N,
    )

    def run(which: str) -> list[Any]:
        if case.backward:
            out = attend()
            made = [out, *torch.autograd.grad(out, (query, key, value), cotangents[which])]
        else:
            with torch.inference_mode():
                made = [attend()]
        if on_gpu:
            torch.cuda.synchronize()
        return made

    to_numpy = lambda made: [x.detach().transpose(1, 2).double().cpu().numpy() for x in made]
    return Prepared(run, to_numpy, operand_bytes=sum(x.nbytes for x in masks))


_PEERS = "pip install 'attnjax[peers]'"

COMPETITORS: dict[str, Competitor] = {
    competitor.name: competitor
    for competitor in (
        *(Competitor(name, "attnjax", "", functools.partial(_attnjax, name)) for name in KERNELS),
        Competitor("jax.nn", "jax", "", _jax_nn),
        Competitor("flax", "flax", "pip install flax", _flax),
        Competitor("torch", "torch", _PEERS, _torch),
        Competitor("tokamax", "tokamax", _PEERS, _tokamax),
    )
}

_OWN_RULES = ("causal", "window", "length")


def _own_rules(case: Case) -> dict[str, Any]:
    """A case's mask as arguments of `jax.nn.dot_product_attention` (tokamax's are the same)."""
    rules: dict[str, Any] = {"is_causal": case.causal}
    if case.window is not None:
        rules["local_window_size"] = (case.window - 1, 0)
    if case.length is not None:
        rules["key_value_seq_lengths"] = jnp.full((case.B,), case.length, jnp.int32)
    return rules


def _dense(case: Case, arrays: Arrays, *, own: tuple[str, ...], fold: bool = False) -> dict[str, jax.Array]:
    """Everything of a case that a competitor lacks an argument for, as arrays.

    Args:
      own: fields of the case that the competitor takes by its own arguments.
      fold: put the mask into the bias, as -inf, when there are both.

    Returns:
      "mask": boolean `[1, 1, T, S]`, and "bias": in the case's dtype, broadcastable to `[B, N, T, S]`; each
      only if needed.
    """
    gone = {name: False if name == "causal" else None for name in own}
    rest = dataclasses.replace(case, **gone, soft_cap=None)
    options = rest.options(arrays)
    made = {}
    if options["mask"] is not None:
        made["mask"] = options["mask"].to_array(case.T, case.S)[None, None]
    for score in options["score"] or ():
        bias = score.array if hasattr(score, "array") else score.to_array(case.T, case.S, heads=case.N)[None]
        bias = jnp.asarray(bias).astype(case.dtype)
        made["bias"] = bias if "bias" not in made else made["bias"] + bias
    if fold and len(made) == 2:
        return {"bias": jnp.where(made["mask"], made["bias"], -jnp.inf)}
    return made


def _only_causal(case: Case) -> bool:
    """Whether the mask is causal or nothing and there is no bias, so that torch needs no array."""
    return not (case.window or case.documents or case.length or case.alibi or case.bias)


def _no_soft_cap(case: Case, function: str) -> None:
    if case.soft_cap is not None:
        raise CannotDo(f"{function} has no soft cap")


def _same_value_size(case: Case, function: str) -> None:
    if case.H != case.V:
        raise CannotDo(f"{function} wants values of the head size of the keys")


def _check_memory(needed: float, limit: float) -> None:
    if needed > limit:
        raise Refused(f"needs about {needed / 2**30:.1f} GiB, {limit / 2**30:.1f} GiB are allowed")


def _compile(
    case: Case, arrays: Arrays, limit: float, attend: Callable[..., Any], operands: Callable[[], Any]
) -> Prepared:
    """Compiles `attend(query, key, value, operands())` or its gradients, unless it needs too much memory.

    Operands are arguments of the compiled function, as a mask is that a model shares between its layers. They
    are not made before their size, and that of the temporaries, is known to be allowed.
    """

    def step(query: Any, key: Any, value: Any, cotangent: Any, extra: Any) -> tuple[Any, ...]:
        if not case.backward:
            return (attend(query, key, value, extra),)
        out, pull = jax.vjp(lambda *qkv: attend(*qkv, extra), query, key, value)
        return out, *pull(cotangent)

    query, key, value = (jnp.asarray(arrays[name]) for name in ("query", "key", "value"))
    cotangents = {name: jnp.asarray(arrays[name]) for name in ("cotangent", "checked")}
    shapes = jax.eval_shape(operands)
    jitted = jax.jit(step)
    start = time.perf_counter()
    compiled = jitted.lower(query, key, value, cotangents["cotangent"], shapes).compile()
    seconds = time.perf_counter() - start
    memory = profiling.compiled_bytes(compiled)
    if memory is not None:
        _check_memory(sum(memory.values()), limit)
    extra = jax.jit(operands)()
    return Prepared(
        # The jitted function finds what was compiled above; calling it is what users do.
        run=lambda which: jax.block_until_ready(jitted(query, key, value, cotangents[which], extra)),
        to_numpy=lambda made: [np.asarray(x) for x in made],
        temporary_bytes=None if memory is None else memory["temporaries"],
        operand_bytes=sum(x.nbytes for x in jax.tree.leaves(extra)),
        compile_seconds=seconds,
    )
