"""Pictures of the toy tasks, drawn from the JSON that ``toy.run`` writes and from nothing else.

Lines are means over seeds, bands and bars one standard deviation over seeds.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from .. import plots

_LOSS = {"released": "released loss", "paper": "the paper's Eq. 2"}


@contextlib.contextmanager
def _panels(path: Path, results: dict, columns: int, size: tuple[float, float]) -> Iterator[dict]:
    """Axes (columns,) of one figure for each loss, titled by it."""
    losses = results["losses"]
    title = (
        f"{results['title']}\n{results['seeds']} seeds, {results['steps']} steps, "
        "mean and standard deviation"
    )
    with plots.panels(path, columns, title, size, rows=len(losses)) as grid:
        for loss, row in zip(losses, grid):
            for panel in row:
                panel.set_title(_LOSS[loss], fontsize="small")
        yield dict(zip(losses, grid))


def _band(axes, x, values: dict, **style) -> None:
    """Mean over seeds with a band of one standard deviation."""
    mean, spread = np.array(values["mean"]), np.array(values["spread"])
    (line,) = axes.plot(x, mean, **style)
    axes.fill_between(
        x, mean - spread, mean + spread, color=line.get_color(), alpha=0.2, linewidth=0
    )


def _time(axes, times: list[int], label: str) -> None:
    axes.set_xscale("symlog", linthresh=1)  # linear from step 0 to step 1
    axes.set(xlim=(0, times[-1]), xlabel="SGD step", ylabel=label)


def _rank(axes, results: dict, label: str) -> None:
    axes.set(xlabel="rank", xticks=range(1, results["width"] + 1, 3), ylabel=label)


def _count(axes, results: dict, **labels) -> None:
    axes.set(ylim=(-0.5, results["width"] + 0.5), **labels)


def _colour(i: int, n: int):
    from matplotlib import colormaps

    return colormaps["viridis"](0.95 * i / max(n - 1, 1))


def _augmentation(results: dict, path: Path) -> None:
    with _panels(path, results, 3, (4.4, 3.2)) as grid:
        for loss, (over_time, final, count) in grid.items():
            result = results["losses"][loss]
            rows, times = result["variants"], result["times"]
            for i, row in enumerate(rows):
                style = {"color": _colour(i, len(rows))}
                _band(over_time, times, row["curves"]["clean"], linestyle="--", **style)
                _band(over_time, times, row["curves"]["noisy"], **style)
                weights = {k: v[0] for k, v in row["final"]["weights"].items()}
                label = f"k = {row['strength']:g}"
                _band(final, range(1, results["width"] + 1), weights, label=label, **style)
            over_time.set_yscale("log")
            _time(over_time, times, "singular values of W:\nclean columns (dashed), noisy (solid)")
            final.set(yscale="log", ylim=(1e-2, None))
            _rank(final, results, "singular value of W at the end")
            k = [row["strength"] for row in rows]
            for name, label in (
                ("collapsed", "below e$^{-10}$"),
                ("small", f"below {results['small_below_share_of_largest']:g} of the largest"),
            ):
                values = [row["final"][name] for row in rows]
                mean, spread = ([v[part] for v in values] for part in ("mean", "spread"))
                count.errorbar(k, mean, spread, marker="o", capsize=3, label=label)
            x = "augmentation strength k"
            _count(count, results, xlabel=x, ylabel="eigenvalues of the embedding")


def _regularization(results: dict, path: Path) -> None:
    with _panels(path, results, 3, (4.2, 3.2)) as grid:
        for loss, panels in grid.items():
            result = results["losses"][loss]
            (row,) = result["variants"]
            curves = row["curves"]
            layers = [
                {part: np.array(v)[:, layer] for part, v in curves["log_weights"].items()}
                for layer in range(2)
            ]
            embedding = {part: np.array(v) for part, v in curves["log_embedding"].items()}
            start, end = (curves["collapsed"]["mean"][t] for t in (0, -1))
            labels = ("log singular value of W$_1$", "log singular value of W$_2$")
            labels += ("log eigenvalue of the embedding",)
            for panel, values, label in zip(panels, (*layers, embedding), labels):
                for j in range(results["width"]):
                    one = {part: v[:, j] for part, v in values.items()}
                    colour = _colour(j, results["width"])
                    _band(panel, result["times"], one, color=colour, linewidth=1)
                _time(panel, result["times"], label)
            panels[2].axhline(np.log(results["collapsed_below"]), color="tab:red", linestyle=":")
            panels[2].set_title(
                f"{_LOSS[loss]}: below e$^{{-10}}$: {start:.1f} at the start, {end:.1f} at the end",
                fontsize="small",
            )


def _depth(results: dict, path: Path) -> None:
    starts = {
        "random": ("each layer exp(-0.35 j)", "tab:blue"),
        "aligned": ("product exp(-0.7 j), aligned", "tab:orange"),
    }
    with _panels(path, results, 3, (4.2, 3.2)) as grid:
        for loss, (count, *spectra) in grid.items():
            rows = results["losses"][loss]["variants"]
            for (start, (label, colour)), spectrum in zip(starts.items(), spectra):
                some = [row for row in rows if row["start"] == start]
                depth = [row["layers"] for row in some]
                for when, at, style in (("end", -1, "-o"), ("start", 0, ":s")):
                    values = [row["curves"]["collapsed"] for row in some]
                    mean, spread = ([v[p][at] for v in values] for p in ("mean", "spread"))
                    text = f"{label}, {when}"
                    count.errorbar(
                        depth, mean, spread, fmt=style, color=colour, capsize=3, label=text
                    )
                for i, row in enumerate(some):
                    layers = f"{row['layers']} layer{'s' * (row['layers'] > 1)}"
                    style = {"color": _colour(i, len(some)), "label": layers}
                    ranks, values = range(1, results["width"] + 1), row["final"]["log_embedding"]
                    _band(spectrum, ranks, values, **style)
                spectrum.axhline(np.log(results["collapsed_below"]), color="tab:red", linestyle=":")
                spectrum.set_title(f"{_LOSS[loss]}, {label}", fontsize="small")
                _rank(spectrum, results, "log eigenvalue of the embedding, end")
            _count(count, results, xlabel="linear layers", ylabel="eigenvalues below e$^{-10}$")


def _alignment(results: dict, path: Path) -> None:
    with _panels(path, results, 3, (4.0, 3.3)) as grid:
        for loss, (over_time, *matrices) in grid.items():
            result = results["losses"][loss]
            rows, times = result["variants"], result["times"]
            for i, row in enumerate(rows):
                # Before a direction is above the threshold there is nothing to be aligned.
                alive = [t for t, live in enumerate(row["curves"]["live"]["mean"]) if live >= 1]
                for name, line in (("alignment", "-"), ("diagonal", ":")):
                    curve = {p: np.array(v)[alive] for p, v in row["curves"][name].items()}
                    label = f"start x {row['scale']:g}" if line == "-" else None
                    style = {"linestyle": line, "color": _colour(i, len(rows)), "label": label}
                    _band(over_time, np.array(times)[alive], curve, **style)
            _time(
                over_time, times, "live directions: alignment by group\n(dotted: mean |A$_{kk}$|)"
            )
            over_time.set_ylim(-0.1, 1.1)
            for panel, row in zip(matrices, (rows[0], rows[-1])):
                panel.grid(False)
                panel.imshow(row["final"]["matrix"], vmin=0, vmax=1, cmap="magma")
                panel.set_title(
                    f"{_LOSS[loss]}: |A| at the end, start x {row['scale']:g}, seed 0",
                    fontsize="small",
                )
                panel.set(
                    xlabel="left singular vector of W$_1$", ylabel="right singular vector of W$_2$"
                )


_DRAWINGS = {
    "augmentation": _augmentation,
    "regularization": _regularization,
    "depth": _depth,
    "alignment": _alignment,
}


def draw(results: dict, path: str | Path) -> None:
    """Draws the JSON of ``toy.run`` as a picture at ``path``."""
    _DRAWINGS[results["task"]](results, Path(path))
    from PIL import Image  # comes with matplotlib

    # Bands of many tints: a palette makes the file a third as large, and looks the same.
    with Image.open(path) as picture:
        small = picture.convert("RGB").quantize(128, dither=Image.Dither.NONE)
    small.save(path, optimize=True)
