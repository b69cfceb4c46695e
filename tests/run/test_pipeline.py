import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from run_requests import request_for

from tests.fakes import write_checkpoint
from weakmedsam.errors import DIVERGED, ConfigError
from weakmedsam.report import cli as report
from weakmedsam.report.page_mark import page_mark
from weakmedsam.run import pipeline
from weakmedsam.run.overrides import wanted_settings
from weakmedsam.run.pipeline import run
from weakmedsam.run.stages import STAGES
from weakmedsam.system.file_lock import alone
from weakmedsam.system.fingerprints import is_whole
from weakmedsam.system.json_files import read_object, write_object
from weakmedsam.system.signals import REQUEUE, Relay

STAGE = {stage.name: stage for stage in STAGES}


def ran(calls):
    names = [" ".join(call) for call in calls]
    calls.clear()
    first = [Path(name.split("--config ")[1].split()[0]).stem for name in names]
    own = [next((kind for kind in ("threshold", "refined") if f"{kind}.yaml" in name), "") for name in names]
    configs = [kind or stem for kind, stem in zip(own, first, strict=True)]
    return [f"{name.split()[0]} {config}" for name, config in zip(names, configs, strict=True)]


TESTS = ["test classify", "test segment", "test threshold", "test refined"]
ALL = ["prepare phantom", "fit classify", "predict classify", "fit segment", *TESTS]


def test_stages_run_once_and_in_order(house, tmp_path, capsys):
    run("evaluate", request_for(tmp_path))
    assert ran(house) == ALL
    run("evaluate", request_for(tmp_path))
    assert house == []
    assert capsys.readouterr().out.count("up to date") == 8


def test_changed_settings_make_the_stage_and_what_follows_anew_and_keep_the_old(house, tmp_path, capsys):
    run("evaluate", request_for(tmp_path))
    house.clear()
    run("evaluate", request_for(tmp_path, "--segment.trainer.max_epochs", "2"))
    assert ran(house) == ["fit segment", *TESTS[1:]]
    run(
        "evaluate",
        request_for(tmp_path, "--segment.trainer.max_epochs", "2", "--model.pam.affinity.beta", "2"),
    )
    assert ran(house) == ["fit classify", "predict classify", "fit segment", *TESTS]
    folder = tmp_path / "runs/phantom/x"
    assert (folder / "segment.old1/stage.json").is_file()
    assert (folder / "segment.old2/stage.json").is_file()
    assert (folder / "classify.old1/stage.json").is_file()
    assert "kept as segment.old1" in capsys.readouterr().out.replace("\n", " ")


ROUND = ["predict classify", "fit segment", *TESTS]


def test_another_round_follows_the_first_and_starts_from_its_network(house, tmp_path):
    run("evaluate", request_for(tmp_path))
    house.clear()
    run("evaluate", request_for(tmp_path, rounds=2))
    labels, network, maps, test, threshold, refined = house
    folder = Path("runs/phantom/x")
    assert labels[0] == "predict"
    assert labels[labels.index("--model.pam.start.checkpoint") + 1].endswith(
        str(folder / "segment/checkpoints/best.ckpt")
    )
    assert labels[labels.index("--ckpt_path") + 1].endswith(str(folder / "classify/checkpoints/best.ckpt"))
    for command in (labels, maps):
        assert "experiments/another_round.yaml" in command
        assert "experiments/pseudo_labels.yaml" in command or command is maps
        assert command[command.index("--model.pam.start.checkpoint") + 1].endswith("segment/checkpoints/best.ckpt")
    assert maps[0] == "test"
    assert "experiments/refined.yaml" in refined
    assert refined[refined.index("--model.pam.start.checkpoint") + 1].endswith("segment_2/checkpoints/best.ckpt")
    assert threshold[threshold.index("--model.pam.start.checkpoint") + 1].endswith("segment_2/checkpoints/best.ckpt")
    assert refined[refined.index("--model.pam.threshold.value") + 1] == "0.55"
    assert refined[refined.index("--ckpt_path") + 1].endswith(str(folder / "classify/checkpoints/best.ckpt"))
    assert network[network.index("--data.labels.pseudo_labels_dir") + 1].endswith(str(folder / "pseudo_labels_2"))
    assert test[test.index("--ckpt_path") + 1].endswith(str(folder / "segment_2/checkpoints/best.ckpt"))
    house.clear()
    run("evaluate", request_for(tmp_path, rounds=3))
    assert ran(house) == ROUND
    run("evaluate", request_for(tmp_path, rounds=1))
    run("evaluate", request_for(tmp_path, rounds=3))
    assert house == []


