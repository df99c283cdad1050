"""MLflow as a view of outputs: complete, once, whatever happened before. Outputs are made by hand, the store is real."""

from __future__ import annotations

import json
import math
import shutil
import socket
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import mlflow
import pytest
from mlflow import MlflowClient
from mlflow.entities import Run
from PIL import Image

from dit import init, yamlfile
from dit.analysis.signal import BlockSignal, Coordinates, Signal
from dit.analysis.start import EarlyStep
from dit.analysis.wakeup import RoleGradient
from dit.errors import UserError
from dit.training.records import Divergence, Final, Initial
from pipelines import live, mlflow_store, tracking
from pipelines.files import scratch
from pipelines.mlflow_store import UnreachableError
from pipelines.mlflow_view import DIFFERENCE, SHARED, TRAINING, View
from pipelines.records.analysis import COORDINATES, GRADIENTS, StartRecord
from pipelines.records.base import Status, Timing
from pipelines.records.evaluation import EvaluateRecord, FeatureSpace
from pipelines.records.training import (
    DIAGNOSTICS,
    GRADIENT_NOISE,
    METRICS,
    VALIDATION,
    RunningRecord,
    TrainRecord,
    TrainSettings,
)
from pipelines.report.colours import colours

ROOT = Path(__file__).parents[1]
STRATEGIES, SEEDS = ["adaln_zero", "symmetric"], [0, 1]


