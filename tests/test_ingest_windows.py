"""Windows of a query: all small enough, newest first, nothing lost between them, and wrong counts told."""

from collections import Counter
from collections.abc import Callable
from datetime import date, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.ingest.windows import CAP, Days, Window, agreed, cut, open_days
from shared.clients import BadReply
from shared.command import UsageError

EVERY_DAY = open_days(date(2026, 1, 1))
Papers = dict[tuple[date, date], int]  # (published, created) → how many
days = st.integers(0, 20_000).map(lambda number: date(1970, 1, 1) + timedelta(days=number))


def counting(papers: Papers, undated: int = 0) -> Callable[[Window], int]:
    """A PubMed that holds these papers, some of them of no day."""

    def count(window: Window) -> int:
        held = sum(number for (published, created), number in papers.items() if holds(window, published, created))
        return held + (undated if window.published is None else 0)

    return count


def holds(window: Window, published: date, created: date) -> bool:
    return all(
        part is None or part.first <= day <= part.last
        for part, day in ((window.published, published), (window.created, created))
    )


def windows_of(papers: Papers, limit: int = 10**9, undated: int = 0) -> dict[Window, int]:
    count = counting(papers, undated)
    return cut(count, Window(), count(Window()), every_day=EVERY_DAY, limit=limit)


@given(st.dictionaries(st.tuples(days, days), st.integers(1, CAP), max_size=30))
def test_every_paper_is_in_just_one_window_and_every_window_fits(papers: Papers) -> None:
    windows = windows_of(papers)
    assert all(0 < number <= CAP for number in windows.values())
    assert sum(windows.values()) == sum(papers.values())
    for published, created in papers:
        assert sum(holds(window, published, created) for window in windows) == 1


@given(st.dictionaries(st.tuples(days, days), st.integers(1, CAP), max_size=30), st.integers(CAP + 1, 100_000))
def test_windows_come_newest_first_and_end_where_the_limit_is_reached(papers: Papers, limit: int) -> None:
    every, some = list(windows_of(papers).items()), list(windows_of(papers, limit).items())
    begins = [window.published.first for window, _ in every if window.published]
    assert begins == sorted(begins, reverse=True)
    if sum(papers.values()) > CAP:
        assert some == every[: len(some)]
        assert sum(number for _, number in some[:-1]) < limit


def test_what_fits_or_is_not_wanted_stays_one_window() -> None:
    papers = {(date(2000, month, 1), date(2000, 1, 1)): 5000 for month in (1, 2, 3)}
    assert windows_of(papers, limit=CAP) == {Window(): 15_000}
    assert windows_of({}) == {}


def test_a_query_of_any_day_is_cut_in_few_counts() -> None:
    papers = {(date(year, 6, 1), date(year, 6, 1)): 1000 for year in range(1960, 2020)}
    asked: Counter[Window] = Counter()

    def count(window: Window) -> int:
        asked[window] += 1
        return counting(papers)(window)

    windows = cut(count, Window(), 60_000, every_day=EVERY_DAY, limit=10**9)
    assert len(windows) <= 15
    assert asked.total() <= 35


def test_a_day_with_too_many_papers_is_cut_by_the_day_they_were_created() -> None:
    january = date(2010, 1, 1)
    papers = {(january, date(2010, 1, day)): 4000 for day in range(1, 11)}
    windows = windows_of(papers)
    assert sum(windows.values()) == 40_000
    assert all(window.published == Days(january, january) and window.created for window in windows)


def test_one_created_day_with_too_many_papers_asks_for_a_narrower_query() -> None:
    with pytest.raises(UsageError, match=r"found 12000; narrow DRZERO_INGEST__QUERY"):
        windows_of({(date(2010, 1, 1), date(2010, 2, 1)): 12_000})


def test_papers_without_a_day_are_an_error_with_both_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    papers = {(date(2000, month, 1), date(2000, 1, 1)): 5000 for month in (1, 2, 3)}
    with pytest.raises(BadReply, match=r"finds 15007 papers for all, but 15000 in .*DRZERO_INGEST__DATE_FROM"):
        windows_of(papers, undated=7)
    assert "counted again" in capsys.readouterr().out


def test_one_wrong_count_is_mended_by_counting_again() -> None:
    papers = {(date(2000, month, 1), date(2000, 1, 1)): 5000 for month in (1, 2, 3)}
    wrong = [4000]

    def count(window: Window) -> int:
        true = counting(papers)(window)
        return wrong.pop() if wrong and true == 15_000 else true

    windows = cut(count, Window(), 15_000, every_day=EVERY_DAY, limit=10**9)
    assert wrong == []
    assert sum(windows.values()) == 15_000


def test_a_paper_with_two_days_of_publication_may_be_in_two_windows() -> None:
    papers = {(date(2000, month, 1), date(2000, 1, 1)): 5000 for month in (1, 2, 3)}

    def count(window: Window) -> int:
        return counting(papers)(window) + (1 if window.published and window.published.last < date(2000, 3, 1) else 0)

    assert sum(cut(count, Window(), 15_000, every_day=EVERY_DAY, limit=10**9).values()) > 15_000


def test_a_number_is_agreed_when_it_comes_twice_or_is_known() -> None:
    replies = iter([5, 9, 7, 9])
    assert agreed(lambda: next(replies)) == 9
    assert agreed(lambda: 4, 4) == 4
    numbers = iter(range(100))
    with pytest.raises(BadReply, match="different counts"):
        agreed(lambda: next(numbers))
