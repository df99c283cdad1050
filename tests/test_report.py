"""The report: what it reads, what it says, and that a browser shows it, on run directories as the stages write them."""

from __future__ import annotations

import hashlib
import html
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from browser import dumped, seen
from hypothesis import given, strategies as draw
from reports import FINAL, STEPS, Fate, planted, study, write_best, write_json, write_run, write_study

from dit.analysis.series import diagnosed
from dit.config import Params
from dit.design import Run, Setting
from dit.errors import DataError
from pipelines.design import ALL as ALL_RUNS, item_named
from pipelines.report.headline import headline
from pipelines.report.listings import listings
from pipelines.report.reading import read_run, read_study
from pipelines.report.summary import summarise
from pipelines.report.words import MINUS, fixed
from pipelines.stages.compare import compare as compare_stage, make_report

Workspace = Callable[..., Params]


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def workspace() -> Workspace:
    """Write a study of given strategies and seeds."""

    def write(strategies: list[str], seeds: list[int], diverged: tuple[str, ...] = (), at: int = 120) -> Params:
        params = study({"strategies": strategies, "seeds": seeds})
        return write_study(params, fates=dict.fromkeys(diverged, Fate(at)))

    return write


def compare(params: Params) -> None:
    compare_stage(params, item_named(params, "compare", ALL_RUNS))


def summary() -> dict[str, Any]:
    def refuse(constant: str) -> None:
        raise AssertionError(f"summary.json holds {constant}")

    return json.loads(Path("reports/summary.json").read_text(), parse_constant=refuse)


def told(params: Params) -> dict[str, Any]:
    """What `compare` writes to summary.json about the runs, without the page, whose figures take most of its time."""
    found = read_study(params)
    numbers = summarise(found)
    return {**numbers, "headline": headline(found, numbers).sentences}


def change(path: str, edit: Callable[[dict[str, Any]], object]) -> None:
    record = json.loads(Path(path).read_text())
    edit(record)
    write_json(Path(path), record)


ALL = list(FINAL)


def test_the_answer_is_read_off_the_numbers(workspace: Workspace) -> None:
    found = told(workspace(ALL, [0, 1, 2]))
    answer, *others = found["headline"]
    assert answer.startswith("Yes. The zero head ends training with a lower validation error")
    assert any(
        "The study detects its control, a start that is broken on purpose, in validation error: symmetric is worse" in text
        for text in others
    )
    assert any("adaln is not distinguishable" in text for text in others)
    assert any("head_xavier starts at 2.1" in text and "start at the error of a zero output (1.00" in text for text in others)
    assert any("from step 1 on in head_xavier and adaln and from step 2 on in adaln_zero" in text for text in others)
    difference = found["strategies"]["symmetric"]["difference"]["validation_mse"]
    assert 0 < difference["low"] < difference["mean"] < difference["high"]
    assert difference["declared"] is False
    assert found["comparisons"] == 4 * (1 + len(found["compared_steps"])) + sum(
        found["strategies"][name]["difference"][metric]["verdict"] != "no verdict"
        for name in ALL[1:]
        for metric, ranking in found["rankings"].items()
        if ranking["possible"]
    )


def test_the_opposite_numbers_give_the_opposite_answer(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FINAL, "adaln_zero", 0.125)
    answer = told(workspace(["head_xavier", "adaln_zero"], [0, 1, 2]))["headline"][0]
    assert answer.startswith("No. The zero head ends training with a higher validation error")