def test_what_changes_the_first_round_makes_the_second_anew(house, tmp_path):
    run("evaluate", request_for(tmp_path, rounds=2))
    house.clear()
    run("evaluate", request_for(tmp_path, "--pseudo_labels_2.model.pam.walk.steps", "4", rounds=2))
    assert ran(house) == ROUND
    run("evaluate", request_for(tmp_path, "--pseudo_labels.model.pam.walk.steps", "4", rounds=2))
    assert ran(house) == ["predict classify", "fit segment", *TESTS[1:], *ROUND]


def test_an_option_of_a_round_that_is_not_run_is_refused(house, tmp_path):
    with pytest.raises(ConfigError, match=r"--segment_3\.trainer\.max_epochs is of round 3, ROUNDS is 2"):
        run("train", request_for(tmp_path, "--segment_3.trainer.max_epochs", "5", rounds=2))
    assert house == []


def test_a_trainer_file_is_given_to_every_stage_that_has_a_trainer_and_wins(house, tmp_path):
    for target in ("evaluate", "features"):
        run(target, request_for(tmp_path, trainer="ddp", logger="csv"))
    for words in house:
        files = [word for word in words if word.endswith(".yaml")]
        assert (files[-1] == "experiments/trainer/ddp.yaml") == (words[0] != "prepare")
        if "experiments/features.yaml" in files:  # logs nothing, whatever logger is chosen
            assert files.index("experiments/logger/csv.yaml") < files.index("experiments/features.yaml")
    with pytest.raises(ConfigError, match=r"trainer/tpu\.yaml does not exist; there are: cpu, ddp, debug, "):
        run("classify", request_for(tmp_path, trainer="tpu"))
    with pytest.raises(
        ConfigError, match=r"logger/paper\.yaml does not exist; there are: csv, lineage, tensorboard, wandb"
    ):
        run("classify", request_for(tmp_path, logger="paper"))


def test_only_what_decides_a_result_puts_it_out_of_date(house, tmp_path):
    run("evaluate", request_for(tmp_path, trainer="cpu"))
    house.clear()
    # Processors, loggers and launchers are the way; 32-true and one process stay.
    run("evaluate", request_for(tmp_path, trainer="cpu", logger="csv", launcher=("srun", "python")))
    assert house == []
    settings = {
        name: wanted_settings(STAGE[name], request_for(tmp_path, trainer="ddp"))["configs"]["trainer"]
        for name in STAGE if name != "prepare"
    }  # fmt: skip
    assert settings["classify"] == {"devices": "auto", "num_nodes": 1, "precision": "32-true"}
    assert settings["segment"] == settings["upper_bound"] == settings["classify"]
    assert settings["pseudo_labels"] == settings["test"] == settings["test_maps"] == {"precision": "32-true"}
    run("evaluate", request_for(tmp_path, trainer="gpu"))  # another precision
    assert ran(house) == ALL[1:]


def test_without_a_trainer_file_the_settings_are_those_of_earlier_versions(house, tmp_path):
    found = wanted_settings(STAGE["classify"], request_for(tmp_path))
    assert list(found) == ["configs", "options", "data_dir"]
    names = ["classify", "data/phantom", "backbone/pocket"]
    assert list(found["configs"]) == [f"experiments/{name}.yaml" for name in names]


