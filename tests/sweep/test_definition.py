"""Sweeps as they are written down: our command line takes what is drawn, and the metric is logged."""

import math
import re
from pathlib import Path

import optuna
import pytest
import yaml
from commands import run_command
from lightning import Trainer
from lightning.pytorch.loggers import CSVLogger
from pam_settings import pam_callback, pam_settings
from segmenters import Disks
from tiny import TinyBackbone, tiny_phantom

from weakmedsam import cli
from weakmedsam.callbacks import SubClassExploration
from weakmedsam.classification.module import WeakMedSAM
from weakmedsam.errors import ConfigError
from weakmedsam.pam.feature_cache import Head, write_head
from weakmedsam.run.overrides import parse_options
from weakmedsam.run.request import Request
from weakmedsam.sce.config import SubClassTask
from weakmedsam.segmentation.module import Segmenter
from weakmedsam.sweep import cli as sweep
from weakmedsam.sweep import definition as definitions
from weakmedsam.sweep.agent import pam_settings as read_words
from weakmedsam.sweep.agent import with_null, words_of
from weakmedsam.sweep.definition import PROGRAMS, claim, fit_to_store, plan, read_definition
from weakmedsam.sweep.trials import Trials, direction, distribution_of, encoded, sample

ROOT = Path(__file__).parents[2]
SWEEPS = sorted(path.stem for path in (ROOT / "experiments/sweeps").glob("*.yaml"))


@pytest.fixture(autouse=True)
def at_root(monkeypatch):
    monkeypatch.chdir(ROOT)


def request_for(folder, *words, dataset="phantom"):
    return Request(dataset, "default", "pocket", None, folder / "runs", parse_options(list(words)))


def written(folder, text="", **changes):
    """A sweep's file that differs from the one of SCE."""
    definition = yaml.safe_load((ROOT / "experiments/sweeps/sce.yaml").read_text()) | changes
    path = folder / "own.yaml"
    path.write_text(text or yaml.safe_dump(definition))
    return path


@pytest.mark.parametrize("name", SWEEPS)
def test_every_sweep_is_valid_and_has_its_command(tmp_path, name):
    found = plan(name, request_for(tmp_path, "--trainer.max_epochs", "2"))
    assert found.definition["command"][-1] == "${args}"
    assert found.folder == tmp_path / "runs/phantom/sweeps" / name


@pytest.mark.parametrize("name", [name for name in SWEEPS if name != "pam"])
def test_every_drawn_argument_vector_is_taken_by_the_command_line(tmp_path, monkeypatch, name):
    parsed = []
    monkeypatch.setattr(cli.WeakMedSAMCLI, "instantiate_classes", lambda self: parsed.append(self.config))
    monkeypatch.setattr(cli.WeakMedSAMCLI, "_run_subcommand", lambda self, subcommand: None)
    found = plan(name, request_for(tmp_path, "--trainer.max_epochs", "2"))
    for seed in range(4):
        values = sample(found.definition, [], seed)
        assert values.keys() == found.definition["parameters"].keys()
        run_command(*found.words, *words_of(values))
        config = parsed[-1]["fit"]
        assert config["trainer"]["max_epochs"] == 2
        for key, value in values.items():
            first, *rest = key.split(".")
            held = config[first]["init_args"]
            for step in rest:
                held = held["init_args"][step] if "init_args" in held else held[step]
            assert held == value, key
    if found.metric in ("val/cam_dice", "val/pam_dice"):  # logged where PAM runs, which is to be each epoch
        assert parsed[-1]["fit"]["model"]["init_args"]["pam"]["init_args"]["validation"]["every_n_epochs"] == 1
    if name == "segment":
        assert parsed[-1]["fit"]["data"]["init_args"]["labels"]["supervision"] == "pseudo"


def test_every_drawn_setting_of_pam_is_one(tmp_path):
    found = plan("pam", request_for(tmp_path))
    for seed in range(20):
        values = sample(found.definition, [], seed)
        taken = read_words(words_of(values))  # as W&B's agent hands them to sweep_run
        assert {f"model.pam.{name}": value for name, value in taken.items()} == values
        pam_settings(**taken)


