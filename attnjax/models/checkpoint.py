"""Checkpoints: model, optimizer, step and what else a run needs to go on, by orbax. Whole or not at all, both ways.

A directory holds one folder per step. Saving is atomic: the folder gets its name when all of it is written. Restoring
reads and checks everything before the model is touched.
"""

from __future__ import annotations

import dataclasses
import json
import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from flax import nnx

from attnjax.core.checks import check_count
from attnjax.core.node import is_array

_FORMAT = 1

# Of a config: what changes no result outside of training, and what the shapes of arrays tell.
_FREE = ("dropout", "attention_dropout", "scan", "remat", "dtype", "implementation", "max_length")
_IN_SHAPES = ("param_dtype", "hidden", "head_size", "key_heads", "out_bias")
_UNTOLD = object()


def save(
    directory: Any,
    model: nnx.Module,
    optimizer: nnx.Optimizer | None = None,
    *,
    step: int,
    extras: dict[str, Any] | None = None,
    keep: int | None = None,
) -> None:
    """Writes `directory/<step>`: every variable of model and optimizer, random states included, with check sums.

    Args:
      directory: where checkpoints lie; made when missing.
      model: any module.
      optimizer: its optimizer, when training is to go on.
      step: integer >= 0, the steps done so far.
      extras: whatever else is needed to go on, such as the position in the data; JSON values.
      keep: how many checkpoints to keep, the latest ones; default all.

    Raises:
      FileExistsError: the directory holds that step.
      TypeError, ValueError: step or extras are not what they should be.

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
    if keep is not None and (isinstance(keep, bool) or not isinstance(keep, int) or keep < 1):
        raise ValueError(f"keep must be an integer of at least 1 or None, got {keep!r}.")
    step, path = int(step), _path(directory)
    if step in _steps(path):
        raise FileExistsError(f"{path} holds step {step} already: remove {path / str(step)} or save elsewhere.")
    values = _values(model, optimizer)
    arrays = {name: _stored(value) for name, value in values.items()}
    about: dict[str, Any] = {"format": _FORMAT, "step": step}
    about["model"] = _described(model)
    about["arrays"] = {name: _facts(value, arrays[name]) for name, value in values.items()}
    try:
        about["extras"] = json.loads(json.dumps(extras or {}))
    except (TypeError, ValueError) as error:
        raise TypeError(f"extras must be JSON values (numbers, strings, lists, dictionaries): {error}.") from error
    about["crc32"] = _json_sum(about)
    options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True, enable_async_checkpointing=False)
    with ocp.CheckpointManager(path, options=options) as manager:
        items = ocp.args.Composite(arrays=ocp.args.StandardSave(arrays), about=ocp.args.JsonSave(about))
        manager.save(step, args=items, force=True)


def restore(
    directory: Any,
    model: nnx.Module,
    optimizer: nnx.Optimizer | None = None,
    *,
    step: int | None = None,
    same_config: bool = True,
) -> int:
    """Reads a checkpoint into `model` and `optimizer`, all of it or, when anything is wrong, nothing.

    Arrays take the sharding of those that they replace. There is no falling back: an empty directory is an error
    (ask `latest` first), and so is a damaged checkpoint, also where older ones are intact.

    Args:
      directory: where checkpoints lie.
      model: a module of the same structure, its variables of the same shapes and types.
      optimizer: the optimizer, when one was saved and training is to go on.
      step: which checkpoint; default the latest.
      same_config: refuse a model of another class, or whose config says that it computes something else. False loads
        arrays wherever they fit, as for RoPE with a new scaling.

    Returns:
      The step, an integer.

    Raises:
      FileNotFoundError: there is no checkpoint, or not that one.
      ValueError: the checkpoint is damaged, or of another model.

    Example:
      >>> import tempfile
      >>> from flax import nnx
      >>> from attnjax.models import checkpoint
      >>> directory, model = tempfile.mkdtemp(), nnx.Linear(2, 3, rngs=nnx.Rngs(0))
      >>> checkpoint.save(directory, model, step=10)
      >>> checkpoint.restore(directory, model)
      10
    """
    path = _chosen(directory, step)
    about = _about(path)
    values = _values(model, optimizer)
    wanted = {name: _facts(value) for name, value in values.items()}
    stored = about["arrays"]
    if optimizer is None:  # loading a model for use: what the optimizer held is not needed
        stored = {name: facts for name, facts in stored.items() if not name.startswith("optimizer/")}
    _check_same(path, wanted, stored)
    if same_config:
        _check_described(path, _described(model), about.get("model", {}))
    arrays = _load(path, {name: _stored(value) for name, value in values.items()}, list(about["arrays"]))
    for name, value in arrays.items():
        checksum = about["arrays"][name].get("crc32")
        if checksum is not None and checksum != _facts(value, value)["crc32"]:
            raise ValueError(f"{path} is damaged: the check sum of {name} is wrong. Nothing was loaded.")
    fresh = {name: _restored(values[name], arrays[name]) for name in values}
    _update("model", model, fresh)
    if optimizer is not None:
        _update("optimizer", optimizer, fresh)
    return int(about["step"])


def latest(directory: Any) -> int | None:
    """The latest step that the directory holds; `None` where there is none, or no directory.

    Example:
      >>> from attnjax.models import checkpoint
      >>> checkpoint.latest("/tmp/no/such/directory") is None
      True
    """
    return max(_steps(_path(directory)), default=None)


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
    return _about(_chosen(directory, step))["extras"]


def _path(directory: Any) -> epath.Path:
    return epath.Path(directory).expanduser().resolve()


def _steps(path: epath.Path) -> list[int]:
    """Steps with a folder. One that was not written to its end has another kind of name."""
    return sorted(int(p.name) for p in path.iterdir() if p.name.isdecimal()) if path.exists() else []


def _chosen(directory: Any, step: int | None) -> epath.Path:
    path = _path(directory)
    steps = _steps(path)
    if not steps:
        raise FileNotFoundError(
            f"there is no checkpoint in {path}: nothing to resume from. To start anew where there is none, ask "
            "attnjax.models.checkpoint.latest(directory) first, which is None then."
        )
    if step is not None and step not in steps:
        raise FileNotFoundError(f"there is no step {step} in {path}: it holds {', '.join(map(str, steps))}.")
    return path / str(steps[-1] if step is None else step)


def _values(model: nnx.Module, optimizer: nnx.Optimizer | None) -> dict[str, Any]:
    """Every variable's value by name, such as model/stack/blocks/0/attention/query/kernel."""
    parts = {"model": model} if optimizer is None else {"model": model, "optimizer": optimizer}
    return {
        _name(part, path): variable.get_value()
        for part, module in parts.items()
        for path, variable in _variables(module)
    }


