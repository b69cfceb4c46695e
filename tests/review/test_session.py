"""A review keeps what was clicked, whatever becomes of its process, and gives back what was there."""

import subprocess
import sys

import numpy as np
import pytest
import torch

from data_modules.pseudo_labels import PseudoLabelReader
from weakmedsam.contracts import SliceState
from weakmedsam.errors import ConfigError, DataError
from weakmedsam.pam.pseudo_label_io import Origin, write_pseudo_label
from weakmedsam.pam.thresholding import PseudoLabel
from weakmedsam.review import cli
from weakmedsam.review.label_files import read_original, unsure_slices
from weakmedsam.review.session import RefusedError, Session
from weakmedsam.run.clicks import ACCEPTED, REJECTED, Click, read_reviewed
from weakmedsam.system.file_lock import alone


def place(session, name):
    """A pixel of the class of a slice that has one."""
    case = session.cases[name]
    z = case.rows[0]
    c = int(np.flatnonzero(case.present[z])[0])
    return Click(name, z, 20, 9, 1, session.class_names[c])


def everything(folder):
    return {
        path.relative_to(folder): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and "review" not in path.parts
    }


def test_cases_come_least_sure_first(run):
    session = Session(run)
    unsure = [case.mean_unsure for case in session.cases.values()]
    assert len(unsure) > 2
    assert unsure == sorted(unsure, reverse=True)
    assert unsure[-1] == pytest.approx(0.1, abs=0.01)


def test_a_slice_is_as_unsure_as_its_worst_class_and_without_one_not_at_all(tmp_path):
    quality = torch.tensor([[0.9, 0.4], [0.7, torch.nan], [torch.nan, torch.nan], [0.0, torch.nan]])
    label = torch.zeros(4, 2, 2)
    write_pseudo_label(tmp_path / "a", PseudoLabel(label.byte(), label, quality, quality), Origin("a", {}))
    assert np.allclose(unsure_slices(tmp_path / "a"), [0.6, 0.3, np.nan, 1.0], equal_nan=True)


def test_clicks_are_kept_replayed_and_taken_back(run):
    before = everything(run)
    session = Session(run)
    name = next(iter(session.cases))
    original = session.volume(name).label.copy()
    click = place(session, name)
    first = session.click(name, click)
    second = session.click(name, click._replace(x=8, y=22))
    assert click.slice in first
    assert [held[1:6] for held in read_reviewed(run).clicks] == [click[1:6], click._replace(x=8, y=22)[1:6]]
    label, states = session.volume(name).label.copy(), session.states(name)
    assert (label != original).any()
    path = run / f"review/labels/{name}.safetensors"
    written = path.read_bytes()

    again = Session(run, rank=False)  # as after a kill
    np.testing.assert_array_equal(again.volume(name).label, label)
    assert again.states(name) == states
    path.unlink()
    assert again.replay() == 1
    assert path.read_bytes() == written
    assert again.replay() == 0

    assert set(again.undo(name)) == set(second)
    again.undo(name)
    np.testing.assert_array_equal(again.volume(name).label, original)
    with pytest.raises(RefusedError, match="no click to undo"):
        again.undo(name)
    assert not path.exists()
    assert list((run / "review").rglob("*.csv")) == []
    assert everything(run) == before  # nothing but the review's folder was written to


def test_training_reads_what_was_decided(run):
    session = Session(run)
    names = list(session.cases)
    click = place(session, names[0])
    changed = session.click(names[0], click)
    session.decide(names[1], None, ACCEPTED)
    session.decide(names[1], 0, REJECTED)
    session.decide(names[2], None, REJECTED)
    session.decide(names[2], None, None)
    reader = PseudoLabelReader(run / "pseudo_labels", run / "review/labels")
    reader.check([session.cases[name].entry for name in names])
    own = reader.read(names[0], click.slice)
    assert own.trusted
    assert own.quality == 1
    assert (own.confidence == 255).all()
    np.testing.assert_array_equal(own.label, changed[click.slice])
    for z in set(changed) - {click.slice}:
        np.testing.assert_array_equal(reader.read(names[0], z).label, changed[z])
        assert not reader.read(names[0], z).trusted
    assert reader.read(names[1], 1).trusted
    assert (reader.read(names[1], 0).label == 255).all()
    plain = PseudoLabelReader(run / "pseudo_labels").read(names[2], 3)
    found = reader.read(names[2], 3)
    np.testing.assert_array_equal(found.label, plain.label)
    assert found[2:] == plain[2:]