@pytest.fixture(scope="module")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The database of an MLflow that holds no run."""
    file = tmp_path_factory.mktemp("store") / "mlflow.db"
    MlflowClient(f"sqlite:///{file}").search_experiments()
    return file


@pytest.fixture
def study(tmp_path: Path, empty_store: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A study of 2 strategies and 2 seeds, evaluated; symmetric-1 has diverged. Its folder is the working directory."""
    shutil.copy(empty_store, tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.delenv("DIT_SCRATCH", raising=False)
    params = yamlfile.read(ROOT / "params.yaml")
    params["study"] |= {"strategies": STRATEGIES, "seeds": SEEDS, "factors": {}, "declared": [], "sample": "all"}
    (tmp_path / "params.yaml").write_text(json.dumps(params))
    for strategy in STRATEGIES:
        for seed in SEEDS:
            make_run(tmp_path, params, strategy, seed, diverged=(strategy, seed) == ("symmetric", 1))
    outs = {f"{stage}@adaln_zero-0": {"outs": [{"md5": f"{stage}.dir"}]} for stage in ("train", "evaluate")}
    (tmp_path / "dvc.lock").write_text(json.dumps({"stages": outs}))
    return tmp_path


def make_run(root: Path, params: dict[str, Any], strategy: str, seed: int, *, diverged: bool, version: str = "") -> None:
    train, evaluate = (root / "runs" / stage / f"{strategy}-{seed}" for stage in ("train", "evaluate"))
    train.mkdir(parents=True, exist_ok=True)
    evaluate.mkdir(parents=True, exist_ok=True)
    key = f"train-{strategy}-{seed}{version}"
    rules = init.named(strategy.partition("-")[0]).resolved
    settings = {name: params[name] for name in ("model", "diffusion", "train")}
    status: Status = "diverged" if diverged else "finished"
    TrainRecord(
        strategy=strategy,
        seed=seed,
        run_key=key,
        device="cpu",
        settings=TrainSettings(**settings, rules=rules),
        status=status,
        diverged=Divergence(10, "loss", "nan") if diverged else None,
        steps_done=20,
        parameters=7,
        initial=Initial(1.0, 1.0),
        final=None if diverged else Final(0.5, 0.3, 0.25),
    ).write(train)
    rest = {"gradient_norm": 1.0, "learning_rate": 1e-3}
    logged = [(0, 2.0, 1.0), (10, 1.0, math.nan if diverged else 0.5)]
    METRICS.write(train, [{"step": step, "loss": loss, "mse": mse, **rest} for step, loss, mse in logged])
    validated = [(0, "model", 1.0, 1.1), (0, "ema", 1.0, 1.2), (20, "ema", 0.25, 0.3)]
    VALIDATION.write(train, [dict(zip((*VALIDATION.columns, "mse_t0"), row, strict=True)) for row in validated])
    gradients = {
        "block[0].mlp_in.weight": 3.0,
        "block[1].mlp_out.weight": 4.0,
        "block[0].mlp_in.bias": 7.0,
        "block[0].modulation.attn.gate.weight": 9.0,
    }
    DIAGNOSTICS.write(
        train,
        [
            {
                **dict.fromkeys(DIAGNOSTICS.columns),
                "step": 0,
                "role": role,
                "gradient_rms": value,
                "update_ratio": 0.5,
                **({"gate_rms": 0.25, "effective_rank": 3.0} if "gate" in role else {}),
                **({"distinct_units": 7} if "mlp_in.weight" in role else {}),
            }
            for role, value in gradients.items()
        ],
    )
    GRADIENT_NOISE.write(train, [dict(zip(GRADIENT_NOISE.columns, (0, 2.0, 80.0, 1.0, 1.0), strict=True))])
    EvaluateRecord(
        strategy=strategy,
        seed=seed,
        run=f"{strategy}-{seed}",
        run_key=f"evaluate-{strategy}-{seed}{version}",
        train_run_key=key,
        status=status,
        num_generated=8,
        num_real=8,
        features=FeatureSpace(extractor="efficientnet_lite0", size=32),
        settings={"evaluate": params["evaluate"]},
        metrics={"frechet_distance": None if diverged else 12.5, "recall": None if diverged else 0.25},
    ).write(evaluate)
    if not diverged:
        Image.new("RGB", (8, 8)).save(evaluate / "grid.png")


def runs() -> dict[str, Run]:
    """The active runs in the store, by name; a name that is there twice is an error."""
    client = MlflowClient(tracking.tracking_uri())
    found = client.search_runs([experiment.experiment_id for experiment in client.search_experiments()])
    assert len({run.info.run_name for run in found}) == len(found)
    return {run.info.run_name: run for run in found}


def history(run: Run, metric: str) -> list[tuple[int, float]]:
    client = MlflowClient(tracking.tracking_uri())
    return sorted((point.step, point.value) for point in client.get_metric_history(run.info.run_id, metric))


def test_every_run_is_there_once_with_all_about_it(study: Path) -> None:
    Timing(seconds=3.0, images_per_second=100.0, hostname="somewhere").write(scratch("train-adaln_zero-0"))
    synced = tracking.sync(study, {"dvc_experiment": "witty-name"})
    assert (len(synced.added), synced.present, synced.missing) == (4, [], [])
    found = runs()
    assert set(found) == {"adaln_zero-0", "adaln_zero-1", "symmetric-0", "symmetric-1"}
    run = found["adaln_zero-0"]
    assert run.info.status == "FINISHED"
    assert run.info.end_time - run.info.start_time == pytest.approx(3000, abs=10)
    assert {
        "strategy": "adaln_zero",
        "seed": "0",
        "train.steps": str(yamlfile.read(study / "params.yaml")["train"]["steps"]),
        "train.validation.seed": "0",
    }.items() <= run.data.params.items()
    assert json.loads(run.data.params["rules"])[0] == {"role": "all", "init": "xavier_uniform"}
    tags = {
        "run_key": "evaluate-adaln_zero-0",
        "dvc.train": "train.dir",
        "dvc.evaluate": "evaluate.dir",
        "hostname": "somewhere",
    }
    assert {**tags, "dvc_experiment": "witty-name"}.items() <= run.data.tags.items()
    assert history(run, "train/mse") == [(0, 1.0), (10, 0.5)]
    assert history(run, "validation/mse") == [(0, 1.0), (20, 0.25)]
    assert history(run, "validation_by_timestep/mse_t0") == [(0, 1.2), (20, 0.3)]
    assert history(run, "gradient_rms/mlp") == [(0, pytest.approx((3**2 / 2 + 4**2 / 2) ** 0.5))]
    assert history(run, "gradient_rms/gates") == [(0, 9.0)]
    assert [history(run, f"{name}") for name in ("gates/attention", "effective_rank/gates", "distinct_units/mlp")] == [
        [(0, 0.25)],
        [(0, 3.0)],
        [(0, 7.0)],
    ]
    assert history(run, "update_ratio/gates") == [(0, 0.5)]
    assert history(run, "gradient_noise/scale") == [(0, 40.0)]
    assert {"evaluation/frechet_distance": 12.5, "time/images_per_second": 100.0}.items() <= run.data.metrics.items()
    pictures = MlflowClient(tracking.tracking_uri()).list_artifacts(run.info.run_id, "images")
    assert any(picture.path.endswith(".png") for picture in pictures)


def test_diverged_run_is_shown_as_such(study: Path) -> None:
    tracking.sync(study)
    run = runs()["symmetric-1"]
    assert run.data.tags["status"] == "diverged"
    assert history(run, "train/mse") == [(0, 1.0)]
    assert "evaluation/frechet_distance" not in run.data.metrics


def test_doing_it_twice_adds_nothing(study: Path) -> None:
    tracking.sync(study)
    before = {name: run.info.run_id for name, run in runs().items()}
    again = tracking.sync(study)
    assert (again.added, len(again.present)) == ([], 4)
    assert {name: run.info.run_id for name, run in runs().items()} == before


def test_what_is_missing_is_filled_in(study: Path) -> None:
    late = study / "runs" / "evaluate" / "symmetric-0"
    shutil.move(late, study / "late")
    assert tracking.sync(study).missing == ["symmetric-0"]
    shutil.move(study / "late", late)
    assert tracking.sync(study).added == ["symmetric-0"]
    assert len(runs()) == 4


def test_a_strategys_start_is_on_all_its_runs_whenever_it_was_analysed(study: Path) -> None:
    tracking.sync(study)
    directory = study / "runs" / "analyse" / "adaln_zero"
    directory.mkdir(parents=True)
    schedule = {"final.projection.weight": 0, "block[0].mlp_in.weight": 2, "block[0].qkv.query.weight": None}
    start = StartRecord(
        strategy="adaln_zero",
        run_key="start",
        awake_step=2,
        predicted_equals_measured=True,
        predicted=schedule,
        not_predicted=None,
        measured=schedule,
        signal=Signal(0.0, 0.0, 1.0, 0.98, 1.0, 0.0, 0.0, [BlockSignal(0, 0.0, 0.0, 1.0, 0.1)]),
        early=[EarlyStep(step, 1.0, 0.0, float(step)) for step in range(2)],
        width_exponent=0.5,
    )
    start.write(directory)
    COORDINATES.write(directory, [vars(Coordinates(64, 1, "block[0]", 0.2, 0.1))])
    weights = (
        RoleGradient(0, "block[0].mlp_in.weight", 0.5, 2.0, 32, None),
        RoleGradient(1, "block[1].mlp_in.weight", 0.25, 4.0, 30, 0.1),
    )
    GRADIENTS.write(directory, [vars(weight) for weight in weights])
    for _ in range(2):
        assert tracking.sync(study).added == []
        assert history(runs()["adaln_zero-1"], "start/label_sensitivity") == [(0, 0.0), (1, 1.0)]
    found = runs()
    assert found["adaln_zero-0"].data.metrics["start/width_exponent"] == 0.5
    assert found["adaln_zero-0"].data.metrics["start/expected_zero_output_mse"] == 1
    assert found["adaln_zero-0"].data.metrics["start/predicted_equals_measured"] == 1
    wake_up = {name: step for name, step in found["adaln_zero-0"].data.metrics.items() if name.startswith("wake_up_measured")}
    assert wake_up == {"wake_up_measured/final.projection": 0, "wake_up_measured/mlp_in": 2}
    assert history(found["adaln_zero-0"], "coordinates/block_0_width_64") == [(1, 0.1)]
    assert history(found["adaln_zero-0"], "start_gradient_stable_rank/mlp") == [(0, 2.0), (1, 4.0)]
    assert {name: run.data.metrics.get("start/awake_step") for name, run in found.items()} == {
        "adaln_zero-0": 2,
        "adaln_zero-1": 2,
        "symmetric-0": None,
        "symmetric-1": None,
    }

    start.model_copy(update={"run_key": "another", "awake_step": 1}).write(directory)
    assert tracking.sync(study).added == ["adaln_zero-1", "adaln_zero-0"]
    assert tracking.sync(study).added == []


def test_evaluation_of_another_training_is_not_shown_as_this_ones(study: Path) -> None:
    directory = study / "runs" / "train" / "symmetric-0"
    TrainRecord.read(directory).model_copy(update={"run_key": "a newer training"}).write(directory)
    assert tracking.sync(study).missing == ["symmetric-0"]


def test_run_that_was_cut_short_is_made_again_unless_somebody_else_is_at_it(study: Path) -> None:
    client = MlflowClient(tracking.tracking_uri())
    experiment = client.create_experiment("photos-32")

    def half_a_run(adder: str) -> str:
        tags = {"run_key": "evaluate-adaln_zero-0", "train_run_key": "train-adaln_zero-0", "added_by": adder}
        return client.create_run(experiment, tags=tags, run_name="half").info.run_id

    ours, others = half_a_run(f"{socket.gethostname()}:{Path.cwd()}"), half_a_run("elsewhere:/study")
    assert "adaln_zero-0" in tracking.sync(study).added
    assert runs()["adaln_zero-0"].info.status == "FINISHED"
    assert client.get_run(ours).info.lifecycle_stage == "deleted"
    assert client.get_run(others).info.lifecycle_stage == "active"


def test_view_shows_the_runs_of_this_study_by_strategy(study: Path) -> None:
    tracking.sync(study)
    params = yamlfile.read(study / "params.yaml")
    make_run(study, params, "adaln_zero", 0, diverged=False, version="-edited")
    synced = tracking.sync(study)
    assert synced.added == ["adaln_zero-0"]
    client = MlflowClient(tracking.tracking_uri())
    experiment = client.get_experiment_by_name("photos-32")
    assert experiment
    saved = json.loads(experiment.tags["mlflow.sharedViewState.photos-32"])
    state = json.loads(saved["state"])
    shown = client.search_runs([experiment.experiment_id], state["searchFilter"])
    assert len(shown) == 4
    assert {run.data.tags["run_key"] for run in shown} >= {"evaluate-adaln_zero-0-edited"}
    assert state["groupBy"] is None
    assert {run.data.tags["mlflow.runColor"] for run in shown} == set(colours("adaln_zero", STRATEGIES).values())
    assert "viewStateShareKey=photos-32" in synced.view


def test_view_of_a_study_with_factors_does_not_average_over_them(study: Path) -> None:
    params = yamlfile.read(study / "params.yaml")
    params["study"]["settings"] = {"slow": {"train.learning_rate": 0.001}, "fast": {"train.learning_rate": 0.004}}
    (study / "params.yaml").write_text(json.dumps(params))
    for name in ("slow", "fast"):
        make_run(study, params, f"adaln_zero-{name}", 0, diverged=False)
    assert sorted(tracking.sync(study).added) == ["adaln_zero-fast-0", "adaln_zero-slow-0"]
    client = MlflowClient(tracking.tracking_uri())
    experiment = client.get_experiment_by_name("photos-32")
    assert experiment
    state = json.loads(json.loads(experiment.tags["mlflow.sharedViewState.photos-32-means"])["state"])
    grouped = [key["groupByData"] for key in state["groupBy"]["groupByKeys"]]
    assert grouped == ["strategy", "train.learning_rate"]
    found = runs()["adaln_zero-fast-0"].data
    assert (found.tags["setting"], found.tags["factor.train.learning_rate"]) == ("fast", "0.004")


@pytest.mark.parametrize("uri", ["http://127.0.0.1:{port}", "postgresql://user:secret@127.0.0.1:{port}/mlflow"])
def test_server_that_is_away_costs_seconds_and_loses_nothing(study: Path, monkeypatch: pytest.MonkeyPatch, uri: str) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri.format(port=unused.getsockname()[1]))
        started = time.monotonic()
        with pytest.raises(UnreachableError, match="cannot be reached; nothing is lost") as error:
            tracking.sync(study)
        assert time.monotonic() - started < 30
    assert "secret" not in str(error.value)
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    assert len(tracking.sync(study).added) == 4