@pytest.mark.parametrize(
    ("drawn", "missing"),
    [
        ({"values": [4, 6]}, None),
        ({"value": 6}, None),
        ({"values": [4, 5, 9]}, "[5, 9]"),
        ({"min": 4, "max": 6}, "[5]"),
    ],
)
def test_a_grid_that_is_not_stored_is_refused_before_the_first_run(tmp_path, monkeypatch, drawn, missing):
    monkeypatch.setattr(definitions, "SWEEPS", tmp_path)
    definition = yaml.safe_load((ROOT / "experiments/sweeps/pam.yaml").read_text())
    definition["parameters"]["model.pam.prompts.grid"] = drawn
    written(tmp_path, text=yaml.safe_dump(definition))
    found = plan("own", request_for(tmp_path))
    found.features.mkdir(parents=True)
    write_head(found.features, Head(["lesion"], ["a"], 32, {"occlusion.weight": 0.3}, [4, 6]))
    if missing is None:
        fit_to_store(found)
    else:
        with pytest.raises(
            ConfigError,
            match=re.escape(f"own.yaml: model.pam.prompts.grid {missing} is not among the grids [4, 6]"),
        ):
            fit_to_store(found)


@pytest.mark.parametrize("occlusion", [0.0, 0.3])
def test_occlusion_is_swept_only_where_its_logit_drops_are_stored(tmp_path, monkeypatch, capsys, occlusion):
    monkeypatch.setattr(definitions, "SWEEPS", tmp_path)
    written(tmp_path, text=(ROOT / "experiments/sweeps/pam.yaml").read_text())
    found = plan("own", request_for(tmp_path))
    found.features.mkdir(parents=True)
    write_head(found.features, Head(["lesion"], ["a"], 32, {"occlusion.weight": occlusion}, [4, 6, 8]))
    left = fit_to_store(found).definition["parameters"]
    gone = found.definition["parameters"].keys() - left.keys()
    assert gone == (set() if occlusion else {"model.pam.occlusion.weight", "model.pam.occlusion.share"})
    assert ("not swept: model.pam.occlusion.weight, model.pam.occlusion.share" in capsys.readouterr().out) == (
        not occlusion
    )
    assert read_definition(tmp_path / "own.yaml")["parameters"].keys() == found.definition["parameters"].keys()


def test_a_sweep_of_occlusion_alone_is_refused_where_it_is_not_stored(tmp_path, monkeypatch):
    monkeypatch.setattr(definitions, "SWEEPS", tmp_path)
    definition = yaml.safe_load((ROOT / "experiments/sweeps/pam.yaml").read_text())
    definition["parameters"] = {"model.pam.occlusion.weight": {"min": 0.1, "max": 1.0}}
    written(tmp_path, text=yaml.safe_dump(definition))
    found = plan("own", request_for(tmp_path))
    found.features.mkdir(parents=True)
    write_head(found.features, Head(["lesion"], ["a"], 32, {"occlusion.weight": 0.0}, [4]))
    with pytest.raises(ConfigError, match=r"own\.yaml sweeps occlusion alone, but .*write it with a value above 0"):
        fit_to_store(found)


def test_the_grids_of_the_sweep_are_those_that_are_stored():
    stored = yaml.safe_load((ROOT / "experiments/features.yaml").read_text())["trainer"]["callbacks"][0]
    drawn = read_definition(ROOT / "experiments/sweeps/pam.yaml")["parameters"]["model.pam.prompts.grid"]["values"]
    assert stored["init_args"]["grids"] == drawn


class Points(CSVLogger):
    """Counts how often each figure is logged in each epoch."""

    def __init__(self, folder):
        super().__init__(folder)
        self.seen = {}

    def log_metrics(self, metrics, step=None):
        for name in metrics:
            self.seen[name] = self.seen.get(name, 0) + 1


def train(folder, model, data):
    points = Points(folder)
    trainer = Trainer(
        default_root_dir=folder, max_epochs=2, accelerator="cpu", logger=points, log_every_n_steps=1,
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False, num_sanity_val_steps=0,
    )  # fmt: skip
    trainer.fit(model, data)
    return points.seen


