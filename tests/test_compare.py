"""The comparison of projectors: what is run, that it may be stopped anywhere, what it says."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import waiting

from directclr_fast import cli
from directclr_fast.paper import compare, report, runs
from directclr_fast.paper.runs import Run
from directclr_fast.train import probe

SETTINGS = {"encoder": "small", "image_size": 8, "views": "affine", "batch_size": 16}
SETTINGS |= {"epochs": 2, "optimizer": "adamw", "warmup_epochs": 0, "learning_rate": 2e-3}
SETTINGS |= {"device": "cpu"}
TINY = {"data_spec": "fake:n=96,size=8,channels=1", "seeds": 2, "rates": (5e-4, 2e-3)}
TINY |= {"dims": (10,), "modes": ("directclr", "random"), **SETTINGS}
RUNS = 2 * 2 + 2 * 2 + 2 + 2 * 2 + 2 * 2  # search, table, d0, agreement, untrained and pixels

# Holds a training once as many runs are done as its second argument says, until a signal comes: it
# cannot reach its end before the test, held up, has sent one.
COMPARE = f"""
import signal, sys, time
from pathlib import Path
from directclr_fast.paper import compare, runs
from directclr_fast.train.supervise import TrainingStopped

execute, ended = runs.execute, Path(sys.argv[1]) / "runs"

def held(run, settings, out, on_step):
    def step(record):
        on_step(record)
        caught = signal.getsignal(signal.SIGTERM).__self__  # supervise.Signals
        while not caught.caught and len(list(ended.glob("*.json"))) >= int(sys.argv[2]):
            Path(f"{{out}}-held-{{sys.argv[2]}}").touch()
            time.sleep(0.01)
    return execute(run, settings, out, step)

runs.execute = held
if __name__ == "__main__":
    try:
        compare.run(sys.argv[1], compare.plan(**{TINY!r}), jobs=1, progress=False)
    except TrainingStopped as stopped:
        print(stopped)
        sys.exit(75)
"""

ENDING = f"""
import os, sys
from directclr_fast.paper import compare, runs

runs.execute = lambda *_: os._exit(9)
if __name__ == "__main__":
    try:
        compare.run(sys.argv[1], compare.plan(**{TINY!r}), jobs=2, progress=False)
    except RuntimeError as error:
        print(error)