def test_server_that_does_not_answer_costs_seconds(study: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{silent.getsockname()[1]}")
        started = time.monotonic()
        with pytest.raises(UnreachableError):
            tracking.sync(study)
        assert time.monotonic() - started < 30


def damage_by_garbage(store: Path) -> None:
    store.write_bytes(b"garbage" * 1000)


def damage_by_cutting_off(store: Path) -> None:
    with sqlite3.connect(store) as database:
        database.execute("CREATE TABLE runs (name TEXT)")
        database.executemany("INSERT INTO runs VALUES (?)", [("x" * 500,)] * 100)
    database.close()
    store.write_bytes(store.read_bytes()[:20_000])


@pytest.mark.parametrize("damage", [damage_by_garbage, damage_by_cutting_off, Path.mkdir])
def test_a_damaged_store_is_one_message_that_says_what_to_do(study: Path, damage: Callable[[Path], None]) -> None:
    (study / "mlflow.db").unlink()
    damage(study / "mlflow.db")
    with pytest.raises(UnreachableError, match=r"mlflow\.db is damaged .*: move it away, and `make mlflow` fills") as error:
        tracking.sync(study)
    assert len(str(error.value).splitlines()) == 1
    shutil.move(study / "mlflow.db", study / "moved")
    assert len(tracking.sync(study).added) == 4


def test_a_store_that_another_program_has_locked_costs_seconds(study: Path) -> None:
    with sqlite3.connect(study / "mlflow.db") as busy:
        busy.execute("BEGIN EXCLUSIVE")
        with pytest.raises(UnreachableError, match="cannot be used: database is locked; nothing is lost"):
            tracking.sync(study)


@contextmanager
def server(answer: Callable[[socket.socket, bytes], None]) -> Iterator[str]:
    """The address of a server that does with each connection, and the first bytes of its request, what `answer` says."""

    def serve(listening: socket.socket) -> None:
        with suppress(OSError):
            while True:
                connection, _ = listening.accept()
                threading.Thread(target=handle, args=(connection,), daemon=True).start()

    def handle(connection: socket.socket) -> None:
        with connection, suppress(OSError):
            answer(connection, connection.recv(1 << 16))

    with socket.create_server(("127.0.0.1", 0)) as listening:
        threading.Thread(target=serve, args=(listening,), daemon=True).start()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"


def respond(body: bytes) -> Callable[[socket.socket, bytes], None]:
    head = f"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    return lambda connection, _request: connection.sendall(head.encode() + body)


def drip(connection: socket.socket, request: bytes) -> None:
    if b"/health" in request:
        respond(b"OK")(connection, request)
        return
    connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")
    while True:
        connection.sendall(b" ")
        time.sleep(0.2)


def pour(connection: socket.socket, _request: bytes) -> None:
    connection.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
    while True:
        connection.sendall(b"x" * 4096)


ODD_RUN = b'{"experiment": {"experiment_id": "1", "lifecycle_stage": "active"}, "runs": [{"info": {"status": "FINISHED"}}]}'


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (drip, "did not finish in 3 s; nothing is lost"),
        (pour, "answers without end, so it is no MLflow; nothing is lost"),
        (respond(b"{broken"), "does not take runs: .*; nothing is lost"),
        (respond(b"[1]"), "does not take runs: .*; nothing is lost"),
        (respond(ODD_RUN), "does not take runs: .*; nothing is lost"),
    ],
)
def test_a_server_that_answers_nonsense_or_never_ends_is_one_message(
    study: Path, monkeypatch: pytest.MonkeyPatch, answer: Callable[[socket.socket, bytes], None], message: str
) -> None:
    monkeypatch.setattr(tracking, "SECONDS", 3.0)
    monkeypatch.setattr(tracking, "SECONDS_PER_RUN", 0.0)
    with server(answer) as uri:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        begun = time.monotonic()
        with pytest.raises(UnreachableError, match=message) as error:
            tracking.sync(study)
        assert time.monotonic() - begun < 50
        assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("location", "reason"),
    [
        (
            "s3://bucket/x",
            r"files at its artifact location s3://bucket/x/\w+/artifacts: .*(boto|credentials)",
        ),  # mlflow/mlflow#2150
        ("/proc/mlruns", r"files at its artifact location /proc/mlruns/\w+/artifacts: .*No such file"),  # mlflow/mlflow#810
        ("http://127.0.0.1:9/api", r"files at its artifact location http://127.0.0.1:9/api/\w+/artifacts: .*127.0.0.1"),
        ("nonsense://x", r"files at its artifact location nonsense://x/\w+/artifacts: .*nonsense"),
    ],
)
def test_an_artifact_location_that_cannot_be_reached_is_named_and_leaves_no_half_run(
    study: Path, location: str, reason: str
) -> None:
    client = MlflowClient(tracking.tracking_uri())
    experiment = client.create_experiment("photos-32", artifact_location=location)
    with pytest.raises(UnreachableError, match=reason) as error:
        tracking.sync(study)
    assert len(str(error.value).splitlines()) == 1
    assert "nothing is lost, `make mlflow` catches up" in str(error.value)
    assert all(run.info.status == "FINISHED" for run in client.search_runs([experiment]))
    client.rename_experiment(experiment, "moved away")
    assert len(tracking.sync(study).added) == 4


