"""Numbers, tables and figures of a comparison. The words on them are in docs/paper.md."""

from __future__ import annotations

import math
import statistics
import sys
from collections import Counter
from collections.abc import Iterable
from itertools import combinations, product
from pathlib import Path

from .. import plots
from ..machine import describe, machine
from ..train.checkpoint import replacing, write_json
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
_INSIDE = "inside the training part"
_SCORES = ("linear, r", "kNN, r", "linear, r[:, :d0]", "kNN, r[:, :d0]")  # columns of the tables
# Two-sided 95 % of Student's t with n - 1 degrees of freedom, for the mean of n differences.
_T = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36, 9: 2.31, 10: 2.26}


# ---------------------------------------------------------------- numbers


def summary(plan, done: dict[str, dict], weights: Path, steps: int) -> dict:
    """All numbers of a finished comparison, as plain values.

    ``plan``: the :class:`~directclr_fast.paper.compare.Plan`; ``done``: results by name of the run;
    ``weights``: folder of the kept weights; ``steps``: of a training.
    """
    rates = {mode: plan.chosen(mode, done) for mode in plan.modes}
    rows = {mode: _row([done[r.name] for r in plan.table(mode, rates[mode])]) for mode in rates}
    for mode in ("untrained", "pixels"):
        rows[mode] = _row([done[Run(mode, seed).name] for seed in plan.few])
    numbers = {
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "machine": machine(),
        "settings": plan.settings,
        "steps": steps,
        "seeds": list(plan.seeds),
        "search": {
            mode: {
                "chosen": rates[mode],
                _INSIDE: {
                    f"{run.learning_rate:g}": done[run.name].get("held_out")
                    for run in plan.search(mode)
                },
            }
            for mode in plan.modes
        },
        "rows": rows,
        "order": {measure: order(rows, measure) for measure in _MEASURE},
        "trace": {
            mode: done[plan.table(mode, rate)[0].name].get("trace") for mode, rate in rates.items()
        },
    }
    if "directclr" in rates:
        numbers["sweep"] = _sweep(plan, done, rates["directclr"], rows)
        numbers["differences"] = _differences(rows)
    cut = {mode: [done[run.name] for run in plan.cut(mode, rate)] for mode, rate in rates.items()}
    numbers["cut"] = {mode: _row(results) for mode, results in cut.items() if results}
    if plan.losses:
        numbers["agreement"] = _agreement(plan, done, rates[plan.agreement], weights)
    return numbers


def _differences(rows: dict[str, dict]) -> dict:
    """Accuracy of DirectCLR's r minus that of a mode's r, by measure and mode; of DirectCLR itself
    minus that of its sub-vector."""
    of_modes = {mode: row["accuracy"] for mode, row in rows.items() if "accuracy" in row}
    differences = {measure: {} for measure in _MEASURE}
    if own := of_modes.get("directclr"):
        for measure, (mode, of) in product(_MEASURE, of_modes.items()):
            other = of["sub-vector" if mode == "directclr" else "r"]
            differences[measure][mode] = difference(own["r"][measure], other[measure])
    return differences


def spread(values: list[float]) -> dict:
    """Mean, standard deviation (None of one value) and the values themselves."""
    deviation = statistics.stdev(values) if len(values) > 1 else None
    return {"mean": statistics.fmean(values), "deviation": deviation, "values": values}


def _spreads(of_seeds: list[dict], names: Iterable[str]) -> dict[str, dict]:
    return {name: spread([of_seed[name] for of_seed in of_seeds]) for name in names}


