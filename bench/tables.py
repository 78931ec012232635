"""Fills the tables of README.md and bench/README.md and draws docs/cpu-*.png from result files.

    python bench/tables.py bench/results/cpu-2core-zen5

A table stands between `<!-- NAME -->` and `<!-- end NAME -->` and is replaced as a whole. A name
whose result files are not there is left as it is, and said so. The figures, named after the first
word of the folder's name, are of the loss-*.json. Nothing is measured.

Of a GPU's folder there is one table, and FASTER in backends/cuda.py is written anew: the shapes
from which on every measurement has the Hopper kernels ahead of Triton's.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
from pathlib import Path

from directclr_fast.bench import report, timing
from directclr_fast.plots import markdown

ROOT = Path(__file__).resolve().parent.parent
PAGES = ("README.md", "bench/README.md")
CUDA = ROOT / "directclr_fast/backends/cuda.py"
SHORT = (256, 1024, 4096, 8192, 16384, 32768)  # rows of the table in README.md
FP32 = ("released", "eager", "compiled", "torch", "cpu")
BF16 = ("eager bf16", "compiled bf16", "cpu bf16")
BOTH = ("eager", "compiled", "lightly", "metric-learning", "metric-learning ntxent", "cpu")


def ms(case: dict, name: str) -> str:
    """Milliseconds to three digits, or why there are none."""
    row = case["variants"].get(name, {})
    if "median" not in row:
        return "no memory" if row.get("out_of_memory") else "-"
    value = 1e3 * row["median"]
    return f"{value:.3g}" if value < 100 else f"{value:.0f}"


def times(case: dict, other: str, own: str) -> str:
    """How many times longer ``other`` took."""
    rows = case["variants"]
    ratio = timing.ratio(rows.get(other, {}), rows.get(own, {}))
    return "-" if ratio is None else f"{ratio:.2f}"


def share(case: dict, name: str) -> str:
    """Percent of the roof."""
    value = case["variants"].get(name, {}).get("of_roof")
    return "-" if value is None else f"{100 * value:.0f} %"


def rate(case: dict, name: str) -> str:
    """GFLOP/s, counting 8 N^2 d operations."""
    value = case["variants"].get(name, {}).get("rate")
    return "-" if value is None else f"{value / 1e9:.0f}"


def loss_fp32(cases: list[dict]) -> str:
    """Every fp32 variant, our rate and our ratios."""
    head = ["N", "d", *(f"{n}, ms" for n in FP32), "cpu, GFLOP/s (counting 8·N²·d operations)"]
    head += ["of the FMA peak", "x released", "x compiled"]
    rows = [
        [c["rows"], c["dim"], *(ms(c, n) for n in FP32), rate(c, "cpu"), share(c, "cpu")]
        + [times(c, "released", "cpu"), times(c, "compiled", "cpu")]
        for c in cases
    ]
    return markdown(head, rows)


def loss_bf16(cases: list[dict]) -> str:
    """The variants with bf16 products, their errors, and our ratios."""
    head = ["N", "d", *(f"{n}, ms" for n in BF16), "x eager bf16", "x compiled bf16"]
    head += ["x our fp32", "error, compiled bf16", "error, cpu bf16"]
    rows = []
    for c in cases:
        errors = [c["variants"].get(n, {}).get("error") for n in BF16[1:]]
        rows.append(
            [c["rows"], c["dim"], *(ms(c, n) for n in BF16)]
            + [times(c, n, "cpu bf16") for n in ("eager bf16", "compiled bf16", "cpu")]
            + ["-" if e is None else f"{e:.0e}" for e in errors]
        )
    return markdown(head, rows)


def loss_both(cases: list[dict]) -> str:
    """Negatives "both" beside the libraries that have it."""
    head = ["N", *(f"{n}, ms" for n in BOTH), "x lightly", "x metric-learning", "x compiled"]
    rows = [
        [c["rows"], *(ms(c, n) for n in BOTH)]
        + [times(c, n, "cpu") for n in ("lightly", "metric-learning", "compiled")]
        for c in cases
    ]
    return markdown(head, rows)


def peaks(data: dict) -> str:
    """Peak MiB above the inputs by N."""
    names = list(dict.fromkeys(name for case in data["cases"] for name in case["peak_mib"]))
    rows = []
    for case in data["cases"]:
        cells = [
            f"{case['peak_mib'][n]:.0f}" if n in case["peak_mib"] else "no memory" for n in names
        ]
        must = case["gradients_mib"] + case["z_and_dz_mib"]
        rows.append([f"{case['rows']}", f"{must:.0f}", *cells])
    return markdown(["N", "must", *names], rows)


def targets(cases: list[dict], memory: dict | None) -> str:
    """The plan's CPU targets and what was measured."""
    case = next((c for c in cases if c["rows"] == 8192 and c["dim"] == 360), None)
    if case is None:
        raise FileNotFoundError("a case of N = 8192, d = 360")

    def ratio(other: str, own: str = "cpu") -> float | None:
        return timing.ratio(*(case["variants"].get(name, {}) for name in (other, own)))

    peak = case["variants"]["cpu"].get("of_roof")
    lines = [  # what, must, stretch, measured, and in what
        ("share of the FMA peak, counting 8·N²·d operations", 60, 80, peak and 100 * peak, " %"),
        ("against the released loss", 7, 12, ratio("released"), "x"),
        ("against torch.compile", 2.5, 4, ratio("compiled"), "x"),
        ("bf16 against our fp32", 1, 1.3, ratio("cpu", "cpu bf16"), "x"),
    ]
    if memory is not None:
        last = [c for c in memory["cases"] if "cpu" in c["peak_mib"]][-1]
        extra = last["peak_mib"]["cpu"] - last["gradients_mib"] - last["z_and_dz_mib"]
        what = f"memory beyond z, dz and gradients, N = {last['rows']}"
        lines.append((what, 256, 64, extra, " MiB"))
    rows = []
    for what, must, stretch, value, unit in lines:
        measured, word = "-", "not measured"
        if value is not None:
            measured = f"{value:.{2 if unit == 'x' else 0}f}{unit}"
            met = value >= must if stretch > must else value <= must
            word = "met" if met else "not met"
        rows.append([what, f"{must:g}{unit}", f"{stretch:g}{unit}", measured, word])
    return markdown(["N = 8192, d = 360, fp32", "must", "stretch", "measured", ""], rows)