def test_an_artifact_store_that_never_ends_has_a_deadline(study: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking, "ARTIFACT_SECONDS", 2.0)
    client = MlflowClient(tracking.tracking_uri())
    with server(drip) as uri:
        experiment = client.create_experiment("photos-32", artifact_location=f"{uri}/files")
        with pytest.raises(UnreachableError, match=r"artifact location http://.*: it did not finish in 2 s; nothing is lost"):
            tracking.sync(study)
    assert all(run.info.status == "FINISHED" for run in client.search_runs([experiment]))


def test_a_folder_of_the_servers_machine_is_not_made_on_this_one() -> None:
    """mlflow/mlflow#2744 and #212: with a folder as artifact root, a client writes to a folder of that name of its own."""
    assert mlflow_store.local_folder("/root/mlruns/1/abc/artifacts") == Path("/root/mlruns/1/abc/artifacts")
    assert mlflow_store.local_folder("file:///media/slow%20data/1") == Path("/media/slow data/1")
    assert mlflow_store.local_folder("mlflow-artifacts:/1/abc/artifacts") is None
    assert mlflow_store.is_elsewhere("https://tracking.example.org:5000")
    for here in ("http://127.0.0.1:5000", "http://localhost:5000", "sqlite:///mlflow.db"):
        assert not mlflow_store.is_elsewhere(here)


