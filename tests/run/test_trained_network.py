"""Which network of a run segments, and by what it is told apart."""

import json
import shutil
from pathlib import Path

import pytest
import yaml
from made_run import PAM, pam_of, write_run, write_second_round, write_stage

from weakmedsam.errors import ConfigError
from weakmedsam.run.trained_network import class_names, find_network, last_round, name_maker
from weakmedsam.system.json_files import write_object

OWN = yaml.safe_load(Path("experiments/refined.yaml").read_text())["model"]["init_args"]["pam"]["init_args"]


@pytest.fixture
def run(tmp_path) -> Path:
    return write_run(tmp_path / "runs/phantom/default")


def test_the_last_finished_round_is_taken(run):
    assert last_round(run) == 1
    write_second_round(run)
    (run / "segment_3").mkdir()  # begun, not done
    assert last_round(run) == 2
    network = find_network(run, plain=True)
    assert network.checkpoint == run / "segment_2/checkpoints/best.ckpt"
    assert network.said == f"{run / 'segment_2'}, not refined"


def test_a_round_that_follows_from_an_earlier_training_is_not(run):
    write_second_round(run)
    write_stage(run, "segment", 9, pseudo_labels=2)
    assert last_round(run) == 1


def test_what_is_being_made_anew_before_it_counts_and_what_was_removed_does_not(run):
    write_second_round(run)
    shutil.rmtree(run / "pseudo_labels_2")  # to save space
    shutil.rmtree(run / "prepare")
    assert last_round(run) == 2
    (run / "segment/stage.json").unlink()
    with pytest.raises(ConfigError, match="no trained segmentation network"):
        last_round(run)
    write_stage(run, "segment", 3, pseudo_labels=2)
    (run / "classify/stage.json").unlink()
    write_stage(run, "pseudo_labels_2", 4, classify=1, segment=3)
    assert last_round(run) == 1


def test_a_run_without_a_network_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"phantom/nobody has no trained segmentation network.*make train"):
        find_network(tmp_path / "phantom/nobody", plain=False)


def test_pam_has_the_settings_of_the_runs_own_stage(run):
    write_stage(run, "refined", 4, classify=1, segment=3)
    held = find_network(run, plain=False)
    assert held.config["model"]["class_path"] == "refined"
    assert pam_of(held.config) == PAM["init_args"] | {
        "start": {"checkpoint": str(run / "segment/checkpoints/best.ckpt")}
    }
    assert held.checkpoint == run / "classify/checkpoints/best.ckpt"
    assert held.said.endswith("refined by PAM with the settings of " + str(run / "refined"))


@pytest.mark.parametrize("refined", [None, {"classify": 1, "segment": 2}, {"classify": 0, "segment": 3}])
def test_or_default_ones_where_there_is_none_of_this_network(run, refined):
    if refined is not None:
        write_stage(run, "refined", 4, **refined)
    found = find_network(run, plain=False)
    assert found.config["model"]["class_path"] == "classify"
    assert pam_of(found.config) == PAM["init_args"] | OWN | {
        "start": {"presence": "predicted", "checkpoint": str(run / "segment/checkpoints/best.ckpt")}
    }
    assert found.said.endswith("experiments/refined.yaml")


def test_default_settings_take_the_threshold_that_validation_cases_have_chosen(run):
    write_stage(run, "threshold", 5, classify=1, pseudo_labels=2, segment=3)
    write_object(run / "threshold/threshold.json", {"threshold": 0.55})
    assert pam_of(find_network(run, plain=False).config)["threshold"] == OWN["threshold"] | {"value": 0.55}
    write_stage(run, "threshold", 5, classify=1, pseudo_labels=2, segment=2)  # of another network
    assert pam_of(find_network(run, plain=False).config)["threshold"] == OWN["threshold"]


def test_without_pam_or_a_finished_classifier_only_the_network_alone_segments(run):
    config = run / "classify/config.yaml"
    held = yaml.safe_load(config.read_text())
    held["model"]["init_args"]["pam"] = None
    config.write_text(yaml.safe_dump(held))
    with pytest.raises(ConfigError, match=r"trained without PAM.*PLAIN=1"):
        find_network(run, plain=False)
    write_stage(run, "classify", 1, prepare=0)
    (run / "classify/stage.json").unlink()
    with pytest.raises(ConfigError, match=r"classify is not finished.*PLAIN=1"):
        find_network(run, plain=False)
    assert find_network(run, plain=True).checkpoint == run / "segment/checkpoints/best.ckpt"


def test_away_from_the_repository_the_missing_file_is_named(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"refined\.yaml.*in the repository's folder"):
        find_network(run, plain=False)


def test_classes_are_those_of_the_networks_settings_or_of_its_data_set(run):
    network = find_network(run, plain=True)
    assert class_names(run, network) == ["left", "right"]
    network.config["data"]["init_args"]["classes"] = {"cyst": [2], "lesion": [1]}
    assert class_names(run, network) == ["cyst", "lesion"]
    network.config["data"]["init_args"]["classes"] = None
    shutil.rmtree(run / "prepare")
    with pytest.raises(ConfigError, match=r"data\.json is gone"):
        class_names(run, network)


def test_a_maker_has_another_name_with_other_weights_settings_or_options(run):
    def name(*options, plain=True):
        return name_maker(find_network(run, plain), list(options))

    first = name()
    assert name() == first
    assert name(plain=False) != first
    assert name("--trainer.precision", "32-true") != first
    path = run / "segment/stage.json"
    held = json.loads(path.read_text())
    path.write_text(json.dumps({**held, "made": 9}))
    assert name() != first
    path.write_text(json.dumps(held))
    assert name() == first
    config = run / "segment/config.yaml"
    config.write_text(config.read_text().replace("image_size: 32", "image_size: 64"))
    assert name() != first


@pytest.mark.parametrize(
    "option",
    ["--trainer.devices=4", "--data.like.init_args.prepare.on_bad_case=skip", "--trainer.accelerator=cpu"],
)
def test_where_it_runs_does_not_matter(run, option):
    network = find_network(run, plain=True)
    assert name_maker(network, [option]) == name_maker(network, [])


def test_a_run_that_is_moved_is_the_same_maker(run, tmp_path):
    names = [name_maker(find_network(run, plain), []) for plain in (True, False)]
    moved = run.rename(tmp_path / "moved")
    assert [name_maker(find_network(moved, plain), []) for plain in (True, False)] == names


@pytest.mark.parametrize("content", [None, b"a: [", b"\xff\xfe", b"[1]", b"model: 3", b""])
@pytest.mark.parametrize("plain", [True, False])
def test_a_damaged_configuration_is_one_message(run, content, plain):
    path = run / ("segment" if plain else "classify") / "config.yaml"
    path.unlink()
    if content is None:
        path.mkdir()
    else:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"config\.yaml.*`make train`"):
        find_network(run, plain)


@pytest.mark.parametrize("content", ["null", "{", "[]", '{"made": 3}', '{"made": 3, "settings": {"after": 1}}'])
def test_a_damaged_stamp_is_that_of_no_finished_stage(run, content):
    (run / "segment/stage.json").write_text(content)
    with pytest.raises(ConfigError, match="has no trained segmentation network"):
        find_network(run, plain=True)