"""


def results_of(out):
    """The result of every finished run, without the seconds it took."""
    results = {path.stem: json.loads(path.read_text()) for path in (out / "runs").glob("*.json")}
    for result in results.values():
        del result["seconds"]
    return results


of_whole = pytest.mark.xdist_group("comparison")  # tests of one fixture, which takes long


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """(folder, what run returned) of an undisturbed comparison."""
    pytest.importorskip("matplotlib")
    out = tmp_path_factory.mktemp("compare")
    return out, compare.run(out, compare.plan(**TINY), jobs=2, progress=False)


@of_whole
def test_what_is_run(whole):
    out, numbers = whole
    results = results_of(out)
    assert len(results) == RUNS and not (out / "work").exists()
    plan = compare.plan(**TINY)
    assert set(results) == {run.name for run in plan.known(results)}
    assert plan.trainings + 4 == RUNS
    for name, result in results.items():
        assert not result["diverged"] and ("held_out" in result) == name.endswith("search")
        assert name in ("pixels-seed1", "pixels-seed2") or "sub-vector" in result["accuracy"]
        shown = result["spectra"]["representation"]["samples"]  # a search sees no test part
        assert shown == 96 if not name.endswith("search") else shown < 30
        first = f"{result['run']['mode']}-seed1-rate{result['run']['learning_rate']:g}"
        assert bool(result.get("trace")) == (name == first)
        assert len(result.get("loss", [0] * 12)) == 12
    rows = numbers["rows"]
    assert list(rows) == ["directclr", "random", "untrained", "pixels"]
    assert set(rows["directclr"]["accuracy"]) == {"r", "sub-vector"}
    assert set(rows["pixels"]["accuracy"]) == {"r"}
    assert rows["directclr"]["spectra"]["embedding"]["dimensions"] == 45
    assert rows["random"]["spectra"]["embedding"]["dimensions"] == 256
    assert [line["dim"] for line in numbers["sweep"]] == [10, 45]
    assert numbers["sweep"][1]["accuracy"] == rows["directclr"]["accuracy"]
    for mode, search in numbers["search"].items():
        scores = {
            rate: results[f"{mode}-seed0-rate{rate:g}-search"]["held_out"] for rate in TINY["rates"]
        }
        assert scores[search["chosen"]] == max(scores.values())
    assert json.loads((out / "results.json").read_text()) == numbers


@of_whole
def test_both_losses_train_the_same_network(whole):
    """Their difference is held against that of a rounding error and of another seed."""
    agreement = whole[1]["agreement"]
    first = {k: max(max(v[:3]) for v in runs) for k, runs in agreement["loss apart"].items()}
    assert all(len(values) == 12 for values in agreement["loss apart"]["reference"])
    assert first["reference"] < 20 * first["rounded"] + 1e-6
    apart = {kind: max(v["values"]) for kind, v in agreement["weights apart"].items()}
    assert 0 < apart["reference"] < 20 * apart["rounded"]
    other = min(agreement["weights apart"]["another seed"]["values"])
    assert 20 * apart["rounded"] < other  # or it would say nothing
    fast, reference = (agreement["accuracy"][kind]["values"] for kind in ("fast", "reference"))
    assert fast == pytest.approx(reference, abs=0.05)


@of_whole
def test_the_report_has_every_table_and_figure(whole):
    out, numbers = whole
    text = (out / "report.md").read_text()
    names = {path.name for path in out.glob("*.png")}
    assert names == {"accuracy.png", "spectra.png", "dims.png", "mechanism.png", "agreement.png"}
    assert set(re.findall(r"!\[.*\]\((.+)\)", text)) == names
    lines = [line for line in text.splitlines() if line.startswith("|")]
    # Heads and rules, modes, measures, d0, differences, kinds of agreement, searches.
    assert len(lines) == 6 * 2 + 4 + 2 + 2 + 4 + 4 + 2
    assert len({line.count("|") for line in report.table(numbers).splitlines()}) == 1
    linear = numbers["rows"]["directclr"]["accuracy"]["r"]["linear"]
    assert f"| {report._shown(linear, 100)} |" in text
    assert "| 62.7 (47.9 of r[:, :d0]) |" in text


@pytest.mark.parametrize(("of", "figures"), [("compare", 4), ("fashion-mnist", 4)])
def test_the_committed_report_is_that_of_the_committed_numbers(of, figures):
    """And the table of docs/paper.md has its numbers."""
    folder = Path(__file__).parents[1] / "docs/results" / of
    numbers = json.loads((folder / "results.json").read_text())
    text = (folder / "report.md").read_text()
    captions = dict(re.findall(r"!\[.*\]\((.+)\)\n\n(.+)\n", text))
    assert all((folder / name).exists() for name in captions) and len(captions) == figures
    assert report.text(numbers, captions) == text
    if of == "compare":  # the page has no table of it
        return
    page = (folder.parents[1] / "paper.md").read_text()
    assert report._differences_table(numbers) in page and report._cut_table(numbers) in page
    for mode, row in numbers["rows"].items():
        (line,) = (
            line
            for line in page.splitlines()
            if line.startswith(f"| {mode} | 0.") or line.startswith(f"| {mode} |  |")
        )
        accuracies = [row["accuracy"]["r"][measure] for measure in ("linear", "knn")]
        assert all(f"| {report._shown(values, 100)} |" in line for values in accuracies), mode
        rank = row["spectra"]["representation"]["effective_rank"]
        assert f"| {report._shown(rank)} |" in line, mode


@of_whole
def test_a_finished_comparison_is_not_run_again(whole, monkeypatch):
    out, numbers = whole
    fail = lambda *_: pytest.fail("nothing is left to run")  # noqa: E731
    monkeypatch.setattr(runs.ProcessPoolExecutor, "submit", fail)
    again = compare.run(out, compare.plan(**TINY), progress=False)
    for key in ("rows", "search", "sweep", "agreement", "order"):
        assert again[key] == numbers[key]


@of_whole
def test_other_settings_in_the_same_folder_are_refused(whole):
    with pytest.raises(ValueError, match="^epochs: expected 2 as in .*, got 3; give another --out"):
        compare.run(whole[0], compare.plan(**{**TINY, "epochs": 3}), progress=False)


def children(pid):
    return [int(p) for p in open(f"/proc/{pid}/task/{pid}/children").read().split()]


def alive(pid):
    try:
        return "Z" not in open(f"/proc/{pid}/stat").read().rsplit(")", 1)[1].split()[0]
    except OSError:
        return False


@of_whole
@pytest.mark.skipif(not os.path.exists("/proc/self/stat"), reason="needs /proc")
def test_killed_and_interrupted_comparisons_continue(whole, tmp_path):
    """kill -9 of the parent takes its processes along, Ctrl-C ends it with 75; nothing differs."""
    script = tmp_path / "script.py"
    script.write_text(COMPARE)
    out = tmp_path / "out"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    def start(count):
        return subprocess.Popen(
            [sys.executable, str(script), str(out), str(count)], stdout=subprocess.PIPE, text=True,
            env=environment, start_new_session=True,
        )  # fmt: skip

    def signs():
        return waiting.sizes(out)

    def wait_for(count, process):
        def there():
            assert process.poll() is None, process.communicate()[0]
            return out.with_name(f"out-held-{count}").exists()

        waiting.until(there, signs)

    with start(3) as process:
        wait_for(3, process)
        workers = children(process.pid)
        assert workers
        process.kill()
    waiting.until(lambda: not any(map(alive, workers)), signs)
    before = results_of(out)
    assert 3 <= len(before) < RUNS

    with start(len(before) + 3) as process:
        wait_for(len(before) + 3, process)
        os.killpg(process.pid, signal.SIGINT)
        waiting.until(lambda: process.poll() is not None, signs)
        output = process.communicate()[0]
    assert process.returncode == 75, output
    assert output == ("stopped by SIGINT; what is done is kept, the same command continues\n")
    after, undisturbed = results_of(out), results_of(whole[0])
    assert len(before) < len(after) < RUNS and set(after) <= set(undisturbed)
    assert after == {name: undisturbed[name] for name in after}


def test_an_interrupted_training_resumes_from_its_checkpoint(tmp_path, one_thread):
    """In this process: stopped after five steps, it takes the other seven, to the same bits."""
    from directclr_fast.train.supervise import TrainingStopped

    plan = compare.plan(**TINY)
    run = Run("directclr", 1, 2e-3, rounded=True, keep=True, watch=True)
    steps = []

    def stop(record):
        steps.append(record["step"])
        if record["step"] == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(TrainingStopped):
        runs.execute(run, plan.settings, tmp_path / "a", stop)
    assert list((tmp_path / "a" / "work").iterdir()) and not (tmp_path / "a" / "runs").exists()
    first = steps[-1]
    steps.clear()
    a = runs.execute(run, plan.settings, tmp_path / "a", lambda r: steps.append(r["step"]))
    assert steps == list(range(first + 1, 13))
    b = runs.execute(run, plan.settings, tmp_path / "b", lambda _: None)
    del a["seconds"], b["seconds"]
    assert a == b
    kept = [tmp_path / k / "weights" / f"{run.name}.pt" for k in "ab"]
    assert runs.apart(*kept) == 0.0


def test_a_run_that_diverges_is_a_result(tmp_path, one_thread):
    plan = compare.plan(**{**TINY, "optimizer": "sgd", "epochs": 4, "rates": (1e-3, 1e30)})
    run = replace(plan.search("baseline")[1], watch=True)
    result = runs.execute(run, plan.settings, tmp_path, lambda _: None)
    assert result["diverged"] and "held_out" not in result and "nan" in result["loss"]
    assert result["why"].startswith("loss: expected finite numbers, got nan or inf")
    done = {run.name: result, plan.search("baseline")[0].name: {"held_out": 0.0}}
    assert plan.chosen("baseline", done) == 1e-3
    assert report._row([result]) == {"runs": 0, "diverged": 1}


def test_a_run_that_fails_is_named(tmp_path):
    plan = compare.plan(**TINY)
    plan.settings["views"] = "none"
    with pytest.raises(RuntimeError, match="^run directclr-seed0-rate0.0005-search: expected its"):
        compare.run(tmp_path, plan, jobs=1, progress=False)


def test_a_process_that_ends_is_said(tmp_path):
    """Both runs are named: which of the two processes it was, the pool does not say."""
    script = tmp_path / "script.py"
    script.write_text(ENDING)
    done = subprocess.run([sys.executable, str(script), str(tmp_path / "out")], text=True,
                          capture_output=True, timeout=600)  # fmt: skip
    assert re.fullmatch(
        "run directclr-seed0-rate0.0005-search( or directclr-seed0-rate0.002-search)?: "
        "expected its result, got its process ended\n", done.stdout,
    ), done  # fmt: skip


# ---------------------------------------------------------------- without training


def test_held_out_is_the_last_fifth_of_each_class():
    labels = torch.tensor([0] * 10 + [1] * 5 + [-1] * 4 + [0] * 5)
    features = torch.arange(len(labels)).float()[:, None]
    split = probe.held_out(features, labels, 2)
    assert split.train.flatten().tolist() == [*range(10), 19, 20, *range(10, 14)]
    assert split.test.flatten().tolist() == [21, 22, 23, 14]
    assert split.test_labels.tolist() == [0, 0, 0, 1] and split.classes == 2


def test_search_before_table():
    """Nothing of a mode is known before its search is done, and then it is at the best rate."""
    plan = compare.plan(**TINY)
    search = {run.name for run in plan.known({})}
    assert {n for n in search if n.startswith("random")} == {
        "random-seed0-rate0.0005-search", "random-seed0-rate0.002-search",
    }  # fmt: skip
    done = {run.name: {"held_out": run.learning_rate} for run in plan.search("random")}
    names = {run.name for run in plan.known(done)}
    assert names - search == {"random-seed1-rate0.002", "random-seed2-rate0.002"}
    done = {run.name: {"held_out": 0.5} for run in plan.search("directclr")}
    more = {run.name for run in plan.known(done)} - search
    assert more == {
        f"directclr-seed{seed}-rate0.0005{what}"
        for seed in (1, 2)
        for what in ("", "-reference", "-rounded", "-dim10")
    }


def test_every_mode_has_the_same_settings_and_rates():
    plan = compare.plan(data_spec="patches", device="cpu")
    assert len(plan.modes) == 9 and plan.seeds == (1, 2, 3) and plan.rates == (5e-4, 2e-3, 8e-3)
    assert plan.dims == (11, 22, 90, 180)
    assert not {"mode", "dim", "learning_rate", "seed", "loss"} & plan.settings.keys()
    searched = {tuple(r.learning_rate for r in plan.search(mode)) for mode in plan.modes}
    assert searched == {plan.rates}
    assert plan.trainings == 9 * 3 + 9 * 3 + 4 * 3 + 2 * 3
    quick = compare.plan(data_spec="patches", device="cpu", quick=True)
    assert quick.modes == ("directclr", "baseline") and quick.settings["epochs"] == 1
    assert quick.trainings == len(quick.known({})) - 2 * 3 == 2 * 3
    real = compare.plan(data_spec="fashion-mnist", device="cpu")
    assert (
        real.trainings == 9 * (3 + 5) + 2 * 3 + 4 * 3 and real.settings["encoder"] == "small-deep"
    )


def test_default_set(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert compare.plan().settings["data"] == "patches"
    monkeypatch.setattr(compare.data, "load", lambda *_, **__: None)
    assert compare.plan().settings["data"] == "cifar10"


VERDICTS = ("above", "below", "undecided")


def values(mean, deviation=0.01, turn=0):
    """Of three seeds, spread in an order of their own."""
    of = [mean - deviation, mean, mean + deviation]
    return report.spread(of[turn:] + of[:turn])


def row(linear):
    of = values(linear, turn=round(1e3 * linear) % 3)
    return {"accuracy": {"r": {"linear": of, "knn": of}}}


def test_verdict():
    """Paired by seed: what both have in common is no chance."""
    assert report.verdict(values(0.70), values(0.60, turn=1)) == "above"
    assert report.verdict(values(0.60), values(0.70, turn=1)) == "below"
    assert report.verdict(values(0.61), values(0.60, turn=1)) == "undecided"
    assert report.verdict(values(0.601), values(0.60)) == "above"
    assert report.verdict(values(0.9), report.spread([0.1])) == "undecided"  # no pairs
    assert report.verdict(report.spread([0.9]), report.spread([0.1])) == "undecided"
    # Differences of mean m and deviation 0.01 sqrt(3): 4.30 standard errors of 0.01 are needed.
    assert report.verdict(values(0.60 + 0.0429), values(0.60, turn=1)) == "undecided"
    assert report.verdict(values(0.60 + 0.0431), values(0.60, turn=1)) == "above"


def test_t_table():
    """Student's t against the density's integral, computed here."""
    for n, t in report._T.items():
        nu, x = n - 1, torch.linspace(0, t, 200_001, dtype=torch.float64)
        log = math.lgamma((nu + 1) / 2) - math.lgamma(nu / 2) - math.log(nu * math.pi) / 2
        density = math.exp(log) * (1 + x.square() / nu) ** (-(nu + 1) / 2)
        assert 2 * torch.trapezoid(density, x) == pytest.approx(0.95, abs=4e-4)


def test_order_follows_the_numbers():
    """The paper's order and its opposite, by the same code from other numbers."""

    def counts(rows):
        ranking = report.order(rows, "linear")
        return ranking, [sum(pair["here"] == v for pair in ranking["pairs"]) for v in VERDICTS]

    ours, count = counts({mode: row(value / 100) for mode, value in report.PAPER.items()})
    assert ours["here"] == ours["paper"] and ours["rank correlation"] == 1.0
    assert count[1] == 0 and count[0] > 20
    turned, count = counts({mode: row(1 - value / 100) for mode, value in report.PAPER.items()})
    assert turned["here"] == turned["paper"][::-1] and turned["rank correlation"] == -1.0
    opposite = [(p["worse"], p["better in the paper"]) for p in turned["pairs"]
                if p["here"] == "below"]  # fmt: skip
    assert ("baseline", "simclr") in opposite and count[0] == 0
    assert counts({mode: row(0.5) for mode in report.PAPER})[1] == [0, 0, 28]
    lines = report._order_table({"order": {"linear": turned}}).splitlines()
    assert lines[2].endswith(f"| -1.00 | 0 | {len(opposite)} | {28 - len(opposite)} |")


