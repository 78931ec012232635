"""What a comparison found: numbers, figures and one page of HTML that needs nothing else.

Every sentence about the outcome is derived from the numbers, so it is right for other data, too.
"""

from __future__ import annotations

import base64
import html
import json
import math
import statistics
import sys
from itertools import combinations
from pathlib import Path

from .. import plots
from ..machine import describe, machine
from ..train.checkpoint import replacing
from .runs import SMALL, Run, apart
from .spectrum import THRESHOLD

# Tables 1 and 2 of the paper: linear probe, top-1 in percent, ResNet-50, 100 epochs on ImageNet.
PAPER = {
    "simclr": 66.5, "directclr": 62.7, "lowrank": 62.3, "single": 61.1, "diagonal": 60.2,
    "orthogonal": 52.2, "baseline": 51.5, "random": 43.0,
}  # fmt: skip
PAPER_SUB_VECTOR = 47.9  # of directclr's r[:, :d0]
PAPER_COLLAPSED = 34  # of the 128 directions of simclr's embedding, its figure 2
_MEASURE = {"linear": "linear probe", "knn": "nearest neighbours"}
PROJECTOR = {
    "simclr": "two layers, trained",
    "directclr": "fixed, diagonal, low rank: r[:, :d0]",
    "lowrank": "fixed, low rank",
    "single": "one layer, trained",
    "diagonal": "diagonal, trained",
    "orthogonal": "orthogonal, trained",
    "baseline": "none",
    "random": "d0 random columns, redrawn",
    "group": "none, 8 groups of columns",
    "untrained": "no training",
    "pixels": "no encoder",
}
# Two-sided 95 % of Student's t with 2 (n - 1) degrees of freedom, for two means of n runs.
_T = {2: 4.30, 3: 2.78, 4: 2.45, 5: 2.31, 6: 2.23, 7: 2.18, 8: 2.14}


# ---------------------------------------------------------------- numbers


def summary(plan, done: dict[str, dict], weights: Path, steps: int) -> dict:
    """All numbers of a finished comparison, as plain values.

    ``plan``: the :class:`~directclr_fast.paper.compare.Plan`; ``done``: results by name of the run;
    ``weights``: folder of the kept weights; ``steps``: of a training.
    """
    rates = {mode: plan.chosen(mode, done) for mode in plan.modes}
    rows = {mode: _row([done[r.name] for r in plan.table(mode, rates[mode])]) for mode in rates}
    for mode in ("untrained", "pixels"):
        rows[mode] = _row([done[Run(mode, seed).name] for seed in plan.seeds])
    found = {
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "machine": machine(),
        "settings": plan.settings,
        "steps": steps,
        "seeds": list(plan.seeds),
        "search": {
            mode: {
                "chosen": rates[mode],
                "inside the training part": {
                    f"{run.learning_rate:g}": done[run.name].get("held_out")
                    for run in plan.search(mode)
                },
            }
            for mode in plan.modes
        },
        "rows": rows,
        "order": {measure: order(rows, measure) for measure in _MEASURE},
    }
    if "directclr" in rates:
        found["sweep"] = _sweep(plan, done, rates["directclr"], rows)
    found["agreement"] = _agreement(plan, done, rates[plan.agreement], weights)
    return found


def spread(values: list[float]) -> dict:
    """Mean, standard deviation (None of one value) and the values themselves."""
    deviation = statistics.stdev(values) if len(values) > 1 else None
    return {"mean": statistics.fmean(values), "deviation": deviation, "values": values}