def _row(results: list[dict]) -> dict:
    """One line of the table from its runs, of which those that diverged are only counted."""
    good = [result for result in results if not result["diverged"]]
    row = {"runs": len(good), "diverged": len(results) - len(good)}
    if not good:
        return row
    first = good[0]
    row["accuracy"] = {
        part: _spreads([g["accuracy"][part] for g in good], _MEASURE) for part in first["accuracy"]
    }
    if "dim" in first:
        row["dim"] = first["dim"]
    if "loss" in first:
        last = max(1, len(first["loss"]) // 10)
        row["final loss"] = spread([statistics.fmean(g["loss"][-last:]) for g in good])
    row["spectra"] = {}
    for part, of_first in first["spectra"].items():
        spectra = [g["spectra"][part] for g in good]
        means = (statistics.fmean(values) for values in zip(*(s["log10"] for s in spectra)))
        row["spectra"][part] = {
            "dimensions": of_first["dimensions"],
            **_spreads(spectra, ("effective_rank", "collapsed", "small")),
            "log10": [round(mean, 3) for mean in means],
        }
    return row


def difference(a: dict, b: dict) -> dict | None:
    """a - b, two values of :func:`spread`, paired by seed: the mean, and half the width of its 95 %
    interval (Student's). None where there are no pairs, or only one."""
    x, y = a["values"], b["values"]
    if len(x) != len(y) or len(x) < 2:
        return None
    of = spread([v - w for v, w in zip(x, y)])
    return of | {"half": _T.get(len(x), 2.26) * of["deviation"] / math.sqrt(len(x))}


def verdict(a: dict, b: dict) -> str:
    """Whether a's mean is "above" or "below" b's by more than chance (95 %), or "undecided"."""
    of = difference(a, b)
    if of is None or abs(of["mean"]) <= of["half"]:
        return "undecided"
    return "above" if of["mean"] > 0 else "below"


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
    places = [ours.index(mode) for mode in paper]
    agree = statistics.correlation(places, range(len(places))) if places[1:] else None
    return {"paper": paper, "here": ours, "rank correlation": agree, "pairs": pairs}


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
    again, n = plan.again(rate), len(plan.few)
    runs = {
        "fast": plan.table(plan.agreement, rate)[:n], "reference": again[:n], "rounded": again[n:]
    }  # fmt: skip
    results = {kind: [done[run.name] for run in of_kind] for kind, of_kind in runs.items()}
    agreement = {"mode": plan.agreement, "learning_rate": rate}
    if any(result["diverged"] for of_kind in results.values() for result in of_kind):
        return {**agreement, "diverged": True}
    files = {kind: [weights / f"{r.name}.pt" for r in of_kind] for kind, of_kind in runs.items()}
    agreement["accuracy"] = {
        kind: spread([result["accuracy"]["r"]["linear"] for result in of_kind])
        for kind, of_kind in results.items()
    }
    agreement["loss"] = {
        kind: [[round(v, 5) for v in result["loss"]] for result in results[kind]]
        for kind in ("fast", "reference")
    }
    agreement |= {"loss apart": {}, "weights apart": {}}
    for kind in ("reference", "rounded"):
        agreement["loss apart"][kind] = [
            [float(f"{abs(a - b) / b:.3g}") for a, b in zip(x["loss"], y["loss"])]
            for x, y in zip(results["fast"], results[kind])
        ]
        of_seeds = [apart(*pair) for pair in zip(files[kind], files["fast"])]
        agreement["weights apart"][kind] = spread(of_seeds)
    if pairs := list(combinations(files["fast"], 2)):
        agreement["weights apart"]["another seed"] = spread([apart(*pair) for pair in pairs])
    return agreement


# ---------------------------------------------------------------- tables


def table(numbers: dict) -> str:
    """The projectors, best first by linear probe of r: accuracies in percent, ranks, the paper."""
    head = (
        "mode", "projector", "learning rate", "runs", *_SCORES, "effective rank of r",
        "collapsed / small of r",
        "effective rank, embedding", "collapsed / small, embedding", "paper, linear",
    )  # fmt: skip
    rows = numbers["rows"]

    def place(mode: str) -> float:
        accuracy = rows[mode].get("accuracy")
        return -accuracy["r"]["linear"]["mean"] if accuracy else 1.0

    lines = []
    for mode in sorted(rows, key=place):
        row = rows[mode]
        rate = numbers["search"].get(mode, {}).get("chosen")
        lost = f", {row['diverged']} diverged" if row["diverged"] else ""
        cells = [mode, PROJECTOR[mode], "" if rate is None else f"{rate:g}", f"{row['runs']}{lost}"]
        cells += _accuracies(row.get("accuracy", {}))
        for part in ("representation", "embedding"):
            values = row.get("spectra", {}).get(part)
            cells += [_shown(values["effective_rank"]), _few(values)] if values else ["", ""]
        paper = f"{PAPER[mode]}" if mode in PAPER else ""
        cells.append(f"{paper} ({PAPER_SUB_VECTOR} of r[:, :d0])" if mode == "directclr" else paper)
        lines.append(cells)
    return plots.markdown(head, lines)


def _order_table(numbers: dict) -> str:
    head = ("by", "order here", "order in the paper", "rank correlation", "pairs as in the paper",
            "opposite", "undecided")  # fmt: skip
    lines = []
    for measure, ranking in numbers["order"].items():
        count = Counter(pair["here"] for pair in ranking["pairs"])
        correlation = ranking["rank correlation"]
        lines.append([
            _MEASURE[measure], " > ".join(ranking["here"]), " > ".join(ranking["paper"]),
            "" if correlation is None else f"{correlation:.2f}",
            *(f"{count[verdict]}" for verdict in ("above", "below", "undecided")),
        ])  # fmt: skip
    return plots.markdown(head, lines)


def _differences_table(numbers: dict) -> str:
    def cell(of: dict) -> str:
        return f"{100 * of['mean']:+.2f} ± {100 * of['half']:.2f}"

    by = numbers["differences"]
    lines = [
        ["its r[:, :d0]" if mode == "directclr" else mode, *(cell(by[m][mode]) for m in _MEASURE)]
        for mode, of in by["linear"].items()
        if of is not None
    ]
    return plots.markdown(("directclr's r less", *_MEASURE.values()), lines)


def _cut_table(numbers: dict) -> str:
    head = ("mode", "shortcut", *_SCORES[:3], "effective rank of r")
    lines = [
        [
            mode, how, *_accuracies(row["accuracy"])[:3],
            _shown(row["spectra"]["representation"]["effective_rank"]),
        ]
        for mode, cut in numbers["cut"].items()
        for how, row in (("identity", numbers["rows"][mode]), ("cut", cut))
        if "accuracy" in row
    ]  # fmt: skip
    return plots.markdown(head, lines)


def _sweep_table(numbers: dict) -> str:
    lines = [[line["dim"], *_accuracies(line["accuracy"])] for line in numbers["sweep"]]
    return plots.markdown(("d0", *_SCORES), lines)


def _agreement_table(numbers: dict) -> str:
    accuracy, weights = (numbers["agreement"][key] for key in ("accuracy", "weights apart"))
    names = {"fast": "fast loss", "reference": "reference loss",
             "rounded": "fast loss, initial weights moved by a rounding error",
             "another seed": "fast loss, another seed"}  # fmt: skip
    lines = []
    for kind, name in names.items():
        values = accuracy.get(kind)
        of_seeds = ", ".join(f"{100 * v:.1f}" for v in values["values"]) if values else ""
        apart = f"{weights[kind]['mean']:.2g}" if kind in weights else ""
        lines.append([name, _shown(values, 100), of_seeds, apart])
    head = ("", "linear, r", "by seed", "final weights apart from the fast loss's")
    return plots.markdown(head, lines)


def _search_table(numbers: dict) -> str:
    rates = list(dict.fromkeys(r for s in numbers["search"].values() for r in s[_INSIDE]))
    lines = []
    for mode, search in numbers["search"].items():
        scores = [search[_INSIDE].get(rate) for rate in rates]
        cells = ["diverged" if score is None else f"{100 * score:.1f}" for score in scores]
        lines.append([mode, *cells, f"{search['chosen']:g}"])
    return plots.markdown(("mode", *rates, "chosen"), lines)


def _accuracies(accuracy: dict) -> list[str]:
    parts = (accuracy.get(part, {}) for part in ("r", "sub-vector"))
    return [_shown(of_part.get(measure), 100) for of_part in parts for measure in _MEASURE]


def _shown(values: dict | None, unit: int = 1) -> str:
    """Mean, and deviation where there is one, ``unit`` times as large; empty for None."""
    if values is None:
        return ""
    text = f"{unit * values['mean']:.1f}"
    deviation = values["deviation"]
    return text if deviation is None else f"{text} ± {unit * deviation:.1f}"


def _few(spectrum: dict) -> str:
    """Collapsed and small eigenvalues of how many."""
    collapsed, small = (f"{spectrum[key]['mean']:.0f}" for key in ("collapsed", "small"))
    return f"{collapsed} / {small} of {spectrum['dimensions']}"


# ---------------------------------------------------------------- figures


def _figures(numbers: dict, out: Path) -> dict[str, str]:
    """Draws every figure into ``out``; returns their captions by file name."""
    captions = {
        "accuracy.png": "Accuracy on the test part: mean and standard deviation over seeds.",
        "spectra.png": "Spectra of the covariance over the test part, relative to the largest "
        "eigenvalue, means over seeds: of the representation r (as in the paper's figures 7 and 9) "
        "and of what the loss sees (figure 2).",
    }
    _draw_accuracy(numbers, out / "accuracy.png")
    _draw_spectra(numbers, out / "spectra.png")
    if len(numbers.get("sweep", [])) > 1:
        captions["dims.png"] = (
            "DirectCLR over d0 (figure 12): probe of the whole r and of the columns that were "
            "trained on. The last point is the baseline, all columns, at its own learning rate."
        )
        _draw_sweep(numbers, out / "dims.png")
    if any(numbers.get("trace", {}).values()):
        captions["mechanism.png"] = (
            f"Seed {numbers['seeds'][0]} over training: effective ranks of r, its sub-vector and "
            "what the loss sees; effective rank of the gradient at the encoder's output and at "
            "the input of its last block, of at most four modes; spectrum of DirectCLR's r."
        )
        _draw_mechanism(numbers, out / "mechanism.png")
    if _agree(numbers):
        captions["agreement.png"] = (
            "Loss of every step with the fast loss (lines) and the reference (dots), and "
            "how far apart the two are, beside the fast loss from rounded initial weights."
        )
        _draw_agreement(numbers, out / "agreement.png")
    return captions


def _style(mode: str) -> dict:
    place = list(PROJECTOR).index(mode)
    return {"color": f"C{place % 10}", "linestyle": ("-", "--")[place // 10]}


def _draw_accuracy(numbers: dict, path: Path) -> None:
    rows = {mode: row for mode, row in numbers["rows"].items() if "accuracy" in row}
    modes = sorted(rows, key=lambda mode: rows[mode]["accuracy"]["r"]["linear"]["mean"])
    with plots.figure(path, numbers["settings"]["data"], (7.0, 0.36 * len(modes) + 1.2)) as axes:
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


def _draw_spectra(numbers: dict, path: Path) -> None:
    titles = {"representation": "representation r", "embedding": "what the loss sees"}
    with plots.panels(path, 2, size=(5.6, 4.2)) as panels:
        for axes, (part, title) in zip(panels, titles.items()):
            for mode, row in numbers["rows"].items():
                if mode != "pixels" and part in row.get("spectra", {}):
                    logs = row["spectra"][part]["log10"]
                    axes.plot(range(1, len(logs) + 1), logs, label=mode, **_style(mode))
            axes.set_title(title, fontsize="medium")
            axes.set_ylim(-8, 0.3)  # below lie only directions that are nothing but rounding
            axes.set(xlabel="rank of the eigenvalue", ylabel="log10 eigenvalue / largest")


def _draw_sweep(numbers: dict, path: Path) -> None:
    lines = numbers["sweep"]
    with plots.figure(path, f"directclr on {numbers['settings']['data']}") as axes:
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
        axes.set(xlabel="d0, columns that the loss reads", ylabel="accuracy on the test part, %")


def _draw_mechanism(numbers: dict, path: Path) -> None:
    # Nobody tells the lines of more apart; the first are those of the paper's argument.
    traces = dict([(mode, trace) for mode, trace in numbers["trace"].items() if trace][:4])
    with plots.panels(path, 3, size=(5.2, 4.2)) as (ranks, gradients, over):
        for mode, trace in traces.items():
            steps, style = [seen["step"] for seen in trace], _style(mode)
            for axes, key, marks in (
                (ranks, "spectra", {"representation": "-", "sub-vector": ":", "embedding": "--"}),
                (gradients, "gradient", {"output": "--", "input": "-"}),
            ):
                for part, line in marks.items():
                    if part in trace[0][key]:
                        values = [seen[key][part]["effective_rank"] for seen in trace]
                        how = {"color": style["color"], "linestyle": line, "linewidth": 1}
                        axes.plot(steps, values, label=f"{mode}, {part}", **how)
        chosen = "directclr" if "directclr" in traces else [*traces][0]
        for k, seen in enumerate(traces[chosen]):
            logs = seen["spectra"]["representation"]["log10"]
            places = [1 + 8 * i for i in range(len(logs))]
            over.plot(places, logs, color=f"{0.8 - 0.8 * k / len(traces[chosen]):.2f}",
                      label=f"step {seen['step']}")  # fmt: skip
        for axes, title in ((ranks, "effective rank"), (gradients, "of the gradient")):
            axes.set_xscale("symlog")
            axes.set(xlabel="step", ylabel=title)
        over.set_ylim(-8, 0.3)
        over.set(xlabel="rank of the eigenvalue", ylabel=f"log10 eigenvalue / largest, {chosen}")


def _agree(numbers: dict) -> bool:
    """Whether both losses were trained with, to the end."""
    return not numbers.get("agreement", {"diverged": True}).get("diverged")


def _draw_agreement(numbers: dict, path: Path) -> None:
    agreement = numbers["agreement"]
    with plots.panels(path, 2, size=(5.6, 3.8)) as (curves, apart):
        for i, (fast, reference) in enumerate(zip(*agreement["loss"].values())):
            seed, steps = numbers["seeds"][i], range(1, len(fast) + 1)
            every = max(1, len(steps) // 40)
            curves.plot(steps, fast, color=f"C{i}", linewidth=1, label=f"fast, seed {seed}")
            curves.plot(
                steps[::every], reference[::every], ".", color=f"C{i}", markersize=5,
                label=f"reference, seed {seed}",
            )  # fmt: skip
        curves.set(xlabel="step", ylabel="loss (nats)")
        styles = {"reference": ("C3", "reference"), "rounded": ("C7", "rounded start")}
        for kind, of_seeds in agreement["loss apart"].items():
            colour, other = styles[kind]
            for i, values in enumerate(of_seeds):
                apart.plot(
                    range(1, len(values) + 1), [max(v, 1e-9) for v in values], linewidth=0.8,
                    color=colour, label=None if i else f"fast against {other}",
                )  # fmt: skip
        apart.set(xlabel="step", ylabel="relative difference of the loss", yscale="log")


# ---------------------------------------------------------------- the report


def write(numbers: dict, out: Path) -> None:
    """results.json, the figures, and report.md with the tables, into ``out``."""
    write_json(out / "results.json", numbers)
    captions = _figures(numbers, out)
    with replacing(out / "report.md") as file:
        file.write(text(numbers, captions))


def text(numbers: dict, captions: dict[str, str]) -> str:
    """The report in Markdown; ``captions`` of the figures beside it, by file name."""
    settings = numbers["settings"]
    values = ", ".join(f"{k}={v}" for k, v in settings.items() if v is not None)
    parts = [
        f"# Projectors compared on {settings['data']}",
        "The comparison of [arXiv 2110.09348](https://arxiv.org/abs/2110.09348) (tables 1 and 2; "
        "figures 2, 7, 9 and 12) in small. Every mode has the same encoder, data, number of steps "
        "and search for its learning rate. The paper's numbers are ResNet-50, 100 epochs on "
        "ImageNet, one seed each.",
        f"Encoder {settings['encoder']}, crops of {settings['image_size']} pixels, batch "
        f"{settings['batch_size']}, {numbers['steps']} steps, {settings['optimizer']}, temperature "
        f"{settings['temperature']:g}; seeds {', '.join(map(str, numbers['seeds']))}; "
        f"{describe(numbers['machine'])}; one thread a run. "
        f"Command: `{' '.join(numbers['command'])}`.",
        "## Projectors",
        table(numbers),
        "Accuracy in percent on the test part, mean and standard deviation over seeds. "
        f"Collapsed: eigenvalues of the covariance at most {THRESHOLD:g} of the largest; small: at "
        f"most {SMALL:g} of it. Effective rank: exp of the entropy of the eigenvalues. d0 is the "
        "same for all modes in r[:, :d0]; only directclr was trained on these columns. In the "
        f"paper's figure 2 {PAPER_COLLAPSED} of 128 directions of simclr's embedding have "
        "collapsed.",
        "## Order",
        _order_table(numbers),
        "A pair is undecided where the interval of its difference (Student's, 95 % for each pair) "
        "holds 0.",
    ]
    if len(numbers.get("sweep", [])) > 1:
        parts += ["## DirectCLR over d0", _sweep_table(numbers)]
    if numbers.get("differences"):
        parts += [
            "## DirectCLR less the others",
            _differences_table(numbers),
            "Percent of the test part, mean of the differences by seed and 95 % interval "
            "(Student's, each by itself).",
        ]
    if numbers.get("cut"):
        parts += [
            "## Without the last block's shortcut",
            _cut_table(numbers),
            f"Cut: the first {len(numbers['seeds'][:3])} seeds, at the learning rate of the mode.",
        ]
    if _agree(numbers):
        mode = numbers["agreement"]["mode"]
        parts += [
            f"## Both losses over whole trainings of {mode}",
            _agreement_table(numbers),
            "Weights apart: norm of the difference over the norm, mean over seeds.",
        ]
    parts += [
        "## Search for the learning rate",
        _search_table(numbers),
        "Linear probe trained on the first four fifths of each class of the training part and "
        "scored on the last fifth, percent, on a seed of its own.",
        "## Figures",
        *(f"![{name}]({name})\n\n{caption}" for name, caption in captions.items()),
        "## Settings of every run",
        f"`{values}`",
    ]
    return "\n\n".join(parts) + "\n"