def test_each_metric_of_a_sweep_is_logged_once_an_epoch(tmp_path):
    data = tiny_phantom(tmp_path)
    pam = pam_callback(prompts__grid=2, walk__map_size=16, affinity__radius=2.0)
    sce = SubClassExploration(SubClassTask(2))
    seen = train(tmp_path, WeakMedSAM(TinyBackbone(), data.class_names, sce=sce, pam=pam), data)
    assert {name: seen.get(name) for name in PROGRAMS["classify"].metrics} == dict.fromkeys(
        PROGRAMS["classify"].metrics, 2
    )
    assert seen["val/auroc/lesion"] == seen["val/pam_dice/cyst"] == 2
    data = tiny_phantom(tmp_path, labels__supervision="expert")
    network = Segmenter("monai.networks.nets.BasicUNet", data.class_names, {"features": [8] * 6})
    seen = train(tmp_path, network, data)
    wanted = ("val/score", "val/dice", "val/dice/lesion", "train/loss")
    assert {name: seen.get(name) for name in wanted} == dict.fromkeys(wanted, 2)
    data = Disks(has_val_masks=False)
    seen = train(tmp_path, Segmenter("monai.networks.nets.BasicUNet", data.class_names, {"features": [8] * 6}), data)
    wanted = ("val/score", "val/agreement", "val/agreement/dark", "val/loss", "train/loss")
    assert {name: seen.get(name) for name in wanted} == dict.fromkeys(wanted, 2)


PAM = {"program": "pam", "metric": {"name": "val/pam_dice"}}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"metric": {"name": "val/accuracy", "goal": "maximize"}}, "'val/accuracy' is logged by nothing; classify"),
        ({"metric": None}, "metric is None; give its name, and as goal minimize or maximize"),
        ({"method": "annealing"}, "method is 'annealing'; choose one of bayes, random, grid"),
        ({"parameters": {"model.sce.sub_classes.number": {"min": 8, "max": 2}}}, "min 8 is not less than max 2"),
        ({"early_terminat": {}}, "early_terminat is not a key of a sweep; there are program, method"),
        ({"seed": "x"}, "seed is 'x'; it is a whole number"),
        ({"parameters": {}}, "parameters is {}; name the settings to vary"),
        ({"program": "prepare"}, "program is 'prepare'; choose one of classify, segment, pam"),
        (PAM, "model.pam.affinity.kind cannot be swept on stored"),
        (
            PAM | {"parameters": {"model.pam.walk.map_size": {"values": [32, 64]}}},
            "model.pam.walk.map_size cannot be swept on stored features; there are model.pam.prompts.grid, model.pam.",
        ),
        (
            PAM | {"parameters": {"model.pam.affinity.beta": {"values": [2, 4]}}},
            "early_terminate never acts",
        ),
    ],
)  # fmt: skip
def test_a_wrong_definition_is_refused_by_what_is_wrong(tmp_path, changes, said):
    with pytest.raises(ConfigError) as refused:
        read_definition(written(tmp_path, **changes))
    assert said in str(refused.value)


def test_a_sweep_that_is_not_there_lists_those_that_are(tmp_path):
    with pytest.raises(ConfigError, match=r"sweeps/lr\.yaml does not exist; there are: classify, pam, sce, segment"):
        plan("lr", request_for(tmp_path))
    with pytest.raises(ConfigError, match=r"own\.yaml is empty"):
        read_definition(written(tmp_path, text="# nothing\n"))


def test_a_parameter_that_does_not_exist_is_refused_before_anything_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(definitions, "SWEEPS", tmp_path)
    monkeypatch.setattr(sweep, "run", lambda target, request: pytest.fail("a stage was run"))
    written(tmp_path, parameters={"model.sub_clases": {"values": [2, 4]}})
    with pytest.raises(ConfigError, match=r"own: .*sub_clases"):
        sweep.start(plan("own", request_for(tmp_path)), request_for(tmp_path), 1, local=True, jobs=1)


def test_two_sweeps_of_one_name_are_refused_with_the_difference(tmp_path):
    claim(plan("sce", request_for(tmp_path)))
    claim(plan("sce", request_for(tmp_path)))  # the same one goes on
    with pytest.raises(ConfigError, match=r"sweeps/sce holds a sweep of other settings \(command.*NAME"):
        claim(plan("sce", request_for(tmp_path, "--trainer.max_epochs", "2")))
    claim(plan("sce", request_for(tmp_path, "--trainer.max_epochs", "2"), "short"))


def test_without_an_account_the_local_way_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    with pytest.raises(ConfigError, match="make sweep SWEEP=sce LOCAL=1"):
        sweep.register(plan("sce", request_for(tmp_path)), 1)