def test_a_launcher_starts_what_has_a_trainer(house, tmp_path, monkeypatch):
    started = []
    record = Relay.run

    def launched(self, arguments):
        started.append(arguments[: arguments.index("weakmedsam")])
        return record(self, arguments)

    monkeypatch.setattr(Relay, "run", launched)
    monkeypatch.setattr(
        pipeline,
        "run",
        lambda target, request, _: [pipeline.run_stage(s, request, "", Relay()) for s in STAGES[:2]],
    )
    pipeline.main(["classify", "--runs", str(tmp_path / "runs"), "--launcher", "torchrun --nproc-per-node 2"])
    assert started == [[sys.executable, "-m"], ["torchrun", "--nproc-per-node", "2", "-m"]]


def test_an_interrupted_stage_continues_from_its_last_checkpoint(house, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        record = Relay.run
        patch.setattr(Relay, "run", lambda self, a: 3 if a[3] == "fit" else record(self, a))
        with pytest.raises(SystemExit):
            run("classify", request_for(tmp_path))
    last = tmp_path / "runs/phantom/x/classify/checkpoints/last.ckpt"
    for name in ("best", "last"):
        write_checkpoint(last.with_name(f"{name}.ckpt"))
    house.clear()
    run("classify", request_for(tmp_path))
    assert len(house) == 1
    assert house[0][-2:] == ["--ckpt_path", str(last)]


def test_an_interrupted_stage_is_not_continued_with_another_backbone_and_the_difference_is_shown(
    house, tmp_path, monkeypatch, capsys
):
    with monkeypatch.context() as patch:
        record = Relay.run
        patch.setattr(Relay, "run", lambda self, a: record(self, a) or 3 * (a[3] == "fit"))
        with pytest.raises(SystemExit):
            run("classify", request_for(tmp_path))
    folder = tmp_path / "runs/phantom/x/classify"
    (folder / "checkpoints/last.ckpt").write_text("of pocket")
    capsys.readouterr()
    house.clear()
    run("classify", request_for(tmp_path, backbone="samus"))
    (call,) = house
    assert "--ckpt_path" not in call
    said = " ".join(capsys.readouterr().out.split())
    assert "classify is out of date (backbone: pocket -> samus" in said
    assert (tmp_path / "runs/phantom/x/classify.old1/checkpoints/last.ckpt").read_text() == "of pocket"


def test_new_scans_make_the_store_anew(house, tmp_path):
    run("classify", request_for(tmp_path))
    house.clear()
    for name in ("scan.nii.gz", "labels.csv"):
        (tmp_path / "scans" / name).write_bytes(b"new")
        run("classify", request_for(tmp_path))
        assert ran(house) == ["prepare phantom", "fit classify"]
    os.utime(tmp_path / "scans/labels.csv")  # the same slices come out
    run("classify", request_for(tmp_path))
    assert ran(house) == ["prepare phantom"]


def test_a_file_that_an_option_names_counts_with_its_content(house, tmp_path):
    weights = tmp_path / "own.pth"
    weights.write_bytes(b"old")
    words = ("--model.backbone.weights", str(weights))
    run("classify", request_for(tmp_path, *words))
    house.clear()
    run("classify", request_for(tmp_path, *words))
    assert house == []
    weights.write_bytes(b"newer")
    run("classify", request_for(tmp_path, *words))
    assert ran(house) == ["fit classify"]
    assert (tmp_path / "runs/phantom/x/classify.old1/stage.json").is_file()


def test_a_lost_result_is_made_again_in_its_place(house, tmp_path, capsys):
    run("pseudo-labels", request_for(tmp_path))
    house.clear()
    (tmp_path / "runs/phantom/x/pseudo_labels/a.safetensors").unlink()
    run("pseudo-labels", request_for(tmp_path))
    assert ran(house) == ["predict classify"]
    assert "result missing: a.safetensors" in capsys.readouterr().out.replace("\n", " ")
    assert not list(tmp_path.glob("runs/phantom/x/*.old*"))


def test_settings_that_come_back_take_up_their_earlier_result(house, tmp_path):
    run("classify", request_for(tmp_path))
    run("classify", request_for(tmp_path, "--model.sce.sub_classes.number", "4"))
    house.clear()
    run("classify", request_for(tmp_path))
    assert house == []
    run("classify", request_for(tmp_path, "--model.sce.sub_classes.number", "4"))
    assert house == []


def test_a_command_that_does_not_start_leaves_the_earlier_result_where_it_was(house, tmp_path, monkeypatch, capsys):
    run("classify", request_for(tmp_path))
    with monkeypatch.context() as patch:
        patch.setattr(Relay, "run", lambda self, arguments: 2)
        with pytest.raises(SystemExit):
            run("classify", request_for(tmp_path, "--model.sub_clases", "4"))
    assert "did not start" in capsys.readouterr().out
    assert not list(tmp_path.glob("runs/phantom/x/*.old*"))
    house.clear()
    run("classify", request_for(tmp_path))
    assert house == []


@pytest.mark.parametrize(
    ("status", "said"),
    [
        (DIVERGED, "The same command would diverge again: change a setting that the message names"),
        (1, "stopped. Once that is mended, the same command continues"),
        (-9, "stopped. The same command continues"),
        (REQUEUE, "stopped. The same command continues"),
    ],
)
def test_what_to_do_after_a_stage_has_failed_depends_on_why(house, tmp_path, monkeypatch, capsys, status, said):
    def fail(self, arguments):
        (tmp_path / "runs/phantom/x/classify/config.yaml").write_text("a: 1")
        return status

    run("prepare", request_for(tmp_path))
    monkeypatch.setattr(Relay, "run", fail)
    with pytest.raises(SystemExit) as left:
        run("classify", request_for(tmp_path))
    assert left.value.code == status
    assert said in capsys.readouterr().out


def test_parts_of_a_killed_call_are_removed(house, tmp_path):
    part = tmp_path / "runs/phantom/x/classify/.history.csv.77.part"
    part.parent.mkdir(parents=True)
    part.touch()
    run("classify", request_for(tmp_path))
    assert not part.exists()


def test_without_expert_masks_there_is_nothing_to_score_and_the_chain_ends_well(house, tmp_path, capsys):
    pipeline.masked[0] = 0
    run("evaluate", request_for(tmp_path))
    assert ran(house) == [*ALL[:4], "test threshold"]  # that of the scans to come
    assert capsys.readouterr().out.count("nothing to score") == 3


def test_without_validation_masks_the_threshold_is_that_of_the_file(house, tmp_path, capsys):
    pipeline.masked[1] = 0
    run("evaluate", request_for(tmp_path))
    assert "--model.pam.threshold.value" not in house[-1]
    assert ran(house) == [*ALL[:4], "test classify", "test segment", "test refined"]
    assert "no validation case has an expert mask" in capsys.readouterr().out


def test_an_unknown_data_set_lists_the_known(house, tmp_path):
    with pytest.raises(
        ConfigError,
        match=r"data/lungs\.yaml does not exist; there are: abdomen, brats, cardiac, folder, phantom",
    ):
        run("prepare", request_for(tmp_path, dataset="lungs"))


def test_in_a_folder_without_experiments_it_says_where_to_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"phantom\.yaml does not exist; run the command in the repository's folder"):
        run("prepare", request_for(tmp_path))