def stages(data: dict) -> str:
    """Time and rate of each native stage."""
    case = data.get("cases", [data])[0]  # files of before a study had cases have one at the top
    peak, whole, settings = case["fma_peak"], case["seconds"], data["settings"]
    rate = 8 * settings["n"] ** 2 * settings["d"] / whole
    every = {"stage": "all, counting 8·N²·d operations", "seconds": whole}
    every |= {"gflops": rate / 1e9, "of_peak": rate / peak}
    rows = [
        [
            line["stage"],
            f"{1e3 * line['seconds']:.3g}",
            f"{100 * line['seconds'] / whole:.1f} %" if line is not every else "",
            f"{line['gflops']:.0f}",
            f"{100 * line['of_peak']:.0f} %",
        ]
        for line in [*case["stages"], every]
    ]
    return markdown(["stage", "ms", "share", "GFLOP/s", "of the FMA peak"], rows)


def trainer(data: dict) -> str:
    """Images/s of the step, the bare encoder, and the loss's share."""
    head = ["N", "bare encoder, images/s", "step, images/s", "of the bare encoder", "loss's share"]
    head += ["loss=reference, images/s", "its share"]
    rows = []
    for case in data["cases"]:
        cells = [f"{case['rows']}", f"{case.get('bare_images_per_second', 0):.0f}"]
        for loss in ("fast", "reference"):
            rates = case.get(loss)
            if rates is None:
                row = case["variants"][f"step, {loss}"]
                cells += ["no memory" if row.get("out_of_memory") else "-", "-"]
                continue
            cells.append(f"{rates['images_per_second']:.0f}")
            if loss == "fast":
                cells.append(f"{100 * rates['of_bare_encoder']:.0f} %")
            cells.append(f"{100 * rates['share_of_loss']:.1f} %")
        rows.append(cells)
    return markdown(head, rows)


OURS = ("triton", "cuda")
OTHERS = ("eager", "compiled", "memeff")
AHEAD = 0.97  # of Triton's time; a smaller lead is within the noise


def timed(case: dict) -> list[str]:
    """Names of this package's GPU variants that have a time."""
    rows = case["variants"]
    return [name for name in rows if name.split()[0] in OURS and "median" in rows[name]]


def loss_gpu(cases: list[dict]) -> str:
    """Every size and precision of this package's backends, beside eager, compiled and memeff."""
    head = "N|d|inputs|negatives|backend|products|ms|TFLOP/s at 8c|of roof".split("|")
    rows = []
    for case in cases:
        for name in timed(case):
            row = case["variants"][name]
            line = [case["rows"], case["dim"], case["dtype"], case["negatives"], name]
            line += [row["precision"], ms(case, name), f"{row['rate'] / 1e12:.0f}"]
            line += [share(case, name), *(times(case, other, name) for other in OTHERS)]
            rows.append([*line, f"{row['error']:.1e}"])
    return markdown([*head, *(f"x {other}" for other in OTHERS), "error"], rows)


