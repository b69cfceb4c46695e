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
from weakmedsam import sweep_local
from weakmedsam.errors import ConfigError
from weakmedsam.run.stages import EXPERIMENTS
from weakmedsam.sweep import PROGRAMS, Sweep, read_definition
from weakmedsam.sweep_ledger import Ledger, draw, words_of
from weakmedsam.sweep_local import run_local, visible_gpus
from weakmedsam.sweep_run import main, stage_command
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

    def start(self, command, environment, log):
        (tmp_path / "devices").open("a").write(f"{environment.get('CUDA_VISIBLE_DEVICES')}\n")
        return record(self, [sys.executable, str(script), *command[3:]], environment, log)

    monkeypatch.setattr(Relay, "start", start)
    monkeypatch.setattr(sweep_local, "LOOK", 0.02)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    return tmp_path


@pytest.fixture
def scored(monkeypatch):
    """Stored features that score a setting by its beta."""
    asked = []

    def score(folder, changes):
        asked.append(changes)
        return {"val/pam_dice": changes["beta"] / 10, "val/cam_dice": 0.1}

    monkeypatch.setattr("weakmedsam.pam.feature_cache.score", score)
    return asked


PAM = {"model.pam.affinity.beta": {"min": 0.5, "max": 8.0}, "model.pam.walk.steps": {"values": [0, 4, 16]}}


def test_eight_settings_of_pam_give_a_table_and_a_picture(tmp_path, scored, capsys):
    sweep = sweep_of(tmp_path, PAM, "pam")
    run_local(sweep, 8)
    rows = read_table(sweep.folder / "table.csv")
    assert [row["run"] for row in rows] == [str(n) for n in range(8)]
    assert len({row["model.pam.affinity.beta"] for row in rows}) == 8
    for row, changes in zip(rows, scored, strict=True):
        assert float(row["val/pam_dice"]) == pytest.approx(changes["beta"] / 10, rel=1e-5)
        assert int(row["model.pam.walk.steps"]) == changes["steps"]
    best = max(scored, key=lambda changes: changes["beta"])
    assert f"--model.pam.affinity.beta={best['beta']}" in capsys.readouterr().out.replace("\n", " ")
    assert (sweep.folder / "parallel.png").read_bytes()[:4] == b"\x89PNG"


def test_a_killed_sweep_goes_on_and_ends_as_an_uninterrupted_one(tmp_path, scored, monkeypatch):
    whole = sweep_of(tmp_path / "whole", PAM, "pam")
    run_local(whole, 6)
    broken = sweep_of(tmp_path / "broken", PAM, "pam")
    close = Ledger.close

    def killed(self, trial, *arguments):
        if trial.number == 3:
            raise KeyboardInterrupt
        close(self, trial, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Ledger, "close", killed)
        with pytest.raises(KeyboardInterrupt):
            run_local(broken, 6)
    assert json.loads((broken.folder / "trials/003/trial.json").read_text())["state"] == "running"
    run_local(broken, 6)
    tables = [read_table(sweep.folder / "table.csv") for sweep in (whole, broken)]
    assert [{**row, "seconds": ""} for row in tables[0]] == [{**row, "seconds": ""} for row in tables[1]]
    asked = len(scored)
    run_local(broken, 6)
    assert len(scored) == asked  # nothing is run twice


ALONE = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from weakmedsam import sweep_local
from weakmedsam.system.file_lock import alone
from weakmedsam.system.signals import Relay
from test_sweep_local import sweep_of
folder, record = Path(sys.argv[1]), Relay.start
training = [sys.executable, str(folder / "training.py")]
Relay.start = lambda self, command, environment, log: record(self, training + command[3:], environment, log)
sweep_local.LOOK = 0.02
sweep = sweep_of(folder, {"model.rate": {"values": [0.5, 0.6]}}, method="grid")
with alone(sweep.folder) as lock:
    sweep_local.run_local(sweep, 2, 1, [lock])
