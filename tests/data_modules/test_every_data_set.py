"""What every data set promises; those of ``experiments/data`` are found by themselves."""

import pytest
from data_sets import DATA_SETS, data_set, settings
from data_settings import data_settings
from fakes import draw_data_set

from data_modules.sources import source_files
from weakmedsam.errors import DataError

READ = [name for name in DATA_SETS if data_set(name).info.example]
"""Those that read scans; the others draw their own."""


@pytest.fixture
def made(request, tmp_path):
    """(data module, folder of its scans): six small scans in the layout of the data set."""
    name = request.param
    root = draw_data_set(tmp_path / "scans", data_set(name).info)
    needed = {"classes": settings(name)["init_args"]["classes"], "image_size": 32, "num_workers": 0}
    groups = data_settings(
        prepare__store_dir=str(tmp_path / "store"),
        prepare__workers=1,
        split__fractions=(0.4, 0.3, 0.3),
        slices__min_pixels=1,
    )
    return data_set(name)(str(root), **needed, **groups), root


each = pytest.mark.parametrize("made", READ, indirect=True)


@each
def test_its_cases_are_found_and_prepared(made):
    module, root = made
    cases = module.find_cases()
    assert [case.problem for case in cases] == [None] * 6
    assert {case.image for case in cases} <= {str(path) for path in root.rglob("*.nii.gz")}
    module.prepare_data()
    module.setup("fit")
    assert sorted(module.split.values()).count("train") == 2
    assert module.train_labels().any(axis=0).all(), "no training slice of some class"


@each
def test_the_files_of_its_cases_are_its_sources(made):
    module, _ = made
    paths = {path for case in module.find_cases() for path in (case.image, case.mask)}
    assert paths <= {str(path) for path in source_files(module.sources())}


@each
def test_a_lost_mask_or_image_is_named_with_the_mend(made):
    module, root = made
    for lost, kept in zip(module.info.example, module.info.example[::-1], strict=True):
        path = root / lost.format(number=3)
        content = path.read_bytes()
        path.unlink()
        (said,) = [case.problem for case in module.find_cases() if case.problem] or [None]
        there = root / kept.format(number=3)
        # An image without a mask can be meant: some sets have unlabelled scans, and say how many they leave out.
        assert said is None or str(there) in said or str(there.parent) in said
        assert said is None or any(mend in said for mend in ("Get", "Add", "Remove", "leave"))
        assert said is not None or len(module.find_cases()) == 5
        path.write_bytes(content)


@each
def test_a_damaged_scan_is_named(made):
    module, root = made
    path = root / module.info.example[0].format(number=2)
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(DataError, match=rf"(?s)1 of 6 cases cannot be used.*{path.name}"):
        module.prepare_data()


@pytest.mark.parametrize("name", READ)
def test_an_empty_folder_shows_the_layout(name, tmp_path):
    classes = settings(name)["init_args"]["classes"]
    with pytest.raises(DataError) as told:
        data_set(name)(str(tmp_path), classes=classes).find_cases()
    info = data_set(name).info
    assert str(told.value).startswith(f"No {info.name} data in {tmp_path}")
    assert info.layout in str(told.value)
    assert info.home in str(told.value)
