"""The drawings of this site: masks, scores, block maps and how tiles are walked. Only the pages use it.

`python docs/figures.py` writes docs/_static/masks.png, the picture of the README and of the first page.
"""

from __future__ import annotations

import pathlib
import re
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Patch, Rectangle

from attnjax import (
    BlockMap,
    Causal,
    Chunked,
    Dilated,
    Lengths,
    Mask,
    Permutation,
    Prefix,
    Segments,
    Where,
    Window,
)
from attnjax.masks import And, Or

SEEN, UNSEEN = "#2b6cb0", "#e9edf2"
PARTIAL, PARTIAL_UNSEEN = "#dd8a12", "#fbe6bf"
INK = "#333333"

plt.rcParams.update({"font.size": 8, "text.color": INK, "axes.labelcolor": INK, "axes.titlesize": 7.5})


def svg() -> None:
    """Makes the figures of a page vector graphics."""
    from matplotlib_inline.backend_inline import set_matplotlib_formats

    set_matplotlib_formats("svg")


def show(*nodes: Any, size: tuple[int, int] = (12, 12), titles: list[str] | None = None, **options: Any) -> None:
    """Draws masks and scores side by side, one panel per head and batch entry, queries down and keys to the right.

    Args:
      nodes: masks (dark: the query sees the key) or scores (what becomes of logits that are 0).
      size: T and S.
      titles: one per panel; default: what the node prints.
      options: of `to_array`.
    """
    panels = []
    for node in nodes:
        array = np.asarray(node.to_array(*size, **options))
        most = max(float(np.abs(array).max()), 1e-6)  # one scale of colours for all panels of a node
        for index in np.ndindex(array.shape[:-2]):
            panels.append((array[index], _title(node, index), most))
    scores = any(array.dtype != np.bool_ for array, _, _ in panels)
    width, height = 1.5 + 0.3 * scores, 1.5 * size[0] / size[1] + 0.45
    figure, axes = plt.subplots(1, len(panels), figsize=(width * len(panels), height), squeeze=False)
    for i, (array, title, most) in enumerate(panels):
        title = title if titles is None else titles[i]
        if array.dtype == np.bool_:
            _mask(axes[0, i], array, title)
        else:
            _score(figure, axes[0, i], array, title, most)
    axes[0, 0].set_xlabel("key s →")
    axes[0, 0].set_ylabel("← query t")
    figure.tight_layout(pad=0.4, w_pad=0.8)
    plt.show()


def show_blocks(
    *masks: Mask, size: int = 32, block: int = 8, numbers: bool = False, titles: list[str] | None = None
) -> None:
    """Draws the block map of masks: what is skipped, what needs its mask, what does not.

    Args:
      masks: what to draw.
      size: T and S.
      block: queries and keys of a block.
      numbers: write into each visited block when the kernel comes to it.
      titles: one per mask; default: what it prints.
    """
    figure, axes = plt.subplots(1, len(masks), figsize=(2.3 * len(masks), 2.85), squeeze=False)
    for ax, mask, title in zip(axes.flat, masks, titles or [_title(mask, ()) for mask in masks], strict=True):
        _blocks(ax, mask, size, block, numbers)
        ax.set_title(title, family="monospace")
    handles = [
        Patch(color=UNSEEN, label="empty: skipped"),
        Patch(color=PARTIAL, label="partial: mask is evaluated"),
        Patch(color=SEEN, label="full: mask is not looked at"),
    ]
    figure.tight_layout(pad=0.4, w_pad=1.2, rect=(0, 0.09, 1, 1))
    figure.legend(handles=handles, loc="lower center", ncols=3, frameon=False, fontsize=7)
    plt.show()


def show_curves(x: Any, curves: dict[str, Any], xlabel: str, ylabel: str) -> None:
    """Draws functions of one number."""
    figure, ax = plt.subplots(figsize=(3.6, 2.2))
    for name, y in curves.items():
        ax.plot(x, y, label=name, lw=1.2)
    ax.set(xlabel=xlabel, ylabel=ylabel)
    ax.legend(frameon=False, fontsize=7)
    ax.spines[["top", "right"]].set_visible(False)
    figure.tight_layout(pad=0.4)
    plt.show()


