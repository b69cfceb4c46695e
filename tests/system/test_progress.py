"""The line about work that takes a while: in terminals of several widths, and in a file."""

import sys

import pytest
from terminals import Terminal

from weakmedsam.system import progress
from weakmedsam.system.progress import VERBOSE, ProgressLine, clock_text, is_verbose, tracked


class Clock:
    """Time passes when the test says so."""

    now = 100.0

    def monotonic(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


@pytest.mark.parametrize("columns", [40, 80, 200])
def test_one_line_that_fits_the_terminal_with_time_left_and_one_metric(monkeypatch, clock, columns):
    terminal = Terminal(monkeypatch, columns)
    line = ProgressLine("getting ready", 0)
    line.open()
    clock.now += 50  # what is done before the first step counts for nothing
    line.begin(1000, done=500)
    for _ in range(100):
        clock.now += 9.1
        line.advance("epoch 12/20")
    line.show("val/pam_dice 0.624")
    line.close(whole=False)
    (shown,) = terminal.lines()
    assert len(shown) < columns
    assert shown.startswith("  epoch 12/20 ")
    assert " 60% " in shown
    assert "1:00:40 left" in shown  # 400 steps of 9.1 s
    assert shown.endswith("val/pam_dice 0.624") == (columns > 40)


def test_what_is_through_says_how_long_it_took_and_what_makes_room_leaves_no_trace(monkeypatch, clock):
    terminal = Terminal(monkeypatch, 80)
    for kept in (False, True):
        for number in tracked(range(30), 30, "volume" if kept else "drawing", kept):
            clock.now += 1
            if number == 7 and kept:
                print("one is left out", file=sys.stderr)
    assert list(tracked([], 0, "volume")) == []
    remark, shown = terminal.lines()
    assert remark == "one is left out"
    assert shown.startswith("  volume 30/30 ")
    assert shown.endswith("100%    took 0:30")


def test_where_standard_output_is_a_file_nothing_is_written(capsys):
    assert list(tracked(iter("abc"), 3, "volume")) == ["a", "b", "c"]
    assert capsys.readouterr() == ("", "")


def test_work_that_fails_leaves_the_bar_where_it_is(monkeypatch):
    terminal = Terminal(monkeypatch, 80)

    def work():
        yield "a volume"
        raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        list(tracked(work(), 4, "volume"))
    print("broken")
    shown, said = terminal.lines()
    assert " 25% " in shown
    assert said == "broken"


def test_times_and_verbosity(monkeypatch):
    assert [clock_text(seconds) for seconds in (0.4, 59.6, 75, 3675)] == ["0:00", "1:00", "1:15", "1:01:15"]
    for value, verbose in (("", False), ("0", False), ("1", True)):
        monkeypatch.setenv(VERBOSE, value)
        assert is_verbose() == verbose
    monkeypatch.delenv(VERBOSE)
    assert not is_verbose()
