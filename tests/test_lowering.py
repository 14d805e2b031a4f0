"""Programs of every kernel for GPUs and TPUs, made on a CPU by `jax.export`: forward and backward; nothing is compiled.

What a kernel cannot express for its device (an operation, a block shape, a layout, too much shared memory) is an error
here; what it refuses must be refused with its reason. Among all cases of a kernel every mask without score and every
score without mask meets every head size, and the dtypes that it takes go round, so that each of them meets every mask,
score and size too; the others are refused once for each mask and score. `--full-cross` is all of that in all dtypes.
That the programs compile is in tests/aot.
"""

import contextlib
import dataclasses
import re

import jax
import pytest
from cases import MASKS, SCORES, VARIANTS
from jax import export
from oracle import Shape
from problems import DTYPES, REFUSED, Case, attend, draw, precision

from attnjax.kernels import mosaic_gpu

SIZES = (16, 64, 80, 128, 256)
NAMED = {mask.name: mask for mask in VARIANTS}
FAMILIES = [(mask, SCORES[0]) for mask in MASKS] + [(MASKS[0], score) for score in SCORES[1:]]


@dataclasses.dataclass(frozen=True)
class Kernel:
    """An implementation.

    Attributes:
      platforms: what it is lowered for.
      calls: its custom call, and how many of them a program with gradients has at least.
      allowed: custom calls that `jax.export` does not vouch for.
      device: for which the program is made; most take any of their platform.
      refused: reasons by dtype, by name of the mask or the score, or by "" for all of them.
      more: masks beside those of the table.
    """

    platforms: tuple[str, ...]
    calls: tuple[str, int]
    allowed: tuple[str, ...] = ()
    device: tuple[str, str] | None = None
    refused: dict[str, str] = dataclasses.field(default_factory=dict)
    more: tuple[str, ...] = ()

    def reason(self, case, dtype):
        """Why the case must be refused, or `None`."""
        names = ("", dtype, case.score.name, case.mask.name)
        return next((self.refused[name] for name in names if name in self.refused), None)

    def lowering(self):
        """While it is open, programs are made for the device."""
        if self.device is None:
            return contextlib.nullcontext()
        platform, kind = self.device
        device = jax.sharding.AbstractDevice(device_kind=kind, num_cores=1, platform=platform)
        return jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=device))


HALVES = "takes bfloat16 and float16, not "
BIAS = "would read {} as a T x S bias"
KERNELS = {
    "xla": Kernel(("cuda", "tpu"), ("", 0)),
    "triton": Kernel(
        ("cuda",),
        ("__gpu$xla.gpu.triton", 3),
        allowed=("__gpu$xla.gpu.triton",),
        refused=REFUSED["triton"],
    ),
    "cudnn": Kernel(
        ("cuda",),
        ("__cudnn$fmhaSoftmax", 2),
        allowed=("__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward"),
        device=("gpu", "NVIDIA H200"),
        refused={dtype: HALVES + dtype for dtype in ("float32", "float64")}
        | {score.name: "takes no scores" for score in SCORES[1:]}
        | {name: BIAS.format(name.title()) for name in ("chunked", "prefix", "segments", "dilated", "dense", "where")}
        | {"permutation": BIAS.format("Permutation"), "combined": BIAS.format("(Or|Segments|Not)")}
        | {
            "causal": "takes Causal with Python numbers, not with arrays",
            "window": "takes causal masks and windows that",
        },
        more=("causal_static", "causal_end", "window_past", "lengths_static", "lengths_key"),
    ),
    "mosaic_gpu": Kernel(
        ("cuda",),
        ("mosaic_gpu", 1),
        refused=REFUSED["mosaic_gpu"]
        if jax.__version_info__ >= mosaic_gpu.NEEDS
        else {"": f"needs jax 0.11.2 or newer, this is {re.escape(jax.__version__)}"},
    ),
    "mosaic_tpu": Kernel(("tpu",), ("tpu_custom_call", 3), device=("tpu", "TPU v5p"), refused=REFUSED["mosaic_tpu"]),
}


def covered(everything):
    """(name, family, size, dtype): see the first lines of this file. Of the tiled code each family meets one size."""
    for name, kernel in KERNELS.items():
        taken = [dtype for dtype in DTYPES if dtype not in kernel.refused]
        for n, family in enumerate([*FAMILIES, *((NAMED[mask], SCORES[0]) for mask in kernel.more)]):
            for m, size in enumerate(SIZES):
                some = [taken[(n + m) % len(taken)]] if name != "xla" or m == n % len(SIZES) else []
                some += [dtype for dtype in DTYPES if dtype not in taken and m == 0]
                for dtype in DTYPES if everything else some:
                    yield pytest.param(name, family, size, dtype, id=f"{name}-{Case(*family)}-{dtype}-{size}")


def pytest_generate_tests(metafunc):
    if metafunc.function is test_lowering:
        metafunc.parametrize("name, family, size, dtype", list(covered(metafunc.config.getoption("--full-cross"))))


def test_what_is_covered():
    """Every two of mask or score, head size and dtype meet, in each kernel for devices that are not here."""
    found = [param.values for param in covered(False)]
    for name in KERNELS.keys() - {"xla"}:
        own = [(repr(Case(*family)), size, dtype) for one, family, size, dtype in found if one == name]
        taken = [dtype for dtype in DTYPES if dtype not in KERNELS[name].refused]
        families = {family for family, _, _ in own}
        pairs = lambda a, b, own=own: {(one[a], one[b]) for one in own}
        assert pairs(0, 1) == {(family, size) for family in families for size in SIZES}
        assert pairs(0, 2) == {(family, dtype) for family in families for dtype in DTYPES}
        assert pairs(1, 2) >= {(size, dtype) for size in SIZES for dtype in taken}


@pytest.mark.crossed("name", "family", "size", "dtype", each="name")
def test_lowering(name, family, size, dtype):
    kernel = KERNELS[name]
    values = size if name == "cudnn" or family[1] is not SCORES[0] else size // 2
    case = Case(*family, Shape(batch=(2,), T=300, S=300, H=size, V=values))
    with precision(dtype):
        inputs = draw(case, dtype)
        reason = kernel.reason(case, dtype)
        if reason is None:
            text = exported(kernel, name, case, inputs)
            call, least = kernel.calls
            assert text.count(call) >= least if call else not re.search("triton|cudnn|mosaic|tpu_custom_call", text)
            return
        with pytest.raises(NotImplementedError, match=f"implementation '{name}' cannot: {reason}.*xla.* can"):
            exported(kernel, name, case, inputs)


def exported(kernel, name, case, inputs):
    """The program of output and gradients, as text."""

    def solve(x, d, cotangent):
        out, pull = jax.vjp(lambda x: attend(case, x, d, name, return_lse=False), x)
        return out, *pull(cotangent)

    arguments = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), (inputs.x, inputs.d, inputs.cotangents[0])
    )
    allowed = [export.DisabledSafetyCheck.custom_call(call) for call in kernel.allowed]
    with kernel.lowering():
        made = export.export(jax.jit(solve), platforms=kernel.platforms, disabled_checks=allowed)(*arguments)
    return made.mlir_module()
