"""How much memory compiled programs ask for, and how long they are. Nothing is timed.

Measured is what XLA plans on top of arguments and results: `memory_analysis().temp_size_in_bytes`. The compiled
kernel's own memory is not in there, so a process that runs it is measured, too. What is not said to be of it is of the
tiled code.
"""

import functools
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

import attnjax as aj

MiB = 2**20
N, H = 4, 64


def floats(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def ids(S):
    return jax.ShapeDtypeStruct((1, S), jnp.int32)


# Masks and scores from their operands, and the operands' shapes at length S. What is a float gets a gradient.
CALLS = {
    "full": (lambda: {}, lambda S: []),
    "causal": (lambda: {"mask": aj.Causal()}, lambda S: []),
    "window": (lambda: {"mask": aj.Window(512, 0)}, lambda S: []),
    "segments": (lambda a: {"mask": aj.Segments(a)}, lambda S: [ids(S)]),
    "causal_segments": (lambda a: {"mask": aj.Causal() & aj.Segments(a)}, lambda S: [ids(S)]),
    "alibi": (lambda slopes: {"score": aj.ALiBi(slopes), "mask": aj.Causal()}, lambda S: [floats(N)]),
    "bias": (lambda bias: {"score": aj.Bias(bias)}, lambda S: [floats(1, N, 1, S)]),
    "where": (lambda: {"mask": aj.Where(lambda b, h, q, k: (q - k) % 7 < 5)}, lambda S: []),
    "relative": (lambda table: {"score": aj.RelativeBias(table)}, lambda S: [floats(32, N)]),
    "function": (lambda w: {"score": aj.ScoreFn(lambda s, b, h, q, k: s * w[k])}, lambda S: [floats(S)]),
    "sinks": (lambda sinks: {"sinks": sinks, "mask": aj.Causal()}, lambda S: [floats(N)]),
    "dropout": (lambda seed: {"dropout": aj.Dropout(0.1, seed)}, lambda S: [jax.ShapeDtypeStruct((), jnp.uint32)]),
}
MUST_HOLD = ("full", "causal", "window", "segments", "alibi", "bias")


def shapes(name, S, batch=1):
    return [floats(batch, S, N, H)] * 3 + CALLS[name][1](S)


def loss(name, implementation="xla"):
    """The sum of the output, so that all of the program's memory is attention's."""

    def function(q, k, v, *operands):
        return aj.attention(q, k, v, **CALLS[name][0](*operands), implementation=implementation).sum()

    return function


def gradient(name, S, implementation="xla"):
    """The gradient by everything that is a float, compiled for length S."""
    arguments = shapes(name, S)
    moved = [i for i, a in enumerate(arguments) if jnp.issubdtype(a.dtype, jnp.floating)]
    return compiled(jax.grad(loss(name, implementation), argnums=moved), arguments)


def compiled(function, arguments):
    return jax.jit(function).lower(*arguments).compile()


def temporaries(program):
    return program.memory_analysis().temp_size_in_bytes


def instructions(program):
    return sum(" = " in line for line in program.as_text().splitlines())


@functools.cache
def at_16384(name, implementation="xla"):
    return gradient(name, 16384, implementation)


@pytest.mark.parametrize("name", MUST_HOLD)
def test_gradient_at_16384_needs_at_most_160_MiB(name):
    assert temporaries(at_16384(name)) <= 160 * MiB


@pytest.mark.parametrize("name", MUST_HOLD)
def test_gradient_memory_is_linear_in_length(name):
    assert temporaries(at_16384(name)) <= 2.2 * temporaries(gradient(name, 8192))


@pytest.mark.parametrize("name", [name for name in CALLS if name not in MUST_HOLD])
def test_gradient_memory_of_the_other_masks_and_scores(name):
    assert temporaries(at_16384(name)) <= 160 * MiB


@pytest.mark.compiled
@pytest.mark.parametrize("name", [name for name in CALLS if name not in ("where", "function")])
def test_gradient_of_the_compiled_kernel_at_16384(name):
    """What XLA holds for it: cotangents and rows, and at most 100 MiB of them; twice as much for twice the length."""
    assert temporaries(at_16384(name, "cpu")) <= 100 * MiB
    assert temporaries(at_16384(name, "cpu")) <= 2.2 * temporaries(gradient(name, 8192, "cpu"))


@pytest.mark.compiled
def test_a_function_under_a_window_is_packed_where_the_window_leaves_it_open():
    """Bits of two or three blocks of 64 x 64 for each row of them, however long it is; `explain` counts them."""
    S, last = 4096, jnp.arange(4096)
    functions = (aj.Where(lambda b, h, q, k: (q + k) % 3 != 0), aj.Where(lambda b, h, q, k: last[q + k - k] >= h))
    for function, copies in zip(functions, (1, N), strict=True):
        mask, blocks, x = function & aj.Window(64, 0), 2 * S // 64 - 1 + S // 64 - 2, floats(1, S, N, H)
        attend = lambda q, k, v, mask: aj.attention(q, k, v, mask=mask, implementation="cpu")
        told = aj.explain(x, x, x, mask=mask, platform="cpu").temporary_bytes["forward"]
        bits = copies * blocks * 64 * 8
        assert bits <= told - aj.explain(x, x, x, platform="cpu").temporary_bytes["forward"] <= bits + MiB + 20 * S
        arguments = [x] * 3 + [jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), mask)]
        assert bits <= temporaries(compiled(attend, arguments)) <= bits + 5 * MiB


