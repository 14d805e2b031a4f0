"""Checkpoints: model, optimizer, step and what else a run needs to go on, by orbax. Whole or not at all, both ways.

A directory holds one folder per step. Saving is atomic: the folder gets its name when all of it is written. Restoring
reads and checks everything before the model is touched.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple, overload

import jax.numpy as jnp
import numpy as np
from flax import nnx

from attnjax.core.checks import check_count
from attnjax.models import folders
from attnjax.models.variables import Facts, Leaf, Match, Source, leaves_of, matched, updated, wanted_dtype

# Of a config: what changes no result outside of training, and what the shapes of arrays tell.
_FREE = ("dropout", "attention_dropout", "scan", "remat", "dtype", "implementation", "max_length")
_IN_SHAPES = ("param_dtype", "hidden", "head_size", "key_heads", "out_bias")
_UNTOLD = object()

_BATCH = 2**30  # bytes that are read at a time: what is cast, or taken apart, is held twice for so long only


class Parts(NamedTuple):
    """What `restore(strict=False)` did: names such as "model/encoder/embed/tokens/embedding".

    Attributes:
      step: of the checkpoint.
      missing: what the model has and the checkpoint has not; it is as it was.
      left: what the checkpoint has and the model has not.
    """

    step: int
    missing: tuple[str, ...]
    left: tuple[str, ...]


def save(
    directory: Any,
    model: nnx.Module,
    optimizer: nnx.Optimizer | None = None,
    *,
    step: int,
    extras: dict[str, Any] | None = None,
    keep: int | None = None,
    overwrite: bool = False,
) -> None:
    """Writes `directory/<step>`: every variable of model and optimizer, random states included, with check sums.

    Args:
      directory: where checkpoints lie; made when missing. What else is in it stays as it is.
      model: any module.
      optimizer: its optimizer, when training is to go on.
      step: integer >= 0, the steps done so far.
      extras: whatever else is needed to go on, such as the position in the data; JSON values.
      keep: how many checkpoints to keep, those of the highest steps and the one written now; default all.
      overwrite: replace a checkpoint of that step. Until the new one is complete, the old one is there.

    Raises:
      FileExistsError: the directory holds that step.
      TypeError, ValueError: arguments are not what they should be.

    Example:
      >>> import tempfile
      >>> from flax import nnx
      >>> from attnjax.models import checkpoint
      >>> directory = tempfile.mkdtemp()
      >>> checkpoint.save(directory, nnx.Linear(2, 3, rngs=nnx.Rngs(0)), step=10)
      >>> checkpoint.latest(directory)
      10
    """
    check_count("step", step, least=0)
    keep = None if keep is None else check_count("keep", keep)
    step, path = int(step), folders.directory_of(directory)
    leaves = _leaves(model, optimizer)
    for name, leaf in leaves.items():
        if leaf.abstract:
            raise TypeError(f"{name} is only a shape, as nnx.eval_shape makes it: there is nothing to save.")
    try:
        extras = json.loads(json.dumps(extras or {}))
    except (TypeError, ValueError) as error:
        raise TypeError(f"extras must be JSON values (numbers, strings, lists, dictionaries): {error}.") from error
    folders.check_free(path, step, overwrite)
    facts = {name: leaf.facts() for name, leaf in leaves.items()}
    arrays = {name: leaf.data() for name, leaf in leaves.items() if _is_written(facts[name])}
    for name, array in arrays.items():
        facts[name]["crc32"] = folders.check_sum(array)
    folders.write(path, step, {"model": _described(model), "arrays": facts, "extras": extras}, arrays)
    if keep is not None:
        folders.keep_highest(path, keep, step)


@overload
def restore(
    directory: Any,
    model: nnx.Module,
    optimizer: nnx.Optimizer | None = ...,
    *,
    step: int | None = ...,
    dtype: Any = ...,
    strict: Literal[True] = ...,
    same_config: bool = ...,
) -> int: ...


@overload
def restore(
    directory: Any,
    model: nnx.Module,
    optimizer: nnx.Optimizer | None = ...,
    *,
    step: int | None = ...,
    dtype: Any = ...,
    strict: Literal[False],
    same_config: bool = ...,
) -> Parts: ...


def restore(
    directory: Any,
    model: nnx.Module,
    optimizer: nnx.Optimizer | None = None,
    *,
    step: int | None = None,
    dtype: Any = None,
    strict: bool = True,
    same_config: bool = True,
) -> int | Parts:
    """Reads a checkpoint into `model` and `optimizer`, all of it or, when anything is wrong, nothing.

    Arrays take the sharding of those that they replace. There is no falling back: an empty directory is an error
    (ask `latest` first), and so is a damaged checkpoint, also where older ones are intact.

    Layers may be stored in one array and wanted in many, or the other way round (`Stack(scan=)`). Streams of random
    numbers that only one side has, or that are of another PRNG, stay as they are.

    Args:
      directory: where checkpoints lie.
      model: a module of the same structure, its variables of the same shapes and types. One made by
        `nnx.eval_shape(make)` holds no memory yet; its arrays come where its shapes' shardings say, or else where
        they would be made by `jax.set_mesh` and `nnx.logical_axis_rules`.
      optimizer: the optimizer, when one was saved and training is to go on.
      step: which checkpoint; default the latest.
      dtype: of the model's floats, whatever was stored and whatever the model has; those of the optimizer become what
        the optimizer has. Default: types must be the same.
      strict: model and checkpoint hold the same. False takes what both hold in the same shape.
      same_config: refuse a model of another class, or whose config says that it computes something else. False loads
        arrays wherever they fit, as for RoPE with a new scaling.

    Returns:
      The step, an integer; with strict=False `Parts`, which also names what was missing and what was left.

    Raises:
      FileNotFoundError: there is no checkpoint, or not that one.
      TypeError: no modules.
      ValueError: the checkpoint is damaged, or of another model.

    Example:
      >>> import tempfile
      >>> from flax import nnx
      >>> from attnjax.models import checkpoint
      >>> directory, model = tempfile.mkdtemp(), nnx.Linear(2, 3, rngs=nnx.Rngs(0))
      >>> checkpoint.save(directory, model, step=10)
      >>> checkpoint.restore(directory, model)
      10
      >>> checkpoint.restore(directory, nnx.Linear(2, 3, use_bias=False, rngs=nnx.Rngs(0)), strict=False)
      Parts(step=10, missing=(), left=('model/bias',))
    """
    leaves = _leaves(model, optimizer)
    folder = folders.folder_of(folders.directory_of(directory), step)
    about = folders.read_about(folder)
    stored: dict[str, Facts] = about["arrays"]
    if optimizer is None:  # loading a model for use: what the optimizer held is not needed
        stored = {name: facts for name, facts in stored.items() if not name.startswith("optimizer/")}
    match = matched(leaves, stored, dtype)
    missing = sorted([*match.missing, *(match.shapes.keys() & leaves.keys())])
    left = sorted([*match.left, *(name for _, names in match.shapes.values() for name in names)])
    _check_match(folder, match, missing, leaves, strict)
    if same_config:
        _check_described(folder, _described(model), about.get("model", {}), strict)
    fresh = _read(folder, leaves, match.sources, about["arrays"], dtype)
    states = [(module, updated(part, module, fresh)) for part, module in _parts(model, optimizer).items()]
    for module, state in states:
        nnx.update(module, state)
    return int(about["step"]) if strict else Parts(int(about["step"]), tuple(missing), tuple(left))


def latest(directory: Any) -> int | None:
    """The latest step that the directory holds; `None` where there is none, or no directory.

    Example:
      >>> from attnjax.models import checkpoint
      >>> checkpoint.latest("/tmp/no/such/directory") is None
      True
    """
    return max(folders.folders(folders.directory_of(directory)), default=None)


def extras(directory: Any, *, step: int | None = None) -> dict[str, Any]:
    """The extras that were saved with a step (default the latest).

    Raises:
      FileNotFoundError: there is no checkpoint, or not that one.
      ValueError: the checkpoint is damaged.

    Example:
      >>> import tempfile
      >>> from flax import nnx
      >>> from attnjax.models import checkpoint
      >>> directory = tempfile.mkdtemp()
      >>> checkpoint.save(directory, nnx.Linear(2, 3, rngs=nnx.Rngs(0)), step=10, extras={"epoch": 3})
      >>> checkpoint.extras(directory)
      {'epoch': 3}
    """
    return folders.read_about(folders.folder_of(folders.directory_of(directory), step))["extras"]


def _parts(model: Any, optimizer: Any) -> dict[str, Any]:
    parts = {"model": model} if optimizer is None else {"model": model, "optimizer": optimizer}
    for part, module in parts.items():
        if not isinstance(module, nnx.Pytree):
            hint = "nnx.Optimizer(model, ..., wrt=nnx.Param), which holds the state of optax" if part != "model" else ""
            raise TypeError(f"{part} must be {hint or 'an nnx.Module'}, got {type(module).__name__}.")
    return parts


def _leaves(model: Any, optimizer: Any) -> dict[str, Leaf]:
    """Everything that they hold, by name."""
    found: dict[str, Leaf] = {}
    for part, module in _parts(model, optimizer).items():
        found |= leaves_of(part, module)
    return found


def _is_written(facts: Facts) -> bool:
    """Whether orbax holds it: numbers, and arrays of size 0, are in the description alone."""
    return "shape" in facts and 0 not in facts["shape"]


def _check_match(folder: Any, match: Match, missing: list[str], leaves: dict[str, Leaf], strict: bool) -> None:
    """Everything fits, or a ValueError that names the first few that do not."""
    wrong = list(match.types.values())
    if strict:
        wrong += [text for text, _ in match.shapes.values()]
        wrong += [f"{name} is missing in the checkpoint" for name in match.missing]
        wrong += [f"{name} is not in the model" for name in match.left]
    else:
        wrong += [f"{name} is missing, and the model has only its shape" for name in missing if leaves[name].abstract]
        wrong += [] if match.sources else ["they have nothing in common"]
    if wrong:
        more = f"; and {len(wrong) - 4} more" if len(wrong) > 4 else ""
        hint = "" if not strict or match.types else " strict=False takes what both hold."
        says = f"{'; '.join(sorted(wrong)[:4])}{more}. Nothing was loaded.{hint}"
        raise ValueError(f"{folder} is of another model or optimizer: {says}")


def _described(model: nnx.Module) -> dict[str, dict[str, Any]]:
    """The class of the model, and of every config in it the fields that arrays do not tell, as JSON values."""
    found: dict[str, dict[str, Any]] = {"": {"class": type(model).__name__}}
    for path, module in nnx.iter_modules(model):
        config = getattr(module, "config", None)
        if dataclasses.is_dataclass(config) and not isinstance(config, type):
            fields = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
            plain = {name: _plain(x) for name, x in fields.items() if name not in (*_FREE, *_IN_SHAPES)}
            told = {name: x for name, x in plain.items() if x is not _UNTOLD}
            found.setdefault("/".join(map(str, path)), {}).update(told)
    return found


def _plain(value: Any) -> Any:
    """A field as JSON value; functions and their like cannot be compared."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return {"class": type(value).__name__} | {name: x for name, x in fields.items() if x is not _UNTOLD}
    if isinstance(value, (tuple, list)):
        return [None if x is _UNTOLD else x for x in map(_plain, value)]
    value = value.item() if isinstance(value, np.generic) else value
    return value if value is None or isinstance(value, (bool, int, float, str)) else _UNTOLD