"""


def test_after_a_kill_of_the_sweep_alone_its_run_ends_before_the_sweep_goes_on(tmp_path):
    """SIGKILL of one process leaves what it had started; nothing else may write there meanwhile."""
    waits = "while (folder / 'wait').exists(): time.sleep(0.02)\nfor epoch"
    (tmp_path / "training.py").write_text(TRAINING.replace("for epoch", waits))
    first = tmp_path / "sweep/trials/000"
    first.mkdir(parents=True)
    (first / "wait").touch()
    words = [sys.executable, "-c", ALONE, str(tmp_path), str(Path(__file__).parent)]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    sweep = subprocess.Popen(words, env=environment)
    until = time.monotonic() + 120
    while not (first / "log.txt").exists():
        assert sweep.poll() is None
        assert time.monotonic() < until
        time.sleep(0.02)
    sweep.kill()
    sweep.wait()
    again = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert "is being worked on by process" in again.stderr
    (first / "wait").unlink()
    while "is being worked on" in again.stderr:
        assert time.monotonic() < until
        time.sleep(0.1)
        again = subprocess.run(
            words, env=environment, capture_output=True, text=True, timeout=120, check=False
        )
    assert again.returncode == 0, again.stderr
    assert [row["state"] for row in read_table(tmp_path / "sweep/table.csv")] == ["finished", "finished"]


def test_a_grid_ends_when_it_is_through(tmp_path, scored):
    grid = {"model.pam.affinity.beta": {"values": [1.0, 2.0]}, "model.pam.walk.steps": {"values": [0, 4]}}
    sweep = sweep_of(tmp_path, grid, "pam", method="grid")
    run_local(sweep, 20)
    rows = read_table(sweep.folder / "table.csv")
    assert (
        len({(row["model.pam.affinity.beta"], row["model.pam.walk.steps"]) for row in rows}) == len(rows) == 4
    )


def test_bayes_learns_from_the_runs_before(tmp_path, scored):
    sweep = sweep_of(tmp_path, {"model.pam.affinity.beta": {"min": 0.0, "max": 8.0}}, "pam", method="bayes")
    run_local(sweep, 12)
    betas = [changes["beta"] for changes in scored]
    assert sum(betas[6:]) / 6 > 5.5  # by chance 4, with a deviation of 0.9


def test_runs_at_once_and_the_worst_is_stopped(trained):
    early = {"type": "hyperband", "min_iter": 2, "eta": 2}
    rates = {"model.rate": {"values": [0.1, 0.7, 0.8]}}
    sweep = sweep_of(trained, rates, method="grid", early_terminate=early)
    run_local(sweep, 3, jobs=3)
    rows = {float(row["model.rate"]): row for row in read_table(sweep.folder / "table.csv")}
    assert rows[0.7]["state"] == rows[0.8]["state"] == "finished"
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


def test_a_signal_ends_the_sweep_and_the_same_command_goes_on_with_the_runs_that_were_on(
    trained, monkeypatch
):
    sweep = sweep_of(trained, {"model.rate": {"values": [0.1, 0.5]}}, method="grid")
    look, seen = sweep_local._look, []

    def at_the_third_look(*arguments):
        seen.append(arguments)
        if len(seen) == 3:
            os.kill(os.getpid(), signal.SIGUSR1)
        look(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(sweep_local, "_look", at_the_third_look)
        with pytest.raises(SystemExit) as left:
            run_local(sweep, 2)
    assert left.value.code == REQUEUE
    (path,) = sweep.folder.glob("trials/*/trial.json")  # no other was begun
    assert json.loads(path.read_text())["state"] == "running"
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
    with pytest.raises(ConfigError, match=r"3 runs failed and none finished.*model\.rate is too high"):
        run_local(sweep, 20)


def test_a_metric_that_the_runs_do_not_log_is_named_with_those_they_log(trained):
    metric = {"name": "val/score/spleen", "goal": "maximize"}
    sweep = sweep_of(trained, {"model.rate": {"values": [0.5]}}, metric=metric)
    with pytest.raises(ConfigError, match=r"log no val/score/spleen; they log val/score"):
        run_local(sweep, 1)


def test_a_metric_of_a_class_that_is_not_there_is_named(tmp_path, scored):
    sweep = sweep_of(tmp_path, PAM, "pam", metric={"name": "val/pam_dice/spleen", "goal": "maximize"})
    with pytest.raises(
        ConfigError, match="'val/pam_dice/spleen' is not scored; there are val/pam_dice, val/cam_dice"
    ):
        run_local(sweep, 1)


def test_less_can_be_better(tmp_path, scored, capsys):
    sweep = sweep_of(tmp_path, PAM, "pam", metric={"name": "val/pam_dice", "goal": "minimize"})
    run_local(sweep, 4)
    least = min(changes["beta"] for changes in scored)
    assert f"--model.pam.affinity.beta={least}" in capsys.readouterr().out.replace("\n", " ")


def test_the_same_seed_draws_the_same():
    definition = read_definition(EXPERIMENTS / "sweeps/sce.yaml")
    assert draw(definition, [], 3) == draw(definition, [], 3) != draw(definition, [], 4)
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
        main([str(tmp_path), "fit", "--config", "a.yaml", "--model.sub_classes=4"])
    (words,) = became
    folder = tmp_path / "trials/k3j"
    assert words[1:] == [
        "-m", "weakmedsam", "fit", "--config", "a.yaml", "--model.sub_classes=4",
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


@pytest.mark.parametrize("content", [None, b"{", b"[1]", b'{"number": 1}', b"\xff"])
def test_a_run_whose_note_is_damaged_is_drawn_again_in_its_place(tmp_path, content):
    sweep = sweep_of(tmp_path, {"model.rate": {"min": 0.1, "max": 0.8}})
    ledger = Ledger(sweep)
    drawn = [ledger.next() for _ in range(3)]
    path = ledger.folder(drawn[1]) / "trial.json"
    path.unlink()
    if content is None:
        path.mkdir()
    else:
        path.write_bytes(content)
    again = Ledger(sweep)
    assert [trial.number for trial in again.trials] == [0, 2]
    assert (sweep.folder / "trials/001.old1").is_dir()
    assert again.next() == drawn[1]  # a random search draws the same
    assert Ledger(sweep).trials == [drawn[0], drawn[1], drawn[2]]


def test_a_damaged_table_of_a_run_counts_as_far_as_it_can_be_read(tmp_path):
    ledger = Ledger(sweep_of(tmp_path, {"model.rate": {"min": 0.1, "max": 0.8}}))
    trial = ledger.next()
    path = ledger.folder(trial) / "history.csv"
    path.write_text("epoch,val/score\n0,0.5\n1,?\n2,0.25\n3\n")
    assert ledger.history(trial) == [0.5, 0.25]
    path.write_bytes(b"\xff\xfe")
    assert ledger.history(trial) == []
