import numpy as np
import pytest
from data_sets import settings

from data_modules.label_check import find_label_faults, frequency_by_position
from data_modules.phantom_drawing import PhantomParameters, draw_volume
from weakmedsam.contracts import SOMEWHERE

CASES, SLICES = 20, 30
PATIENTS = np.repeat([f"p{n}" for n in range(CASES)], SLICES)
POSITIONS = np.tile((np.arange(SLICES) + 0.5) / SLICES, CASES)


def scattered(share: float, seed: int = 0) -> np.ndarray:
    """A class in some slices, wherever they lie."""
    return (np.random.default_rng(seed).random(CASES * SLICES) < share).astype(np.float32)


def found(*labels: np.ndarray, names: str = "ab") -> list[str]:
    return find_label_faults(PATIENTS, POSITIONS, np.stack(labels, axis=1), names[: len(labels)])


def test_labels_that_are_fine_are_not_warned_of():
    assert found(scattered(0.3), scattered(0.6, seed=1)) == []


def test_a_class_in_nearly_all_slices_of_nearly_all_patients_is_named():
    (sentence,) = found(scattered(0.85), scattered(0.4, seed=1))
    assert "little about a: it is in 8" in sentence


def test_a_class_in_nearly_all_slices_is_fine_where_patients_without_it_show_what_it_is_not():
    label = scattered(0.98) * (POSITIONS < 2)
    label[: 4 * SLICES] = 0
    assert label.mean() > 0.75
    assert found(label) == []


@pytest.mark.parametrize(
    ("label", "said"),
    [(np.arange(600) % 20 == 0, "only 30 of 600 training slices have a"), (np.arange(600) > 11, "little about a")],
)
def test_too_few_slices_with_or_without_a_class_are_counted(label, said):
    (sentence,) = found(label.astype(np.float32))
    assert said in sentence


def test_few_slices_without_a_class_count_where_patients_lack_it():
    label = np.ones(CASES * SLICES, np.float32)
    label[:SLICES] = 0
    (sentence,) = find_label_faults(np.array(["p0"] * SLICES + ["p1"] * 570), POSITIONS, label[:, None], ["a"])
    assert "only 30 of 600 training slices are without a" in sentence


def test_a_rare_class_is_named_with_its_share():
    label = np.zeros(CASES * SLICES * 10, np.float32)
    label[::100] = 1
    (sentence,) = find_label_faults(np.tile(PATIENTS, 10), np.tile(POSITIONS, 10), label[:, None], ["a"])
    assert "a is in 1.0 %" in sentence


def test_a_class_that_the_position_gives_away_is_named_with_its_auroc():
    (sentence,) = found(((POSITIONS > 0.2) & (POSITIONS < 0.7)).astype(np.float32))
    assert "alone tells whether it has a (AUROC 1.00)" in sentence


def test_positions_of_few_patients_say_nothing():
    some = np.flatnonzero(np.isin(PATIENTS, ["p0", "p1", "p2", "p3", "p4"]))
    label = (POSITIONS[some] > 0.5).astype(np.float32)
    assert find_label_faults(PATIENTS[some], POSITIONS[some], label[:, None], ["a"]) == []


def test_a_patient_does_not_speak_for_itself():
    """Every patient has the class at a place of its own: in all others there is none."""
    owners = np.repeat(np.arange(3), 3)
    positions, label = np.tile([0.1, 0.5, 0.9], 3), np.eye(3, dtype=np.float32).ravel()
    scores = frequency_by_position(owners, positions, label)
    assert scores[label > 0].max() < scores[label == 0].min()


def test_two_classes_that_nearly_always_occur_together_are_named():
    one = scattered(0.4)
    other = one.copy()
    other[np.flatnonzero(one)[::20]] = 0
    (sentence,) = found(one, other)
    assert "hardly tell a from b" in sentence
    assert "95 % have both" in sentence
    assert found(one, one * scattered(0.8, seed=1)) == []


def test_no_slices_and_a_class_in_none_of_them_are_taken_as_they_are():
    assert find_label_faults([], np.zeros(0), np.zeros((0, 1), np.float32), ["a"]) == []
    (sentence,) = found(0 * scattered(0.5))
    assert "only 0 of 600 training slices have a" in sentence


def test_the_default_phantom_gives_no_alarm():
    options = settings("phantom")["init_args"]
    parameters = PhantomParameters(**options["phantom"])
    volumes = [draw_volume(parameters, number).mask for number in range(int(0.6 * options["num_volumes"]))]
    counts = [[(slices == c).sum(axis=(1, 2)) for (c,) in options["classes"].values()] for slices in volumes]
    labels = (options["slices"]["min_pixels"] <= np.concatenate(counts, axis=1).T).astype(np.float32)
    depth = parameters.slices
    positions = np.tile((np.arange(depth) + 0.5) / depth, len(volumes))
    assert find_label_faults([f"p{n // depth}" for n in range(len(labels))], positions, labels, "ab") == []


def somewhere(patients: int, seed: int = 0) -> np.ndarray:
    """A class that so many of the patients show, in slices that nobody has named."""
    shown = np.zeros(CASES, np.float32)
    shown[np.random.default_rng(seed).permutation(CASES)[:patients]] = SOMEWHERE
    return np.repeat(shown, SLICES)


def test_labels_of_scans_are_counted_by_patients():
    assert found(somewhere(10), somewhere(10, seed=1)) == []
    (few,) = found(somewhere(3))
    assert "only 3 of 20 training patients have a" in few
    (many,) = found(somewhere(18))
    assert "only 2 of 20 training patients are without a" in many
    (same,) = found(somewhere(10), somewhere(10))
    assert "of the training patients with either, 100 % have both" in same
