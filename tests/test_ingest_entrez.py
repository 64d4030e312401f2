"""Ingest from Entrez against a local server: windows, paging, faults, resumption, pace, contact, key, real replies."""

import random
import subprocess
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, date, datetime, timedelta
from pathlib import Path

import pytest
from Bio import Entrez
from eutils_server import KINDS, EutilsServer, Held, article_set, most_in_a_second, serving, spread
from ingest_command import ROOT, command, environment, ingest

from services.ingest import eutils
from services.ingest.batches import TURNS, read_batch, records_of
from services.ingest.entrez import EntrezQuery, checked_contact, read_key, whole_window
from services.ingest.eutils import Caller, ErrorReply, call, configured, reply_root
from services.ingest.pace import Pace
from services.ingest.searches import read_search, search_parameters
from services.ingest.store import Base
from services.ingest.windows import Days, Window
from shared.clients import BadReply, Refused, Unavailable
from shared.command import UsageError
from shared.corpus import Corpus
from shared.files import read_manifest
from shared.records import Paper
from shared.settings import IngestSettings, Settings, StorageSettings

REPLIES = Path(__file__).parents[2] / "shared" / "data" / "entrez-replies"
needs_replies = pytest.mark.skipif(not REPLIES.is_dir(), reason="the real replies are not beside this checkout")
KEY = "0123456789abcdef"


class FakeClock:
    """A clock that only waiting moves; `waits` are the waits."""

    def __init__(self) -> None:
        self.now = 0.0
        self.waits: list[float] = []

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.waits.append(seconds)


