"""Which implementation runs what, per platform, and why the others do not. Decides; computes nothing."""

from __future__ import annotations

import dataclasses
import difflib
from types import ModuleType
from typing import Any

from attnjax.core.program import Problem
from attnjax.kernels import cpu, cudnn, mosaic_gpu, mosaic_tpu, reference, triton, xla

KERNELS: dict[str, ModuleType] = {
    "cpu": cpu,
    "cudnn": cudnn,
    "triton": triton,
    "mosaic_gpu": mosaic_gpu,
    "mosaic_tpu": mosaic_tpu,
    "xla": xla,
    "reference": reference,
}
PARTS = ("forward", "backward", "tangent", "higher")  # higher: derivatives of second order and up

_ORDER = {"cpu": ("cpu", "xla"), "cuda": ("cudnn", "triton", "xla"), "rocm": ("xla",), "tpu": ("mosaic_tpu", "xla")}
_TAKE_SYMBOLS = ("xla", "reference")
_BY_NAME = {  # why they are in no order
    "reference": "for checking only: needs the T x S matrix",
    "mosaic_gpu": "not yet measured beside triton",
}


@dataclasses.dataclass(frozen=True)
class Choice:
    """The implementation of one part of the work, and for each other one the reason why it is not used."""

    name: str
    reasons: dict[str, str]

    @property
    def kernel(self) -> ModuleType:
        return KERNELS[self.name]

    def own(self, problem: Problem) -> Problem:
        """The problem as the implementation gets it: a config is for the one that was named."""
        return problem if self.name == problem.implementation else dataclasses.replace(problem, config=None)


def check_name(implementation: str | None) -> None:
    """Raises `ValueError` for a name that is no implementation."""
    if implementation is None or (isinstance(implementation, str) and implementation in KERNELS):
        return
    near = difflib.get_close_matches(str(implementation), KERNELS, n=1, cutoff=0.3)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"implementation {implementation!r} is unknown: expected one of {sorted(KERNELS)} or None.{hint}")


def choose(
    problem: Problem,
    operands: list[Any],
    platform: str,
    part: str,
    *,
    exported: bool = False,
    gradients: tuple[int, ...] = (),
) -> Choice:
    """The implementation for one of `PARTS`.

    Args:
      problem, operands: the call; the operands may be `jax.ShapeDtypeStruct`.
      platform: what it is compiled for; "" where the body is differentiated as a whole, which makes it "higher".
      part: one of `PARTS`. Where an array is empty no other kernel is asked than xla, which needs none of the rest.
      exported: by `jax.export`, whose programs run where attnjax may not be installed: not with compiled kernels,
        unless one is named.
      gradients: positions of operands whose gradients it must be able to give.

    Raises:
      NotImplementedError: the implementation that was named cannot take the problem.
    """
    if not problem.pairs or not problem.value_size:
        return Choice("xla", {name: "an array is empty" for name in KERNELS if name != "xla"})
    named, part = problem.implementation, part if platform else "higher"
    own = named is not None and part in parts_of(named, problem, operands)
    if named is not None and not own:  # its config says nothing to those that run this part
        problem = dataclasses.replace(problem, config=None)
    refusals = {
        name: _unable(name, problem, operands, platform, part) or _without(name, problem, operands, gradients)
        for name in KERNELS
    }
    if named is not None and (own or refusals[named] is None):
        if refusals[named] is not None:
            anyone = dataclasses.replace(problem, config=None)  # which is of the one that was named
            others = [name for name in KERNELS if name != named]
            able = [name for name in others if not _unable(name, anyone, operands, platform, part)]
            raise NotImplementedError(f"implementation {named!r} cannot: {refusals[named]}. {', '.join(able)} can.")
        return Choice(named, {name: f"implementation={named!r} was asked for" for name in KERNELS if name != named})
    if exported:
        refusals["cpu"] = refusals["cpu"] or "jax.export: the program could not be loaded without attnjax"
        refusals["cudnn"] = refusals["cudnn"] or "jax.export: the program may run on a GPU for which cuDNN is not used"
        refusals["triton"] = refusals["triton"] or "jax.export: later versions of JAX need not load Triton's programs"
    order = _ORDER.get(platform, ("xla",))
    chosen = next(name for name in order if refusals[name] is None)
    reasons = {}
    for name in KERNELS:
        if name != chosen:
            reasons[name] = refusals[name] or _not_preferred(name, order, chosen)
    return Choice(chosen, reasons)


def _unable(name: str, problem: Problem, operands: list[Any], platform: str, part: str) -> str | None:
    """Why an implementation cannot take a part of the problem, or `None`."""
    if not problem.sizes.known and name not in _TAKE_SYMBOLS:
        return "needs sizes that are known while it is compiled, and here some are symbols (jax.export.symbolic_shape)"
    return KERNELS[name].unsupported(problem, operands, platform, part)


def shares(
    problem: Problem, operands: list[Any], platform: str, *, exported: bool = False
) -> list[tuple[Choice, tuple[int, ...]]]:
    """Who gives which gradients in the backward: choices, with positions of the operands that have gradients."""
    first = choose(problem, operands, platform, "backward", exported=exported)
    left = _lacking(first.name, problem, operands, problem.differentiable)
    if not left:
        return [(first, problem.differentiable)]
    anyone = dataclasses.replace(problem, implementation=None, config=None)
    second = choose(anyone, operands, platform, "backward", exported=exported, gradients=left)
    return [(first, tuple(i for i in problem.differentiable if i not in left)), (second, left)]


def _lacking(name: str, problem: Problem, operands: list[Any], wanted: tuple[int, ...]) -> tuple[int, ...]:
    """Of these operands, those whose gradients an implementation cannot give. Without `gradients` it gives all."""
    given = getattr(KERNELS[name], "gradients", lambda problem, operands: wanted)(problem, operands) if wanted else ()
    return tuple(i for i in wanted if i not in given)


def _without(name: str, problem: Problem, operands: list[Any], wanted: tuple[int, ...]) -> str | None:
    lacking = _lacking(name, problem, operands, wanted)
    names = ", ".join(problem.program.name_of(i) for i in lacking)
    return f"cannot give the gradient of {names}" if lacking else None


def parts_of(name: str, problem: Problem | None = None, operands: list[Any] | None = None) -> tuple[str, ...]:
    """The parts that an implementation has, for a problem or at all. Where it is named, others run the rest."""
    kernel = KERNELS[name]
    if problem is not None and hasattr(kernel, "parts"):
        return kernel.parts(problem, operands)
    return getattr(kernel, "PARTS", PARTS)


def _not_preferred(name: str, order: tuple[str, ...], chosen: str) -> str:
    if name in order:
        return f"{chosen} is faster here"
    return _BY_NAME.get(name, "is not for this device") + "; ask for it by name"