def test_a_run_cannot_have_the_name_of_the_sweeps_folder(house, tmp_path):
    with pytest.raises(ConfigError, match="EXPERIMENT=sweeps"):
        run("train", request_for(tmp_path, experiment="sweeps"))


def test_two_pipelines_on_one_run_are_refused(house, tmp_path):
    with (
        alone(tmp_path / "runs/phantom/x"),
        pytest.raises(ConfigError, match=rf"x is being worked on by process {os.getpid()} on "),
    ):
        run("train", request_for(tmp_path))


def test_after_a_signal_the_stage_that_ended_well_counts_and_none_is_begun(house, tmp_path, monkeypatch):
    record = Relay.run

    def asked(self, words):
        self.asked = words[3] == "fit"
        return record(self, words)

    with monkeypatch.context() as patch:
        patch.setattr(Relay, "run", asked)
        with pytest.raises(SystemExit) as left:
            run("evaluate", request_for(tmp_path))
    assert left.value.code == REQUEUE
    assert ran(house) == ALL[:2]
    run("evaluate", request_for(tmp_path))
    assert ran(house) == ALL[2:]


def test_a_stage_that_a_signal_ended_is_asked_for_again_whatever_its_launcher_says(house, tmp_path, monkeypatch):
    def stopped(self, words):
        self.asked = True
        return 143

    monkeypatch.setattr(Relay, "run", stopped)
    with pytest.raises(SystemExit) as left:
        run("prepare", request_for(tmp_path))
    assert left.value.code == REQUEUE