def test_with_an_account_it_is_registered_and_an_agent_started(tmp_path, monkeypatch):
    import wandb

    taken = []
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setattr(wandb, "sweep", lambda definition, project: taken.append(definition) or "abc123")
    monkeypatch.setattr(sweep.subprocess, "run", lambda words, check: taken.append(words))
    found = plan("sce", request_for(tmp_path))
    sweep.register(found._replace(definition=found.definition | {"seed": 3}), 7)
    definition, agent = taken
    assert "seed" not in definition  # W&B knows no such key
    assert definition["metric"]["name"] == "val/cam_dice"
    assert agent[1:] == ["-m", "wandb", "agent", "--project", "weakmedsam", "--count", "7", "abc123"]


def test_nested_parameters_are_drawn_by_their_options_as_wandb_draws_them(tmp_path):
    nested = {
        "model": {
            "parameters": {
                "learning_rate": {"values": [1e-3, 2e-3]},
                "pam": {"parameters": {"affinity.beta": {"value": 2}}},
            }
        },
        "data.slices.percentiles": {"values": [[0.5, 99.5], [1.0, 99.0]]},
        "data.split.file": {"values": [None]},
    }
    found = read_definition(written(tmp_path, method="grid", parameters=nested))
    assert set(found["parameters"]) == {
        *("model.learning_rate", "model.pam.affinity.beta", "data.slices.percentiles", "data.split.file"),
    }
    drawn = drawn_in_turn(found)
    assert len(drawn) == 4
    assert {(v["model.learning_rate"], tuple(v["data.slices.percentiles"])) for v in drawn} == {
        (rate, pair) for rate in (1e-3, 2e-3) for pair in ((0.5, 99.5), (1.0, 99.0))
    }
    # As W&B's agent writes them into ${args}, but for None.
    from wandb.sdk.launch.sweeps.utils import create_sweep_command_args

    args = {name: {"value": value} for name, value in drawn[0].items()}
    assert with_null(create_sweep_command_args({"args": args})["args"]) == words_of(drawn[0])
    assert "--data.split.file=null" in words_of(drawn[0])


def drawn_in_turn(definition, count=99):
    """Settings that are drawn one after another, each finished before the next."""
    study = optuna.create_study(direction=direction(definition))
    space = {name: distribution_of(drawn) for name, drawn in definition["parameters"].items()}
    drawn = []
    while len(drawn) < count and (values := sample(definition, study.trials)) is not None:
        drawn.append(values)
        params = {name: encoded(value) for name, value in values.items()}
        study.add_trial(optuna.create_trial(value=0.5, params=params, distributions=space))
    return drawn


def test_a_grid_of_long_numbers_ends(tmp_path):
    values = [0.123456789, 0.987654321]
    found = read_definition(written(tmp_path, method="grid", parameters={"model.learning_rate": {"values": values}}))
    assert sorted(drawn["model.learning_rate"] for drawn in drawn_in_turn(found)) == values


def test_a_grid_goes_through_ranges_of_steps(tmp_path):
    parameters = {
        "a": {"min": 2, "max": 4},
        "b": {"distribution": "q_uniform", "min": 0, "max": 1.2, "q": 0.5},
    }
    drawn = drawn_in_turn(read_definition(written(tmp_path, method="grid", parameters=parameters)))
    assert sorted((values["a"], values["b"]) for values in drawn) == [(a, b) for a in (2, 3, 4) for b in (0, 0.5, 1.0)]


@pytest.mark.parametrize("method", ["random", "bayes"])
def test_each_distribution_is_sampled_within_its_range(tmp_path, method):
    parameters = {
        "a": {"min": 2, "max": 4},
        "b": {"min": 0.0, "max": 1},
        "c": {"distribution": "log_uniform_values", "min": 1e-4, "max": 0.123456789},
        "d": {"distribution": "log_uniform", "min": -7, "max": 0},
        "e": {"distribution": "q_uniform", "min": 10, "max": 52, "q": 5},
        "f": {"distribution": "constant", "value": "x"},
        "g": {"values": [1, 2, "auto", None, True]},
    }
    found = read_definition(written(tmp_path, method=method, parameters=parameters))
    drawn = drawn_in_turn(found, 12)
    assert {values["a"] for values in drawn} <= {2, 3, 4}
    assert all(0 <= values["b"] <= 1 for values in drawn)
    assert all(1e-4 <= values["c"] <= 0.123456789 and len(f"{values['c']:.9g}") <= 12 for values in drawn)
    assert all(math.exp(-7) <= values["d"] <= 1 for values in drawn)
    assert {values["e"] for values in drawn} <= set(range(10, 53, 5))
    assert all(values["f"] == "x" for values in drawn)
    assert all(isinstance(values["e"], int) for values in drawn)
    assert drawn_in_turn(found, 12) == drawn  # the seed decides it
    assert drawn_in_turn(found | {"seed": 1}, 12) != drawn
    assert min(values["d"] for values in drawn) < 0.05  # evenly, none would be