def faster(cases: list[dict]) -> list[tuple[str, int, int]]:
    """(precision, d, N) from which on "cuda" is ahead of "triton" wherever both were timed; the
    precision as the dispatch names it."""
    ahead: dict[str, dict[tuple[int, int], bool]] = {}
    for case in cases:
        rows = case["variants"]
        for name in timed(case):
            other = rows.get(name.replace("triton", "cuda", 1), {})
            if name.startswith("triton") and "median" in other:
                precision = other["precision"].replace("fp32", "highest")
                places = ahead.setdefault(precision, {})
                place = (case["dim"], case["rows"])
                won = other["median"] < AHEAD * rows[name]["median"]
                places[place] = places.get(place, True) and won
    shapes = []
    for precision, places in ahead.items():
        corners = []
        for d, n in itertools.product(*(sorted(set(side)) for side in zip(*places))):
            beyond = [won for (e, m), won in places.items() if e >= d and m >= n]
            known = any(e <= d and m <= n for e, m in corners)
            if beyond and all(beyond) and not known:
                corners.append((d, n))
        shapes += [(precision, d, n) for d, n in corners]
    return shapes


def write_faster(shapes: list[tuple[str, int, int]], results: str, module: Path) -> None:
    """Puts ``shapes`` in the place of FASTER in ``module``, with the folder they are from."""
    head = "FASTER: tuple[tuple[str, int, int], ...] = "
    lines = [f'    ("{precision}", {d}, {n}),  # {results}' for precision, d, n in shapes]
    value = "\n".join(["(", *lines, ")"]) if lines else "()"
    pattern = re.escape(head) + r"\((?:\)|\n(?:    .*\n)*\))"
    text, count = re.subn(pattern, lambda _: head + value, module.read_text())
    if count != 1:
        raise ValueError(f"{module}: expected one FASTER, got {count}")
    module.write_text(text)


def losses(results: Path) -> list[dict]:
    """The cases of the loss files of a folder, "both" included."""
    files = [*sorted(results.glob("loss-*.json")), *results.glob("both.json")]
    return report.load(files)["cases"] if files else []


def blocks(results: Path) -> dict[str, str]:
    """Name to table, of those whose files are there."""

    def read(name: str) -> dict:
        return json.loads((results / name).read_text())

    def cases(pattern: str = "loss-*.json") -> list[dict]:
        return report.load(sorted(results.glob(pattern)))["cases"]

    def short(case: dict) -> bool:
        return case["dim"] == 360 and case["rows"] in SHORT

    has_memory = (results / "memory.json").exists()
    makers = {
        "loss-short": lambda: loss_fp32([*filter(short, cases())]),
        "loss": lambda: loss_fp32(cases()),
        "loss-bf16": lambda: loss_bf16(cases()),
        "both": lambda: loss_both(cases("both.json")),
        "targets": lambda: targets(cases(), read("memory.json") if has_memory else None),
        "memory": lambda: peaks(read("memory.json")),
        "stages": lambda: stages(read("stages.json")),
        "trainer": lambda: trainer(read("trainer.json")),
    }
    if on_gpu(losses(results)):
        makers = {
            "gpu-short": lambda: loss_gpu([*filter(short, losses(results))]),
            "gpu-loss": lambda: loss_gpu(losses(results)),
        }
    tables = {}
    for name, make in makers.items():
        try:
            tables[name] = make()
        except (OSError, ValueError, KeyError) as error:
            print(f"{name}: left as it is ({error})")
    return tables


def on_gpu(cases: list[dict]) -> bool:
    """Whether losses were measured on a GPU."""
    return any(case["device"] == "cuda" for case in cases)


def fill(text: str, tables: dict[str, str]) -> str:
    """``text`` with every marked table that is in ``tables`` replaced."""

    def replaced(match: re.Match) -> str:
        name = match[1]
        table = f"{tables[name]}\n" if name in tables else match[2]
        return f"<!-- {name} -->\n{table}<!-- end {name} -->"

    return re.sub(r"<!-- ([\w-]+) -->\n(.*?)<!-- end \1 -->", replaced, text, flags=re.S)


def main() -> None:
    """Fills both pages and draws the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path, help="folder of the machine's result files")
    arguments = parser.parse_args()
    tables = blocks(arguments.results)
    for page in PAGES:
        path = ROOT / page
        path.write_text(fill(path.read_text(), tables))
    print(f"filled: {', '.join(tables) or 'nothing'}")
    if on_gpu(cases := losses(arguments.results)):
        write_faster(shapes := faster(cases), arguments.results.name, CUDA)
        print(f"FASTER: {shapes or 'nothing'}")
    if files := sorted(arguments.results.glob("loss-*.json")):
        stem = arguments.results.resolve().name.partition("-")[0]
        report.figures(report.load(files), ROOT / "docs", stem)


if __name__ == "__main__":
    main()