PEAK = """
import sys, jax, jax.numpy as jnp, numpy as np, attnjax as aj
S, threads = int(sys.argv[1]), aj.kernels.cpu.Config(threads=int(sys.argv[2]))
q, k, v, ct = (jnp.asarray(np.random.default_rng(n).normal(size=(1, S, 4, 64)), jnp.float32) for n in range(4))
slopes = jnp.ones(4)

def gradients(q, k, v, slopes):
    f = lambda *x: aj.attention(*x[:3], mask=aj.Causal(), score=aj.ALiBi(x[3]), implementation="cpu", config=threads)
    return jax.vjp(f, q, k, v, slopes)[1](ct)

program = jax.jit(gradients).lower(q, k, v, slopes).compile()

def peak(reset):
    if reset:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # the peak is what there is now
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))

before = peak(reset=True)
made = jax.block_until_ready(program(q, k, v, slopes))
print(peak(reset=False) - before - sum(a.nbytes for a in made))
"""


@pytest.mark.compiled
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the peak of a process is read as Linux tells it")
def test_peak_of_a_process_that_runs_the_compiled_kernel():
    """Forward and backward at 16384, all that they take beside arguments and results: tiles and sums of each thread."""
    command = [sys.executable, "-c", PEAK, "16384", "2"]
    run = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
    assert 0 < int(run.stdout) <= 100 * MiB


def test_what_is_measured_sees_the_whole_matrix():
    """The plain formula, at a length at which it can be compiled at all, needs the T x S matrix of every head."""
    S = 2048
    assert temporaries(gradient("causal", S, "reference")) >= N * S * S * 4
    assert temporaries(gradient("causal", S)) <= N * S * S


@pytest.mark.parametrize("lse", [False, True], ids=["out", "out_and_lse"])
def test_forward_needs_its_output_once_more_at_most(lse):
    """Beside the output as it is written there are only tiles, with and without the log-sum-exp."""
    S = 16384
    attend = lambda q, k, v: aj.attention(q, k, v, mask=aj.Causal(), return_lse=lse, implementation="xla")
    assert temporaries(compiled(attend, shapes("causal", S))) <= 1.1 * S * N * H * 4


both = pytest.mark.parametrize("implementation", ["xla", "cpu"])


@both
def test_shared_bias_is_not_repeated_over_the_batch(implementation):
    """A bias [1, 1, T, S] under a batch of 8: its gradient is summed on the fly, in its own shape."""
    B, S = 8, 2048
    attend = lambda q, k, v, bias: aj.attention(q, k, v, score=aj.Bias(bias), implementation=implementation).sum()
    arguments = [floats(B, S, N, H)] * 3 + [floats(1, 1, S, S)]
    plain = temporaries(compiled(jax.grad(attend, argnums=(0, 1, 2)), arguments))
    program = compiled(jax.grad(attend, argnums=(0, 1, 2, 3)), arguments)
    assert temporaries(program) <= plain + 2 * S * S * 4
    assert f"f32[{B},1,{S},{S}]" not in program.as_text() and f"f32[{B},{N},{S},{S}]" not in program.as_text()


@both
def test_shared_keys_and_values_are_not_repeated(implementation):
    """Grouped queries, and keys that vmap shares: neither is copied per head (2 x 7 / 8 of q) or per example."""
    S, examples = 8192, 8
    attend = functools.partial(aj.causal_attention, implementation=implementation)
    q, k = floats(1, S, 8, H), floats(1, S, 1, H)
    group = compiled(jax.grad(lambda q, k, v: attend(q, k, v).sum(), argnums=(0, 1, 2)), [q, k, k])
    assert temporaries(group) <= 3.5 * S * 8 * H * 4
    shared = jax.vmap(lambda q, k, v: attend(q, k, v), in_axes=(0, None, None))
    q, k = floats(examples, S, N, H), floats(S, N, H)
    assert temporaries(compiled(shared, [q, k, k])) <= 1.5 * examples * S * N * H * 4


def hessian_product(modes):
    """Forward over reverse, or reverse over reverse."""

    def product(x, t):
        gradient = jax.grad(lambda x: loss("causal")(*x))
        if modes == "forward_over_reverse":
            return jax.jvp(gradient, (x,), (t,))[1]
        return jax.grad(lambda x: sum(jnp.vdot(a, b) for a, b in zip(gradient(x), t, strict=True)))(x)

    return product


@pytest.mark.parametrize("modes", ["forward_over_reverse", "reverse_over_reverse"])
def test_hessian_products_at_8192_need_at_most_1_GiB(modes):
    """And linear memory: twice the length, twice as much."""
    at = lambda S: temporaries(compiled(hessian_product(modes), [shapes("causal", S)] * 2))
    assert at(8192) <= 1024 * MiB
    assert at(16384) <= 2.2 * at(8192)


def test_third_order_is_linear_too():
    product = lambda x, t: jax.jvp(lambda x: hessian_product("forward_over_reverse")(x, t), (x,), (t,))[1]
    at = lambda S: temporaries(compiled(product, [shapes("causal", S)] * 2))
    assert at(8192) <= 2.2 * at(4096)


@both
@pytest.mark.parametrize("name", [*MUST_HOLD, "causal_segments"])
def test_programs_do_not_grow_with_length(name, implementation):
    """As many instructions at 1024 as at 65536, so that compiling takes as long.

    A few more are XLA's own way to add up the longer lists of blocks that traced masks have.
    """
    at = lambda S: instructions(gradient(name, S, implementation))
    assert at(65536) <= 1.03 * at(1024)


def test_saved_for_the_backward_pass_are_inputs_out_and_rows():
    """What a gradient keeps from the forward pass: q, k, v, the output and two numbers per row of the softmax."""
    S = 4096
    _, pull = jax.eval_shape(lambda *x: jax.vjp(lambda *x: aj.causal_attention(*x), *x), *shapes("causal", S))
    saved = sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(pull))
    assert saved <= 4 * S * N * H * 4 + 2 * S * N * 4 + 64
