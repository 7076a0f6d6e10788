"""How far prepare is, where there is no terminal: a line a minute."""

from collections.abc import Iterator

import pytest

from voxtrast.engine.data.progress import Progress


def counted(clock: list[float], seconds: float) -> Iterator[int]:
    for number in range(10):
        clock[0] += seconds
        yield number


def test_a_line_a_minute_with_rate_and_time_left(capsys: pytest.CaptureFixture[str]) -> None:
    clock = [100.0]
    with Progress(True, clock=lambda: clock[0]) as progress:
        assert list(progress.follow("preparing", 10, counted(clock, 31.0))) == list(range(10))
    assert capsys.readouterr().err.splitlines() == [
        "preparing: 2 of 10, 0.03/s, 4 min left",
        "preparing: 4 of 10, 0.03/s, 3 min left",
        "preparing: 6 of 10, 0.03/s, 2 min left",
        "preparing: 8 of 10, 0.03/s, 1 min left",
        "preparing: 10 of 10, 0.03/s, 0 min left",
    ]


def test_short_and_silent_runs_say_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    for shown, seconds in ((True, 1.0), (False, 100.0)):
        clock = [0.0]
        with Progress(shown, clock=lambda clock=clock: clock[0]) as progress:
            assert len(list(progress.follow("preparing", 10, counted(clock, seconds)))) == 10
    assert capsys.readouterr().err == ""
