"""A sweep without an account: what is drawn, what a kill leaves, who is stopped, what is written."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.fakes import write_checkpoint
from weakmedsam.errors import ConfigError, DataError
from weakmedsam.run.request import EXPERIMENTS
from weakmedsam.sweep import local_runner
from weakmedsam.sweep.agent import main, stage_command, words_of
from weakmedsam.sweep.definition import PROGRAMS, Sweep, read_definition
from weakmedsam.sweep.local_runner import run_local, visible_gpus
from weakmedsam.sweep.trials import Trials, sample
from weakmedsam.system.atomic_io import read_table
from weakmedsam.system.signals import REQUEUE, Relay

# Stands in for a training: one row an epoch, the better the higher the learning rate.
TRAINING = """
import sys, time
from pathlib import Path
words = dict(word[2:].split("=") for word in sys.argv[1:] if "=" in word)
folder = Path(sys.argv[sys.argv.index("--trainer.default_root_dir") + 1])
rate, text = float(words["model.rate"]), "epoch,val/score\\n"
if rate > 0.9:
    sys.exit("weakmedsam: ConfigError: model.rate is too high")
for epoch in range(8):
    text += f"{epoch},{rate * (epoch + 1) / 8}\\n"
    (folder / "history.csv").write_text(text)
    time.sleep(0.05 + 0.1 * (rate < 0.3))
"""


def sweep_of(folder, parameters, program="segment", **changes):
    definition = {"method": "random", "metric": {"name": PROGRAMS[program].metrics[0], "goal": "maximize"}}
    definition |= {"program": program, "parameters": parameters, **changes}
    words = ["fit"] if program != "pam" else [str(folder / "features")]
    return Sweep("own", definition, PROGRAMS[program], folder / "sweep", words)


@pytest.fixture
def trained(tmp_path, monkeypatch):
    """The stand-in takes the place of the stage's command."""
    script = tmp_path / "training.py"
    script.write_text(TRAINING)
    record = Relay.start

    def start(self, command, environment, log, held):
        (tmp_path / "devices").open("a").write(f"{environment.get('CUDA_VISIBLE_DEVICES')}\n")
        return record(self, [sys.executable, str(script), *command[3:]], environment, log, held)

    monkeypatch.setattr(Relay, "start", start)
    monkeypatch.setattr(local_runner, "LOOK", 0.02)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    return tmp_path


@pytest.fixture
def scored(monkeypatch):
    """Stored features that score a setting by its beta."""
    asked = []

    def score(folder, changes):
        asked.append(changes)
        return {"val/pam_dice": changes["affinity.beta"] / 10, "val/cam_dice": 0.1}

    monkeypatch.setattr("weakmedsam.pam.feature_cache.score_setting", score)
    return asked


PAM = {"model.pam.affinity.beta": {"min": 0.5, "max": 8.0}, "model.pam.walk.steps": {"values": [0, 4, 16]}}