def test_pseudo_labels_made_anew_get_the_clicks_again(run):
    session = Session(run)
    name = next(iter(session.cases))
    session.click(name, place(session, name))
    path, corrected = run / f"pseudo_labels/{name}.safetensors", run / f"review/labels/{name}.safetensors"
    other = next(held for held in session.cases if held != name)
    assert session.replay() == 0
    stamp = run / "classify/stage.json"
    stamp.write_text(stamp.read_text().replace('"made": "1"', '"made": "9"'))
    assert session.replay() == 1
    path.write_bytes((run / f"pseudo_labels/{other}.safetensors").read_bytes())  # of other slices
    assert read_original(path).content != 0
    corrected.unlink()
    with pytest.raises(DataError, match="is of other slices or labels"):
        Session(run, rank=False).replay()


def test_a_class_that_the_slice_lacks_is_refused_and_nothing_kept(run):
    session = Session(run)
    name, case = next((n, c) for n, c in session.cases.items() if not c.present.all(axis=1).all())
    z, c = np.argwhere(~case.present)[0]
    with pytest.raises(RefusedError, match=f"slice {z} is labelled without {session.class_names[c]}"):
        session.click(name, Click(name, int(z), 1, 1, 1, session.class_names[c]))
    assert session.states(name) == [SliceState.unchanged] * case.entry.depth
    assert not (run / "review/clicks.csv").exists()


def test_a_run_without_pseudo_labels_is_named(run):
    (run / "pseudo_labels/stage.json").unlink()
    with pytest.raises(ConfigError, match="has no pseudo-labels to review"):
        Session(run)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--experiment", "none"], "there is no such run"),
        (["--replay"], "clicks.csv: line 2, column sign: '2' is neither 1"),
        ([], "clicks.csv: line 2, column sign: '2' is neither 1"),
    ],
)
def test_what_is_wrong_is_one_line(run, words, said, capsys):
    (run / "review").mkdir()
    name = next(run.glob("pseudo_labels/*.safetensors")).stem
    (run / "review/clicks.csv").write_text(
        f"case,slice,x,y,sign,class,time\n{name},3,1,1,2,lesion,2025-01-31T12:00:00\n"
    )
    with pytest.raises(SystemExit) as stopped:
        cli.main(["--runs", str(run.parents[1]), "--port", "0", *words])
    assert said in str(stopped.value)
    assert not (run.parent / "none").exists()


def test_an_open_review_is_not_replayed_beside(run, capsys):
    session = Session(run)
    session.decide(next(iter(session.cases)), None, ACCEPTED)
    with alone(run / "review"), pytest.raises(SystemExit, match="the review is open; end it there"):
        cli.main(["--runs", str(run.parents[1]), "--replay"])


def test_without_a_review_there_is_nothing_to_replay(run, capsys):
    cli.main(["--runs", str(run.parents[1]), "--replay"])
    assert "nothing is reviewed" in capsys.readouterr().out


def test_without_the_extra_it_is_named(run):
    code = (
        "import sys; sys.modules['starlette'] = None; sys.meta_path.insert(0, type('No', (), {'find_spec': "
        "staticmethod(lambda n, *_: (_ for _ in ()).throw(ModuleNotFoundError(n)) if n == 'uvicorn' else None)}))\n"
        "import importlib.util as u; real = u.find_spec; u.find_spec = lambda n: None if n == 'uvicorn' else real(n)\n"
        f"from weakmedsam.review import cli; cli.find_spec = u.find_spec\ncli.main(['--runs', {str(run.parents[1])!r}])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "pip install 'weakmedsam[review]'" in done.stderr
    assert "Traceback" not in done.stderr
