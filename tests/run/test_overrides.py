"""Which stage an option concerns, in the first round and in later ones, and which stages a target means."""

import shlex

import pytest

from weakmedsam.errors import ConfigError
from weakmedsam.run.overrides import options_for, parse_options
from weakmedsam.run.stages import STAGES, another_round, chosen_stages

STAGE = {stage.name: stage for stage in STAGES}


def words(*given):
    return shlex.split(" ".join(given))


def test_options_are_split_into_keys_and_values():
    assert parse_options(["--a.b", "1", "--c=2", "--flag", "--d", "-1"]) == [
        ("a.b", ["1"]),
        ("c", ["2"]),
        ("flag", []),
        ("d", ["-1"]),
    ]
    with pytest.raises(ConfigError, match="'max_epochs=3' is not an option"):
        parse_options(["max_epochs=3"])


def test_options_go_to_the_stages_they_concern():
    model, shared = "--model.sce.sub_classes.number 4", "--trainer.max_epochs 2 --data.split.seed 1"
    options = parse_options(words(model, shared, "--segment.model.loss.dice_weight 0"))
    assert options_for(STAGE["classify"], options) == words(model, shared)
    assert options_for(STAGE["pseudo_labels"], options)[:2] == words(model)
    assert options_for(STAGE["segment"], options) == words(shared, "--model.loss.dice_weight 0")
    assert options_for(STAGE["test"], options)[-2:] == ["--model.loss.dice_weight", "0"]
    assert options_for(STAGE["prepare"], options) == ["--data.split.seed", "1"]
    with pytest.raises(ConfigError, match=r"--modle\.sce\.sub_classes\.number concerns no stage"):
        options_for(STAGE["classify"], parse_options(["--modle.sce.sub_classes.number", "4"]))


@pytest.mark.parametrize(
    ("target", "rounds", "last"),
    [
        ("prepare", 2, ["prepare"]),
        ("classify", 3, ["prepare", "classify"]),
        ("upper-bound", 2, ["prepare", "upper_bound"]),
        ("pseudo-labels", 1, ["prepare", "classify", "pseudo_labels"]),
        ("pseudo-labels", 2, ["prepare", "classify", "pseudo_labels", "segment", "pseudo_labels_2"]),
        ("segment", 2, ["prepare", "classify", "pseudo_labels", "segment", "pseudo_labels_2", "segment_2"]),
    ],
)
def test_a_target_means_its_stage_of_the_last_round(target, rounds, last):
    assert [stage.name for stage in chosen_stages(target, rounds)] == last


def test_no_round_is_refused():
    with pytest.raises(ConfigError, match="ROUNDS=0: there is at least one round"):
        chosen_stages("train", 0)


def test_options_of_a_later_round():
    options = parse_options(
        words(
            "--pseudo_labels_2.model.pam.affinity.beta 3 --pseudo_labels_2.model.pam.walk.steps 5 "
            "--segment_2.trainer.max_epochs 5",
            "--model.sce.sub_classes.number 4 --model.pam.walk.steps 16 --classify.model.pam.threshold.value 0.9",
            "--pseudo_labels.model.pam.init_args.walk.steps 7 --pseudo_labels.model.pam.affinity.beta 2",
            "--segment.model.loss.dice_weight 0 --segment.trainer.max_epochs 3 --test.data.num_workers 0",
        )
    )
    labels, network, maps, test, threshold, refined = (options_for(stage, options) for stage in another_round(2))
    # What another_round.yaml sets is this round's own; the rest is shared, and what is said of it alone wins.
    own = "--model.pam.affinity.beta 3 --model.pam.walk.steps 5"
    assert labels == words("--model.sce.sub_classes.number 4 --model.pam.affinity.beta 2", own)
    assert maps == labels  # what is scored is made as they are
    assert network == words("--model.loss.dice_weight 0 --trainer.max_epochs 3 --trainer.max_epochs 5")
    assert test == [*network, "--data.num_workers", "0"]
    assert refined == threshold == words("--model.sce.sub_classes.number 4")  # what is walked is neither round's
    first = "--model.sce.sub_classes.number 4 --model.pam.walk.steps 16 --model.pam.threshold.value 0.9"
    assert options_for(STAGE["pseudo_labels"], options) == words(
        first, "--model.pam.init_args.walk.steps 7 --model.pam.affinity.beta 2"
    )
    assert options_for(STAGE["segment"], options) == words("--model.loss.dice_weight 0 --trainer.max_epochs 3")
    with pytest.raises(ConfigError, match=r"--segment_1\.model concerns no stage.*later round with segment_2"):
        options_for(STAGE["segment"], parse_options(["--segment_1.model", "4"]))


def test_a_file_of_settings_for_all_stages_does_not_undo_a_later_rounds_own():
    options = parse_options(words("--classify.config a.yaml --pseudo_labels_2.config b.yaml"))
    labels, network, maps, *_ = (options_for(stage, options) for stage in another_round(2))
    files = ["--config", "a.yaml", "--config", "experiments/another_round.yaml", "--config", "b.yaml"]
    assert labels == maps == files
    assert network == []
    assert options_for(STAGE["pseudo_labels"], options) == ["--config", "a.yaml"]


def test_options_of_refined_predictions():
    options = parse_options(
        words(
            "--refined_2.model.pam.walk.steps 5 --refined.model.pam.threshold.value 0.3 "
            "--refined.model.pam.walk.steps 4",
            "--classify.config a.yaml --model.pam.walk.rescale true --model.pam.affinity.beta 2 "
            "--segment.data.num_workers 0",
        )
    )
    shared = "--config a.yaml --model.pam.affinity.beta 2 --config experiments/refined.yaml"
    own = "--model.pam.threshold.value 0.3 --model.pam.walk.steps 4"
    first, second = (options_for(stage, options) for stage in (STAGE["refined"], another_round(2)[-1]))
    assert sorted(first) == sorted(words(shared, own))
    assert first[-4:] == words(own)
    assert second == [*first, *words("--model.pam.walk.steps 5")]
    assert first.index("experiments/refined.yaml") > first.index("a.yaml")


def test_the_threshold_is_chosen_of_what_is_refined_by_the_same_settings():
    options = parse_options(
        words("--classify.config a.yaml --refined.model.pam.walk.steps 4 --threshold.data.num_workers 0")
    )
    files = "--config a.yaml --config experiments/refined.yaml --config experiments/threshold.yaml"
    assert options_for(STAGE["threshold"], options) == words(files, "--model.pam.walk.steps 4 --data.num_workers 0")
    assert options_for(STAGE["refined"], options)[-2:] == words("--model.pam.walk.steps 4")