def test_experiment_deleted_in_mlflow_is_a_clear_error(study: Path) -> None:
    client = MlflowClient(tracking.tracking_uri())
    client.delete_experiment(client.create_experiment("photos-32"))
    with pytest.raises(UserError, match=r"was deleted there; restore it, or change study\.name"):
        tracking.sync(study)


def test_what_the_view_relies_on_is_in_the_installed_mlflow() -> None:
    scripts = Path(mlflow.__file__).parent / "server/js/build/static/js"
    pages = "\n".join(file.read_text(errors="replace") for file in scripts.glob("*.js"))
    view = View("study", ("train.learning_rate",), frozenset({"train.learning_rate"}))
    used = [SHARED, "mlflow.runColor", *TRAINING.split("="), "viewStateShareKey", "compareRunsMode", "custom_model_development"]
    used += [
        "compareRunCharts",
        "compareRunSections",
        "isAccordionReordered",
        "selectedColumns",
        "runsHiddenMode",
        "searchFilter",
    ]
    used += ["orderByKey", "orderByAsc", "groupByKeys", "metricSectionId", "selectedParams", "selectedMetrics", "showAllRuns"]
    used += [
        '"SHOW_ALL"',
        '"LINE"',
        '"BAR"',
        '"SCATTER"',
        '"PARALLEL"',
        '"CONTOUR"',
        'scaleType="linear"',
        "runsCountToCompare",
    ]
    assert view.address("1").startswith("/#/experiments/1/runs?")
    missing = [name for name in used if name not in pages]
    assert not missing, f"MLflow {mlflow.__version__} has no {missing} in its pages: look at pipelines/mlflow_view.py"


