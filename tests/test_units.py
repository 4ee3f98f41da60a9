"""Sizes, counts and times in words."""

import pytest

from layershare.units import brief_count, clock_time, count, count_of, duration, percent, size


@pytest.mark.parametrize(
    ("words", "number", "expected"),
    [
        (size, 0, "0 bytes"),
        (size, 999, "999 bytes"),
        (size, 3_210_000_000, "3.21 GB"),
        (size, 999_700, "1 MB"),
        (size, 2 * 10**15, "2000 TB"),
        (count, 12, "12"),
        (count, 7_610_000, "7.61 million"),
        (count, 999_700, "1 million"),
        (brief_count, 999, "999"),
        (brief_count, 999_600_000, "1B"),
        (brief_count, 7_610_000, "7.61M"),
        (brief_count, 70 * 10**9, "70B"),
        (percent, 0.8, "80\N{NO-BREAK SPACE}%"),
        (duration, 0.2, "0.2 s"),
        (duration, 47, "47 s"),
        (duration, 210, "3.5 min"),
        (duration, 3 * 86400, "3 days"),
        (clock_time, 12, "0:12"),
        (clock_time, 3723, "1:02:03"),
    ],
)
def test_numbers_in_words(words, number, expected):
    assert words(number) == expected


def test_a_part_has_the_unit_of_its_whole():
    assert count_of(630_000, 7_600_000) == "0.63 of 7.6 million"
    assert count_of(3, 12) == "3 of 12"
    assert count_of(107_612_006, 134_515_008) == "108 of 135 million"
