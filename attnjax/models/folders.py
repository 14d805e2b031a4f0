"""A directory of checkpoints on disk: which folders are some, writing, removing and reading one. Knows no modules.

A folder `<step>` holds `about/metadata`, which is JSON with a check sum of its own, and `arrays`, which is orbax's.
Where a step is written anew, the folder that it replaces is called `<step>.replaced` until the new one is complete.
"""

from __future__ import annotations

import json
import zlib
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

_FORMATS = (1, 2)  # those that are read; 2 is written. 1 knew neither numbers nor arrays of size 0
_REPLACED = ".replaced"


def directory_of(directory: Any) -> epath.Path:
    return epath.Path(directory).expanduser().resolve()


def folders(path: epath.Path) -> dict[int, epath.Path]:
    """The folder of each step, in order. Files, and folders with neither description nor arrays, are others' things."""
    found: dict[int, epath.Path] = {}
    for folder in sorted(path.iterdir(), reverse=True) if path.exists() else []:  # "5" behind "5.replaced"
        name = folder.name.removesuffix(_REPLACED)
        step = int(name) if name.isdecimal() and name.isascii() else -1
        if str(step) == name and any((folder / part).exists() for part in ("about", "arrays")):
            found[step] = folder
    return dict(sorted(found.items()))


def folder_of(path: epath.Path, step: int | None) -> epath.Path:
    """That of a step, by default the latest, or a FileNotFoundError."""
    found = folders(path)
    if not found:
        raise FileNotFoundError(
            f"there is no checkpoint in {path}: nothing to resume from. To start anew where there is none, ask "
            "attnjax.models.checkpoint.latest(directory) first, which is None then."
        )
    if step is not None and step not in found:
        raise FileNotFoundError(f"there is no step {step} in {path}: it holds {', '.join(map(str, found))}.")
    return found[max(found) if step is None else step]


def check_free(path: epath.Path, step: int, overwrite: bool) -> None:
    """Whether the step may be written: there is none, or it is an intact checkpoint that is to be replaced.

    Raises:
      FileExistsError: it may not.
    """
    folder = folders(path).get(step, path / str(step))
    if not folder.exists():
        return
    if not is_intact(folder, step):
        raise FileExistsError(f"{folder} is no intact checkpoint of attnjax: remove it, or save elsewhere.")
    if not overwrite:
        raise FileExistsError(f"{path} holds step {step} already: overwrite=True replaces it.")


def write(path: epath.Path, step: int, about: dict[str, Any], arrays: dict[str, Any]) -> None:
    """Writes a step; at any time, either the one that was there before or the new one is complete."""
    target, replaced = path / str(step), path / f"{step}{_REPLACED}"
    about = {"format": _FORMATS[-1], "step": step, **about}
    about["crc32"] = _json_sum(about)
    items: dict[str, Any] = {"about": ocp.args.JsonSave(about)}
    if arrays:  # orbax writes no empty trees
        items["arrays"] = ocp.args.StandardSave(arrays)
    first = jax.process_index() == 0
    if first and target.exists():
        if replaced.exists():
            replaced.rmtree()
        target.rename(replaced)
    _together("moved")
    try:
        with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as writer:
            writer.save(target, args=ocp.args.Composite(**items))
    except BaseException:
        if first:
            for unfinished in path.glob(f"{step}.orbax-checkpoint-tmp*"):
                unfinished.rmtree()
            if replaced.exists() and not target.exists():
                replaced.rename(target)
        raise
    if first and replaced.exists():
        replaced.rmtree()
    _together("written")


def keep_highest(path: epath.Path, keep: int, written: int) -> None:
    """Removes all intact checkpoints but the `keep` highest steps and the one just written; nothing else."""
    if jax.process_index() == 0:
        own = [(step, folder) for step, folder in folders(path).items() if is_intact(folder, step)]
        for step, folder in own[:-keep]:
            if step != written:
                folder.rmtree()
    _together("removed")


def is_intact(folder: epath.Path, step: int) -> bool:
    """Whether the folder is surely a checkpoint of attnjax, of that step."""
    try:
        return read_about(folder)["step"] == step
    except ValueError:
        return False


def read_about(folder: epath.Path) -> dict[str, Any]:
    """The description: format, step, model, arrays, extras.

    Raises:
      ValueError: it is damaged, or of a newer attnjax.
    """
    try:
        about = json.loads((folder / "about" / "metadata").read_text())
        checksum = about.pop("crc32")
    except Exception as error:
        raise ValueError(f"{folder} is damaged or no checkpoint of attnjax: {_first_line(error)}") from error
    if checksum != _json_sum(about):
        raise ValueError(f"{folder} is damaged: the check sum of its description is wrong.")
    if about["format"] not in _FORMATS:
        known = " and ".join(map(str, _FORMATS))
        raise ValueError(f"{folder} has format {about['format']}, this attnjax reads {known}: update attnjax.")
    return about


def read_arrays(folder: epath.Path, like: dict[str, Any], names: list[str]) -> dict[str, Any]:
    """The arrays named in `like`: of its shapes, types and shardings; of numpy where there is no sharding.

    Args:
      folder: of the checkpoint.
      like: `jax.ShapeDtypeStruct` by name.
      names: of all arrays that are stored.

    Raises:
      ValueError: they are damaged.
    """
    target: dict[str, Any] = {name: like.get(name, ocp.PLACEHOLDER) for name in names}
    arguments = {name: ocp.RestoreArgs() for name in names}
    arguments |= {name: ocp.RestoreArgs(restore_type=np.ndarray) for name in like}
    arguments |= ocp.checkpoint_utils.construct_restore_args({n: x for n, x in like.items() if x.sharding is not None})
    try:
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
            loaded = reader.restore(folder / "arrays", args=ocp.args.PyTreeRestore(item=target, restore_args=arguments))
        return {name: jax.block_until_ready(loaded[name]) for name in like}
    except Exception as error:
        raise ValueError(f"{folder} is damaged: {_first_line(error)} Nothing was loaded.") from error


def check_sum(array: Any) -> int | None:
    """That of an array's bytes; `None` where part of it lies on other hosts."""
    if isinstance(array, jax.Array) and not array.is_fully_addressable:
        return None
    return zlib.crc32(np.ascontiguousarray(np.asarray(array)).reshape(-1).view(np.uint8).data)


def _json_sum(about: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(about, sort_keys=True).encode())


def _together(done: str) -> None:
    """Waits until all processes are here."""
    ocp.multihost.sync_global_processes(f"attnjax checkpoint {done}")


def _first_line(error: Exception) -> str:
    text = (str(error).strip().splitlines() or [""])[0][:200]
    return f"{type(error).__name__}: {text.rstrip('.')}."
