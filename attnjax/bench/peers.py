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
      start: does the work once, or begins it, from the cotangent of that name ("cotangent" or "checked"): the output,
        and the gradients of query, key and value when the case asks for them.
      to_numpy: what `run` returned as numpy arrays in attnjax's layout, [B, T, N, V] and so on.
      temporary_bytes: what the compiler reserves beside arguments and results; `None` when nobody tells.
      operand_bytes: dense masks and biases that this competitor needs as arrays.
      compile_seconds: time to trace and compile; `None` for what is not compiled.
      wait: returns when what `start` returned is there.
      queued: whether a device does the work while `start` returns, so that several can be begun before the wait.
    """

    start: Callable[[str], Any]
    to_numpy: Callable[[Any], list[np.ndarray]]
    temporary_bytes: int | None = None
    operand_bytes: int = 0
    compile_seconds: float | None = None
    wait: Callable[[Any], Any] = lambda made: made
    queued: bool = False

    def run(self, which: str) -> Any:
        """Does the work once and returns when it is done, with what it gave."""
        made = self.start(which)
        self.wait(made)
        return made

    def timed(self, which: str) -> profiling.Run:
        """The same, to be timed."""
        return profiling.Queue(lambda: self.start(which), self.wait) if self.queued else lambda: self.run(which)


@dataclasses.dataclass(frozen=True)
class Competitor:
    """A name for `--impl`, the module that must be importable, and how a case is prepared.

    `prepare(case, arrays, limit, asked)`: limit is the memory in bytes that a run may need; asked is true
    when the user named the competitor, so that it is never skipped. Those with a `platform` take part there only.
    """

    name: str
    module: str
    install: str
    prepare: Callable[[Case, Arrays, float, bool], Prepared]
    platform: str | None = None

    @property
    def missing(self) -> str | None:
        """Why it cannot be imported, and what to do, or `None`."""
        error = _import_error(self.module)
        return None if error is None else f"{error}: {self.install}"

    @property
    def absent(self) -> str | None:
        """Why it cannot take part, or `None`."""
        elsewhere = self.platform is not None and self.platform != jax.default_backend()
        return self.missing or (f"for {str(self.platform).upper()}s only" if elsewhere else None)


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


def _jax_nn(implementation: str | None, case: Case, arrays: Arrays, limit: float, asked: bool) -> Prepared:
    """causal, window and lengths by their own arguments; documents as a dense mask; ALiBi as a dense bias.

    As "cudnn" it has cuDNN's attention, which takes no bias that the queries share.
    """
    _no_soft_cap(case, "jax.nn.dot_product_attention")
    _same_value_size(case, "jax.nn.dot_product_attention")

    def attend(query: Any, key: Any, value: Any, operands: dict[str, Any]) -> Any:
        rules = {**_own_rules(case), "implementation": implementation}
        return jax.nn.dot_product_attention(query, key, value, **operands, **rules)

    def operands() -> dict[str, jax.Array]:
        made = _dense(case, arrays, own=_OWN_RULES)
        if implementation == "cudnn" and "bias" in made:
            made["bias"] = jnp.broadcast_to(made["bias"], (*made["bias"].shape[:2], case.T, case.S))
        return made

    return _compile(case, arrays, limit, attend, operands)


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
    """is_causal where that is all, else a dense mask or bias; heads before rows in memory; torch chooses the kernel."""
    _no_soft_cap(case, "torch's scaled_dot_product_attention")
    tensors = _Tensors(case, arrays)
    operands = lambda: _dense(case, arrays, own=("causal",) if _only_causal(case) else (), fold=True)
    shapes = jax.eval_shape(operands)
    itemsize = jnp.dtype(case.dtype).itemsize
    dense = sum(x.size for x in shapes.values())
    # A boolean mask is turned into a float one; heads that differ in number or size make it hold the logits.
    folded = not tensors.on_gpu and (case.K != case.N or case.H != case.V)
    _check_memory(dense * (1 + itemsize) + (3 * itemsize * case.logits if folded else 0), limit)
    masks = [tensors.of(x) for x in jax.jit(operands)().values()]
    attend = functools.partial(
        tensors.torch.nn.functional.scaled_dot_product_attention,
        attn_mask=masks[0] if masks else None,
        is_causal=case.causal and _only_causal(case),
        enable_gqa=case.K != case.N,
    )
    return tensors.prepared(attend, operand_bytes=sum(x.nbytes for x in masks))


def _torch_flex(case: Case, arrays: Arrays, limit: float, asked: bool) -> Prepared:
    """FlexAttention: mask as a function and its block mask, scores as a function. Compiled, and tuned, on a GPU."""
    flex = importlib.import_module("torch.nn.attention.flex_attention")
    tensors = _Tensors(case, arrays)
    torch = tensors.torch
    extra = {name: tensors.of(arrays[name]) for name in ("query_ids", "key_ids", "slopes", "bias") if name in arrays}

    def visible(b: Any, h: Any, q: Any, k: Any) -> Any:
        seen = k >= 0
        if case.causal or case.window is not None:
            seen = seen & (k <= q)
        if case.window is not None:
            seen = seen & (k > q - case.window)
        if case.documents is not None:
            seen = seen & (extra["query_ids"][q] == extra["key_ids"][k])
        if case.length is not None:
            seen = seen & (k < case.length)
        return seen

    def score(s: Any, b: Any, h: Any, q: Any, k: Any) -> Any:
        if case.soft_cap is not None:
            s = case.soft_cap * torch.tanh(s / case.soft_cap)
        if case.alibi:
            s = s - extra["slopes"][h] * (q - k).abs()
        if case.bias:
            at = zip(case.bias, (b, h, q, k), strict=True)
            s = s + extra["bias"][tuple(0 if letter == "1" else i for letter, i in at)]
        return s

    masked = case.causal or any(x is not None for x in (case.window, case.documents, case.length))
    scored = case.alibi or case.bias or case.soft_cap is not None
    _check_memory(case.T * case.S * masked, limit)  # of booleans, from which the block mask is made
    sizes = {"B": None, "H": None, "Q_LEN": case.T, "KV_LEN": case.S}
    device = "cuda" if tensors.on_gpu else "cpu"
    torch.compiler.reset()  # it compiles a function so often and no more, and takes what differed for a variable
    tuned = {"mode": "max-autotune-no-cudagraphs", "dynamic": False}
    attend = functools.partial(
        torch.compile(flex.flex_attention, **tuned) if tensors.on_gpu else flex.flex_attention,
        score_mod=score if scored else None,
        block_mask=flex.create_block_mask(visible, **sizes, device=device) if masked else None,
        enable_gqa=case.K != case.N,
    )
    prepared = tensors.prepared(attend)
    if not tensors.on_gpu:
        return prepared
    start = time.perf_counter()
    prepared.run("cotangent")
    return dataclasses.replace(prepared, compile_seconds=time.perf_counter() - start)


class _Tensors:
    """A case's arrays as torch's, on the GPU if that is JAX's device, heads before rows."""

    def __init__(self, case: Case, arrays: Arrays):
        self.torch, self.case = importlib.import_module("torch"), case
        self.torch.set_num_threads(profiling.usable_cores())
        self.on_gpu = jax.default_backend() == "gpu"
        if self.on_gpu and not self.torch.cuda.is_available():
            raise CannotDo("this torch cannot use the GPU that JAX uses")
        first = lambda name: self.of(arrays[name]).transpose(1, 2).contiguous()
        self.inputs = [first(name).requires_grad_(case.backward) for name in ("query", "key", "value")]
        self.cotangents = {name: first(name) for name in ("cotangent", "checked")}

    def of(self, array: Any) -> Any:
        """An array as a tensor: floats of the case's dtype stay so, others are as they are."""
        array = np.asarray(array)
        half = array.dtype == jnp.bfloat16  # numpy's bfloat16 is not torch's
        made = self.torch.from_numpy(np.array(array, np.float32 if half else array.dtype))
        made = made.to(self.torch.bfloat16) if half else made
        return made.cuda() if self.on_gpu else made

    def prepared(self, attend: Callable[..., Any], operand_bytes: int = 0) -> Prepared:
        """`attend(query, key, value)`, with its gradients if the case has them."""

        def start(which: str) -> list[Any]:
            if self.case.backward:
                out = attend(*self.inputs)
                return [out, *self.torch.autograd.grad(out, self.inputs, self.cotangents[which])]
            with self.torch.inference_mode():
                return [attend(*self.inputs)]

        return Prepared(
            start,
            lambda made: [x.detach().transpose(1, 2).double().cpu().numpy() for x in made],
            operand_bytes=operand_bytes,
            wait=(lambda made: self.torch.cuda.synchronize()) if self.on_gpu else lambda made: made,
            queued=self.on_gpu,
        )


