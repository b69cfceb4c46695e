"""Two gloo processes against one: a network is trained, then pseudo-labels and scores are made of it."""

import csv
import json
import os
import shlex
import subprocess
import sys

import pytest
import torch
from commands import ROOT, free_port, run_command, run_commands_by_ranks
from fakes import fake_abdomen
from safetensors.numpy import load_file

from weakmedsam.pam.feature_cache import score_setting

OPTIONS = {
    "--data.num_volumes": 5,
    "--data.phantom.slices": 8,
    "--data.phantom.size": 64,
    "--data.image_size": 64,
    "--data.slices.min_pixels": 3,
    "--data.num_workers": 0,
    "--data.batch_size": 4,
    "--data.split.fractions": "[0.6, 0.2, 0.2]",  # one test volume: a rank has none
    "--model.sce.sub_classes.number": 2,
    "--model.pam.prompts.grid": 2,
    "--trainer.max_epochs": 1,
    "--trainer.accelerator": "cpu",
    "--trainer.enable_progress_bar": "false",
}


def words(subcommand, folder, run, devices, *more):
    """Of a stage by one process or two; its files go to ``folder / run``."""
    names = ["classify", "data/phantom", "backbone/pocket"]
    configs = [word for name in names for word in ("--config", f"experiments/{name}.yaml")]
    options = OPTIONS | {"--data.data_dir": folder / "scans", "--data.prepare.store_dir": folder / "store"}
    options |= {"--trainer.default_root_dir": folder / run, "--trainer.devices": devices}
    options |= {"--trainer.strategy": "ddp"} if devices > 1 else {}
    return [subcommand, *configs, *(word for pair in options.items() for word in pair), *more]


@pytest.mark.slow
@pytest.mark.ddp
def test_two_processes_train_one_network_and_a_process_without_a_volume_repeats_one(tmp_path):
    last = tmp_path / "fit/checkpoints/last.ckpt"
    scoring = ("--ckpt_path", last)
    run_commands_by_ranks(
        [words("fit", tmp_path, "fit", 2), words("test", tmp_path, "test2", 2, *scoring)], processes=2
    )
    run_command(*words("test", tmp_path, "test1", 1, *scoring))
    saved = torch.load(last, weights_only=True)
    ids = saved["state_dict"]["subclass_ids"]
    assert len(ids) == 24
    assert saved["global_step"] == 3  # 24 slices, two processes of four
    assert ids.max() == 2
    assert ((ids > 0).sum(0) >= 2).all()
    rows = [table(tmp_path / f"test{n}/cam_cases.csv") for n in (1, 2)]
    assert rows[0] == rows[1]
    assert len(rows[0]) == 2  # of one volume, which the second process has repeated


PIPELINE = {
    "--data.image_size": 64,
    "--data.slices.min_pixels": 1,
    "--data.num_workers": 0,
    "--data.batch_size": 6,
    "--data.prepare.workers": 1,
    "--data.split.fractions": "[0.4, 0.3, 0.3]",
    "--model.sce.sub_classes.number": 2,
    "--model.pam.prompts.grid": 2,
    "--segment.model.network_args": "{features: [8, 8, 8, 8, 8, 8]}",
    "--trainer.max_epochs": 1,
    "--trainer.accelerator": "cpu",
    "--trainer.enable_progress_bar": "false",
}
TWO = ["--trainer.devices", "2", "--trainer.strategy", "ddp"]


def by_one_process(run, stage, folder):
    """Words of the stage's own command, for one process and into another folder."""
    words = shlex.split(json.loads((run / stage / "stage.json").read_text())["command"])[1:]
    first = words.index(TWO[0])
    del words[first : first + len(TWO)]
    words[words.index("--trainer.default_root_dir") + 1] = folder / stage
    return words


def table(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
@pytest.mark.ddp
def test_two_processes_of_torchrun_go_through_all_stages_and_each_volume_is_done_once(tmp_path):
    scans = fake_abdomen(tmp_path / "scans", numbers=(1, 2, 3, 4, 5, 6, 7, 8))
    options = PIPELINE | {"--data.prepare.store_dir": tmp_path / "store"}
    words = [str(word) for pair in options.items() for word in pair]
    words += ["--trainer.callbacks+", "{class_path: seen.Seen}", *TWO]
    runs = ["--dataset", "abdomen", "--data-dir", str(scans), "--runs", str(tmp_path / "runs")]
    path = os.pathsep.join([str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "WANDB_MODE": "disabled", "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    port = f"--master-port {free_port()}"
    torchrun = f"{shlex.quote(sys.executable)} -m torch.distributed.run --nproc-per-node 2 {port}"
    for target in ("train", "features"):
        command = [
            sys.executable,
            "-m",
            "weakmedsam.run.pipeline",
            target,
            "--verbose",
            *runs,
            "--launcher",
            torchrun,
            "--",
            *words,
        ]
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=900
        )
        assert done.returncode == 0, done.stdout + done.stderr
        if target == "train":
            assert "a step learns from 12 slices: 2 process(es) x data.batch_size 6" in done.stdout
    run = tmp_path / "runs/abdomen/default"
    assert (run / "report.html").stat().st_size > 0
    splits = json.loads((run / "prepare/data.json").read_text())["splits"]
    made = sorted(path.name for path in (run / "pseudo_labels").glob("*.safetensors"))
    assert len(made) == splits["train"]["cases"] >= 3  # more than ranks, so that both have some
    scored = [(row["case"], row["class"]) for row in table(run / "test/cases.csv")]
    assert len(scored) == len(set(scored)) == 4 * splits["test"]["cases"]
    seen = [(run / f"pseudo_labels/seen-{rank}.txt").read_text().split() for rank in (0, 1)]
    assert all(seen)
    assert sorted(seen[0] + seen[1]) == [name.removesuffix(".safetensors") for name in made]
    for stage in ("test_maps", "test", "refined"):  # where ranks have unequal shares one repeats a volume
        seen = [(run / stage / f"seen-{rank}.txt").read_text().split() for rank in (0, 1)]
        assert len(seen[0]) == len(seen[1]) == -(-splits["test"]["cases"] // 2)
        assert len({*seen[0], *seen[1]}) == splits["test"]["cases"]
    # The networks are those of two processes.
    stages = ("pseudo_labels", "features", "test_maps", "test", "refined")
    for stage in stages:
        run_command(*by_one_process(run, stage, tmp_path / "one"))
    assert score_setting(run / "features", {}) == score_setting(tmp_path / "one/features", {})
    assert made == sorted(path.name for path in (tmp_path / "one/pseudo_labels").glob("*.safetensors"))
    for name in made:
        one, two = (load_file(folder / "pseudo_labels" / name) for folder in (tmp_path / "one", run))
        assert all((one[key] == two[key]).all() for key in ("label", "confidence"))
    tables = ("pseudo_labels/quality.csv", "test_maps/cam_cases.csv", "test/cases.csv", "refined/cases.csv")
    for name in tables:
        assert table(run / name) == table(tmp_path / "one" / name)
    assert (run / "test/summary.json").read_text() == (tmp_path / "one/test/summary.json").read_text()