def show_ragged(length: int = 10, block: int = 4) -> None:
    """Draws how the last block of a length that the block does not divide is moved inwards."""
    count = -(-length // block)
    figure, ax = plt.subplots(figsize=(4.6, 1.7))
    for i in range(count):
        start = min(i * block, length - block)
        y = count - i
        ax.text(-0.4, y + 0.3, f"block {i}", ha="right", va="center", fontsize=7.5)
        for position in range(start, start + block):
            fresh = position >= i * block
            ax.add_patch(Rectangle((position, y), 0.94, 0.6, fc=SEEN if fresh else PARTIAL_UNSEEN, ec="none"))
            if not fresh:
                ax.text(position + 0.47, y + 0.3, "✕", ha="center", va="center", fontsize=7)
    for position in range(length):
        ax.text(position + 0.47, 0.55, str(position), ha="center", va="center", fontsize=7)
    ax.set(xlim=(-2, length), ylim=(0.2, count + 0.8))
    ax.axis("off")
    figure.tight_layout(pad=0.2)
    plt.show()


def show_primitives() -> None:
    """Draws the primitives and the rules that lead from one to the next."""
    figure, ax = plt.subplots(figsize=(7.4, 2.6))
    boxes = {
        "attention": (0.4, 2.6, "attention\nout, lse"),
        "tangent": (4.0, 2.6, "attention_tangent\nlinear in the tangents"),
        "backward": (7.6, 2.6, "attention_backward\nlinear in the cotangents"),
        "sweep": (5.8, 0.3, "attention_sweep\nsum of a tile function over visible tiles"),
    }
    widths = {"attention": 1.8, "tangent": 2.3, "backward": 2.3, "sweep": 3.6}
    for name, (x, y, text) in boxes.items():
        fill = "#dbe8f6" if name != "sweep" else "#fdeccb"
        ax.add_patch(FancyBboxPatch((x, y), widths[name], 0.9, boxstyle="round,pad=0.1", fc=fill, ec=INK, lw=0.7))
        ax.text(x + widths[name] / 2, y + 0.45, text, ha="center", va="center", fontsize=7.5)
    arrows = [
        ((2.35, 3.05), (3.85, 3.05), "jvp", (3.1, 3.2), "arc3"),
        ((6.45, 3.25), (7.45, 3.25), "transpose", (6.95, 3.4), "arc3"),
        ((7.45, 2.85), (6.45, 2.85), "transpose", (6.95, 2.55), "arc3"),
        ((5.2, 2.45), (6.6, 1.35), "jvp of the rest", (4.85, 1.9), "arc3"),
        ((8.7, 2.45), (8.2, 1.35), "jvp of the rest", (9.5, 1.9), "arc3"),
        ((9.55, 0.95), (9.55, 0.5), "jvp, transpose:\nanother sweep", (11.0, 0.75), "arc3,rad=-1.6"),
    ]
    for start, end, text, at, style in arrows:
        arrow = FancyArrowPatch(
            start, end, connectionstyle=style, arrowstyle="-|>", mutation_scale=8, lw=0.8, color=INK
        )
        ax.add_patch(arrow)
        ax.text(*at, text, ha="center", va="center", fontsize=7, style="italic")
    ax.set(xlim=(0.2, 11.9), ylim=(0, 3.8))
    ax.axis("off")
    figure.tight_layout(pad=0.2)
    plt.show()


def overview(path: str | pathlib.Path) -> None:
    """Writes the picture of many masks at once."""
    n = 24
    documents = jnp.asarray(np.repeat([0, 1, 2, 3], [7, 9, 3, 5]))
    order = jnp.asarray(np.random.default_rng(3).permutation(n))
    pictured = {
        "Causal()": Causal(),
        "Window(5, 0)": Window(5, 0),
        "Window(3, 3) | Prefix(2)": Window(3, 3) | Prefix(2),
        "Causal() | Prefix(8)": Causal() | Prefix(8),
        "Causal() & Segments(ids)": Causal() & Segments(documents),
        "Causal() & Chunked(6)": Causal() & Chunked(6),
        "Causal() & Dilated(3)": Causal() & Dilated(3),
        "Lengths(17, 20)": Lengths(17, 20),
        "Permutation(order)": Permutation(order),
        "~Window(4, 4)": ~Window(4, 4),
        "Where(2-D neighbours)": Where(_neighbours),
        "Where(q & k == 0)": Where(lambda b, h, q, k: q & k == 0),
    }
    figure, axes = plt.subplots(3, 4, figsize=(7.6, 6.4))
    for ax, (title, mask) in zip(axes.flat, pictured.items(), strict=True):
        _mask(ax, np.asarray(mask.to_array(n, n)), title)
    figure.tight_layout(pad=0.5, w_pad=1.0, h_pad=1.2)
    figure.savefig(path, dpi=150, metadata={"Software": None})
    plt.close(figure)


def _neighbours(b: jax.Array, h: jax.Array, q: jax.Array, k: jax.Array) -> jax.Array:
    """Patches of a 4 x 6 image that touch each other."""
    return (abs(q // 6 - k // 6) <= 1) & (abs(q % 6 - k % 6) <= 1)


def _title(node: Any, index: tuple) -> str:
    """What the node prints, in short lines, and which batch entry and head this is."""
    text = re.sub(r"function of \([a-z, ]*\)", "function", repr(node))
    if isinstance(node, And | Or):
        text = text[1:-1]  # the outer parentheses
    lines, line = [], ""
    for word in re.split(r"(?<= [&|]) |(?<=,) (?![^\[]*\])", text):
        if line and len(line) + len(word) >= 22:
            lines, line = [*lines, line], word
        else:
            line = f"{line} {word}".strip()
    where = ""
    if index:
        *batch, head = (int(i) for i in index)
        where = "\n" + ", ".join([*(f"b = {b}" for b in batch), f"h = {head}"])
    return "\n".join([*lines, line]) + where


def _mask(ax: Axes, seen: np.ndarray, title: str) -> None:
    ax.imshow(seen, cmap=ListedColormap([UNSEEN, SEEN]), vmin=0, vmax=1, interpolation="none")
    _grid(ax, seen.shape, 1, 0.6 if max(seen.shape) <= 16 else 0.4)
    ax.set_title(title, family="monospace")


def _score(figure: Any, ax: Axes, values: np.ndarray, title: str, most: float) -> None:
    image = ax.imshow(values, cmap="RdBu_r", vmin=-most, vmax=most, interpolation="none")
    _grid(ax, values.shape, 1, 0.4)
    ax.set_title(title, family="monospace")
    bar = figure.colorbar(image, ax=ax, fraction=0.046, pad=0.04)
    bar.ax.tick_params(labelsize=6, length=2)
    bar.outline.set_visible(False)


def _blocks(ax: Axes, mask: Mask, size: int, block: int, numbers: bool) -> None:
    built = BlockMap.build(mask, size, size, block_q=block, block_k=block)
    kinds = np.asarray(built.kinds).reshape(-1, *built.kinds.shape[-2:])[0]
    seen = np.asarray(mask.to_array(size, size)).reshape(-1, size, size)[0]
    spread = kinds.repeat(built.block_q, 0).repeat(built.block_k, 1)[:size, :size]
    colours = ListedColormap([UNSEEN, PARTIAL_UNSEEN, PARTIAL, SEEN])
    ax.imshow(
        np.select([spread == 0, spread == 2, seen], [0, 3, 2], 1), cmap=colours, vmin=0, vmax=3, interpolation="none"
    )
    _grid(ax, (size, size), block, 1.5)
    counts = built.counts()
    ax.set_xlabel(", ".join(f"{count} {kind}" for kind, count in counts.items()), fontsize=7)
    if not numbers:
        return
    number = 0
    for i, row in enumerate(kinds):
        for j in [*np.flatnonzero(row == 1), *np.flatnonzero(row == 2)]:
            number += 1
            at = [min(n * block + block / 2, size - block / 2) - 0.5 for n in (j, i)]
            ax.text(*at, str(number), ha="center", va="center", fontsize=7, bbox=dict(fc="white", ec="none", pad=1.5))


def _grid(ax: Axes, shape: tuple[int, ...], step: int, width: float) -> None:
    t, s = shape
    ax.hlines(np.arange(step, t, step) - 0.5, -0.5, s - 0.5, colors="white", lw=width)
    ax.vlines(np.arange(step, s, step) - 0.5, -0.5, t - 0.5, colors="white", lw=width)
    ax.set(xticks=[], yticks=[], xlim=(-0.5, s - 0.5), ylim=(t - 0.5, -0.5))
    for side in ax.spines.values():
        side.set_visible(False)


if __name__ == "__main__":
    overview(pathlib.Path(__file__).parent / "_static" / "masks.png")