def test_what_diverged_is_in_the_table():
    rows = {"simclr": {**row(0.5), "runs": 2, "diverged": 1}, "random": {"runs": 0, "diverged": 3}}
    search = {mode: {"chosen": 1.0, report._INSIDE: {"1": 0.5, "2": None}} for mode in rows}
    lines = report.table({"rows": rows, "search": search}).splitlines()
    assert "| 2, 1 diverged | 50.0 ± 1.0 |" in lines[2] and "| 0, 3 diverged |  |" in lines[3]
    assert "| simclr | 50.0 | diverged | 1 |" in report._search_table({"search": search})


@pytest.mark.parametrize(("flags", "text"), [
    ("--modes directclr,byol", "modes: expected some of baseline, .*, got 'byol'"),
    ("--modes directclr,directclr", "modes: expected each once, got directclr,directclr"),
    ("--seeds 0", "seeds: expected at least 1, got 0"),
    ("--data imagenet", "data: expected one of digits, patches, .*, got 'imagenet'"),
    ("--data fake --epochs 0", "epochs: expected at least 1, got 0"),
    ("--data fake --jobs 0", "jobs: expected at least 1, got 0"),
    ("--data fake --dims 22 300", "dims: expected 1 to 256 .the encoder's width., got 300"),
    ("--data fake --encoder vgg", "encoder: expected one of resnet18, .*, got 'vgg'"),
])  # fmt: skip
def test_errors(flags, text, tmp_path, capsys):
    code = cli.main(["compare", "--out", str(tmp_path / "out"), *flags.split()])
    output, errors = capsys.readouterr()
    assert code == 2 and re.fullmatch(f"directclr-fast: error: {text}\n", errors) and not output