def test_deciding_what_is_up_to_date_needs_no_torch():
    code = textwrap.dedent("""
        import sys, weakmedsam.run.pipeline, weakmedsam.run.status, weakmedsam.report.cli
        assert not {"torch", "lightning"} & sys.modules.keys()
    """)
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_finished_training_whose_best_network_is_lost_or_damaged_is_trained_anew(house, tmp_path, capsys):
    folder = tmp_path / "runs/phantom/x/classify/checkpoints"
    run("evaluate", request_for(tmp_path))
    whole = (folder / "best.ckpt").read_bytes()
    for content in (None, b"", whole[:-1], b"garbage", whole.replace(b"weights", b"weightz")):
        (folder / "best.ckpt").unlink()
        if content is not None:
            (folder / "best.ckpt").write_bytes(content)
        house.clear()
        run("evaluate", request_for(tmp_path))
        (call,) = house  # it came out the same: what follows stays
        assert call[0] == "fit"
        assert "--ckpt_path" not in call
        assert is_whole(folder / "best.ckpt")
        house.clear()
        run("evaluate", request_for(tmp_path))
        assert house == []
    said = capsys.readouterr().out
    assert "result missing: checkpoints/best.ckpt" in said
    assert "result damaged: checkpoints/best.ckpt (7 bytes, " in said


def test_a_network_that_comes_out_otherwise_puts_what_follows_out_of_date(house, tmp_path, monkeypatch):
    run("evaluate", request_for(tmp_path))
    house.clear()
    (tmp_path / "runs/phantom/x/segment/checkpoints/best.ckpt").unlink()
    record = Relay.run

    def otherwise(self, words):
        code = record(self, words)
        if words[3] == "fit":
            write_checkpoint(tmp_path / "runs/phantom/x/segment/checkpoints/best.ckpt", b"others")
        return code

    monkeypatch.setattr(Relay, "run", otherwise)
    run("evaluate", request_for(tmp_path))
    assert ran(house) == ["fit segment", *TESTS[1:]]


def test_of_a_finished_training_the_last_checkpoint_may_be_lost(house, tmp_path):
    run("classify", request_for(tmp_path))
    house.clear()
    (tmp_path / "runs/phantom/x/classify/checkpoints/last.ckpt").unlink()
    run("classify", request_for(tmp_path))
    assert house == []


@pytest.mark.parametrize("content", [None, b"", b"{", b"[1]", b"null", b"NaN", b"\xff\x00", b'{"seal": 1, "made": 2}'])
@pytest.mark.parametrize("name", ["stage.json", "settings.json", "clock.json", "provenance.json"])
def test_a_damaged_note_is_named_and_its_stage_looked_at_anew(house, tmp_path, capsys, name, content):
    run("segment", request_for(tmp_path))
    path = tmp_path / "runs/phantom/x/classify" / name
    path.unlink(missing_ok=True)
    if content is None:
        path.mkdir()
    else:
        path.write_bytes(content)
    house.clear()
    capsys.readouterr()
    run("segment", request_for(tmp_path))
    assert ran(house) == (["fit classify"] if name == "stage.json" else [])
    if name in ("stage.json", "settings.json"):
        assert f"{path}: " in capsys.readouterr().out.replace("\n", "")
    run("segment", request_for(tmp_path))
    assert house == []


