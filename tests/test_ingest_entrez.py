"""Ingest from Entrez against a local server: paging, faults and retries, error replies, contact, key, and a kill."""

import subprocess
import urllib.request
from collections.abc import Iterator
from datetime import UTC, date, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path

import pytest
from Bio import Entrez
from eutils_server import EutilsServer, article_set, serving
from ingest_command import ROOT, command, environment, ingest

from services.ingest.entrez import checked_contact, read_batch, read_key, read_search, search_parameters
from services.ingest.eutils import Caller, ErrorReply, call, configured, reply_root, retry_after
from shared.clients import BadReply, Refused, Unavailable
from shared.command import UsageError
from shared.corpus import Corpus
from shared.files import read_manifest
from shared.settings import IngestSettings

REPLIES = Path(__file__).parents[2] / "shared" / "data" / "entrez-replies"
needs_replies = pytest.mark.skipif(not REPLIES.is_dir(), reason="the real replies are not beside this checkout")
KEY = "0123456789abcdef"


@pytest.fixture
def server() -> Iterator[EutilsServer]:
    with serving(list(range(101, 112))) as running:
        yield running


@pytest.fixture
def waits() -> list[float]:
    return []


@pytest.fixture
def caller(server: EutilsServer, waits: list[float], monkeypatch: pytest.MonkeyPatch) -> Caller:
    monkeypatch.setenv("no_proxy", "*")
    return Caller(server.url, "tests@example.org", KEY, timeout_s=5.0, tries=3, sleep=waits.append)


def fetch(caller: Caller, retmax: int = 5) -> list[str]:
    with configured(caller):
        batch = call(caller, Entrez.efetch, {"db": "pubmed", "retstart": 0, "retmax": retmax}, read_batch)
    return [paper.pmid for _, paper in batch]


def query_environment(server: EutilsServer, data: Path, **settings: object) -> dict[str, str]:
    given = {"entrez_url": server.url, "query": "cancer", "email": "tests@example.org", "entrez_batch": 4}
    return environment(data, **(given | settings)) | {"NCBI_API_KEY": KEY}


def test_a_query_is_fetched_in_batches_and_every_paper_is_counted(server: EutilsServer, tmp_path: Path) -> None:
    done = ingest(query_environment(server, tmp_path, date_from="2020-01-02"))
    assert done.returncode == 0, done.stderr
    assert [paper.pmid for paper in Corpus(tmp_path / "corpus")] == [str(n) for n in range(101, 112)]
    counts = read_manifest(tmp_path / "corpus").counts
    assert {name: counts[name] for name in ("found", "asked", "missing", "read", "kept")} == {
        "found": 11, "asked": 11, "missing": 0, "read": 11, "kept": 11,
    }  # fmt: skip
    utility, asked = server.requests[0]
    assert utility == "esearch"
    assert asked.items() >= {"term": "cancer", "mindate": "2020/01/02", "maxdate": "3000/12/31"}.items()
    assert asked.items() >= {"email": "tests@example.org", "tool": "drzero-biomedical", "api_key": KEY}.items()
    assert [(a["retstart"], a["retmax"]) for u, a in server.requests[1:]] == [("0", "4"), ("4", "4"), ("8", "3")]
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
    assert fetch(caller) == ["101", "102", "103", "104", "105"]
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


def test_a_reply_that_does_not_come_is_given_up_after_the_time_limit(server: EutilsServer, waits: list[float]) -> None:
    server.faults["efetch"] = ["hold"]
    hasty = Caller(server.url, "tests@example.org", KEY, timeout_s=0.2, tries=2, sleep=waits.append)
    assert len(fetch(hasty)) == 5
    assert len(waits) == 1


def test_nobody_there_is_unavailable(caller: Caller, server: EutilsServer) -> None:
    server.shutdown()
    server.server_close()
    with pytest.raises(Unavailable, match="refused"):
        fetch(caller)


def test_bio_entrez_is_as_before_after_the_block(caller: Caller) -> None:
    before = (Entrez.email, Entrez.tool, Entrez.api_key, Entrez.max_tries, urllib.request._opener)
    with configured(caller):
        assert Entrez.email == "tests@example.org"
    assert (Entrez.email, Entrez.tool, Entrez.api_key, Entrez.max_tries, urllib.request._opener) == before