# ---------------------------------------------------------------- what training does


def test_directclr_leaves_r_more_directions_than_no_projector(run_dir, one_thread):
    """The paper's figure 9 on handwritten digits, 80 steps: without projector r has an effective
    rank of 23, with DirectCLR 29 to 33, while the columns it is trained on have 14."""
    pytest.importorskip("sklearn")
    from directclr_fast.paper import spectrum
    from directclr_fast.train import data
    from directclr_fast.train.config import TrainConfig
    from directclr_fast.train.loop import Trainer

    images = data.load("digits", train=True)
    ranks = {}
    for mode in ("baseline", "directclr"):
        config = TrainConfig(
            mode=mode, seed=1, batch_size=32, epochs=2, warmup_epochs=0, amp="none",
            checkpoint_dir=str(run_dir), name=mode, device="cpu",
        )  # fmt: skip
        trainer = Trainer(config, overwrite=True, progress=False)
        trainer.run()
        model = trainer.model.eval()
        features, _ = probe.encode(model.encoder, images, 8)
        spectra = spectrum.of_model(model, features)
        ranks[mode] = {name: report.effective_rank for name, report in spectra.items()}
    assert ranks["directclr"]["representation"] > 1.12 * ranks["baseline"]["representation"]
    assert ranks["directclr"]["sub-vector"] < 0.7 * ranks["directclr"]["representation"]