@pytest.mark.parametrize(
    ("drawn", "said"),
    [
        ({"distribution": "normal", "mu": 0, "sigma": 1}, "parameters.a: cannot sample .*constant, categorical"),
        ({"values": [1, 2], "probabilities": [0.5, 0.5]}, "parameters.a: categorical takes values, not"),
        ({"min": 1}, "parameters.a: uniform takes max, min, not"),
        ({"min": "a", "max": 2}, "parameters.a: .* are not numbers"),
        ({"distribution": "int_uniform", "min": 0.5, "max": 2}, "are not whole numbers"),
        ({"distribution": "log_uniform_values", "min": 0, "max": 1}, "min has to be above 0"),
        ({"distribution": "q_uniform", "min": 0, "max": 1, "q": 0}, "q has to be above 0"),
        ({"values": []}, "list one value or more"),
        ({"min": 0.5, "max": 2}, "a grid cannot go through uniform"),
    ],
)  # fmt: skip
def test_a_distribution_that_cannot_be_sampled_is_refused(tmp_path, drawn, said):
    method = "grid" if drawn == {"min": 0.5, "max": 2} else "random"
    with pytest.raises(ConfigError, match=said) as found:
        read_definition(written(tmp_path, method=method, parameters={"a": drawn}))
    assert len(str(found.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("early", "looks"),
    [
        ({"min_iter": 2, "eta": 2}, [2, 4, 8, 16]),
        ({"min_iter": 3}, [3, 9]),
        ({"max_iter": 27, "s": 2, "eta": 3}, [3, 9]),
        ({"max_iter": 27, "s": 9}, [1, 3, 9]),
        ({"max_iter": 16, "s": 2, "eta": 2}, [4, 8]),
    ],
)
def test_trials_are_compared_where_wandb_compares_them(tmp_path, early, looks):
    """Each of 20 epochs of a trial that always wins asks whether it is compared with others there."""
    early = {"type": "hyperband", **early}
    changes = {"metric": {"name": "val/auroc", "goal": "maximize"}, "early_terminate": early}
    definition = read_definition(written(tmp_path, parameters={"a": {"value": 1}}, **changes))
    trials = Trials(definitions.Sweep("own", definition, PROGRAMS["classify"], tmp_path / "sweep", []))
    number = trials.take(1).number
    seen = []
    for epoch in range(1, 21):
        rows = "".join(f"{n},{n / 20}\n" for n in range(epoch))
        trials.folder(number).mkdir(parents=True, exist_ok=True)
        (trials.folder(number) / "history.csv").write_text("epoch,val/auroc\n" + rows)
        before = len(trials.all[number].system_attrs)
        assert not trials.falls_behind(number)
        seen += [epoch] * (len(trials.all[number].system_attrs) > before)
    assert seen == looks


@pytest.mark.parametrize(
    "early",
    [
        *({"type": "median"}, {}, {"min_iter": 2, "max_iter": 4, "s": 1}, {"max_iter": 4}),
        *({"min_iter": 0}, {"min_iter": 2, "eta": 1}, 3),
    ],
)  # fmt: skip
def test_an_early_end_that_is_not_hyperbands_is_refused(tmp_path, early):
    if isinstance(early, dict):
        early = {"type": "hyperband", **early}
    with pytest.raises(ConfigError, match=r"early_terminate is .*; it takes type: hyperband, and either min_iter"):
        read_definition(written(tmp_path, early_terminate=early))


@pytest.mark.parametrize(
    ("parameters", "said"),
    [
        ({"model": {"parameters": {"a": {"value": 1}}}, "model.a": {"value": 2}}, "model.a stands twice"),
        ({"model": {"parameters": {}}}, "model"),
        ({"model": 3}, "model"),
        ({"model": [1]}, "model"),
    ],
)
def test_parameters_that_are_none_are_refused_in_one_line(tmp_path, parameters, said):
    with pytest.raises(ConfigError, match=said) as found:
        read_definition(written(tmp_path, parameters=parameters))
    assert len(str(found.value).splitlines()) == 1
