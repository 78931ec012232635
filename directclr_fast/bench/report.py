"""A result as text and figures: the table, time and memory against N, the roofline, accuracy.

Reads what grid.run returns and measures nothing. Figures are of the cases whose width, d, dtype and
negatives are those of the result's first case.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from ..machine import describe
from ..plots import figure
from . import ceilings, timing
from .grid import FORMAT

ORDER = {"ours": 0, "plain": 1, "peer": 2, "neighbour": 3}


def load(paths: Iterable[str | Path]) -> dict:
    """One result from the result files of a machine: the cases of all, the rest of the first.

    ValueError for a file that is no result, and for files of different machines.
    """
    whole: dict = {}
    for path in paths:
        try:
            result = json.loads(Path(path).read_text())
        except ValueError as error:
            raise ValueError(f"{path}: expected a result file of bench, got {error}") from None
        if not isinstance(result, dict) or result.get("format") != FORMAT:
            got = result.get("format") if isinstance(result, dict) else type(result).__name__
            raise ValueError(f"{path}: expected a result file of format {FORMAT}, got {got}")
        if not whole:
            whole = result
            continue
        # A GPU may be lent by another host each time.
        for key in ("gpu",) if "gpu" in whole["machine"] else ("processor", "gpu", "threads"):
            if result["machine"].get(key) != whole["machine"].get(key):
                raise ValueError(
                    f"{path}: expected results of one machine, got another {key}: "
                    f"{result['machine'].get(key)!r} beside {whole['machine'].get(key)!r}"
                )
        whole["cases"] += result["cases"]
    if not whole:
        raise ValueError("files: expected at least one result file, got none")
    whole["cases"].sort(key=lambda c: (c["negatives"] != "cross", c["dim"], c["rows"]))
    return whole


def speedup(case: dict, name: str) -> tuple[float, str] | None:
    """(how many times longer ``name``, which has a time, took than ours, which of ours).

    Ours is what a user gets by default: the backend that dispatch prefers among those timed; with
    fp32 products where the peer computes in fp32, with rounded ones where it rounds.
    """
    rows = case["variants"]
    rounds = rows[name]["precision"] != "fp32"
    for own, row in rows.items():  # in the order of dispatch
        if row["family"] == "ours" and "median" in row and (row["precision"] != "fp32") == rounds:
            return timing.ratio(rows[name], row), own
    return None


# ------------------------------------------------------------------------ text


def table(result: dict) -> str:
    """Every case as lines of text, the fastest variant first; then who is absent, and why."""
    gpu = "gpu" in result["machine"]
    unit, scale = ("TFLOP/s", 1e12) if gpu else ("GFLOP/s", 1e9)
    lines = [describe(result["machine"])]
    lines.append("ceilings: " + _rates(result["ceilings"], unit, scale))
    for case in result["cases"]:
        title = (
            f"N {case['rows']}, d {case['dim']} of {case['width']}, {case['dtype']}, "
            f"negatives {case['negatives']}"
        )
        lines += ["", f"{title}; {_rates(case['ceilings'], unit, scale)}"]
        lines.append(
            f"  {'':<22}{'ms':>10}{'quartiles':>19}{unit:>9}{'of roof':>8}{'of lib':>7}"
            f"{'peak MiB':>10}{'error':>9}  against ours"
        )
        rows = case["variants"]
        for name in sorted(rows, key=lambda n: rows[n].get("median", float("inf"))):
            row = rows[name]
            if "why_not" in row:
                continue
            lines.append(f"  {name:<22}" + _figures(case, name, scale))
    if any((r.get("of_roof") or 0) > 1.2 for c in result["cases"] for r in c["variants"].values()):
        lines += ["", "a rate above its roof: the machine was busy while one of them was measured"]
    if missing := absent(result["cases"]):
        lines += ["", "not here:"]
        lines += [f"  {name}: {'; '.join(reasons)}" for name, reasons in missing.items()]
    return "\n".join(lines)


def absent(cases: list[dict]) -> dict[str, list[str]]:
    """The variants that no case could run, and the reasons of the case that came nearest."""
    reasons: dict[str, list[str]] = {}
    for case in cases:
        for name, row in case["variants"].items():
            why = row.get("why_not", [])
            reasons[name] = min(reasons.get(name, why), why, key=len)
    return {name: why for name, why in reasons.items() if why}


def _rates(rates: dict[str, float], unit: str, scale: float) -> str:
    parts = [f"{n} {r / scale:.4g}" for n, r in sorted(rates.items()) if n != "copy"]
    text = ", ".join(parts) + f" {unit}" if parts else ""
    copy = f"copy {rates['copy'] / 1e9:.4g} GB/s" if "copy" in rates else ""
    return ", ".join(part for part in (text, copy) if part)


def _figures(case: dict, name: str, scale: float) -> str:
    row = case["variants"][name]
    peak = f"{row['peak_mib']:.0f}" if "peak_mib" in row else "-"
    if "median" not in row:
        what = "out of memory" if row.get("out_of_memory") else row.get("failed", "not measured")
        return f"{'-':>10}  {what}"
    low, high = (1e3 * q for q in row["quartiles"])
    quartiles = f"{low:.4g} to {high:.4g}"
    roof, library = row.get("of_roof"), row.get("of_library")
    roof = "-" if roof is None else f"{100 * roof:.0f} %"
    library = "-" if library is None else f"{library:.2f}"
    error = f"{row['error']:.1e}" if "error" in row else "-"
    text = f"{1e3 * row['median']:10.4g}{quartiles:>19}{row['rate'] / scale:9.4g}"
    text += f"{roof:>8}{library:>7}{peak:>10}{error:>9}"
    if row["family"] == "ours":
        return text
    if row["family"] == "neighbour":
        return text + "  another loss"
    ratio = speedup(case, name)
    return text + (f"  {ratio[0]:.2f}x {ratio[1]}" if ratio else "")


# ------------------------------------------------------------------------ figures


def figures(result: dict, folder: str | Path, stem: str = "bench") -> list[Path]:
    """Draws every figure that the result has points for into ``folder``; returns the files.

    ImportError without matplotlib.
    """
    cases = main_cases(result)
    rows = [row for case in cases for row in case["variants"].values()]
    several = len(cases) > 1
    wanted = {
        "time": (draw_time, several and _series(cases, "median")),
        "memory": (draw_memory, several and _series(cases, "peak_mib")),
        "roofline": (draw_roofline, "copy" in result["ceilings"] and _series(cases, "rate")),
        "accuracy": (draw_accuracy, any("median" in r and r.get("error") for r in rows)),
    }
    files = []
    for name, (draw, points) in wanted.items():
        if points:
            files.append(Path(folder) / f"{stem}-{name}.png")
            draw(result, cases, files[-1])
    return files


def main_cases(result: dict) -> list[dict]:
    """The cases that differ from the first in nothing but N, in its order."""
    if not result["cases"]:
        return []
    keys = ("width", "dim", "dtype", "device", "negatives", "temperature")
    first = next((c for c in result["cases"] if c["dim"] == 360), result["cases"][0])
    cases = [c for c in result["cases"] if all(c[key] == first[key] for key in keys)]
    return sorted(cases, key=lambda case: case["rows"])


def _title(result: dict, cases: list[dict], what: str) -> str:
    machine, case = result["machine"], cases[0]
    where = machine.get("gpu") or f"{machine['processor']}, {machine['threads']} threads"
    return f"{what}, {case['dtype']}, {case['dim']} of {case['width']} columns\n{where}"


def _series(cases: list[dict], key: str) -> dict[str, list[tuple[int, float]]]:
    """Points (N, value) of each variant that has any, ours first."""
    series: dict[str, list] = {}
    for case in cases:
        for name, row in case["variants"].items():
            if row.get(key) is not None:
                series.setdefault(name, []).append((case["rows"], row[key]))
    family = {n: r["family"] for case in cases for n, r in case["variants"].items()}
    return dict(sorted(series.items(), key=lambda item: ORDER[family[item[0]]]))


def _style(cases: list[dict], name: str) -> dict:
    family = next(c["variants"][name]["family"] for c in cases if name in c["variants"])
    style = {
        "ours": {"linewidth": 2.4},
        "plain": {"linewidth": 1.3},
        "peer": {"linewidth": 1.3, "linestyle": "--"},
        "neighbour": {"linewidth": 1.0, "linestyle": ":"},
    }
    return {"marker": "o", "markersize": 3, **style[family]}


def _against_rows(axes, cases: list[dict], key: str, scale: float, label: str) -> None:
    for name, points in _series(cases, key).items():
        rows, values = zip(*points)
        axes.plot(rows, [scale * v for v in values], label=name, **_style(cases, name))
    axes.set_xscale("log", base=2)
    axes.set(xlabel="N, rows of each view", ylabel=label, yscale="log")


def draw_time(result: dict, cases: list[dict], path: Path) -> None:
    """Milliseconds of a step against N, both on log scales."""
    with figure(path, _title(result, cases, "Loss, forward + backward")) as axes:
        _against_rows(axes, cases, "median", 1e3, "ms")


def draw_memory(result: dict, cases: list[dict], path: Path) -> None:
    """Peak MiB of a step above its inputs against N; the N beyond which it ran out of memory."""
    with figure(path, _title(result, cases, "Peak memory above the inputs")) as axes:
        _against_rows(axes, cases, "peak_mib", 1.0, "MiB")
        itemsize = 4 if cases[0]["dtype"] == "float32" else 2
        rows = [case["rows"] for case in cases]
        must = [2 * n * cases[0]["width"] * itemsize / 2**20 for n in rows]
        axes.plot(rows, must, color="0.5", linewidth=1, label="the gradients alone")
        full = [c["rows"] for c in cases for r in c["variants"].values() if r.get("out_of_memory")]
        if full:
            axes.axvline(min(full), color="0.5", linestyle=":", label="first out of memory")


def draw_roofline(result: dict, cases: list[dict], path: Path) -> None:
    """Rate, counting 8 N^2 d operations, against those per byte that the problem must move."""
    gpu = "gpu" in result["machine"]
    unit, scale = ("TFLOP/s", 1e12) if gpu else ("GFLOP/s", 1e9)
    itemsize = 4 if cases[0]["dtype"] == "float32" else 2

    def intensity(case: dict) -> float:
        moved = ceilings.least_bytes(case["rows"], case["width"], case["dim"], itemsize)
        return case["work"] / moved

    by_rows = {case["rows"]: intensity(case) for case in cases}
    with figure(path, _title(result, cases, "Roofline, counting 8 N² d operations")) as axes:
        for name, points in _series(cases, "rate").items():
            x = [by_rows[n] for n, _ in points]
            axes.plot(x, [r / scale for _, r in points], label=name, **_style(cases, name))
        edges = [min(by_rows.values()) / 2, max(by_rows.values()) * 2]
        fills = [result["ceilings"]["copy"] * x / scale for x in edges]
        rates = {n: r / scale for n, r in result["ceilings"].items() if n != "copy"}
        axes.plot(edges, fills, color="0.3", linewidth=1, linestyle="--")
        meets = min(max(rates.values()) * scale / result["ceilings"]["copy"], edges[1])
        height = min(fills[0] * meets / edges[0], max(rates.values()))
        axes.annotate("copy", (meets, height), fontsize="x-small", color="0.3")
        for name, rate in rates.items():
            axes.axhline(rate, color="0.6", linewidth=0.8)
            where = (edges[1], rate)
            axes.annotate(name, where, fontsize="x-small", color="0.3", va="bottom", ha="right")
        label = "8 N² d operations per byte that must move (slices read, gradients written)"
        axes.set(xlabel=label, ylabel=unit, xscale="log", yscale="log")
        axes.set(xlim=edges, ylim=(None, max(rates.values()) * 1.5))


def draw_accuracy(result: dict, cases: list[dict], path: Path) -> None:
    """Relative error of the gradient against ms, at the largest N that most variants completed."""
    points: dict[str, tuple[float, float]] = {}
    for case in cases:
        completed = {
            name: (1e3 * row["median"], row.get("error_fp32", row["error"]))
            for name, row in case["variants"].items()
            if "median" in row and row.get("error")
        }
        if completed and len(completed) >= len(points):
            points, rows = completed, case["rows"]
    title = _title(result, cases, f"Error against time, N = {rows}")
    with figure(path, title) as axes:
        for number, (name, (ms, error)) in enumerate(sorted(points.items(), key=lambda p: p[1])):
            style = _style(cases, name)
            axes.plot([ms], [error], marker="o", markersize=4 + 2 * style["linewidth"])
            above = number % 2 == 0  # neighbours are often near
            axes.annotate(
                name, (ms, error), fontsize="small", ha="center", va="bottom" if above else "top",
                xytext=(0, 7 if above else -7), textcoords="offset points",
            )  # fmt: skip
        axes.set(xscale="log", yscale="log", xlabel="ms, forward + backward")
        axes.set_ylabel("relative error of the gradient against fp64")
        axes.margins(x=0.25, y=0.15)