def test_damaged_settings_of_an_interrupted_stage_do_not_hold_it_up(house, tmp_path):
    run("classify", request_for(tmp_path))
    folder = tmp_path / "runs/phantom/x/classify"
    (folder / "stage.json").unlink()
    for name in ("settings.json", "clock.json", "provenance.json"):
        (folder / name).unlink(missing_ok=True)
        (folder / name).mkdir()
    house.clear()
    run("classify", request_for(tmp_path))
    assert house[0][-2:] == ["--ckpt_path", str(folder / "checkpoints/last.ckpt")]


def test_a_damaged_store_is_prepared_again_and_what_follows_stays(house, tmp_path, capsys):
    run("classify", request_for(tmp_path))
    for damage in (Path.unlink, lambda path: path.write_text("garbage"), lambda path: path.write_text("[]")):
        damage(tmp_path / "store/index.json")
        house.clear()
        run("classify", request_for(tmp_path))
        assert ran(house) == ["prepare phantom"]
    assert f"result damaged: {tmp_path}/store/index.json\n" in capsys.readouterr().out


def test_a_null_summary_is_made_again(house, tmp_path):
    run("evaluate", request_for(tmp_path))
    for path, made in (("prepare/data.json", "prepare phantom"), ("test/summary.json", "test segment")):
        (tmp_path / "runs/phantom/x" / path).write_text("null")
        house.clear()
        run("evaluate", request_for(tmp_path))
        assert ran(house) == [made]


def test_a_stage_that_leaves_no_result_is_an_error_that_says_so(house, tmp_path, monkeypatch):
    monkeypatch.setattr(Relay, "run", lambda self, words: 0)
    with pytest.raises(ConfigError, match=r"prepare: the stage has ended, but left no data\.json"):
        run("prepare", request_for(tmp_path))


def test_a_run_of_version_0_1_is_refused(house, tmp_path):
    run("classify", request_for(tmp_path))
    path = tmp_path / "runs/phantom/x/classify/stage.json"
    write_object(path, {**read_object(path), "inputs": "a digest of all"})
    house.clear()
    with pytest.raises(ConfigError, match=r"x/classify was made by weakmedsam 0\.1.* remove .*phantom/x \("):
        run("classify", request_for(tmp_path))
    assert ran(house) == []


@pytest.mark.parametrize("code", [-9, 137])
def test_a_stage_whose_process_is_killed_is_said_with_what_to_lower(house, tmp_path, monkeypatch, capsys, code):
    monkeypatch.setattr(Relay, "run", lambda self, arguments: code)
    with pytest.raises(SystemExit) as left:
        run("prepare", request_for(tmp_path))
    assert left.value.code == code
    told = " ".join(capsys.readouterr().out.split())
    assert "prepare: its process was killed: memory may be short" in told
    assert "--data.prepare.workers" in told


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"data:\n\tx: 1\n", "line 2, column 1"),
        (b"# gr\xf6\xdfe\n", "line 1, column 5"),
        (b"- a\n", "holds a list"),
    ],
)
def test_a_broken_file_of_the_experiments_is_named_with_its_place(tmp_path, monkeypatch, content, said):
    data = tmp_path / "experiments/data"
    data.mkdir(parents=True)
    (data / "own.yaml").write_bytes(content)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=f"experiments/data/own.yaml, {said}|own.yaml, .*{said}"):
        run("prepare", request_for(tmp_path, dataset="own"))


def test_train_writes_the_report_where_the_run_has_changed_and_report_always(house, tmp_path, monkeypatch):
    written = []

    def write(folder):
        written.append(folder)
        (folder / report.REPORT).write_text(page_mark(folder))

    monkeypatch.setattr(report, "write_report", write)
    monkeypatch.setattr(report, "summary_table", lambda folder: None)
    counts = []
    for target in ("train", "train", "report", "upper-bound", "train", "train"):
        run(target, request_for(tmp_path))
        counts.append(len(written))
    assert counts == [1, 1, 2, 2, 3, 3]
