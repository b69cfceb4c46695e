from dataclasses import replace

import pytest

from data_modules.abdomen import AbdomenCT1K
from data_modules.cases import Case, Intensity, choose_classes, class_ids, require_cases
from data_modules.folder import Folder
from weakmedsam.errors import ConfigError, DataError


def test_classes_take_ids_in_their_order():
    classes = choose_classes(AbdomenCT1K.info, {"spleen": [3], "liver": [1]})
    assert class_ids(classes) == {3: 1, 1: 2}
    assert list(choose_classes(AbdomenCT1K.info, None)) == ["liver", "kidney", "spleen", "pancreas"]


@pytest.mark.parametrize(
    ("info", "wanted", "said"),
    [
        (AbdomenCT1K.info, {"lever": [1]}, r"lever.*liver"),
        (AbdomenCT1K.info, {"liver": [7]}, "7"),
        (AbdomenCT1K.info, {"liver": [1], "spleen": [1]}, "both liver and spleen"),
        (AbdomenCT1K.info, {"liver": []}, "no mask value"),
        (Folder.info, None, "at least one"),
        (Folder.info, {"tumour": [300]}, "300"),
        *((Folder.info, {name: [1]}, "^classes: '") for name in ("", " ", "a/b", "a\\b", " a", "a\n", "a\x1bb")),
    ],
)
def test_wrong_classes_are_refused(info, wanted, said):
    with pytest.raises(ConfigError, match=said):
        choose_classes(info, wanted)


def test_no_case_says_what_is_expected_what_is_there_and_where_to_get_it(tmp_path):
    with pytest.raises(DataError, match=r"(?s)no such folder.*Case_00001_0000\.nii\.gz.*AbdomenCT-1K"):
        require_cases([], AbdomenCT1K.info, tmp_path / "nowhere")
    (tmp_path / "a.nrrd").touch()
    with pytest.raises(DataError, match=r"there is: a\.nrrd"):
        require_cases([], AbdomenCT1K.info, tmp_path)


def test_a_name_twice_is_refused(tmp_path):
    case = Case("a", "a", "first")
    with pytest.raises(DataError, match="first and second"):
        require_cases([case, replace(case, image="second")], Folder.info, tmp_path)


def test_impossible_intensity_rules_are_refused():
    with pytest.raises(ConfigError, match="window"):
        Intensity(window=(40, 0))
    with pytest.raises(ConfigError, match="percentiles"):
        Intensity(percentiles=(99, 1))