def train_a_little(folder: Path, *, rows: int) -> None:
    """What a run leaves in its scratch folder after some logged steps, the last line not yet complete."""
    header, lines = (
        "step,loss,mse,gradient_norm,learning_rate",
        [f"{10 * row},2.0,{1 / (row + 1)},1.0,0.001" for row in range(rows)],
    )
    (folder / "metrics.csv").write_text("\n".join([header, *lines, "9999,2.0,0.0"]))
    (folder / "validation.csv").write_text("step,weights,mse,mse_t0\n0,model,1.0,1.1\n0,ema,1.0,1.2\n")


def test_a_run_appears_while_it_trains_and_is_completed_not_doubled(study: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "EVERY_SECONDS", 0.05)
    record = TrainRecord.read(study / "runs/train/adaln_zero-0")
    folder = scratch("resumable")
    shared = {"parameters": record.parameters, "device": record.device, "settings": record.settings}
    RunningRecord(run="adaln_zero-0", run_key=record.run_key, folder=str(study), **shared).write(folder)
    pages: list[str] = []
    with live.Live(study, {}, pages.append):
        for rows in (1, 2):
            train_a_little(folder, rows=rows)
            wait_for(lambda rows=rows: len(history(runs()["adaln_zero-0"], "train/mse")) == rows)
            assert runs()["adaln_zero-0"].info.status == "RUNNING"
    assert len(pages) == 1
    seen = runs()["adaln_zero-0"]
    assert (seen.info.status, seen.data.tags["outcome"]) == ("KILLED", "training")
    Timing(seconds=0.01, images_per_second=100.0, hostname="somewhere").write(scratch("train-adaln_zero-0"))
    assert len(tracking.sync(study).added) == 4
    run = runs()["adaln_zero-0"]
    assert run.info.end_time - run.info.start_time == 10  # the time of its training, not of the study
    assert (run.info.run_id, run.info.status, run.data.tags["outcome"]) == (seen.info.run_id, "FINISHED", "finished")
    assert history(run, "train/mse") == [(0, 1.0), (10, 0.5)]
    assert history(run, "validation/mse") == [(0, 1.0), (20, 0.25)]
    assert tracking.sync(study).added == []


