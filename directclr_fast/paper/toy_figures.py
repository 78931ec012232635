"""Pictures of the toy tasks, drawn from the JSON that ``toy.run`` writes and from nothing else.

Lines are means over seeds, bands and bars one standard deviation over seeds.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from .. import plots

_LOSS = {"released": "released loss", "paper": "the paper's Eq. 2"}


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


def _rank(axes, width: int, label: str) -> None:
    axes.set(xlabel="rank", xticks=range(1, width + 1, 3), ylabel=label)


def _colour(i: int, n: int):
    from matplotlib import colormaps

    return colormaps["viridis"](0.95 * i / max(n - 1, 1))


# Each draws one loss into a row of three panels; ``of``: its result and what all losses share.


def _augmentation(panels, of: dict, loss: str) -> None:
    over_time, final, count = panels
    rows, times, width = of["variants"], of["times"], of["width"]
    for i, row in enumerate(rows):
        style = {"color": _colour(i, len(rows))}
        _band(over_time, times, row["curves"]["clean"], linestyle="--", **style)
        _band(over_time, times, row["curves"]["noisy"], **style)
        weights = {k: v[0] for k, v in row["final"]["weights"].items()}
        _band(final, range(1, width + 1), weights, label=f"k = {row['strength']:g}", **style)
    over_time.set_yscale("log")
    _time(over_time, times, "singular values of W:\nclean columns (dashed), noisy (solid)")
    final.set(yscale="log", ylim=(1e-2, None))
    _rank(final, width, "singular value of W at the end")
    k = [row["strength"] for row in rows]
    for name, label in (
        ("collapsed", "below e$^{-10}$"),
        ("small", f"below {of['small_below_share_of_largest']:g} of the largest"),
    ):
        values = [row["final"][name] for row in rows]
        mean, spread = ([v[part] for v in values] for part in ("mean", "spread"))
        count.errorbar(k, mean, spread, marker="o", capsize=3, label=label)
    labels = {"xlabel": "augmentation strength k", "ylabel": "eigenvalues of the embedding"}
    count.set(ylim=(-0.5, width + 0.5), **labels)


def _regularization(panels, of: dict, loss: str) -> None:
    (row,), width = of["variants"], of["width"]
    curves = {
        name: {part: np.array(v) for part, v in curve.items()}
        for name, curve in row["curves"].items()
    }
    layers = [{k: v[:, layer] for k, v in curves["log_weights"].items()} for layer in range(2)]
    labels = [f"log singular value of W$_{layer}$" for layer in (1, 2)]
    labels += ["log eigenvalue of the embedding"]
    for panel, values, label in zip(panels, (*layers, curves["log_embedding"]), labels):
        for j in range(width):
            one = {k: v[:, j] for k, v in values.items()}
            _band(panel, of["times"], one, color=_colour(j, width), linewidth=1)
        _time(panel, of["times"], label)
    panels[2].axhline(np.log(of["collapsed_below"]), color="tab:red", linestyle=":")
    start, end = curves["collapsed"]["mean"][[0, -1]]
    title = f"{loss}: below e$^{{-10}}$: {start:.1f} at the start, {end:.1f} at the end"
    panels[2].set_title(title, fontsize="small")


def _depth(panels, of: dict, loss: str) -> None:
    count, *spectra = panels
    starts = {
        "random": ("each layer exp(-0.35 j)", "tab:blue"),
        "aligned": ("product exp(-0.7 j), aligned", "tab:orange"),
    }
    for (start, (label, colour)), spectrum in zip(starts.items(), spectra):
        rows = [row for row in of["variants"] if row["start"] == start]
        depth = [row["layers"] for row in rows]
        for when, at, style in (("end", -1, "-o"), ("start", 0, ":s")):
            values = [row["curves"]["collapsed"] for row in rows]
            mean, spread = ([v[part][at] for v in values] for part in ("mean", "spread"))
            style = {"fmt": style, "color": colour, "capsize": 3, "label": f"{label}, {when}"}
            count.errorbar(depth, mean, spread, **style)
        for i, row in enumerate(rows):
            layers = f"{row['layers']} layer{'s' * (row['layers'] > 1)}"
            style = {"color": _colour(i, len(rows)), "label": layers}
            _band(spectrum, range(1, of["width"] + 1), row["final"]["log_embedding"], **style)
        spectrum.axhline(np.log(of["collapsed_below"]), color="tab:red", linestyle=":")
        spectrum.set_title(f"{loss}, {label}", fontsize="small")
        _rank(spectrum, of["width"], "log eigenvalue of the embedding, end")
    labels = {"xlabel": "linear layers", "ylabel": "eigenvalues below e$^{-10}$"}
    count.set(ylim=(-0.5, of["width"] + 0.5), **labels)


def _alignment(panels, of: dict, loss: str) -> None:
    over_time, *matrices = panels
    rows, times = of["variants"], np.array(of["times"])
    for i, row in enumerate(rows):
        # Before a direction is above the threshold there is nothing to be aligned.
        alive = [t for t, live in enumerate(row["curves"]["live"]["mean"]) if live >= 1]
        for name, line in (("alignment", "-"), ("diagonal", ":")):
            curve = {part: np.array(v)[alive] for part, v in row["curves"][name].items()}
            label = f"start x {row['scale']:g}" if line == "-" else None
            style = {"linestyle": line, "color": _colour(i, len(rows)), "label": label}
            _band(over_time, times[alive], curve, **style)
    _time(over_time, times, "live directions: alignment by group\n(dotted: mean |A$_{kk}$|)")
    over_time.set_ylim(-0.1, 1.1)
    for panel, row in zip(matrices, (rows[0], rows[-1])):
        panel.grid(False)
        panel.imshow(row["final"]["matrix"], vmin=0, vmax=1, cmap="magma")
        title = f"{loss}: |A| at the end, start x {row['scale']:g}, seed 0"
        panel.set_title(title, fontsize="small")
        panel.set(xlabel="left singular vector of W$_1$", ylabel="right singular vector of W$_2$")


_DRAWINGS = {  # and the inches of a panel
    "augmentation": (_augmentation, (4.4, 3.2)),
    "regularization": (_regularization, (4.2, 3.2)),
    "depth": (_depth, (4.2, 3.2)),
    "alignment": (_alignment, (4.0, 3.3)),
}


def draw(results: dict, path: str | Path) -> None:
    """Draws the JSON of ``toy.run`` as a picture at ``path``."""
    drawing, size = _DRAWINGS[results["task"]]
    how = f"{results['seeds']} seeds, {results['steps']} steps, mean and standard deviation"
    losses = results["losses"]
    title = f"{results['title']}\n{how}"
    with plots.panels(path, 3, title, size, rows=len(losses)) as grid:
        for (loss, result), panels in zip(losses.items(), grid):
            for panel in panels:
                panel.set_title(_LOSS[loss], fontsize="small")
            drawing(panels, results | result, _LOSS[loss])
    from PIL import Image  # comes with matplotlib

    # Bands of many tints: a palette makes the file a third as large, and looks the same.
    with Image.open(path) as picture:
        small = picture.convert("RGB").quantize(128, dither=Image.Dither.NONE)
    small.save(path, optimize=True)
