"""Numbers as people write them."""

import pytest

from actors.format import duration, percent, plural, size


def test_nouns_follow_their_number() -> None:
    assert [plural(count, "node") for count in (0, 1, 2)] == ["0 nodes", "1 node", "2 nodes"]


def test_bytes_and_times_have_the_unit_that_keeps_them_short() -> None:
    assert [size(count) for count in (2048, 5 << 20, 50 << 20, 3 << 30)] == ["2.0 KiB", "5.00 MiB", "50 MiB", "3.00 GiB"]
    assert [duration(seconds) for seconds in (None, 3, 600, 36_000)] == ["–", "3.0 s", "10.0 min", "10.0 h"]


@pytest.mark.parametrize(
    ("share", "written"),
    [(1.0, "100.0"), (0.99951, "100.0"), (0.5, "50.0"), (0.0123, "1.2"), (0.001, "0.1"), (0.00042, "0.042"), (0.0, "0")],
)
def test_shares_are_written_as_percentages(share: float, written: str) -> None:
    assert percent(share) == f"{written}\u00a0%"