def test_eight_settings_of_pam_give_a_table_best_first_and_plots(tmp_path, scored, capsys):
    sweep = sweep_of(tmp_path, PAM, "pam")
    run_local(sweep, 8)
    rows = read_table(sweep.folder / "table.csv")
    assert sorted(row["trial"] for row in rows) == [str(n) for n in range(8)]
    assert len({row["model.pam.affinity.beta"] for row in rows}) == 8
    values = [float(row["val/pam_dice"]) for row in rows]
    assert values == sorted(values, reverse=True)
    for row in rows:
        changes = scored[int(row["trial"])]
        assert float(row["val/pam_dice"]) == pytest.approx(changes["affinity.beta"] / 10, rel=1e-5)
        assert int(row["model.pam.walk.steps"]) == changes["walk.steps"]
    best = max(scored, key=lambda changes: changes["affinity.beta"])
    assert f"--model.pam.affinity.beta={best['affinity.beta']}" in capsys.readouterr().out.replace("\n", " ")
    for name in ("parallel", "history", "importances"):
        assert (sweep.folder / f"{name}.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize("method", ["random", "bayes"])
def test_a_killed_sweep_goes_on_and_ends_as_an_uninterrupted_one(tmp_path, scored, monkeypatch, method):
    whole = sweep_of(tmp_path / "whole", PAM, "pam", method=method)
    run_local(whole, 6)
    broken = sweep_of(tmp_path / "broken", PAM, "pam", method=method)
    close = Trials.close

    def killed(self, number, *arguments):
        if number == 3:
            raise KeyboardInterrupt
        close(self, number, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Trials, "close", killed)
        with pytest.raises(KeyboardInterrupt):
            run_local(broken, 6)
    states = {row["trial"]: row["state"] for row in read_table(broken.folder / "table.csv")}
    assert states == dict.fromkeys("012", "finished") | {"3": "running"}
    run_local(broken, 6)
    tables = [read_table(sweep.folder / "table.csv") for sweep in (whole, broken)]
    assert [{**row, "seconds": ""} for row in tables[0]] == [{**row, "seconds": ""} for row in tables[1]]
    asked = len(scored)
    run_local(broken, 6)
    assert len(scored) == asked  # nothing is run twice


def test_a_trial_that_somebody_runs_is_left_to_them(tmp_path, scored):
    sweep = sweep_of(tmp_path, PAM, "pam")
    others = Trials(sweep)
    assert others.take(3).number == 0
    run_local(sweep, 3)
    rows = {row["trial"]: row["state"] for row in read_table(sweep.folder / "table.csv")}
    assert rows == {"0": "running", "1": "finished", "2": "finished"}
    others.release(0)  # as a death does
    run_local(sweep, 3)
    assert len(scored) == 3
    assert {row["state"] for row in read_table(sweep.folder / "table.csv")} == {"finished"}


CALL = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from weakmedsam.sweep import local_runner
from weakmedsam.system.signals import Relay
from test_local_runner import sweep_of
folder, record = Path(sys.argv[1]), Relay.start
training = [sys.executable, str(folder / "training.py")]
Relay.start = lambda self, command, *more: record(self, training + command[3:], *more)
local_runner.LOOK = 0.02
sweep = sweep_of(folder, {"model.rate": {"values": [0.4, 0.5, 0.6, 0.7]}}, method="grid")
local_runner.run_local(sweep, int(sys.argv[3]), 1)
"""


def call(folder, count):
    words = [sys.executable, "-c", CALL, str(folder), str(Path(__file__).parent), str(count)]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def test_after_a_kill_of_the_sweep_alone_its_trial_ends_before_the_sweep_goes_on_with_it(tmp_path):
    """SIGKILL of one process leaves what it had started; nothing else may write there meanwhile."""
    waits = """
with (folder / "starts").open("a") as file:
    file.write("x")
while folder.name == "000" and (folder.parents[2] / "wait").exists():
    time.sleep(0.02)
for epoch"""
    (tmp_path / "training.py").write_text(TRAINING.replace("for epoch", waits))
    (tmp_path / "wait").touch()
    starts = tmp_path / "sweep/trials/000/starts"
    sweep, until = call(tmp_path, 2), time.monotonic() + 120
    while not starts.exists():
        assert sweep.poll() is None
        assert time.monotonic() < until
        time.sleep(0.02)
    sweep.kill()
    sweep.wait()
    again = call(tmp_path, 2)
    said, _ = again.communicate(timeout=120)
    assert again.returncode == 0, said
    assert "still run by other processes: trial 0" in said
    assert starts.read_text() == "x"
    (tmp_path / "wait").unlink()
    while any(row["state"] == "running" for row in read_table(tmp_path / "sweep/table.csv")):
        assert time.monotonic() < until
        again = call(tmp_path, 2)
        said, _ = again.communicate(timeout=120)
        assert again.returncode == 0, said
    assert starts.read_text() == "xx"
    assert [row["state"] for row in read_table(tmp_path / "sweep/table.csv")] == ["finished", "finished"]


def test_two_calls_at_once_share_a_study(tmp_path):
    record = '(folder / "starts").open("a").write("x")\nfor epoch'
    (tmp_path / "training.py").write_text(TRAINING.replace("for epoch", record))
    for process in [call(tmp_path, 4) for _ in range(2)]:
        said, _ = process.communicate(timeout=120)
        assert process.returncode == 0, said
    rows = read_table(tmp_path / "sweep/table.csv")
    assert [row["model.rate"] for row in rows] == ["0.7", "0.6", "0.5", "0.4"]
    assert [(tmp_path / f"sweep/trials/00{n}/starts").read_text() for n in range(4)] == ["x"] * 4
    assert not (tmp_path / "sweep/trials/004").exists()


def test_a_grid_ends_when_it_is_through(tmp_path, scored):
    grid = {"model.pam.affinity.beta": {"values": [1.0, 2.0]}, "model.pam.walk.steps": {"values": [0, 4]}}
    sweep = sweep_of(tmp_path, grid, "pam", method="grid")
    run_local(sweep, 20)
    rows = read_table(sweep.folder / "table.csv")
    assert len({(row["model.pam.affinity.beta"], row["model.pam.walk.steps"]) for row in rows}) == len(rows) == 4


def test_bayes_learns_from_the_runs_before(tmp_path, scored):
    sweep = sweep_of(tmp_path, {"model.pam.affinity.beta": {"min": 0.0, "max": 8.0}}, "pam", method="bayes")
    run_local(sweep, 30)
    betas = [changes["affinity.beta"] for changes in scored]
    assert sum(betas[20:]) / 10 > 5.8  # by chance 4, with a deviation of 0.7


def test_runs_at_once_and_the_worst_is_stopped(trained):
    early = {"type": "hyperband", "min_iter": 2, "eta": 2}
    rates = {"model.rate": {"values": [0.1, 0.7, 0.8]}}
    sweep = sweep_of(trained, rates, method="grid", early_terminate=early)
    run_local(sweep, 3, jobs=3)
    rows = {float(row["model.rate"]): row for row in read_table(sweep.folder / "table.csv")}
    assert rows[0.8]["state"] == "finished"  # 0.7 too, unless it comes to a look after 0.8
    assert float(rows[0.8]["val/score"]) == pytest.approx(0.8)
    assert rows[0.1]["state"] == "stopped"
    assert float(rows[0.1]["val/score"]) < 0.1


def test_each_run_has_a_gpu_of_its_own(trained, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    sweep = sweep_of(trained, {"model.rate": {"values": [0.4, 0.5, 0.6]}}, method="grid")
    run_local(sweep, 3)
    devices = (trained / "devices").read_text().split()
    assert set(devices[:2]) == {"3", "5"}
    assert devices[2] in ("3", "5")


def test_a_signal_ends_the_sweep_and_the_same_command_goes_on_with_the_runs_that_were_on(trained, monkeypatch):
    sweep = sweep_of(trained, {"model.rate": {"values": [0.1, 0.5]}}, method="grid")
    look, seen = local_runner._look, []

    def at_the_third_look(*arguments):
        seen.append(arguments)
        if len(seen) == 3:
            os.kill(os.getpid(), signal.SIGUSR1)
        return look(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(local_runner, "_look", at_the_third_look)
        with pytest.raises(SystemExit) as left:
            run_local(sweep, 2)
    assert left.value.code == REQUEUE
    (row,) = read_table(sweep.folder / "table.csv")  # no other was begun
    assert row["state"] == "running"
    run_local(sweep, 2)
    assert [row["state"] for row in read_table(sweep.folder / "table.csv")] == ["finished"] * 2


def test_a_failed_run_is_listed_and_the_sweep_goes_on(trained):
    sweep = sweep_of(trained, {"model.rate": {"values": [0.95, 0.5]}}, method="grid")
    run_local(sweep, 2)
    rows = {float(row["model.rate"]): row for row in read_table(sweep.folder / "table.csv")}
    assert (rows[0.95]["state"], rows[0.95]["val/score"]) == ("failed", "")
    assert rows[0.5]["state"] == "finished"


def test_when_all_runs_fail_the_last_ones_message_is_shown(trained):
    sweep = sweep_of(trained, {"model.rate": {"min": 0.91, "max": 0.99}})
    with pytest.raises(ConfigError, match=r"3 trials failed and none finished.*model\.rate is too high"):
        run_local(sweep, 20)


def test_a_metric_that_the_runs_do_not_log_is_named_with_those_they_log(trained):
    metric = {"name": "val/score/spleen", "goal": "maximize"}
    sweep = sweep_of(trained, {"model.rate": {"values": [0.5]}}, metric=metric)
    with pytest.raises(ConfigError, match=r"log no val/score/spleen; they log val/score"):
        run_local(sweep, 1)


def test_a_metric_of_a_class_that_is_not_there_is_named(tmp_path, scored):
    sweep = sweep_of(tmp_path, PAM, "pam", metric={"name": "val/pam_dice/spleen", "goal": "maximize"})
    with pytest.raises(ConfigError, match="'val/pam_dice/spleen' is not scored; there are val/pam_dice, val/cam_dice"):
        run_local(sweep, 1)


def test_less_can_be_better(tmp_path, scored, capsys):
    sweep = sweep_of(tmp_path, PAM, "pam", metric={"name": "val/pam_dice", "goal": "minimize"})
    run_local(sweep, 4)
    least = min(changes["affinity.beta"] for changes in scored)
    assert f"--model.pam.affinity.beta={least}" in capsys.readouterr().out.replace("\n", " ")


def test_the_same_seed_draws_the_same():
    definition = read_definition(EXPERIMENTS / "sweeps/sce.yaml")
    assert sample(definition, [], 3) == sample(definition, [], 3) != sample(definition, [], 4)
    assert words_of({"a.b": 1, "c": "top_k", "d": 0.5}) == ["--a.b=1", "--c=top_k", "--d=0.5"]


def test_gpus_are_those_that_the_process_may_use(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert visible_gpus() == []
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,GPU-7")
    assert visible_gpus() == ["2", "GPU-7"]


def test_a_run_of_wandbs_agent_has_a_folder_of_its_own_and_goes_on_there(tmp_path, monkeypatch):
    last = tmp_path / "trials/k3j/checkpoints/last.ckpt"
    for path in (last, last.with_name("best.ckpt")):
        write_checkpoint(path)
    became = []
    monkeypatch.setenv("WANDB_RUN_ID", "k3j")
    monkeypatch.setattr("os.execv", lambda program, words: became.append(words) or sys.exit(0))
    with pytest.raises(SystemExit):
        main([str(tmp_path), "fit", "--config", "a.yaml", "--model.sce.sub_classes.number=4"])
    (words,) = became
    folder = tmp_path / "trials/k3j"
    assert words[1:] == [
        "-m", "weakmedsam", "fit", "--config", "a.yaml", "--model.sce.sub_classes.number=4",
        "--trainer.default_root_dir", str(folder), "--ckpt_path", str(last),
    ]  # fmt: skip
    assert "--ckpt_path" not in stage_command(tmp_path / "trials/new", ["fit"])


def test_a_setting_of_pam_drawn_by_wandbs_agent_is_scored_and_logged(tmp_path, scored, monkeypatch):
    monkeypatch.setenv("WANDB_RUN_ID", "p1")
    monkeypatch.setenv("WANDB_MODE", "disabled")
    main(
        [
            str(tmp_path),
            str(tmp_path / "features"),
            "--model.pam.affinity.beta=2.5",
            "--model.pam.walk.steps=4",
        ]
    )
    assert scored == [{"affinity.beta": 2.5, "walk.steps": 4}]
    assert json.loads((tmp_path / "trials/p1/scores.json").read_text())["val/pam_dice"] == 0.25


def test_trials_that_a_removed_journal_held_are_put_aside(tmp_path):
    sweep = sweep_of(tmp_path, {"model.rate": {"min": 0.1, "max": 0.8}})
    trials = Trials(sweep)
    drawn = [trials.values(trials.take(3)) for _ in range(3)]
    trials.folder(1).mkdir(parents=True)
    for number in range(3):
        trials.release(number)
    (sweep.folder / "journal.log").unlink()
    again = Trials(sweep)
    assert [again.values(again.take(3)) for _ in range(3)] == drawn  # a random search draws the same
    assert (sweep.folder / "trials/001.old1").is_dir()


@pytest.mark.parametrize("content", [None, b"{\n{}\n", b"[1]\n", b"\xff\n\n", b'{"op_code": 99}\n'])
def test_a_damaged_journal_is_named_with_the_mend(tmp_path, content):
    sweep = sweep_of(tmp_path, {"model.rate": {"min": 0.1, "max": 0.8}})
    path = sweep.folder / "journal.log"
    path.parent.mkdir(parents=True)
    if content is None:
        path.mkdir()
    else:
        path.write_bytes(content)
    with pytest.raises(DataError, match=r"journal\.log is damaged .*: remove it"):
        Trials(sweep)


def test_a_line_of_the_journal_that_a_full_disk_has_cut_is_written_anew(tmp_path):
    sweep = sweep_of(tmp_path, {"model.rate": {"min": 0.1, "max": 0.8}})
    trials = Trials(sweep)
    drawn = [trials.values(trials.take(2)) for _ in range(2)]
    for number in range(2):
        trials.release(number)
    path = sweep.folder / "journal.log"
    path.write_bytes(path.read_bytes()[:-9])
    again = Trials(sweep)
    assert len(again.all) == 1
    assert [again.values(again.take(2)) for _ in range(2)] == drawn


def test_a_damaged_table_of_a_trial_counts_as_far_as_it_can_be_read(tmp_path):
    trials = Trials(sweep_of(tmp_path, {"model.rate": {"min": 0.1, "max": 0.8}}))
    path = trials.folder(0) / "history.csv"
    path.parent.mkdir(parents=True)
    path.write_text("epoch,val/score\n0,0.5\n1,?\n2,0.25\n3\n4,nan\n")
    assert trials.history(0) == [0.5, 0.25]
    path.write_bytes(b"\xff\xfe")
    assert trials.history(0) == []
