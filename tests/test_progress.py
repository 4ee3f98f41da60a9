"""How far the steps are, as a terminal and as a log file show it."""

import io

from rich.console import Console

from layershare.bars import TimeColumn, steps
from layershare.console import say


def shown(terminal: bool) -> str:
    console = Console(file=io.StringIO(), force_terminal=terminal, width=80, color_system=None)
    with steps(console) as (announce, tell):
        progress = announce("calibrate")
        progress(1, 4)
        announce("write")
        tell("a line")
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_a_terminal_has_a_bar_for_each_step_and_no_number_that_nobody_knows():
    text = shown(terminal=True)
    assert "so far" in text
    assert "a line" in text
    last = {line.split()[0]: line for line in text.splitlines() if "took" in line}
    assert set(last) >= {"calibrate", "write"}
    assert not any("write" in line and " 0%" in line for line in text.splitlines())
    assert not any("left" in line and "so far" in line for line in text.splitlines())


def test_a_log_file_has_a_line_for_each_step():
    assert shown(terminal=False).splitlines() == ["calibrate …", "write …", "a line"]


def test_the_time_that_is_left():
    from rich.progress import Progress

    times = iter(range(0, 1000, 10))
    now = [0.0]
    bars = Progress(TimeColumn(), get_time=lambda: now[0])
    task = bars.add_task("train", total=None)
    column = TimeColumn()
    column.max_refresh = None
    now[0] = float(next(times)) + 12
    assert str(column(bars.tasks[0])) == "0:12 so far"
    for done in range(1, 4):
        now[0] += 30
        bars.update(task, completed=done, total=6)
    assert str(column(bars.tasks[0])) == "about 1:30 left"
    bars.update(task, completed=6)
    assert str(column(bars.tasks[0])) == "took 1:42"


def test_sentences_break_between_words_in_a_terminal_and_nowhere_else():
    sentence = "step 10 of 100: held-out perplexity 12.34, and more words than fit"
    for terminal in (True, False):
        console = Console(file=io.StringIO(), force_terminal=terminal, width=30, color_system=None)
        say(console, sentence)
        assert isinstance(console.file, io.StringIO)
        lines = console.file.getvalue().splitlines()
        assert " ".join(line.strip() for line in lines) == sentence
        assert len(lines) == (3 if terminal else 1)