def _check_described(
    folder: Any, wanted: dict[str, dict[str, Any]], stored: dict[str, dict[str, Any]], strict: bool
) -> None:
    """The same class and configs, as far as both tell, or a ValueError that names what differs."""
    wrong = [
        f"{'/'.join(filter(None, (part, field)))} is {had!r}, the model has {wanted[part][field]!r}"
        for part, fields in stored.items()
        for field, had in fields.items()
        if wanted.get(part, {}).get(field, had) != had and (strict or (part, field) != ("", "class"))
    ]
    if wrong:
        raise ValueError(
            f"{folder} is of another model, though its arrays have the same shapes: {'; '.join(wrong)}. Nothing was "
            "loaded; same_config=False loads them all the same."
        )


def _read(
    folder: Any, leaves: dict[str, Leaf], sources: dict[str, Source], stored: dict[str, Facts], dtype: Any
) -> dict[str, Any]:
    """The new value of each leaf, checked."""
    fresh: dict[str, Any] = {}
    for name, source in sources.items():
        facts, leaf = source.facts(stored), leaves[name]
        if "value" in facts:
            fresh[name] = facts["value"] if leaf.plain else leaf.placed(jnp.asarray(facts["value"], leaf.value.dtype))
        elif 0 in facts["shape"]:
            fresh[name] = leaf.placed(np.zeros(facts["shape"], wanted_dtype(name, leaf, dtype)))
    kept = [name for name, facts in stored.items() if _is_written(facts)]
    for batch in _batches(leaves, {n: s for n, s in sources.items() if n not in fresh}, stored):
        like: dict[str, Any] = {}
        for name, source in batch:
            like |= source.like(leaves[name], stored)
        read = folders.read_arrays(folder, like, kept)
        for name, array in read.items():
            if stored[name].get("crc32") not in (None, folders.check_sum(array)):
                raise ValueError(f"{folder} is damaged: the check sum of {name} is wrong. Nothing was loaded.")
        for name, source in batch:
            fresh[name] = source.build(leaves[name], read, wanted_dtype(name, leaves[name], dtype))
    return fresh


def _batches(
    leaves: dict[str, Leaf], sources: dict[str, Source], stored: dict[str, Facts]
) -> Iterator[list[tuple[str, Source]]]:
    """Leaves that are read together; those that come from the same arrays always are."""
    batch: list[tuple[str, Source]] = []
    size = 0
    order = sorted(sources.items(), key=lambda pair: pair[1].names)
    for i, (name, source) in enumerate(order):
        new = i == 0 or order[i - 1][1].names != source.names
        if new and size > _BATCH:
            yield batch
            batch, size = [], 0
        size += sum(x.size * x.dtype.itemsize for x in source.like(leaves[name], stored).values()) if new else 0
        batch.append((name, source))
    if batch:
        yield batch