def _row(results: list[dict]) -> dict:
    """One line of the table from its runs, of which those that diverged are only counted."""
    good = [result for result in results if not result["diverged"]]
    row = {"runs": len(good), "diverged": len(results) - len(good)}
    if not good:
        return row
    row["accuracy"] = {
        part: {k: spread([g["accuracy"][part][k] for g in good]) for k in ("linear", "knn")}
        for part in good[0]["accuracy"]
    }
    if "dim" in good[0]:
        row["dim"] = good[0]["dim"]
    if "loss" in good[0]:
        last = max(1, len(good[0]["loss"]) // 10)
        row["final loss"] = spread([statistics.fmean(g["loss"][-last:]) for g in good])
    row["spectra"] = {
        part: {
            "dimensions": good[0]["spectra"][part]["dimensions"],
            **{
                k: spread([g["spectra"][part][k] for g in good])
                for k in ("effective_rank", "collapsed", "small")
            },
            "log10": [
                round(statistics.fmean(v), 3)
                for v in zip(*(g["spectra"][part]["log10"] for g in good))
            ],
        }
        for part in good[0]["spectra"]
    }
    return row


def verdict(a: dict, b: dict) -> str:
    """Whether a's mean is "above" or "below" b's by more than chance (95 %), or "undecided"."""
    difference = a["mean"] - b["mean"]
    if a["deviation"] is None or b["deviation"] is None:
        return "undecided"
    n = min(len(a["values"]), len(b["values"]))
    error = math.sqrt(sum(v["deviation"] ** 2 / len(v["values"]) for v in (a, b)))
    if abs(difference) <= _T.get(n, 2.1) * error:
        return "undecided"
    return "above" if difference > 0 else "below"


def order(rows: dict[str, dict], measure: str) -> dict:
    """The order of the modes by "linear" or "knn" in r, and every pair of the paper's (linear)."""
    here = {
        mode: rows[mode]["accuracy"]["r"][measure]
        for mode in PAPER
        if "accuracy" in rows.get(mode, {})
    }
    paper = [mode for mode in PAPER if mode in here]  # PAPER is sorted
    ours = sorted(here, key=lambda mode: -here[mode]["mean"])
    pairs = [
        {"better in the paper": a, "worse": b, "here": verdict(here[a], here[b])}
        for a, b in combinations(paper, 2)
    ]
    n = len(paper)
    squares = sum((paper.index(mode) - ours.index(mode)) ** 2 for mode in paper)
    return {
        "paper": paper,
        "here": ours,
        "rank correlation": 1 - 6 * squares / (n * (n * n - 1)) if n > 1 else None,
        "pairs": pairs,
    }


def _sweep(plan, done: dict, rate: float, rows: dict) -> list[dict]:
    """Lines by d0, ascending: the sweep, DirectCLR's own and, where it is there, all columns."""
    lines = {
        dim: _row([done[r.name] for r in plan.sweep(rate) if r.dim == dim]) for dim in plan.dims
    }
    own = rows["directclr"]
    if "dim" in own:
        lines[own["dim"]] = own
    base = rows.get("baseline", {})
    if "spectra" in base:
        width = base["spectra"]["representation"]["dimensions"]
        lines[width] = {**base, "accuracy": {**base["accuracy"]}}
        lines[width]["accuracy"]["sub-vector"] = base["accuracy"]["r"]  # all columns are r
    return [
        {"dim": dim, "runs": row["runs"], "accuracy": row["accuracy"]}
        for dim, row in sorted(lines.items())
        if "accuracy" in row
    ]


def _agreement(plan, done: dict, rate: float, weights: Path) -> dict:
    """The fast loss, the reference and the fast one from rounded weights, over whole trainings."""
    again, n = plan.again(rate), len(plan.seeds)
    runs = {
        "fast": plan.table(plan.agreement, rate), "reference": again[:n], "rounded": again[n:]
    }  # fmt: skip
    results = {kind: [done[run.name] for run in of_kind] for kind, of_kind in runs.items()}
    found = {"mode": plan.agreement, "learning_rate": rate}
    if any(result["diverged"] for of_kind in results.values() for result in of_kind):
        return {**found, "diverged": True}
    files = {kind: [weights / f"{r.name}.pt" for r in of_kind] for kind, of_kind in runs.items()}
    pairs = list(combinations(files["fast"], 2))
    found["accuracy"] = {
        kind: spread([result["accuracy"]["r"]["linear"] for result in of_kind])
        for kind, of_kind in results.items()
    }
    found["loss"] = {
        kind: [[round(v, 5) for v in result["loss"]] for result in of_kind]
        for kind, of_kind in results.items()
        if kind != "rounded"
    }
    found["loss apart"] = {
        kind: [
            [float(f"{abs(a - b) / b:.3g}") for a, b in zip(x["loss"], y["loss"])]
            for x, y in zip(results["fast"], results[kind])
        ]
        for kind in ("reference", "rounded")
    }
    found["weights apart"] = {
        kind: spread([apart(*pair) for pair in zip(files[kind], files["fast"])])
        for kind in ("reference", "rounded")
    }
    if pairs:
        found["weights apart"]["another seed"] = spread([apart(*pair) for pair in pairs])
    return found


# ---------------------------------------------------------------- sentences


def _percent(values: dict | None, digits: int = 1) -> str:
    if values is None:
        return ""
    deviation = values["deviation"]
    text = f"{100 * values['mean']:.{digits}f}"
    return text if deviation is None else f"{text} ± {100 * deviation:.{digits}f}"


def _number(values: dict, digits: int = 1) -> str:
    text = f"{values['mean']:.{digits}f}"
    deviation = values["deviation"]
    return text if not deviation else f"{text} ± {deviation:.{digits}f}"


def sentences(found: dict) -> list[str]:
    """The outcome in words, each with its numbers."""
    rows, seeds = found["rows"], len(found["seeds"])
    said = []
    for measure, ranking in found["order"].items():
        said += _order(ranking, measure, rows, seeds)
    said += _orthogonal(rows) + _sub_vector(rows) + _ranks(rows) + _collapsed(rows)
    said += _of_sweep(found) + _of_agreement(found)
    edges = [
        f"{mode} ({search['chosen']:g})"
        for mode, search in found["search"].items()
        if _at_edge(search)
    ]
    if edges:
        said.append(f"Learning rate chosen at an end of the grid: {', '.join(edges)}.")
    lost = [f"{mode} ({row['diverged']})" for mode, row in rows.items() if row["diverged"]]
    if lost:
        said.append(f"Runs that diverged and are left out: {', '.join(lost)}.")
    return said


def _order(ranking: dict, measure: str, rows: dict, seeds: int) -> list[str]:
    here, paper, pairs = ranking["here"], ranking["paper"], ranking["pairs"]
    if len(paper) < 2:
        return []
    count = {v: sum(p["here"] == v for p in pairs) for v in ("above", "below", "undecided")}
    outcome = "It is the paper's order" if here == paper else "It differs from the paper's"
    said = [
        f"Order of the projectors by {_MEASURE[measure]} of r, here: {' > '.join(here)}. In the "
        f"paper, by linear probe: {' > '.join(paper)}. {outcome} (rank correlation "
        f"{ranking['rank correlation']:.2f}). Of {len(pairs)} pairs {count['above']} are in the "
        f"paper's order beyond chance (95 % for each, {seeds} seed{'s' * (seeds > 1)}), "
        f"{count['below']} in the opposite one, {count['undecided']} undecided."
    ]
    opposite = [
        f"{p['worse']} {_mean(rows, p['worse'], measure)} over {p['better in the paper']} "
        f"{_mean(rows, p['better in the paper'], measure)}"
        for p in pairs
        if p["here"] == "below"
    ]
    if opposite:
        said.append(
            f"Opposite to the paper beyond chance, by {_MEASURE[measure]}: {'; '.join(opposite)}."
        )
    return said


def _at_edge(search: dict) -> bool:
    tried = list(search["inside the training part"])
    return len(tried) > 1 and f"{search['chosen']:g}" in (tried[0], tried[-1])


def _mean(rows: dict, mode: str, measure: str = "linear") -> str:
    return _percent(rows[mode]["accuracy"]["r"][measure]) + " %"


def _orthogonal(rows: dict) -> list[str]:
    if not all("accuracy" in rows.get(mode, {}) for mode in ("orthogonal", "baseline")):
        return []
    return [
        "An orthogonal projector changes no similarity, so its row is the baseline's once more but "
        f"for rounding: {_mean(rows, 'orthogonal')} and {_mean(rows, 'baseline')} here, "
        f"{PAPER['orthogonal']} and {PAPER['baseline']} in the paper."
    ]


def _sub_vector(rows: dict) -> list[str]:
    accuracy = rows.get("directclr", {}).get("accuracy")
    if accuracy is None:
        return []
    whole, part = accuracy["r"]["linear"], accuracy["sub-vector"]["linear"]
    found = {"above": "better", "below": "worse", "undecided": "not told apart from it"}
    outcome = found[verdict(whole, part)]
    return [
        f"DirectCLR, probe of the whole r {_percent(whole)} %, of r[:, :d0] alone "
        f"{_percent(part)} %: the whole is {outcome} (paper {PAPER['directclr']} and "
        f"{PAPER_SUB_VECTOR})."
    ]


def _ranks(rows: dict) -> list[str]:
    there = {
        mode: row["spectra"]["representation"]["effective_rank"]
        for mode, row in rows.items()
        if mode not in ("pixels", "untrained") and "spectra" in row
    }
    if not {"directclr", "baseline"} <= there.keys():
        return []
    a, b = there["directclr"], there["baseline"]
    outcome = {
        "above": "more than without projector, as in the paper",
        "below": "fewer than without projector, the opposite of the paper",
        "undecided": "not told apart from no projector, where the paper has more",
    }[verdict(a, b)]
    listed = ", ".join(f"{mode} {_number(v)}" for mode, v in there.items())
    return [
        f"Directions that r uses (effective rank) with DirectCLR: {_number(a)}, {outcome} "
        f"({_number(b)}). All: {listed}."
    ]


def _collapsed(rows: dict) -> list[str]:
    values = rows.get("simclr", {}).get("spectra", {}).get("embedding")
    if values is None:
        return []
    return [
        f"Collapsed directions of simclr's embedding (at most {THRESHOLD:g} of the largest "
        f"eigenvalue): {_number(values['collapsed'])} of {values['dimensions']}, small ones (at "
        f"most {SMALL:g}): {_number(values['small'])}; in the paper's figure 2 "
        f"{PAPER_COLLAPSED} of 128 have collapsed."
    ]


def _of_sweep(found: dict) -> list[str]:
    lines = found.get("sweep", [])
    if len(lines) < 2:
        return []
    best = max(lines, key=lambda line: line["accuracy"]["r"]["linear"]["mean"])
    worst = min(lines, key=lambda line: line["accuracy"]["r"]["linear"]["mean"])
    a, b = (line["accuracy"]["r"]["linear"] for line in (best, worst))
    outcome = "apart beyond chance" if verdict(a, b) == "above" else "not told apart"
    return [
        f"Over d0 the probe of r is best at {best['dim']} ({_percent(a)} %) and worst at "
        f"{worst['dim']} ({_percent(b)} %), {outcome}; the paper takes 360 of 2048."
    ]


def _of_agreement(found: dict) -> list[str]:
    agreement = found["agreement"]
    if agreement.get("diverged"):
        return [f"Loss backends: a run of {agreement['mode']} diverged."]
    accuracy, weights = agreement["accuracy"], agreement["weights apart"]
    gaps = [f - r for f, r in zip(accuracy["fast"]["values"], accuracy["reference"]["values"])]
    deviation = accuracy["fast"]["deviation"]
    text = (
        f"Fast and reference loss over whole trainings ({agreement['mode']}): linear probe "
        f"{_percent(accuracy['fast'])} % and {_percent(accuracy['reference'])} %, differences by "
        f"seed {', '.join(f'{100 * v:+.1f}' for v in gaps)}"
    )
    if deviation is not None:
        text += f" beside a deviation of {100 * deviation:.1f} between seeds"
    text += (
        f". Final weights differ by {weights['reference']['mean']:.2g} of their norm; those of the "
        f"fast loss from initial weights moved by a rounding error by "
        f"{weights['rounded']['mean']:.2g}"
    )
    if "another seed" in weights:
        text += f", those of two seeds by {weights['another seed']['mean']:.2g}"
    return [text + "."]


# ---------------------------------------------------------------- figures


def _figures(found: dict, out: Path) -> dict[str, str]:
    """Draws every figure into ``out``; file names and what they show."""
    shown = {
        "accuracy.png": "Accuracy on the test part: mean and standard deviation over seeds.",
        "spectra.png": "Spectra of the covariance over the test part, relative to the largest "
        "eigenvalue, means over seeds: of the representation r (as in the paper's figures 7 and 9) "
        "and of what the loss sees (figure 2).",
    }
    _draw_accuracy(found, out / "accuracy.png")
    _draw_spectra(found, out / "spectra.png")
    if len(found.get("sweep", [])) > 1:
        shown["dims.png"] = (
            "DirectCLR over d0 (figure 12): probe of the whole r and of the columns that were "
            "trained on. The last point is the baseline, all columns, at its own learning rate."
        )
        _draw_sweep(found, out / "dims.png")
    if not found["agreement"].get("diverged"):
        shown["agreement.png"] = (
            "Loss of every step with the fast loss (lines) and the reference (dots), and "
            "how far apart the two are, beside the fast loss from rounded initial weights."
        )
        _draw_agreement(found, out / "agreement.png")
    return shown


def _style(mode: str) -> dict:
    place = list(PROJECTOR).index(mode)
    return {"color": f"C{place % 10}", "linestyle": ("-", "--")[place // 10]}


def _draw_accuracy(found: dict, path: Path) -> None:
    rows = {mode: row for mode, row in found["rows"].items() if "accuracy" in row}
    modes = sorted(rows, key=lambda mode: rows[mode]["accuracy"]["r"]["linear"]["mean"])
    with plots.figure(path, found["settings"]["data"], (7.0, 0.36 * len(modes) + 1.2)) as axes:
        for shift, part, measure, marker, label in (
            (0.16, "r", "linear", "o", "linear probe of r"),
            (0.0, "r", "knn", "s", "nearest neighbours in r"),
            (-0.16, "sub-vector", "linear", "^", "linear probe of r[:, :d0]"),
        ):
            there = [(i, m) for i, m in enumerate(modes) if part in rows[m]["accuracy"]]
            values = [rows[m]["accuracy"][part][measure] for _, m in there]
            axes.errorbar(
                [100 * v["mean"] for v in values],
                [i + shift for i, _ in there],
                xerr=[100 * (v["deviation"] or 0) for v in values],
                fmt=marker, markersize=4, capsize=2, label=label,
            )  # fmt: skip
        axes.set_yticks(range(len(modes)), modes)
        axes.set_xlabel("accuracy on the test part, %")
        axes.legend(fontsize="x-small")


def _draw_spectra(found: dict, path: Path) -> None:
    with plots.panels(path, 2, size=(5.6, 4.2)) as panels:
        for axes, part in zip(panels, ("representation", "embedding")):
            for mode, row in found["rows"].items():
                if mode != "pixels" and part in row.get("spectra", {}):
                    logs = row["spectra"][part]["log10"]
                    axes.plot(range(1, len(logs) + 1), logs, label=mode, **_style(mode))
            name = {"representation": "representation r", "embedding": "what the loss sees"}[part]
            axes.set_title(name, fontsize="medium")
            axes.set_ylim(-8, 0.3)  # below lie only directions that are nothing but rounding
            axes.set_xlabel("rank of the eigenvalue")
            axes.set_ylabel("log10 eigenvalue / largest")
            axes.legend(fontsize="x-small")


def _draw_sweep(found: dict, path: Path) -> None:
    lines = found["sweep"]
    with plots.figure(path, f"directclr on {found['settings']['data']}") as axes:
        for part, label in (("r", "of the whole r"), ("sub-vector", "of r[:, :d0]")):
            for measure, style in (("linear", "-"), ("knn", ":")):
                values = [line["accuracy"][part][measure] for line in lines]
                axes.errorbar(
                    [line["dim"] for line in lines],
                    [100 * v["mean"] for v in values],
                    yerr=[100 * (v["deviation"] or 0) for v in values],
                    linestyle=style, color="C0" if part == "r" else "C1", marker="o",
                    markersize=3, capsize=2, label=f"{_MEASURE[measure]} {label}",
                )  # fmt: skip
        axes.set_xscale("log", base=2)
        axes.set_xticks([line["dim"] for line in lines], [str(line["dim"]) for line in lines])
        axes.set_xlabel("d0, columns that the loss reads")
        axes.set_ylabel("accuracy on the test part, %")
        axes.legend(fontsize="x-small")


def _draw_agreement(found: dict, path: Path) -> None:
    agreement = found["agreement"]
    with plots.panels(path, 2, size=(5.6, 3.8)) as (curves, apart):
        for i, (fast, reference) in enumerate(zip(*agreement["loss"].values())):
            seed, steps = found["seeds"][i], range(1, len(fast) + 1)
            every = max(1, len(steps) // 40)
            curves.plot(steps, fast, color=f"C{i}", linewidth=1, label=f"fast, seed {seed}")
            curves.plot(
                steps[::every], reference[::every], ".", color=f"C{i}", markersize=5,
                label=f"reference, seed {seed}",
            )  # fmt: skip
        curves.set_xlabel("step")
        curves.set_ylabel("loss (nats)")
        curves.legend(fontsize="x-small")
        colours = {"reference": "C3", "rounded": "C7"}
        labels = {"reference": "fast against reference", "rounded": "fast against rounded start"}
        for kind, of_seeds in agreement["loss apart"].items():
            for i, values in enumerate(of_seeds):
                apart.plot(
                    range(1, len(values) + 1), [max(v, 1e-9) for v in values], linewidth=0.8,
                    color=colours[kind], label=labels[kind] if i == 0 else None,
                )  # fmt: skip
        apart.set_yscale("log")
        apart.set_xlabel("step")
        apart.set_ylabel("relative difference of the loss")
        apart.legend(fontsize="x-small")


# ---------------------------------------------------------------- the page


_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1080px; margin: 2em auto; padding: 0 1em;
  color: #222; background: #fff; }
table { border-collapse: collapse; font-size: 13px; margin: 1em 0; }
th, td { border-bottom: 1px solid #ddd; padding: 3px 8px; text-align: right; white-space: nowrap; }
th { vertical-align: bottom; white-space: normal; }
th:first-child, td:first-child, .left { text-align: left; }
img { max-width: 100%; } figcaption { font-size: 13px; color: #555; }
.wide { overflow-x: auto; } code { background: #f4f4f4; padding: 0 3px; }
"""


def write(found: dict, out: Path) -> None:
    """results.json, the pictures, and report.html with the pictures in it, into ``out``."""
    with replacing(out / "results.json") as file:
        file.write(json.dumps(found) + "\n")
    figures = _figures(found, out)
    with replacing(out / "report.html") as file:
        file.write(page(found, {name: (out / name).read_bytes() for name in figures}, figures))


def page(found: dict, pictures: dict[str, bytes], captions: dict[str, str]) -> str:
    """The report as HTML; ``pictures``: PNG files by name."""
    settings = found["settings"]
    parts = [
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>",
        "<meta name='viewport' content='width=device-width'>",
        f"<title>Projectors compared on {_e(settings['data'])}</title>",
        f"<style>{_STYLE}</style></head><body>",
        f"<h1>Projectors compared on {_e(settings['data'])}</h1>",
        "<p>The comparison of <a href='https://arxiv.org/abs/2110.09348'>arXiv 2110.09348</a> "
        "(tables 1 and 2; figures 2, 7, 9 and 12) in small. Every mode has the same encoder, data, "
        "number of steps and search for its learning rate; the rate is chosen on a seed of its own "
        "by a linear probe inside the training part. The paper's numbers are ResNet-50, 100 epochs "
        "on ImageNet, one seed each.</p>",
        f"<p>{_e(_set_up(found))}</p>",
        f"<p><code>{_e(' '.join(found['command']))}</code></p>",
        "<h2>What was found</h2><ul>",
        *(f"<li>{_e(sentence)}</li>" for sentence in sentences(found)),
        "</ul><h2>Table</h2>",
        _table(found),
        "<p>Accuracy in percent on the test part, mean and standard deviation over seeds. "
        f"Collapsed: eigenvalues of the covariance at most {THRESHOLD:g} of the largest; small: at "
        f"most {SMALL:g} of it. Effective rank: exp of the entropy of the eigenvalues. d0 is the "
        "same for all modes in r[:, :d0]; only directclr was trained on these columns.</p>",
        "<h2>Figures</h2>",
    ]
    for name, picture in pictures.items():
        data = base64.b64encode(picture).decode()
        caption = _e(captions[name])
        parts.append(
            f"<figure><img alt='{caption}' src='data:image/png;base64,{data}'>"
            f"<figcaption>{caption}</figcaption></figure>"
        )
    parts += [
        "<h2>Search for the learning rate</h2>",
        "<p>Linear probe trained on the first four fifths of each class of the training part and "
        "scored on the last fifth, percent.</p>",
        _search_table(found),
        "<h2>Settings of every run</h2><p><code>",
        _e(", ".join(f"{k}={v}" for k, v in settings.items() if v is not None)),
        "</code></p></body></html>\n",
    ]
    return "\n".join(parts)


def _e(text: str) -> str:
    return html.escape(str(text))


def _set_up(found: dict) -> str:
    settings = found["settings"]
    return (
        f"Encoder {settings['encoder']}, crops of {settings['image_size']} pixels, batch "
        f"{settings['batch_size']}, {found['steps']} steps, {settings['optimizer']}, temperature "
        f"{settings['temperature']:g}; seeds {', '.join(map(str, found['seeds']))}; "
        f"{describe(found['machine'])}; one thread a run."
    )


def _table(found: dict) -> str:
    head = (
        "mode", "projector", "learning rate", "linear, r", "kNN, r", "linear, r[:, :d0]",
        "kNN, r[:, :d0]", "effective rank of r", "collapsed / small of r",
        "effective rank, embedding", "collapsed / small, embedding", "paper, linear",
    )  # fmt: skip
    lines = [f"<tr>{''.join(f'<th>{_e(h)}</th>' for h in head)}</tr>"]
    rows = found["rows"]

    def place(mode: str) -> float:
        accuracy = rows[mode].get("accuracy")
        return -accuracy["r"]["linear"]["mean"] if accuracy else 1.0

    for mode in sorted(rows, key=place):
        row = rows[mode]
        rate = found["search"].get(mode, {}).get("chosen")
        cells = [mode, PROJECTOR[mode], "" if rate is None else f"{rate:g}"]
        accuracy, spectra = row.get("accuracy", {}), row.get("spectra", {})
        for part in ("r", "sub-vector"):
            for measure in ("linear", "knn"):
                cells.append(_percent(accuracy.get(part, {}).get(measure)))
        for part in ("representation", "embedding"):
            values = spectra.get(part)
            cells.append("" if values is None else _number(values["effective_rank"]))
            cells.append(
                ""
                if values is None
                else f"{values['collapsed']['mean']:.0f} / {values['small']['mean']:.0f} "
                f"of {values['dimensions']}"
            )
        paper = f"{PAPER[mode]}" if mode in PAPER else ""
        cells.append(f"{paper} ({PAPER_SUB_VECTOR} of r[:, :d0])" if mode == "directclr" else paper)
        lines.append(f"<tr>{''.join(f'<td>{_e(c)}</td>' for c in cells)}</tr>")
    return f"<div class='wide'><table>{''.join(lines)}</table></div>"


def _search_table(found: dict) -> str:
    rates = list(dict.fromkeys(r for s in found["search"].values() for r in s[_INSIDE]))
    lines = [f"<tr><th>mode</th>{''.join(f'<th>{r}</th>' for r in rates)}<th>chosen</th></tr>"]
    for mode, search in found["search"].items():
        scores = [search[_INSIDE].get(rate) for rate in rates]
        cells = ["diverged" if score is None else f"{100 * score:.1f}" for score in scores]
        cells = [mode, *cells, f"{search['chosen']:g}"]
        lines.append(f"<tr>{''.join(f'<td>{_e(c)}</td>' for c in cells)}</tr>")
    return f"<table>{''.join(lines)}</table>"


_INSIDE = "inside the training part"