def _variables(module: Any) -> list[tuple[Any, Any]]:
    """Path and variable of all that hold an array: of an optimizer that is masked, some hold nothing."""
    return [(path, v) for path, v in nnx.to_flat_state(nnx.state(module)) if is_array(v.get_value())]


def _name(part: str, path: tuple[Any, ...]) -> str:
    return "/".join((part, *map(str, path)))


def _is_key(value: Any) -> bool:
    return jnp.issubdtype(value.dtype, jax.dtypes.prng_key)


def _stored(value: Any) -> jax.Array:
    """What is written: arrays as they are, PRNG keys as their integers."""
    return jax.random.key_data(value) if _is_key(value) else jnp.asarray(value)


def _restored(old: Any, data: jax.Array) -> jax.Array:
    return jax.random.wrap_key_data(data, impl=jax.random.key_impl(old)) if _is_key(old) else data


def _facts(value: Any, data: jax.Array | None = None) -> dict[str, Any]:
    """Shape and type; of data also a check sum, unless part of it lies on other hosts."""
    facts = {"shape": list(value.shape), "dtype": str(value.dtype)}
    if data is not None and data.is_fully_addressable:
        facts["crc32"] = zlib.crc32(np.ascontiguousarray(np.asarray(data)).reshape(-1).view(np.uint8).data)
    return facts