def wait_for(reached: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        with suppress(KeyError):
            if reached():
                return
        time.sleep(0.1)
    raise AssertionError("not reached in 60 s")


def test_a_store_that_is_away_costs_a_running_study_nothing(study: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "EVERY_SECONDS", 0.05)
    with server(drip) as uri:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        begun = time.monotonic()
        with live.Live(study, {}, pytest.fail):
            time.sleep(0.2)
        assert time.monotonic() - begun < live.END_SECONDS + 30


def test_runs_have_their_difference_to_the_baseline_at_the_same_seed(study: Path) -> None:
    directory = study / "runs" / "train" / "symmetric-0"
    TrainRecord.read(directory).model_copy(update={"final": Final(0.5, 0.3, 0.3)}).write(directory)
    tracking.sync(study)
    found = runs()
    assert found["symmetric-0"].data.metrics[DIFFERENCE] == pytest.approx(20)
    assert found["adaln_zero-0"].data.metrics[DIFFERENCE] == 0
    assert DIFFERENCE not in found["symmetric-1"].data.metrics


def test_quick_trials_have_an_experiment_and_names_of_their_own(study: Path) -> None:
    tracking.sync(study)
    synced = tracking.sync(study, {"dvc_experiment": "study-abc", "trial": "train.steps=20"})
    assert (synced.experiment, len(synced.added)) == ("photos-32-trials", 4)
    assert {name for name in runs() if "(" in name} == {
        f"{run}-{seed} (train.steps=20)" for run in STRATEGIES for seed in SEEDS
    }