_PEERS = "pip install 'attnjax[peers]'"
_PLATFORMS = {"cpu": "cpu", "mosaic_tpu": "tpu", **dict.fromkeys(("cudnn", "triton", "mosaic_gpu"), "gpu")}

COMPETITORS: dict[str, Competitor] = {
    competitor.name: competitor
    for competitor in (
        *(Competitor(name, "attnjax", "", functools.partial(_attnjax, name), _PLATFORMS.get(name)) for name in KERNELS),
        Competitor("jax.nn", "jax", "", functools.partial(_jax_nn, None)),
        Competitor("jax.nn-cudnn", "jax", "", functools.partial(_jax_nn, "cudnn"), "gpu"),
        Competitor("flax", "flax", "pip install flax", _flax),
        Competitor("torch", "torch", _PEERS, _torch),
        Competitor("torch-flex", "torch", _PEERS, _torch_flex, "gpu"),
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
        start=lambda which: jitted(query, key, value, cotangents[which], extra),
        to_numpy=lambda made: [np.asarray(x) for x in made],
        temporary_bytes=None if memory is None else memory["temporaries"],
        operand_bytes=sum(x.nbytes for x in jax.tree.leaves(extra)),
        compile_seconds=seconds,
        wait=jax.block_until_ready,
        queued=jax.default_backend() != "cpu",
    )
