"""What a training, a test and a prediction print, in terminals of two widths and in a file."""

import logging

import pytest
from classifiers import module, trainer
from commands import as_it_was
from terminals import Terminal
from tiny import tiny_phantom

from weakmedsam import cli
from weakmedsam.callbacks import stage_progress
from weakmedsam.callbacks.stage_progress import StageProgress, _batches
from weakmedsam.system.progress import VERBOSE


def make(folder, epochs=2):
    """A trainer with the bar, and its data."""
    made = trainer(folder / "run", epochs)
    bar = StageProgress()
    bar.setup(made, None, "fit")
    made.callbacks.append(bar)
    return made, bar, tiny_phantom(folder)


@pytest.mark.parametrize("columns", [80, 200])
def test_a_training_is_one_line_and_so_are_test_and_prediction(tmp_path, monkeypatch, columns):
    fitted, _, data = make(tmp_path)
    data.prepare_data()
    network = module()
    terminal = Terminal(monkeypatch, columns)
    fitted.fit(network, data)
    for command in ("test", "predict", "validate"):
        getattr(make(tmp_path)[0], command)(network, data, **({} if command == "predict" else {"verbose": False}))
    lines = terminal.lines()
    assert len(lines) == 4, lines
    training, test, prediction, validation = lines
    assert max(map(len, (training, test, prediction, validation))) < columns
    assert training.startswith("  epoch 2/2 ")
    assert "100%    took 0:0" in training
    assert "val/auroc 0." in training or "val/auroc 1." in training
    volumes = {split: len(data.cases(split)) for split in ("train", "test")}
    assert test.split()[:2] == ["volume", f"{volumes['test']}/{volumes['test']}"]
    assert prediction.split()[:2] == ["volume", f"{volumes['train']}/{volumes['train']}"]
    assert validation.split()[0] == "batch"


def test_in_a_file_a_training_is_a_line_an_epoch_and_nothing_else(tmp_path, capsys):
    fitted, _, data = make(tmp_path)
    network = module()
    fitted.fit(network, data)
    said = capsys.readouterr().out
    assert "\r" not in said
    assert "\x1b" not in said
    first, second = (line for line in said.splitlines() if line.startswith("  "))
    assert first.split()[:2] == ["epoch", "1/2"]
    assert first.split()[3] == "left"
    assert second.split()[:2] == ["epoch", "2/2"]
    assert second.split()[-2] == "val/auroc"
    make(tmp_path)[0].test(network, data, verbose=False)
    assert capsys.readouterr().out == ""


def test_in_a_file_volumes_are_a_line_a_minute(tmp_path, capsys, monkeypatch):
    tested, _, data = make(tmp_path)
    monkeypatch.setattr(stage_progress, "LINE_EVERY", 0.0)
    tested.test(module(), data, verbose=False)
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    volumes = len(data.cases("test"))
    assert [line[:2] for line in lines] == [["volume", f"{n + 1}/{volumes}"] for n in range(volumes)]
    assert lines[0][3] == "left"


def test_other_ranks_print_nothing(tmp_path, capsys):
    fitted, bar, data = make(tmp_path, epochs=1)
    bar.disable()
    fitted.fit(module(), data)
    assert not [line for line in capsys.readouterr().out.splitlines() if line.startswith("  ")]


def test_a_bar_counts_the_batches_of_all_epochs_and_validations(tmp_path):
    fitted, _, data = make(tmp_path, epochs=3)
    fitted.check_val_every_n_epoch = 2
    fitted.fit(module(), data)
    training, validation = fitted.num_training_batches, sum(fitted.num_val_batches)
    total, each = _batches(fitted)
    assert total == 3 * training + validation
    assert each == total / 3


def test_a_notice_of_a_library_stands_above_the_bar_which_is_there_once(tmp_path, monkeypatch):
    monkeypatch.setenv(VERBOSE, "1")
    fitted, _, data = make(tmp_path)
    data.prepare_data()
    network = module()
    terminal = Terminal(monkeypatch, 80)
    log = logging.getLogger("lightning.pytorch")
    with as_it_was():
        log.setLevel(logging.INFO)
        log.handlers = [logging.StreamHandler()]  # as Lightning leaves it: on the standard error of before the bar
        cli.quieten()
        fitted.fit(network, data)
    lines = terminal.lines()
    assert len([line for line in lines if "100%" in line]) == 1, lines
    assert "`Trainer.fit` stopped: `max_epochs=2` reached." in lines