@pytest.fixture
def server() -> Iterator[EutilsServer]:
    with serving(list(range(101, 112))) as running:
        yield running


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "*")
    for name in ("NCBI_API_KEY", "NCBI_API_KEY_FILE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def waits(clock: FakeClock) -> list[float]:
    return clock.waits


@pytest.fixture
def caller(server: EutilsServer, clock: FakeClock) -> Caller:
    pace = Pace(100, clock=clock)
    return Caller(server.url, "tests@example.org", KEY, timeout_s=5.0, tries=3, pace=pace, sleep=clock.sleep)


def fetch(caller: Caller, number: int = 5) -> list[int]:
    with configured(caller):
        wanted = range(101, 101 + number)
        asked = {"db": "pubmed", "id": ",".join(map(str, wanted))}
        return list(call(caller, Entrez.efetch, asked, lambda body: read_batch(body, wanted))[1])


def query_environment(server: EutilsServer, data: Path, **settings: object) -> dict[str, str]:
    given = {
        "entrez_url": server.url, "query": "cancer", "email": "tests@example.org", "entrez_batch": 4, "entrez_rate": 200
    }  # fmt: skip
    scratch = {"DRZERO_STORAGE__SCRATCH_DIR": str(data / "scratch"), "NCBI_API_KEY": KEY}
    return environment(data, **(given | settings)) | scratch


def source_of(server: EutilsServer, folder: Path, **settings: object) -> EntrezQuery:
    """The source in this process, which waits two milliseconds where others wait a second."""
    given = {
        "entrez_url": server.url, "query": "cancer", "email": "tests@example.org", "entrez_batch": 500,
        "entrez_rate": 200, "entrez_tries": 60, "entrez_retry_budget": 10**6, "max_records": 10**6,
    }  # fmt: skip
    made = Settings(storage=StorageSettings(scratch_dir=folder), ingest=IngestSettings.model_validate(given | settings))
    source = EntrezQuery(made)
    source.job = replace(source.job, caller=replace(source.job.caller, first_wait_s=0.002))
    return source


class Noted(deque[float]):
    """The times at which a pace has seen requests go, with all that it has forgotten meanwhile."""

    def __init__(self) -> None:
        super().__init__()
        self.all: list[float] = []

    def append(self, when: float) -> None:
        self.all.append(when)
        super().append(when)


def paced(source: EntrezQuery, rate: int) -> tuple[EntrezQuery, Noted]:
    """The source with a pace of this rate, and when that saw its requests go."""
    pace, noted = Pace(rate), Noted()
    pace._sent = noted
    source.job = replace(source.job, caller=replace(source.job.caller, pace=pace))
    return source, noted


def papers_of(source: EntrezQuery, folder: Path) -> tuple[list[Paper], Counter[str]]:
    change = source.change(Base(), folder)
    return list(change.papers), change.counts


def pmids(papers: list[Paper]) -> list[int]:
    return [int(paper.pmid) for paper in papers]


def test_a_query_is_fetched_in_batches_and_every_paper_is_counted(server: EutilsServer, tmp_path: Path) -> None:
    done = ingest(query_environment(server, tmp_path, date_from="2020-01-01"))
    assert done.returncode == 0, done.stderr
    assert [paper.pmid for paper in Corpus(tmp_path / "corpus")] == [str(n) for n in range(111, 100, -1)]
    counts = read_manifest(tmp_path / "corpus").counts
    assert {name: counts[name] for name in ("found", "windows", "asked", "missing", "read", "kept")} == {
        "found": 11, "windows": 1, "asked": 11, "missing": 0, "read": 11, "kept": 11,
    }  # fmt: skip
    (utility, asked), (again, listing) = server.requests[:2]
    assert (utility, again, listing["retmax"]) == ("esearch", "esearch", "9999")
    assert asked.items() >= {"term": "cancer", "mindate": "2020/01/01", "datetype": "pdat"}.items()
    assert asked.items() >= {"email": "tests@example.org", "tool": "drzero-biomedical", "api_key": KEY}.items()
    batches = sorted((a["id"] for _, a in server.requests[2:]), reverse=True)
    assert batches == ["111,110,109,108", "107,106,105,104", "103,102,101"]
    assert KEY not in done.stderr
    assert KEY not in (tmp_path / "corpus" / "manifest.json").read_text()


def test_the_same_query_is_reused_without_a_call_and_another_is_not(server: EutilsServer, tmp_path: Path) -> None:
    environ = query_environment(server, tmp_path)
    ingest(environ)
    calls = len(server.requests)
    assert "corpus is reused" in ingest(environ).stderr
    assert len(server.requests) == calls
    assert "changed inputs: query" in ingest(environ | {"DRZERO_INGEST__QUERY": "gout"}).stderr


def test_more_papers_than_the_limit_are_told_and_counted(server: EutilsServer, tmp_path: Path) -> None:
    done = ingest(query_environment(server, tmp_path, max_records=6))
    assert "the query finds more papers than are fetched" in done.stderr
    counts = read_manifest(tmp_path / "corpus").counts
    assert (counts["found"], counts["asked"], counts["read"]) == (11, 6, 6)


def test_faults_of_the_service_are_waited_out(server: EutilsServer, tmp_path: Path) -> None:
    server.faults["esearch"] = [(429, {"Retry-After": "1"}, b'{"error":"API rate limit exceeded","api-key":"%s"}')]
    server.faults["efetch"] = ["cut"]
    done = ingest(query_environment(server, tmp_path))
    assert done.returncode == 0, done.stderr
    assert read_manifest(tmp_path / "corpus").rows == 11


FAULTS = {
    "429": (429, {"Retry-After": "7"}, b"{}"),
    "500": (500, {}, b"oops"),
    "503": (503, {}, b""),
    "cut": "cut",
    "cut inside, length right": (200, {}, article_set([1, 2])[:-30]),
    "error in 200": (200, {}, b"<eFetchResult><ERROR>Search Backend failed</ERROR></eFetchResult>"),
    "html": (200, {"Content-Type": "text/html"}, b"<!DOCTYPE html><html><body>Maintenance</body></html>"),
    "json as text": (200, {"Content-Type": "text/plain"}, b'{"error": "down"}'),
    "empty": (200, {}, b""),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_one_fault_costs_one_wait(fault: str, server: EutilsServer, caller: Caller, waits: list[float]) -> None:
    server.faults["efetch"] = [FAULTS[fault]]
    assert fetch(caller) == [101, 102, 103, 104, 105]
    assert len(waits) == 1
    assert waits[0] == 7 if fault == "429" else 0.7 < waits[0] < 1.3


def test_waits_double_and_the_last_failure_is_told(server: EutilsServer, caller: Caller, waits: list[float]) -> None:
    server.faults["efetch"] = [FAULTS["500"]] * 3
    with pytest.raises(Unavailable, match="no usable reply in 3 tries; the last one: status 500: oops"):
        fetch(caller)
    assert len(waits) == 2
    assert waits[1] > waits[0]


def test_a_reply_that_stays_wrong_is_a_bad_reply_in_ncbis_words(server: EutilsServer, caller: Caller) -> None:
    server.faults["efetch"] = [FAULTS["error in 200"]] * 3
    with pytest.raises(BadReply, match="Search Backend failed"):
        fetch(caller)


def test_our_own_mistake_is_not_tried_again_and_the_key_is_not_told(
    server: EutilsServer, caller: Caller, waits: list[float]
) -> None:
    server.faults["efetch"] = [(400, {}, f'{{"error":"API key invalid","api-key":"{KEY}"}}'.encode())]
    with pytest.raises(Refused, match="API key invalid") as caught:
        fetch(caller)
    assert KEY not in str(caught.value)
    assert waits == []


def test_a_wait_of_hours_is_not_sat_through(server: EutilsServer, caller: Caller) -> None:
    server.faults["efetch"] = [(429, {"Retry-After": "7200"}, b"")]
    with pytest.raises(Unavailable, match="wait for 7200 s"):
        fetch(caller)


def test_a_reply_that_does_not_come_is_given_up_after_the_time_limit(
    server: EutilsServer, caller: Caller, waits: list[float]
) -> None:
    server.faults["efetch"] = ["hold"]
    hasty = replace(caller, timeout_s=0.2, tries=2)
    assert len(fetch(hasty)) == 5
    assert len(waits) == 1


def test_nobody_there_is_unavailable(caller: Caller, server: EutilsServer) -> None:
    server.shutdown()
    server.server_close()
    with pytest.raises(Unavailable, match="refused"):
        fetch(caller)


def test_bio_entrez_is_as_before_after_the_block(caller: Caller) -> None:
    before = (Entrez.email, Entrez.tool, Entrez.api_key, Entrez._open)
    with configured(caller):
        assert Entrez.email == "tests@example.org"
    assert (Entrez.email, Entrez.tool, Entrez.api_key, Entrez._open) == before


def test_a_retry_after_stops_every_caller(server: EutilsServer, caller: Caller, clock: FakeClock) -> None:
    server.faults["efetch"] = [FAULTS["429"]]
    other = replace(caller, tries=1)
    with configured(caller), pytest.raises(Unavailable):
        call(replace(caller, sleep=lambda _: True), Entrez.efetch, {"db": "pubmed", "id": "1"}, lambda body: body)
    assert fetch(other) == [101, 102, 103, 104, 105]
    assert clock.waits == [7]


def test_the_retries_of_a_run_are_bounded(server: EutilsServer, tmp_path: Path) -> None:
    server.rates = {"5xx": 1.0}
    with pytest.raises(Unavailable, match="DRZERO_INGEST__ENTREZ_RETRY_BUDGET"):
        papers_of(source_of(server, tmp_path, entrez_retry_budget=3), tmp_path)
    assert len(server.requests) == 4


def test_no_hit_is_one_sentence_with_what_was_not_understood(server: EutilsServer, tmp_path: Path) -> None:
    reply = (
        b"<eSearchResult><Count>0</Count><ErrorList><PhraseNotFound>abcXYZ</PhraseNotFound></ErrorList></eSearchResult>"
    )
    server.faults["esearch"] = [(200, {}, reply)] * 2
    done = ingest(query_environment(server, tmp_path, query="abcXYZ"))
    assert done.returncode == 1
    assert "finds no paper for 'abcXYZ' (not understood: abcXYZ)" in done.stderr.splitlines()[-1]
    assert not (tmp_path / "corpus").exists()


def test_a_single_wrong_zero_is_not_believed(server: EutilsServer, tmp_path: Path) -> None:
    server.faults["esearch"] = [(200, {}, b"<eSearchResult><Count>0</Count></eSearchResult>")]
    assert len(papers_of(source_of(server, tmp_path), tmp_path)[0]) == 11


def test_kill_in_the_middle_of_fetching_leaves_the_old_corpus(server: EutilsServer, tmp_path: Path) -> None:
    assert ingest(query_environment(server, tmp_path)).returncode == 0
    environ = query_environment(server, tmp_path, query="gout", entrez_workers=1)
    server.faults["efetch"] = [None, "hold"]
    with subprocess.Popen(command("--force"), cwd=ROOT, env=environ, stderr=subprocess.DEVNULL) as process:
        assert server.held.wait(60)
        process.kill()
    server.released.set()
    assert len(Corpus(tmp_path / "corpus", verify=True)) == 11
    assert read_manifest(tmp_path / "corpus").made_from["query"] == "cancer"
    asked = len(server.requests)
    assert ingest(environ, "--force").returncode == 0
    assert read_manifest(tmp_path / "corpus").made_from["query"] == "gout"
    assert [a["id"] for _, a in server.requests[asked:]] == ["107,106,105,104", "103,102,101"]  # the first was kept


def test_more_papers_than_the_cap_come_in_windows_newest_first(tmp_path: Path) -> None:
    with serving(spread(12_000)) as server:
        papers, counts = papers_of(source_of(server, tmp_path), tmp_path)
        some, fewer = papers_of(source_of(server, tmp_path, max_records=11_000), tmp_path)
    assert sorted(pmids(papers)) == list(range(1, 12_001))
    assert pmids(papers) == sorted(pmids(papers), reverse=True)  # the server numbers its papers by date
    assert counts["windows"] > 1
    assert pmids(some) == pmids(papers)[:11_000]
    assert (fewer["found"], fewer["asked"], fewer["read"]) == (12_000, 11_000, 11_000)


def test_a_new_years_day_over_the_cap_is_cut_by_the_day_of_creation(tmp_path: Path) -> None:
    day = date(2010, 1, 1)
    held = [Held(day, day + timedelta(days=pmid % 90), pmid) for pmid in range(1, 12_001)]
    with serving(held) as server:
        papers, _ = papers_of(source_of(server, tmp_path), tmp_path)
        assert any("[crdt]" in asked["term"] for utility, asked in server.requests if utility == "esearch")
    assert sorted(pmids(papers)) == list(range(1, 12_001))


def test_the_corpus_does_not_depend_on_workers_or_faults(tmp_path: Path) -> None:
    with serving(spread(12_000)) as server:
        calm, _ = papers_of(source_of(server, tmp_path / "calm", entrez_workers=1), tmp_path)
        server.rates, server.retry_after = dict.fromkeys(KINDS, 0.05), "0"
        rough, _ = papers_of(source_of(server, tmp_path / "rough", entrez_workers=8), tmp_path)
    assert calm == rough


def test_the_filters_of_the_corpus_hold_for_a_query_too(server: EutilsServer, tmp_path: Path) -> None:
    excluded = tmp_path / "held-out.txt"
    excluded.write_text("103\n104\n")
    assert ingest(query_environment(server, tmp_path, exclude_pmids=excluded)).returncode == 0
    corpus = Corpus(tmp_path / "corpus")
    assert {paper.pmid for paper in corpus}.isdisjoint({"103", "104"})
    assert (corpus.manifest.counts["read"], corpus.manifest.counts["dropped_excluded"], len(corpus)) == (11, 2, 9)


def fetched_ids(server: EutilsServer, since: int) -> list[int]:
    """The PMIDs that EFetch was asked for from this request on."""
    asked = [a["id"] for utility, a in server.requests[since:] if utility == "efetch"]
    return [int(pmid) for pmids in asked for pmid in pmids.split(",")]


def test_an_update_fetches_what_is_new_or_changed_and_drops_what_is_gone(server: EutilsServer, tmp_path: Path) -> None:
    environ = query_environment(server, tmp_path)
    assert ingest(environ).returncode == 0
    first = {paper.pmid: paper for paper in Corpus(tmp_path / "corpus")}
    day, today = date(2020, 1, 1), datetime.now(UTC).date()
    kept = [Held(day, day, pmid) for pmid in range(102, 112) if pmid != 105]
    server.hold([*kept, Held(day, day, 105, today, "Another title."), Held(today, today, 120), Held(today, today, 121)])
    calls = len(server.requests)
    assert "corpus is reused" in ingest(environ).stderr
    assert len(server.requests) == calls
    done = ingest(environ, "--update")
    assert done.returncode == 0, done.stderr
    assert sorted(fetched_ids(server, calls)) == [105, 120, 121]
    corpus = Corpus(tmp_path / "corpus", verify=True)
    assert [int(p.pmid) for p in corpus] == [111, 110, 109, 108, 107, 106, 104, 103, 102, 121, 120, 105]
    assert corpus[11] == corpus.find("105")
    assert corpus[11].title == "Another title."
    assert corpus.find("101") is None
    assert all(first[paper.pmid] == paper for paper in list(corpus)[:9])
    done = ingest(environ, "--update")
    assert "corpus is up to date" in done.stderr
    assert Corpus(tmp_path / "corpus").manifest == corpus.manifest
    counts = corpus.manifest.counts
    assert {name: counts[name] for name in ("found", "asked", "carried", "fetched", "read", "kept")} == {
        "found": 12, "asked": 12, "carried": 9, "fetched": 3, "read": 12, "kept": 12,
    }  # fmt: skip


def test_a_higher_limit_fetches_only_the_papers_that_are_not_there(server: EutilsServer, tmp_path: Path) -> None:
    assert ingest(query_environment(server, tmp_path, max_records=6)).returncode == 0
    calls = len(server.requests)
    assert ingest(query_environment(server, tmp_path, max_records=10)).returncode == 0
    assert sorted(fetched_ids(server, calls)) == [102, 103, 104, 105]
    assert [int(paper.pmid) for paper in Corpus(tmp_path / "corpus")] == list(range(111, 101, -1))


def test_other_filters_begin_from_nothing(server: EutilsServer, tmp_path: Path) -> None:
    assert ingest(query_environment(server, tmp_path)).returncode == 0
    calls = len(server.requests)
    assert ingest(query_environment(server, tmp_path, min_abstract_words=2)).returncode == 0
    assert len(fetched_ids(server, calls)) == 11


def test_a_paper_that_never_comes_is_counted_as_missing_and_the_others_come(
    server: EutilsServer, tmp_path: Path
) -> None:
    del server.titles[107]
    papers, counts = papers_of(source_of(server, tmp_path, entrez_batch=4), tmp_path)
    assert pmids(papers) == [pmid for pmid in range(111, 100, -1) if pmid != 107]
    assert (counts["asked"], counts["read"], counts["missing"]) == (11, 10, 1)
    assert fetched_ids(server, 0).count(107) == TURNS


def test_what_pubmed_gains_while_a_run_is_interrupted_waits_for_the_next_run(tmp_path: Path) -> None:
    with serving(list(range(1, 31))) as server:
        server.faults["efetch"] = [None, (400, {}, b"stop")]
        settings: dict[str, object] = {"entrez_batch": 10, "entrez_workers": 1}
        with pytest.raises(Refused):
            papers_of(source_of(server, tmp_path, **settings), tmp_path)
        server.hold([*server.papers, Held(date(2020, 1, 1), date(2020, 1, 2), 31)])
        searches = sum(utility == "esearch" for utility, _ in server.requests)
        papers, _ = papers_of(source_of(server, tmp_path, **settings), tmp_path)
        assert sum(utility == "esearch" for utility, _ in server.requests) == searches
    assert pmids(papers) == list(range(30, 0, -1))


def test_a_query_that_counts_more_papers_than_its_windows_list_is_an_error(tmp_path: Path) -> None:
    with serving(spread(12_000)) as server:
        undated = EutilsServer.matches

        def with_undated(asked: dict[str, str]) -> list[int]:
            found = undated(server, asked)
            return found if "mindate" in asked else [*found, 99_999]

        server.matches = with_undated  # type: ignore[method-assign]
        with pytest.raises(BadReply, match=r"finds 12001 papers for .*, but 12000 in"):
            papers_of(source_of(server, tmp_path), tmp_path)


def test_a_damaged_kept_batch_is_fetched_again(server: EutilsServer, tmp_path: Path) -> None:
    papers_of(source_of(server, tmp_path, entrez_batch=4), tmp_path)
    kept = sorted(tmp_path.rglob("*.xml.gz"))
    kept[1].write_bytes(kept[1].read_bytes()[:-20])
    asked = len(server.requests)
    papers, _ = papers_of(source_of(server, tmp_path, entrez_batch=4), tmp_path)
    assert len(papers) == 11
    assert [utility for utility, _ in server.requests[asked:]] == ["efetch"]


def test_kept_batches_are_gone_when_the_corpus_is_done(server: EutilsServer, tmp_path: Path) -> None:
    source = source_of(server, tmp_path)
    papers_of(source, tmp_path)
    assert source.job.folder.is_dir()
    source.done()
    assert not source.job.folder.exists()
    source.done()


def test_sixty_thousand_papers_come_once_each_under_faults_of_every_kind_and_within_the_rate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(eutils, "LONGEST_STEP_S", 0.1)  # at these rates a call often fails twenty times in a row
    with serving(spread(60_000), rates=dict.fromkeys(KINDS, 0.1)) as server:
        server.retry_after = "0"
        source, noted = paced(source_of(server, tmp_path, entrez_workers=4), 200)
        papers, counts = papers_of(source, tmp_path)
        assert most_in_a_second(noted.all) <= 200
        assert most_in_a_second(server.times) <= 200 + 4  # a machine that stops can hold up what is on its way
    assert len(papers) == len(set(pmids(papers))) == 60_000
    assert (counts["found"], counts["asked"], counts["missing"]) == (60_000, 60_000, 0)


def test_many_workers_keep_to_the_rate_and_come_near_it(tmp_path: Path) -> None:
    shares = []
    for attempt in range(3):  # the best counts: all else is a busy machine's
        with serving(spread(3_000)) as server:
            source, noted = paced(source_of(server, tmp_path / str(attempt), entrez_workers=8, entrez_batch=50), 20)
            papers_of(source, tmp_path)
            assert most_in_a_second(noted.all) <= 20
            assert most_in_a_second(server.times) <= 20 + 8
            shares.append((server.times[-1] - server.times[0]) * 20 / len(server.times))
        if shares[-1] <= 1.2:
            break
    assert min(shares) <= 1.2


def kill_and_resume(folder: Path, kills: int) -> None:
    """A run that is killed so many times makes the corpus of an undisturbed one and asks for hardly anything twice."""
    draw = random.Random(kills)  # noqa: S311
    settings = {"max_records": 20_000, "entrez_batch": 500, "entrez_workers": 3}
    with serving(spread(12_000), rates={"slow": 1.0}) as server:
        assert ingest(query_environment(server, folder / "calm", **settings)).returncode == 0
        calm = len(server.requests)
        environ = query_environment(server, folder / "rough", **settings)
        for _ in range(kills):
            with subprocess.Popen(command(), cwd=ROOT, env=environ, stderr=subprocess.DEVNULL) as process:
                assert server.wait_for(len(server.requests) + draw.randrange(1, calm // kills))
                process.kill()
        assert ingest(environ).returncode == 0
        fetches = sum(utility == "efetch" for utility, _ in server.requests[calm:])
    assert fetches <= 12_000 / 500 + 3 + kills * 3  # at most what was in flight at a kill
    one, other = (read_manifest(folder / name / "corpus", verify=True) for name in ("calm", "rough"))
    assert (one.files, one.rows) == (other.files, 12_000)


def test_a_run_that_is_killed_goes_on_and_makes_the_same_corpus(tmp_path: Path) -> None:
    kill_and_resume(tmp_path, 3)


@pytest.mark.slow
def test_a_run_that_is_killed_ten_times_makes_the_same_corpus(tmp_path: Path) -> None:
    kill_and_resume(tmp_path, 10)


@pytest.mark.slow
def test_ten_thousand_papers_at_ncbis_own_rate_are_bounded_by_the_rate(tmp_path: Path) -> None:
    with serving(spread(10_000)) as server:
        papers, _ = papers_of(source_of(server, tmp_path, entrez_rate=0, entrez_batch=200), tmp_path)
        assert len(papers) == 10_000
        assert most_in_a_second(server.times) <= 3
        assert server.times[-1] - server.times[0] <= 1.2 * len(server.times) / 3


def test_the_server_of_these_tests_lists_no_more_than_the_cap_and_refuses_what_lies_beyond() -> None:
    with serving(spread(10_500)) as server:
        caller = Caller(server.url, "tests@example.org", None, timeout_s=5.0, tries=1, pace=Pace(100))
        with configured(caller):
            asked = {"db": "pubmed", "term": "x", "retmax": 20_000}
            reply = call(caller, Entrez.esearch, asked, lambda body: body)
            assert reply.count(b"<Id>") == 9_999
            with pytest.raises(BadReply, match="'retstart' cannot be larger than 9998"):
                call(caller, Entrez.esearch, asked | {"retstart": 9_999}, read_search)


def test_the_server_of_these_tests_keeps_searches_and_says_when_it_has_lost_one(
    server: EutilsServer, caller: Caller
) -> None:
    with configured(caller):
        asked: dict[str, object] = {"db": "pubmed", "term": "x", "usehistory": "y"}
        kept = reply_root(call(caller, Entrez.esearch, asked, lambda body: body), "eSearchResult")
        asked = {name: kept.findtext(tag) for name, tag in (("WebEnv", "WebEnv"), ("query_key", "QueryKey"))}
        asked |= {"db": "pubmed", "retstart": 2, "retmax": 3}
        body = call(caller, Entrez.efetch, asked, lambda body: body)
        assert [record.pmid for record in records_of(body)] == ["109", "108", "107"]
        server.kept.clear()
        with pytest.raises(Refused, match="Unable to obtain query"):
            call(caller, Entrez.efetch, asked, records_of)
        with pytest.raises(BadReply, match="Unable to obtain query"):
            call(caller, Entrez.efetch, asked | {"retstart": 3}, records_of)


@pytest.mark.parametrize("address", [None, "", "nobody", "a@b", "a b@c.de", "a@b.c@d.e", "a@b."])
def test_no_plausible_contact_is_one_sentence_with_the_variable(address: str | None) -> None:
    with pytest.raises(UsageError, match="DRZERO_INGEST__EMAIL"):
        checked_contact(address)


def test_without_contact_or_query_nothing_is_asked(server: EutilsServer, tmp_path: Path) -> None:
    for missing in ("email", "query"):
        done = ingest(query_environment(server, tmp_path, source="entrez", **{missing: ""}))
        assert done.returncode == 1
        assert f"DRZERO_INGEST__{missing.upper()}" in done.stderr
    assert server.requests == []


def test_dates_in_the_wrong_order_are_named(server: EutilsServer, tmp_path: Path) -> None:
    done = ingest(query_environment(server, tmp_path, date_from="2021-01-01", date_to="2020-01-01"))
    assert done.returncode == 1
    assert "DRZERO_INGEST__DATE_TO" in done.stderr


def test_dates_are_sent_as_a_closed_range_or_not_at_all() -> None:
    today = date(2026, 3, 1)
    assert "datetype" not in search_parameters("x", whole_window(IngestSettings(query="x"), today))
    sent = search_parameters("x", whole_window(IngestSettings(query="x", date_to=date(2020, 3, 4)), today))
    assert (sent["datetype"], sent["mindate"], sent["maxdate"]) == ("pdat", "1700/01/01", "2020/03/04")
    sent = search_parameters("x", whole_window(IngestSettings(query="x", date_from=date(2020, 3, 4)), today))
    assert (sent["mindate"], sent["maxdate"]) == ("2020/03/04", "2027/03/02")


def test_days_of_creation_are_a_clause_of_the_term() -> None:
    day = Days(date(2020, 1, 1), date(2020, 1, 1))
    sent = search_parameters("a OR b", Window(day, Days(date(2020, 1, 2), date(2020, 1, 9))))
    assert sent["term"] == '(a OR b) AND ("2020/01/02"[crdt] : "2020/01/09"[crdt])'
    assert (sent["mindate"], sent["maxdate"]) == ("2020/01/01", "2020/01/01")


def test_the_key_comes_from_a_variable_or_a_file(tmp_path: Path) -> None:
    secret = tmp_path / "key"
    secret.write_text(KEY + "\n")
    assert read_key({}) is None
    assert read_key({"NCBI_API_KEY": KEY}) == KEY
    assert read_key({"NCBI_API_KEY_FILE": str(secret)}) == KEY
    with pytest.raises(UsageError, match="NCBI_API_KEY_FILE"):
        read_key({"NCBI_API_KEY_FILE": str(tmp_path / "none")})


SEARCHES = {
    "esearch1.xml": 63, "esearch2.xml": 42249, "esearch3.xml": 2651, "esearch4.xml": 177, "esearch5.xml": 5,
    "esearch6.xml": 1018, "esearch7.xml": 330, "esearch8.xml": 0, "esearch9.xml": 2,
}  # fmt: skip
RECORDS = {
    "pubmed1.xml": 2, "pubmed2.xml": 2, "pubmed4.xml": 1, "pubmed5.xml": 1, "pubmed6.xml": 1, "pubmed7.xml": 1,
    "title_with_html_tags.xml": 1,
}  # fmt: skip
POSTS = {"epost1.xml"}


@needs_replies
@pytest.mark.parametrize("path", sorted(REPLIES.glob("*")), ids=lambda path: path.name)
def test_every_real_reply_is_read_as_what_it_is_and_as_nothing_else(path: Path) -> None:
    body = path.read_bytes()
    if path.name in SEARCHES:
        assert read_search(body).count == SEARCHES[path.name]
    else:
        with pytest.raises(ErrorReply):
            read_search(body)
    if path.name in RECORDS:
        papers = [record.paper() for record in records_of(body)]
        assert len(papers) == RECORDS[path.name]
        assert all(paper.pmid.isdecimal() and paper.title and paper.pub_date for paper in papers)
    else:
        with pytest.raises(ErrorReply):
            read_batch(body, range(100))
    if path.name in POSTS:
        assert reply_root(body, "ePostResult").findtext("WebEnv")
    else:
        with pytest.raises(ErrorReply):
            reply_root(body, "ePostResult")


@needs_replies
def test_a_real_search_is_checked_against_what_it_lists_and_says_what_it_did_not_understand() -> None:
    assert read_search((REPLIES / "esearch8.xml").read_bytes()).remark == " (not understood: abcXYZ)"
    body = (REPLIES / "esearch1.xml").read_bytes()
    assert len(read_search(body, most=20).pmids) == 20
    with pytest.raises(ErrorReply, match="counts 63 papers, but lists 20 of the 30 asked for"):
        read_search(body, most=30)