def test_a_short_batch_is_asked_once_more_and_then_counted(server: EutilsServer, tmp_path: Path) -> None:
    short = (200, {}, article_set([101, 102, 103]))
    server.faults["efetch"] = [short, (200, {}, article_set([101, 102]))]
    done = ingest(query_environment(server, tmp_path))
    counts = read_manifest(tmp_path / "corpus").counts
    assert (counts["asked"], counts["read"], counts["missing"]) == (11, 10, 1)
    assert "fewer papers than it found" in done.stderr


def test_no_hit_is_one_sentence_with_what_was_not_understood(server: EutilsServer, tmp_path: Path) -> None:
    reply = (
        b"<eSearchResult><Count>0</Count><ErrorList><PhraseNotFound>abcXYZ</PhraseNotFound></ErrorList></eSearchResult>"
    )
    server.faults["esearch"] = [(200, {}, reply)]
    done = ingest(query_environment(server, tmp_path, query="abcXYZ"))
    assert done.returncode == 1
    assert "finds no paper for 'abcXYZ' (not understood: abcXYZ)" in done.stderr.splitlines()[-1]
    assert not (tmp_path / "corpus").exists()


def test_kill_in_the_middle_of_fetching_leaves_the_old_corpus(server: EutilsServer, tmp_path: Path) -> None:
    assert ingest(query_environment(server, tmp_path)).returncode == 0
    environ = query_environment(server, tmp_path, query="gout")
    server.faults["efetch"] = [(200, {}, article_set([1, 2, 3, 4])), "hold"]
    with subprocess.Popen(command(), cwd=ROOT, env=environ, stderr=subprocess.DEVNULL) as process:
        assert server.held.wait(60)
        process.kill()
    server.released.set()
    assert len(Corpus(tmp_path / "corpus", verify=True)) == 11
    assert read_manifest(tmp_path / "corpus").made_from["query"] == "cancer"
    assert ingest(environ).returncode == 0
    assert read_manifest(tmp_path / "corpus").made_from["query"] == "gout"


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
    assert "datetype" not in search_parameters(IngestSettings(query="x"))
    sent = search_parameters(IngestSettings(query="x", date_to=date(2020, 3, 4)))
    assert (sent["datetype"], sent["mindate"], sent["maxdate"]) == ("pdat", "1000/01/01", "2020/03/04")


def test_the_key_comes_from_a_variable_or_a_file(tmp_path: Path) -> None:
    secret = tmp_path / "key"
    secret.write_text(KEY + "\n")
    assert read_key({}) is None
    assert read_key({"NCBI_API_KEY": KEY}) == KEY
    assert read_key({"NCBI_API_KEY_FILE": str(secret)}) == KEY
    with pytest.raises(UsageError, match="NCBI_API_KEY_FILE"):
        read_key({"NCBI_API_KEY_FILE": str(tmp_path / "none")})


def test_retry_after_is_read_as_seconds_or_as_a_date() -> None:
    soon = format_datetime(datetime.now(UTC) + timedelta(seconds=60), usegmt=True)
    assert retry_after("12") == 12
    assert 50 < (retry_after(soon) or 0) <= 60
    assert retry_after("later") is None
    assert retry_after(None) is None


@needs_replies
@pytest.mark.parametrize("name", ["epost2.xml", "epost3.xml", "esummary8.xml", "pubmed3.html", "pubmed_result1.txt"])
def test_real_error_replies_are_recognised(name: str) -> None:
    body = (REPLIES / name).read_bytes()
    for read in (read_batch, read_search):
        with pytest.raises(ErrorReply):
            read(body)
    with pytest.raises(ErrorReply):
        reply_root(body, "ePostResult")


@needs_replies
def test_real_search_replies_are_read() -> None:
    found = read_search((REPLIES / "esearch2.xml").read_bytes())
    assert (found.count, found.web_env, found.query_key) == (42249, "MCID_6927d6e7fee3e90f880ec190", "1")
    nothing = read_search((REPLIES / "esearch8.xml").read_bytes())
    assert (nothing.count, nothing.remark) == (0, " (not understood: abcXYZ)")
    with pytest.raises(ErrorReply, match="WebEnv"):  # a search that was not kept cannot be fetched
        read_search((REPLIES / "esearch1.xml").read_bytes())


@needs_replies
@pytest.mark.parametrize("number", [1, 2, 4, 5, 6, 7])
def test_real_fetch_replies_are_read(number: int) -> None:
    body = (REPLIES / f"pubmed{number}.xml").read_bytes()
    papers = [paper for _, paper in read_batch(body)]
    assert len(papers) == body.count(b"<PubmedArticle>") + body.count(b"<PubmedBookArticle>") > 0
    assert all(paper.pmid.isdecimal() and paper.title and paper.pub_date for paper in papers)