def _json_sum(about: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(about, sort_keys=True).encode())


def _about(path: epath.Path) -> dict[str, Any]:
    try:
        with ocp.Checkpointer(ocp.JsonCheckpointHandler()) as reader:
            about = reader.restore(path / "about")
        checksum = about.pop("crc32")
    except Exception as error:
        raise ValueError(f"{path} is damaged or no checkpoint of attnjax: {_first_line(error)}") from error
    if checksum != _json_sum(about):
        raise ValueError(f"{path} is damaged: the check sum of its description is wrong.")
    if about["format"] != _FORMAT:
        raise ValueError(f"{path} has format {about['format']}, this attnjax reads {_FORMAT}: update attnjax.")
    return about


def _check_same(path: epath.Path, wanted: dict[str, Any], stored: dict[str, Any]) -> None:
    """Names, shapes and types are those of the model, or a ValueError that names the first few that are not."""
    wrong = [f"{name} is missing in the checkpoint" for name in wanted if name not in stored]
    wrong += [f"{name} is not in the model" for name in stored if name not in wanted]
    for name in wanted.keys() & stored.keys():
        (have, want) = ({k: facts[k] for k in ("shape", "dtype")} for facts in (stored[name], wanted[name]))
        if have != want:
            wrong.append(f"{name} is {have['dtype']}{have['shape']}, the model has {want['dtype']}{want['shape']}")
    if wrong:
        more = f"; and {len(wrong) - 4} more" if len(wrong) > 4 else ""
        raise ValueError(
            f"{path} is of another model or optimizer: {'; '.join(sorted(wrong)[:4])}{more}. Nothing was loaded."
        )


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


def _check_described(path: epath.Path, wanted: dict[str, dict[str, Any]], stored: dict[str, dict[str, Any]]) -> None:
    """The same class and configs, as far as both tell, or a ValueError that names what differs."""
    wrong = [
        f"{'/'.join(filter(None, (part, field)))} is {had!r}, the model has {wanted[part][field]!r}"
        for part, fields in stored.items()
        for field, had in fields.items()
        if wanted.get(part, {}).get(field, had) != had
    ]
    if wrong:
        raise ValueError(
            f"{path} is of another model, though its arrays have the same shapes: {'; '.join(wrong)}. Nothing was "
            "loaded; same_config=False loads them all the same."
        )


def _load(path: epath.Path, like: dict[str, jax.Array], names: list[str]) -> dict[str, jax.Array]:
    """The arrays named in `like`, with its shapes and shardings."""
    target: dict[str, Any] = {n: ocp.PLACEHOLDER for n in names}
    target |= {n: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding) for n, x in like.items()}
    try:
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
            arguments = ocp.checkpoint_utils.construct_restore_args(
                {n: t for n, t in target.items() if t is not ocp.PLACEHOLDER}
            )
            loaded = reader.restore(
                path / "arrays",
                args=ocp.args.PyTreeRestore(
                    item=target, restore_args={n: arguments.get(n, ocp.RestoreArgs()) for n in target}
                ),
            )
        loaded = {name: jax.block_until_ready(loaded[name]) for name in like}
    except Exception as error:
        raise ValueError(f"{path} is damaged: {_first_line(error)} Nothing was loaded.") from error
    return loaded


def _update(part: str, module: Any, fresh: dict[str, jax.Array]) -> None:
    state = [(path, variable.replace(fresh[_name(part, path)])) for path, variable in _variables(module)]
    nnx.update(module, nnx.from_flat_state(state))


def _first_line(error: Exception) -> str:
    text = (str(error).strip().splitlines() or [""])[0][:200]
    return f"{type(error).__name__}: {text.rstrip('.')}."