def test_equal_ends_are_called_not_distinguishable_and_the_control_not_caught(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    for strategy in ("head_xavier", "symmetric"):
        monkeypatch.setitem(FINAL, strategy, FINAL["adaln_zero"])
    answer, _, *others = told(workspace(["adaln_zero", "head_xavier", "symmetric"], [0, 1, 2]))["headline"]
    assert answer.startswith("Not distinguishable.")
    assert any(text.startswith("The study does not detect its control") and "null result" in text for text in others)


@dataclass(frozen=True)
class Case:
    strategies: list[str]
    seeds: list[int]
    answer: str
    warning: str = ""
    diverged: tuple[str, ...] = ()
    at: int = 120


HEADS = ["adaln_zero", "head_xavier"]
CASES = [
    Case(HEADS, [3], "Undecided. One seed", "One seed: differences"),
    Case(HEADS, [0, 1], "Undecided. There is no verdict, because a verdict needs at least 3", "12.7 standard errors"),
    Case(HEADS, [0, 1], "Yes. With the random head every", "2 runs diverged", diverged=("head_xavier-0", "head_xavier-1")),
    Case(HEADS, [0, 1], "No. With the zero head", "at step 0 (loss nan)", diverged=("adaln_zero-0", "adaln_zero-1"), at=0),
    Case(HEADS, [0, 1], "Undecided. There is no seed", "2 runs diverged", diverged=("adaln_zero-0", "head_xavier-1")),
    Case(["adaln_zero", "symmetric"], [0, 1, 2], "In final validation error, symmetric is worse than adaln_zero."),
    Case(["adaln_zero", "symmetric"], [0, 1, 2], "Undecided. No comparison", "1 run diverged", diverged=("symmetric-2",)),
    Case(["adaln", "gates_only_zero"], [0, 1, 2], "Not distinguishable. No strategy's"),
    Case(["adaln"], [0, 1], "The study holds one strategy"),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{'+'.join(case.strategies)}, {len(case.seeds)} seeds, {case.answer}")
def test_any_study_gets_a_report_that_says_what_it_cannot_say(workspace: Workspace, case: Case) -> None:
    compare(workspace(case.strategies, case.seeds, case.diverged, case.at))
    words = summary()["headline"]
    assert words[0].startswith(case.answer)
    assert any(case.warning in text for text in words)
    titles = re.findall("<title>(.*)</title>", Path("reports/index.html").read_text())
    assert html.unescape(titles[0]).endswith(words[0])


def test_a_collapsed_run_is_named_and_belongs_to_no_mean(workspace: Workspace) -> None:
    params = workspace(HEADS, [0, 1], diverged=("head_xavier-0", "head_xavier-1"))
    before = told(params)["strategies"]["head_xavier"]["mean"]
    spike = {"event": 0, "step": 70, "kind": "spike", "quantity": "loss", "value": 1.0, "reference": 0.5}
    collapsed = {"step": 77, "mse": 0.97, "limit": 0.5, "spike": spike}
    change(
        "runs/train/head_xavier-1/run.json",
        lambda record: record.update(status="collapsed", diverged=None, collapsed=collapsed),
    )
    change("runs/evaluate/head_xavier-1/metrics.json", lambda record: record.update(status="collapsed"))
    compare(params)
    page, found = html.unescape(Path("reports/index.html").read_text()), summary()
    assert "<td>collapsed at step 77</td>" in page
    assert any("1 run collapsed: head_xavier-1 at step 77 (error 0.97)." in text for text in found["headline"])
    assert "every run diverged or collapsed" in found["headline"][0]
    assert found["strategies"]["head_xavier"]["mean"] == before
    assert found["strategies"]["head_xavier"]["runs"]["1"]["collapsed"] == collapsed


def test_a_run_whose_samples_are_not_finite_keeps_its_validation_error(workspace: Workspace) -> None:
    params = workspace(HEADS, [0, 1])
    lost = {"frechet_distance": None, "kernel_distance": None, "kernel_distance_std": None, "precision": None, "recall": None}
    change(
        "runs/evaluate/head_xavier-1/metrics.json",
        lambda record: record.update(status="diverged", metrics=record["metrics"] | lost),
    )
    Path("runs/evaluate/head_xavier-1/grid.png").unlink()
    compare(params)
    found = summary()
    assert any("Sampling met values that are not finite in head_xavier-1" in text for text in found["headline"])
    difference = found["strategies"]["head_xavier"]["difference"]
    assert (difference["validation_mse"]["n"], difference["frechet_distance"]["n"]) == (2, 1)


def test_a_verdict_that_rests_on_the_averaging_alone_is_pointed_out(workspace: Workspace) -> None:
    params = workspace(["adaln_zero", "head_xavier", "adaln"], [0, 1, 2])
    for strategy, error in (("adaln", 0.125), ("head_xavier", 0.1)):
        for seed in params.study.seeds:
            change(
                f"runs/train/{strategy}-{seed}/run.json", lambda record, to=error: record["final"].update(ema_validation_mse=to)
            )
    found = told(params)
    assert found["headline"][0].startswith(
        "It depends on the averaging. The EMA weights show a lower validation error with the random"
    )
    assert found["strategies"]["adaln"]["difference"][f"validation_mse_step_{STEPS}"]["verdict"] == "not distinguishable"
    (warning,) = [text for text in found["headline"] if text.startswith("The EMA lags")]
    assert "adaln is worse with the averaged weights, not distinguishable with the trained ones" in warning


def test_the_figure_of_hidden_units_leaves_attention_heads_and_rows_of_the_head_out(workspace: Workspace) -> None:
    found = read_study(workspace(["adaln_zero", "symmetric"], [0]))
    hidden = {name: set(diagnosed(runs[0].diagnostics, "distinct_units/mlp")) for name, runs in found.runs.items()}
    assert hidden == {"adaln_zero": {512}, "symmetric": {1}}


def test_the_same_runs_give_the_same_bytes(workspace: Workspace) -> None:
    params = workspace(ALL, [0, 1])
    digests = []
    for _ in range(2):
        compare(params)
        files = sorted(path for path in Path("reports").rglob("*") if path.is_file())
        digests.append({str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files})
    assert digests[0] == digests[1]
    tables = [f"plots/{name}.csv" for name in ("difference", "final_difference", "training_mse", "validation_mse")]
    names = ["index.html", "metrics.json", *tables, "plots.html", "summary.json"]
    assert list(digests[0]) == [f"reports/{name}" for name in names]


def test_dvc_reads_one_column_for_each_strategy(workspace: Workspace) -> None:
    compare(workspace(["adaln_zero", "symmetric"], [0, 1], diverged=("symmetric-1",)))
    for name in ("validation_mse", "training_mse", "difference"):
        header, first, *_ = Path(f"reports/plots/{name}.csv").read_text().splitlines()
        assert header == "step,adaln_zero,symmetric"
        assert all(value != "" for value in first.split(","))  # Vega takes an empty one for zero
    means = json.loads(Path("reports/metrics.json").read_text())
    expected = {name: found["mean"]["validation_mse"] for name, found in summary()["strategies"].items()}
    assert means == {"mse": expected}
    header, *rows = Path("reports/plots/final_difference.csv").read_text().splitlines()
    assert header == "strategy,difference"
    assert [row.partition(",")[0] for row in rows] == ["symmetric"]


def test_the_page_of_dvc_plots_loads_nothing(workspace: Workspace) -> None:
    compare(workspace(["adaln_zero", "symmetric"], [0]))
    page = Path("reports/plots.html").read_text()
    assert "{plot_divs}" in page
    assert not re.search(r"<script[^>]*src=|<link", page)


def test_runs_that_left_the_study_leave_the_workspace_too(workspace: Workspace, capsys: pytest.CaptureFixture[str]) -> None:
    params = workspace(["adaln_zero", "adaln"], [0, 1])
    write_run(params, Run("symmetric", Setting(), 0))
    write_run(params, Run("adaln", Setting(), 7))
    Path("runs/train/notes").mkdir()
    compare(params)
    kept = {"adaln_zero-0", "adaln_zero-1", "adaln-0", "adaln-1"}
    assert {path.name for path in Path("runs/evaluate").iterdir()} == kept
    assert {path.name for path in Path("runs/train").iterdir()} == kept | {"notes"}
    assert "removed runs/train/symmetric-0" in capsys.readouterr().out


def test_an_experiment_does_not_say_that_runs_of_the_study_were_removed(
    workspace: Workspace, capsys: pytest.CaptureFixture[str]
) -> None:
    params = workspace(["adaln_zero", "adaln"], [0])
    write_run(params, Run("adaln", Setting(), 7))
    Path(".git").touch()  # as in a worktree
    compare(params)
    assert "removed" not in capsys.readouterr().out
    assert not Path("runs/train/adaln-7").exists()


def test_a_network_without_a_prediction_is_measured_all_the_same(workspace: Workspace) -> None:
    params = workspace(["adaln_zero", "adaln"], [0])
    for strategy in params.study.strategies:
        unpredicted = {"predicted": None, "predicted_equals_measured": None, "not_predicted": "No prediction for Adafactor."}
        change(f"runs/analyse/{strategy}/start.json", lambda record, new=unpredicted: record.update(new))
    compare(params)
    assert any("This is measured, not predicted" in text for text in summary()["headline"])
    assert "measured, not predicted</small>" in Path("reports/index.html").read_text()


def test_a_missing_run_is_named(workspace: Workspace) -> None:
    params = workspace(["adaln_zero", "adaln"], [0, 1])
    shutil.rmtree("runs/evaluate/adaln-1")
    with pytest.raises(DataError, match=r"runs/evaluate/adaln-1/metrics\.json not found"):
        compare(params)


def test_an_evaluation_of_another_training_is_refused(workspace: Workspace) -> None:
    workspace(["adaln_zero"], [0])
    change("runs/train/adaln_zero-0/run.json", lambda record: record.update(run_key="feedfacefeedface"))
    with pytest.raises(DataError, match=r"evaluates training run '\w+', but .* holds run 'feedfacefeedface'"):
        read_run(Run("adaln_zero", Setting(), 0))


def test_runs_made_with_different_parameters_are_not_compared(workspace: Workspace) -> None:
    params = workspace(["adaln_zero", "adaln"], [0])
    change("runs/train/adaln-0/run.json", lambda record: record["settings"]["train"].update(learning_rate=5e-4))
    with pytest.raises(DataError, match="adaln_zero-0 and adaln-0 were made with different train"):
        read_study(params)


class Page(HTMLParser):
    """What a browser drew: for each figure its marks and its lines at zero, and every address that any element refers to."""

    def __init__(self, document: str) -> None:
        super().__init__()
        self.figure: str | None = None
        self.marks: dict[str, int] = {}
        self.zero_lines: dict[str, int] = {}
        self.addresses: list[str] = []
        self.drawn: str | None = None
        self.feed(document)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = {name: value or "" for name, value in attrs}
        self.addresses += [found[name] for name in ("src", "href", "xlink:href") if name in found]
        if tag == "html":
            self.drawn = found.get("data-figures")
        elif tag == "figure":
            self.figure = found.get("id")
            if self.figure:
                self.marks[self.figure] = self.zero_lines[self.figure] = 0
        elif self.figure and re.match(r"[xy]\d*zl\b", found.get("class", "")):
            self.zero_lines[self.figure] += 1
        elif self.figure and (self._is_curve(tag, found) or self._is_heat_map(tag, found)):
            self.marks[self.figure] += 1

    def handle_endtag(self, tag: str) -> None:
        if tag == "figure":
            self.figure = None

    def _is_curve(self, tag: str, attributes: dict[str, str]) -> bool:
        classes = attributes.get("class", "").split()
        return (
            tag == "path"
            and bool({"js-line", "point"} & set(classes))
            and bool(re.match(r"M-?[\d.]+", attributes.get("d", "")))
        )

    def _is_heat_map(self, tag: str, attributes: dict[str, str]) -> bool:
        return tag == "image" and attributes.get("xlink:href", attributes.get("href", "")).startswith("data:image/png")


def test_a_browser_opens_the_report_from_disk_and_shows_every_figure(workspace: Workspace, tmp_path: Path) -> None:
    compare(workspace(ALL, [0, 1, 2], diverged=("adaln-2",)))
    page = Page(dumped(Path("reports/index.html"), tmp_path / "profile"))
    names = ("delays", "differences", "validation", "early", "relative", "training", "buckets", "wake-up", "gradients")
    names += ("gradient-ranks", "depth", "conditioning", "widths", "units", "gates", "ranks", "updates")
    assert page.drawn == str(len(names))
    assert {name for name, marks in page.marks.items() if marks} == {f"figure-{name}" for name in names}
    assert [page.zero_lines[f"figure-{name}"] for name in ("differences", "relative", "buckets")] == [5, 1, 1]
    assert all(address.startswith(("data:", "#")) for address in page.addresses)


RATES = [1.0e-3, 2.0e-3, 4.0e-3]
FACTORS = {"train.learning_rate": RATES}
THREE = ["adaln_zero", "head_xavier", "symmetric"]


def words_of(params: Params) -> tuple[dict[str, Any], str, str]:
    """The summary of a study that is in the current folder, the answer, and all other sentences."""
    found = read_study(params)
    numbers = summarise(found)
    said = headline(found, numbers)
    return numbers, said.answer, "\n".join(said.sentences[1:])


def test_a_planted_delay_is_the_answer_with_its_steps_and_its_conditions() -> None:
    params = study({"strategies": THREE, "seeds": [0, 1, 2, 3, 4], "factors": FACTORS, "declared": ["head_xavier"]})
    numbers, answer, rest = words_of(write_study(params, planted(delay={"head_xavier": 18}, noise=0.001)))
    assert re.fullmatch(
        r"Yes\. The random head is 1[78](?: to 1[89])? steps behind the zero head early in training and stays "
        r"1[78](?: to 1[89])? steps behind, at every learning rate; at step 400 the error of its trained weights is "
        r"2\.\d\s%(?: to 2\.\d\s%)? higher \(n = 5\)\.",
        answer,
    )
    assert re.search(
        r"In final validation error against adaln_zero, head_xavier is worse at every learning rate "
        r"\(\+\d\.\d\s%(?: to \+\d\.\d\s%)?, n = 5\)\.",
        rest,
    )
    conditions = (
        "with DiT-Tiny/2 (1.23 M parameters) on photos at 32 px, after 400 steps, at learning rates 0.001, 0.002 and 0.004"
    )
    assert conditions in rest
    assert "(3 declared comparisons)" in rest
    nothing = "During training, symmetric is neither clearly behind nor clearly ahead of adaln_zero, at every learning rate"
    assert f"{nothing} (n = 5; exploratory)." in rest
    assert "no verdict on strategies each at its own best rate" in " ".join(rest.split())
    assert "The effect of a start depends" not in rest
    found = numbers["findings"]
    assert found["each_at_its_best"] == []
    assert {(one["strategy"], one["verdict"], one["declared"]) for one in found["same_rate"]} == {
        ("head_xavier", "worse", True),
        ("symmetric", "not distinguishable", False),
    }
    assert all(one["declared"] or one["sentence"].startswith("Exploratory: ") for one in found["same_rate"])


def test_planted_optima_are_compared_each_at_its_best_on_seeds_that_did_not_choose() -> None:
    rates = [5.0e-4, *RATES, 8.0e-3]
    study_of = {"strategies": THREE, "seeds": [0, 1, 2, 3, 4], "choose_on": [0, 1], "declared": ["symmetric"]}
    params = study({**study_of, "factors": {"train.learning_rate": rates}, "sample": "none"})
    errors = planted(best={"*": 2.0e-3, "symmetric": 1.2e-3}, level={"symmetric": 1.1}, noise=0.0005)
    numbers, _, rest = words_of(write_study(params, errors))
    found = numbers["findings"]
    optima = {one["strategy"]: one["optimum"]["rate"] for one in found["responses"]}
    assert optima["adaln_zero"] == pytest.approx(2.0e-3, rel=0.1)
    assert optima["symmetric"] == pytest.approx(1.2e-3, rel=0.1)
    tuned = {one["strategy"]: one for one in found["each_at_its_best"]}
    assert tuned["symmetric"]["verdict"] == "worse"
    assert tuned["symmetric"]["relative"][0] == pytest.approx(0.1, abs=0.01)
    assert (tuned["symmetric"]["n"], tuned["symmetric"]["family"]) == (3, 1)
    assert tuned["head_xavier"]["verdict"] == "not distinguishable"
    assert "Each at its own best learning rate, chosen on other seeds" in rest
    assert not any(one["declared"] for one in found["same_rate"])
    assert numbers["features"] is None


def test_a_partial_report_without_samples_does_not_say_that_the_study_draws_none() -> None:
    params = write_study(study({"strategies": THREE, "seeds": [0], "sample": "none"}))
    whole, part = (make_report(params, partial).page for partial in ("", "Partial report: 3 of 9 runs."))
    assert "No run of this study was sampled (<code>study.sample: none</code>)." in whole
    assert "No run of this study was sampled" not in part
    assert "A partial report has no samples." in part


def test_a_planted_interaction_with_another_factor_is_said_and_no_other() -> None:
    params = study({"strategies": THREE, "seeds": [0, 1, 2, 3, 4], "factors": {"model.depth": [4, 8]}, "sample": "none"})
    errors = planted(with_level={("symmetric", "model.depth", 8): 1.05, ("*", "model.depth", 8): 0.9})
    numbers, _, rest = words_of(write_study(params, errors))
    change = (
        r"with depth 8 instead of 4, the error of symmetric changes by \+[45]\.\d\s% .* "
        r"relative to that of adaln_zero \(n = 5\)"
    )
    assert re.search(change, rest)
    assert "the error of head_xavier changes" not in rest
    assert numbers["findings"]["responses"] == []
    assert "with depth 8 on photos at 32 px" in numbers["findings"]["same_rate"][1]["sentence"]


def test_planted_collapses_are_counted_with_what_warned_of_them_and_are_in_no_mean() -> None:
    params = study({"strategies": THREE, "factors": FACTORS, "sample": "none"})
    lost = {f"head_xavier-learning_rate=0.004-{seed}": Fate(200 + seed, collapses=True) for seed in (0, 2)}
    numbers, _, rest = words_of(write_study(params, planted(), lost))
    assert "2 of 3 runs of head_xavier at learning rate 0.004 collapsed (steps 200 to 202)" in rest
    (found,) = [one for one in numbers["findings"]["failures"] if one["collapsed"]]
    assert (found["strategy"], found["rate"], found["runs"], found["failed_at"]) == ("head_xavier", 0.004, 3, (200, 202))
    tables = listings(read_study(params), numbers)
    (row,) = tables["failures"].rows
    assert "gradient norm 20 steps before; loss 4 steps before" in row[-1]
    assert "max attention logit in block 1 6 times its median" in row[-1]
    judged = {(one["strategy"], one["learning_rate"]): one for one in numbers["findings"]["same_rate"]}
    verdict = judged["head_xavier", 0.004]
    assert verdict["verdict"] == "no verdict"
    assert "2 of the runs of head_xavier collapsed or diverged" in verdict["sentence"]
    group = numbers["groups"]["head_xavier-learning_rate=0.004"]
    assert (group["n"], group["mean"]["validation_mse"]) == (1, group["runs"][1]["validation_mse"])


def test_samples_that_cannot_rank_strategies_get_no_verdict(workspace: Workspace) -> None:
    params = workspace(HEADS, [0, 1, 2])
    change("data/features/references.json", lambda record: record.update(dimension=1280))
    numbers, _, rest = words_of(params)
    found = numbers["strategies"]["head_xavier"]["difference"]["frechet_distance"]
    assert found["verdict"] == "no verdict"
    assert "256 samples are fewer than the 1280 dimensions of the features" in found["sentence"]
    assert "The generated samples cannot rank anything" in rest
    assert numbers["strategies"]["head_xavier"]["difference"]["precision"]["verdict"] == "no verdict"


def test_samples_of_each_strategy_at_its_best_setting_name_the_runs_that_they_are_of() -> None:
    params = study({"strategies": HEADS, "factors": FACTORS, "sample": "best"})
    write_study(params, planted(best={"*": 2.0e-3, "head_xavier": 1.0e-3}))
    for strategy, rate in (("adaln_zero", "0.002"), ("head_xavier", "0.001")):
        for seed in (0, 1, 2):
            write_best(params, strategy, f"learning_rate={rate}", seed)
    numbers, _, _ = words_of(params)
    sentence = numbers["strategies"]["head_xavier"]["difference"]["frechet_distance"]["sentence"]
    assert "each at the setting with its lowest validation error, at learning rate 0.001 against 0.002" in sentence
    assert numbers["strategies"]["head_xavier"]["mean"]["frechet_distance"] is not None


@pytest.mark.slow
def test_a_report_of_500_runs_stays_under_4_megabytes() -> None:
    """Plotly is 1.9 MB of it."""
    strategies = [*FINAL]
    factors = {"train.learning_rate": [5.0e-4, *RATES, 8.0e-3], "model.depth": [2, 4, 8, 12]}
    params = study({"strategies": strategies, "seeds": [0, 1, 2, 3, 4], "factors": factors, "sample": "none"})
    compare(write_study(params, planted(best={"*": 2.0e-3})))
    assert len(summary()["groups"]) == 100
    assert Path("reports/index.html").stat().st_size < 4e6


def test_a_browser_draws_the_figures_of_a_study_with_factors(tmp_path: Path) -> None:
    factors = {**FACTORS, "model.depth": [4, 8]}
    params = study({"strategies": THREE, "seeds": [0, 1, 2, 3, 4], "factors": factors, "choose_on": [0, 1]})
    lost = {"symmetric-learning_rate=0.004,depth=8-0": Fate(200, collapses=True)}
    compare(write_study(params, planted(best={"*": 2.0e-3}), lost))
    page = Page(dumped(Path("reports/index.html"), tmp_path / "profile"))
    assert page.drawn == str(len(page.marks))
    drawn = {name for name, marks in page.marks.items() if marks}
    names = ("same-rate", "at-best", "delays", "response", "map", "interactions", "before-spikes", "differences", "wake-up")
    assert {f"figure-{name}" for name in names} <= drawn == page.marks.keys()


@pytest.fixture(scope="module")
def report_of_three(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of a study of three strategies. One of its runs diverged."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("three"))
        compare(write_study(study({"strategies": THREE}), fates={"symmetric-2": Fate(120)}))
        return Path("reports/index.html").resolve()


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_on_wide_and_narrow_screens_nothing_sticks_out_overlaps_or_is_out_of_reach(
    report_of_three: Path, tmp_path: Path, dark: bool
) -> None:
    found = seen(report_of_three, tmp_path / "seen", (1400, 1000, 420), dark=dark)
    assert sorted(found) == [420, 1000, 1400]
    paper = "rgb(21, 24, 27)" if dark else "rgb(253, 253, 251)"
    nothing = {fault: [] for fault in ("stickingOut", "silentlyCut", "overlapping", "accessibility")}
    assert found == {width: {"background": paper, **nothing} for width in found}


@given(draw.floats(-1e6, 1e6), draw.integers(0, 6))
def test_a_number_whose_digits_are_all_zero_has_no_sign(value: float, decimals: int) -> None:
    text = fixed(value, decimals, signed=True)
    assert "-" not in text
    assert (text[0] in f"+{MINUS}") == any(digit in text for digit in "123456789")
