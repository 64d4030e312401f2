"""Ingest from PubMed XML: what is read, what stands, what is left out, and that the old corpus survives everything."""

import gzip
import hashlib
import io
import json
import multiprocessing
import os
import signal
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from eutils_server import article, article_set
from hypothesis import given
from hypothesis import strategies as st
from ingest_command import ROOT, command, environment, ingest

from services.ingest.filters import Rules, fate
from services.ingest.folder import find_files, opened, scan_file
from services.ingest.pubmed_xml import Deletion, MalformedXml, Record, iso_date, medline_date, read_records, without
from services.ingest.versions import Events, settled
from services.ingest.workers import in_order
from shared.command import UsageError
from shared.corpus import Corpus
from shared.files import read_manifest
from shared.ledger import Ledger
from shared.records import Paper
from shared.settings import IngestSettings

DATA = Path(__file__).parents[2] / "shared" / "data"
PUBMED, UPDATES = DATA / "pubmed", DATA / "pubmed-updates"
needs_data = pytest.mark.skipif(not PUBMED.is_dir(), reason="the real PubMed records are not beside this checkout")
UPDATE_FILES = sorted(path.name for path in UPDATES.glob("*.xml.gz"))

RICH = """<PubmedArticle><MedlineCitation><PMID Version="2">77</PMID><Article>
<Journal><JournalIssue><PubDate><Year>2021</Year><Month>Mar</Month><Day>9</Day></PubDate></JournalIssue>
<Title>Journal of Tests</Title></Journal>
<ArticleTitle>H<sub>2</sub>O and <i>E. coli</i> &amp; <mml:math xmlns:mml="http://www.w3.org/1998/Math/MathML">
<mml:mi>x</mml:mi></mml:math>.</ArticleTitle>
<ELocationID EIdType="doi" ValidYN="Y">10.1/abc</ELocationID>
<Abstract><AbstractText Label="AIMS">To <b>see</b>.</AbstractText><!-- no --><AbstractText Label="UNLABELLED">Plain.
</AbstractText><CopyrightInformation>(c)</CopyrightInformation></Abstract>
<AuthorList><Author ValidYN="Y"><LastName>Curie</LastName><ForeName>Marie</ForeName></Author>
<Author ValidYN="N"><LastName>Curi</LastName></Author>
<Author><CollectiveName>The Test Group</CollectiveName></Author></AuthorList></Article>
<MeshHeadingList><MeshHeading><DescriptorName>Water</DescriptorName><QualifierName>analysis</QualifierName>
</MeshHeading></MeshHeadingList></MedlineCitation>
<PubmedData><ReferenceList><Reference><ArticleIdList><ArticleId IdType="doi">10.9/other</ArticleId></ArticleIdList>
</Reference></ReferenceList></PubmedData></PubmedArticle>"""


def papers(text: str) -> list[Paper]:
    items = read_records(io.BytesIO(text.encode()))
    return [item.paper() for item in items if isinstance(item, Record)]


def in_set(*records: str) -> str:
    return f"<PubmedArticleSet>{''.join(records)}</PubmedArticleSet>"


def folder_of(path: Path, **files: str | bytes) -> Path:
    """A folder with `<name>.xml` for each keyword."""
    path.mkdir(exist_ok=True)
    for name, content in files.items():
        (path / f"{name}.xml").write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def counts_of(data: Path) -> dict[str, int]:
    counts = dict(read_manifest(data / "corpus", verify=True).counts)
    assert counts["read"] == counts["kept"] + sum(n for name, n in counts.items() if name.startswith("dropped_"))
    return counts


def test_a_record_becomes_the_papers_fields_with_markup_as_text() -> None:
    assert papers(in_set(RICH)) == [
        Paper(
            pmid="77",
            title="H2O and E. coli & x.",
            abstract="AIMS: To see. Plain.",
            authors=("Marie Curie", "The Test Group"),
            journal="Journal of Tests",
            pub_date="2021-03-09",
            mesh_terms=("Water",),
            doi="10.1/abc",
            pub_date_text="2021 Mar 9",
            mesh_headings=("Water/analysis",),
        )
    ]


def test_processing_instructions_are_not_text() -> None:
    marked = RICH.replace("To <b>see</b>.", "To <?x y?>s<b>e<?z?>e</b>.").replace("</PMID>", "</PMID><?q?>", 1)
    assert papers(in_set(marked, "<?between?>", marked)) == papers(in_set(RICH, RICH))


def test_the_old_root_element_holds_citations_directly() -> None:
    inner = article(5).removeprefix("<PubmedArticle>").removesuffix("</PubmedArticle>")
    assert [p.pmid for p in papers(f"<MedlineCitationSet>{inner}</MedlineCitationSet>")] == ["5"]


def test_a_title_that_is_not_available_is_the_vernacular_one() -> None:
    text = (
        article(5)
        .replace("Title 5.", "[Not Available].")
        .replace("</Article>", "<VernacularTitle>Über Zucker.</VernacularTitle></Article>")
    )
    assert papers(in_set(text))[0].title == "Über Zucker."


def test_entities_are_neither_read_from_files_nor_expanded(tmp_path: Path) -> None:
    secret = tmp_path / "secret.txt"
    secret.write_text("SECRET")
    head = f'<!DOCTYPE PubmedArticleSet [<!ENTITY x SYSTEM "{secret.as_uri()}"><!ENTITY a "AAAA"><!ENTITY b "&a;&a;">]>'
    paper = papers(head + in_set(article(5).replace("Title 5.", "T &x; &b;")))[0]
    assert "SECRET" not in paper.title
    assert "AAAA" not in paper.title


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1999 Oct 15-31", "1999-10"),
        ("2000 Nov-Dec", "2000"),
        ("1998 Dec-1999 Jan", "1998"),
        ("1975-1976", "1975"),
        ("Spring 2001", "2001"),
        ("2019 Sep/Oct", "2019"),
        ("no year", ""),
        ("", ""),
    ],
)
def test_a_medline_date_tells_only_what_its_range_shares(text: str, expected: str) -> None:
    assert medline_date(text) == expected


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        (("2021", "Mar", "9"), "2021-03-09"),
        (("2021", "03"), "2021-03"),
        (("2021", "6", "31"), "2021-06"),
        (("2021", "13"), "2021"),
        (("2021",), "2021"),
        (("",), ""),
    ],
)
def test_a_date_is_iso_as_far_as_its_parts_are_real(parts: tuple[str, ...], expected: str) -> None:
    assert iso_date(*parts) == expected


Met = list[tuple[bool, int, int]]  # deletes, PMID, version


def after(met: Met, ledger: Ledger) -> tuple[Ledger, int, int]:
    """The ledger with the events met, and how many records were replaced and deleted."""
    deletes, pmids, versions = zip(*met, strict=True) if met else ((), (), ())
    events = Events(np.array(pmids, np.int64), np.array(versions, np.uint8), np.array(deletes, bool))
    found = settled(events, ledger)
    number = int(found.stands.sum())
    new = Ledger(
        events.pmids[found.stands],
        events.versions[found.stands],
        np.zeros(number, np.uint8),
        np.flatnonzero(found.stands).astype(np.int32),
    )
    return ledger.only(found.remains).joined(new), found.replaced, found.deleted


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 4), st.integers(1, 3)), max_size=30), st.integers(0, 30))
def test_what_stands_is_what_a_plain_replay_leaves_in_one_run_or_in_two(met: Met, cut: int) -> None:
    held: dict[int, int] = {}
    records = 0
    for deletes, pmid, version in met:
        if pmid and held.get(pmid, 0) <= version:
            held.pop(pmid, None) if deletes else held.update({pmid: version})
        records += bool(pmid and not deletes)
    whole, replaced, deleted = after(met, Ledger.empty())
    assert dict(zip(whole.pmids.tolist(), whole.versions.tolist(), strict=True)) == held
    assert records == len(held) + replaced + deleted
    first, *gone = after(met[:cut], Ledger.empty())
    both, *more = after(met[cut:], first)
    assert (both.pmids.tolist(), both.versions.tolist()) == (whole.pmids.tolist(), whole.versions.tolist())
    assert [a + b for a, b in zip(gone, more, strict=True)] == [replaced, deleted]


def test_later_files_and_higher_versions_win_and_deletions_remove_what_came_before(tmp_path: Path) -> None:
    def version(number: int, title: str) -> str:
        return article(1).replace('Version="1"', f'Version="{number}"').replace("Title 1.", title)

    delete = '<DeleteCitation><PMID Version="1">2</PMID><PMID Version="1">3</PMID></DeleteCitation>'
    source = folder_of(
        tmp_path / "xml",
        n1=in_set(version(2, "second"), article(2), article(3)),
        n2=in_set(version(1, "first"), article(4), delete),
        n3=in_set(article(3), article(4).replace("Title 4.", "revised")),
    )
    assert ingest(environment(tmp_path / "data", xml_dir=source)).returncode == 0
    titles = {paper.pmid: paper.title for paper in Corpus(tmp_path / "data" / "corpus")}
    assert titles == {"1": "second", "3": "Title 3.", "4": "revised"}
    counts = counts_of(tmp_path / "data")
    assert (counts["read"], counts["dropped_duplicate"], counts["dropped_deleted"]) == (7, 2, 2)


def test_records_without_pmid_or_abstract_are_dropped_and_counted(tmp_path: Path) -> None:
    nameless = article(9).replace('<PMID Version="1">9</PMID>', "")
    source = folder_of(tmp_path / "xml", n1=in_set(article(1), article(2, abstract=False), nameless))
    ingest(environment(tmp_path / "a", xml_dir=source))
    ingest(environment(tmp_path / "b", xml_dir=source, require_abstract="false"))
    strict, loose = counts_of(tmp_path / "a"), counts_of(tmp_path / "b")
    assert (strict["kept"], strict["dropped_no_abstract"], strict["dropped_no_pmid"]) == (1, 1, 1)
    assert (loose["kept"], loose["dropped_no_pmid"]) == (2, 1)


PAPER = Paper("1", "T", "one two three", languages=("ENG",), publication_types=("Letter",))


@pytest.mark.parametrize(
    ("changes", "settings", "name"),
    [
        ({}, {}, "kept"),
        ({"pmid": "7"}, {}, "excluded"),
        ({"retracted": True}, {}, "retracted"),
        ({"retracted": True}, {"keep_retracted": True}, "kept"),
        ({}, {"exclude_publication_types": ("News", "LETTER")}, "publication_type"),
        ({}, {"languages": ("fre", "eng")}, "kept"),
        ({}, {"languages": ("fre",)}, "language"),
        ({"languages": ()}, {"languages": ("fre",)}, "language_unknown"),
        ({"abstract": ""}, {}, "no_abstract"),
        ({"abstract": ""}, {"require_abstract": False, "min_abstract_words": 4}, "kept"),
        ({}, {"min_abstract_words": 3}, "kept"),
        ({}, {"min_abstract_words": 4}, "short_abstract"),
    ],
)
def test_a_paper_is_dropped_for_the_first_rule_it_breaks(
    changes: dict[str, Any], settings: dict[str, Any], name: str
) -> None:
    assert fate(replace(PAPER, **changes), Rules(IngestSettings(**settings), frozenset({"7"}))) == name


def test_filters_come_from_variables_and_count_what_they_drop(tmp_path: Path) -> None:
    speaks = [
        article(n).replace("</Article>", f"<Language>{code}</Language></Article>")
        for n, code in ((1, "eng"), (2, "fre"))
    ]
    (tmp_path / "mine.txt").write_text("3  # known\n\n")
    source = folder_of(tmp_path / "xml", n1=in_set(*speaks, article(3), article(4)))
    environ = environment(tmp_path / "data", xml_dir=source, languages="eng, ger", exclude_pmids=tmp_path / "mine.txt")
    assert ingest(environ).returncode == 0
    counts = counts_of(tmp_path / "data")
    assert (counts["dropped_language"], counts["dropped_excluded"], counts["language_unknown"]) == (1, 1, 1)
    assert [paper.pmid for paper in Corpus(tmp_path / "data" / "corpus")] == ["1", "4"]
    (tmp_path / "mine.txt").write_text("4\n")
    assert "changed settings: exclude_pmids" in ingest(environ).stderr
    (tmp_path / "mine.txt").write_text("four\n")
    assert "DRZERO_INGEST__EXCLUDE_PMIDS" in ingest(environ).stderr.splitlines()[-1]
    assert "languages" in ingest(environ | {"DRZERO_INGEST__LANGUAGES": "en"}).stderr


def test_a_file_that_its_md5_does_not_fit_is_malformed(tmp_path: Path) -> None:
    source = folder_of(
        tmp_path / "xml", n1=article_set([1]), n2=article_set([2]), n3=article_set([3]), n4=article_set([4])
    )
    digests = [hashlib.md5((source / f"n{n}.xml").read_bytes(), usedforsecurity=False).hexdigest() for n in (1, 2)]
    (source / "n1.xml.md5").write_text(f"MD5(n1.xml)= {digests[0]}\n")
    (source / "n2.xml.md5").write_text(f"{digests[1].upper()}  n2.xml\n")
    (source / "n3.xml.md5").write_text(f"{digests[0]}  n3.xml\n")
    (source / "n4.xml.md5").write_text("")
    assert ingest(environment(tmp_path / "data", xml_dir=source)).returncode == 0
    assert [paper.pmid for paper in Corpus(tmp_path / "data" / "corpus")] == ["1", "2"]
    told = json.loads((tmp_path / "data" / "corpus" / "malformed.json").read_text())
    assert [one["file"] for one in told] == ["n3.xml", "n4.xml"]
    assert all("MD5" in one["reason"] for one in told)


def test_the_corpus_is_the_same_for_any_number_of_workers(tmp_path: Path) -> None:
    files = {f"n{n}": article_set(list(range(n, n + 40))) for n in range(7)}
    source = folder_of(tmp_path / "xml", **files)
    shards = []
    for workers in (1, 2, 5):
        data = tmp_path / f"data{workers}"
        assert ingest(environment(data, xml_dir=source, workers=workers)).returncode == 0
        shards.append(read_manifest(data / "corpus").identity)
    assert len(set(shards)) == 1


def double(number: int) -> int:
    return 2 * number


def die(number: int) -> int:
    os.kill(os.getpid(), signal.SIGKILL)
    return number


def test_workers_give_results_in_order_and_end_with_the_iterator() -> None:
    assert list(in_order(double, range(50), 3)) == list(range(0, 100, 2))
    assert list(in_order(double, [], 3)) == []
    begun = in_order(double, range(50), 3)
    assert next(begun) == 0
    begun.close()
    assert multiprocessing.active_children() == []


def test_a_worker_that_is_killed_is_a_known_error() -> None:
    with pytest.raises(UsageError, match="DRZERO_INGEST__WORKERS"):
        list(in_order(die, range(5), 2))


NESTED = st.recursive(st.just("r"), lambda inner: inner.map(lambda text: f"<ReferenceList>{text}</ReferenceList>"))


@given(
    st.lists(st.tuples(st.sampled_from(["", "a", "<Ref/>", "<ReferenceLis", "\n"]), NESTED), max_size=5),
    st.integers(1, 40),
)
def test_reference_lists_are_cut_out_whole_however_the_stream_is_divided(
    pairs: list[tuple[str, str]], size: int
) -> None:
    data = "".join(text + inner for text, inner in pairs).encode()
    wanted = "".join(text + ("" if inner.startswith("<") else inner) for text, inner in pairs).encode()
    chunks = (data[start : start + size] for start in range(0, len(data), size))
    assert b"".join(without(b"ReferenceList", chunks)) == wanted


DAMAGED = {
    "cut": gzip.compress(article_set(list(range(1, 400))))[:-200],
    "flipped": gzip.compress(article_set([1]))[:-8] + b"\0" * 8,
    "open": b"<PubmedArticleSet><PubmedArticle>",
    "mixed": article_set([1, 2]).replace(b"</Article>", b"</Artcle>", 1),
    "html": b"<html><body>Not found</body></html>",
    "other": b"<rss><channel/></rss>",
    "empty": b"",
    "binary": bytes(range(256)),
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_a_damaged_file_is_malformed_xml_and_nothing_else(kind: str, tmp_path: Path) -> None:
    path = folder_of(tmp_path, n1=DAMAGED[kind]) / "n1.xml"
    with pytest.raises(MalformedXml) as caught:
        scan_file(path)
    assert caught.value.reason


def test_a_malformed_file_is_named_counted_and_left_out_whole(tmp_path: Path) -> None:
    source = folder_of(tmp_path / "xml", n1=article_set([1, 2]), n2=DAMAGED["cut"], n3=DAMAGED["mixed"])
    environ = environment(tmp_path / "data", xml_dir=source)
    done = ingest(environ)
    assert done.returncode == 0
    assert "n2.xml" in done.stderr
    assert "n3.xml" in done.stderr
    counts = counts_of(tmp_path / "data")
    assert (counts["files"], counts["files_malformed"], counts["read"], counts["kept"]) == (3, 2, 2, 2)
    told = json.loads((tmp_path / "data" / "corpus" / "malformed.json").read_text())
    assert [one["file"] for one in told] == ["n2.xml", "n3.xml"]
    assert told[1]["line"] == 2
    before = read_manifest(tmp_path / "data" / "corpus").identity
    stopped = ingest(environ, "--strict")
    assert stopped.returncode == 1
    assert "n2.xml is not readable PubMed XML" in stopped.stderr.splitlines()[-1]
    assert read_manifest(tmp_path / "data" / "corpus", verify=True).identity == before


def test_a_missing_folder_an_empty_one_and_no_record_to_keep_leave_the_corpus_as_it_was(tmp_path: Path) -> None:
    data = tmp_path / "data"
    ingest(environment(data, xml_dir=folder_of(tmp_path / "xml", n1=article_set([1]))))
    before = read_manifest(data / "corpus").identity
    (tmp_path / "empty").mkdir()
    hollow = folder_of(tmp_path / "hollow", n1=article_set([]))
    broken = folder_of(tmp_path / "broken", n1=DAMAGED["html"])
    for folder in (tmp_path / "nowhere", tmp_path / "empty", hollow, broken):
        done = ingest(environment(data, xml_dir=folder))
        assert done.returncode == 1
        assert "expected" in done.stderr.splitlines()[-1]
        assert "Traceback" not in done.stderr
        assert read_manifest(data / "corpus", verify=True).identity == before


def test_the_source_xml_without_a_folder_names_the_variable(tmp_path: Path) -> None:
    done = ingest(environment(tmp_path, source="xml"))
    assert done.returncode == 1
    assert "DRZERO_INGEST__XML_DIR" in done.stderr


def test_files_are_ordered_by_name_across_folders_and_others_are_not_read(tmp_path: Path) -> None:
    for name in ("updates/n2.xml.gz", "base/n1.XML", "base/n3.xml", "base/n1.xml.gz.md5", "base/._n1.xml"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert [path.name for path in find_files(tmp_path)] == ["n1.XML", "n2.xml.gz", "n3.xml"]
    with pytest.raises(UsageError, match="found none"):
        find_files(tmp_path / "base" / "n3.xml")


def test_a_second_run_reuses_and_a_change_of_settings_or_files_remakes(tmp_path: Path) -> None:
    source = folder_of(tmp_path / "xml", n1=article_set([1, 2]))
    data = tmp_path / "data"
    environ = environment(data, xml_dir=source)
    ingest(environ)
    first = (data / "corpus").readlink()
    again = ingest(environ)
    assert again.returncode == 0
    assert "corpus is reused" in again.stderr
    assert (data / "corpus").readlink() == first
    assert "changed settings: require_abstract" in ingest(environ | {"DRZERO_INGEST__REQUIRE_ABSTRACT": "0"}).stderr
    folder_of(source, n2=article_set([3]))
    assert "changed inputs: xml" in ingest(environ | {"DRZERO_INGEST__REQUIRE_ABSTRACT": "0"}).stderr
    assert counts_of(data)["kept"] == 3
    assert "--force" in ingest(environ | {"DRZERO_INGEST__REQUIRE_ABSTRACT": "0"}, "--force").stderr


def test_too_little_disk_space_is_one_sentence_before_any_work(tmp_path: Path) -> None:
    source = folder_of(tmp_path / "xml", n1=article_set([1]))
    environ = environment(tmp_path / "data", xml_dir=source) | {"DRZERO_STORAGE__MIN_FREE_GB": "1e9"}
    done = ingest(environ)
    assert done.returncode == 1
    assert "DRZERO_STORAGE__MIN_FREE_GB" in done.stderr.splitlines()[-1]
    assert not (tmp_path / "data" / "corpus").exists()


@needs_data
def test_all_records_of_the_data_folder_are_read_in_one_command(tmp_path: Path) -> None:
    for name, flag, kept in (("a", "true", 28_672), ("b", "false", 28_934)):
        done = ingest(environment(tmp_path / name, xml_dir=PUBMED, require_abstract=flag))
        assert done.returncode == 0, done.stderr
        counts = counts_of(tmp_path / name)
        assert (counts["read"], counts["kept"], counts["files"], counts["files_malformed"]) == (28_936, kept, 9, 0)
        assert counts["dropped_retracted"] == 2
        corpus = Corpus(tmp_path / name / "corpus")
        assert len(corpus) == kept
        assert len({paper.pmid for paper in corpus}) == kept


@needs_data
@pytest.mark.parametrize("name", UPDATE_FILES)
def test_files_as_nlm_ships_them_parse_to_their_end(name: str) -> None:
    with opened(UPDATES / name) as stream:
        raw = stream.read().decode()
    citations, deletions = raw.count("<MedlineCitation "), 0
    if "<DeleteCitation>" in raw:
        deletions = raw.partition("<DeleteCitation>")[2].count("<PMID ")
    with opened(UPDATES / name) as stream:
        items = [i if isinstance(i, Deletion) else i.paper() for i in read_records(stream)]
    read = [item for item in items if isinstance(item, Paper)]
    assert (len(read), len(items) - len(read)) == (citations, deletions)
    assert all(paper.pmid.isdecimal() and paper.title for paper in read)


@needs_data
def test_base_and_updates_together_agree_on_every_record(tmp_path: Path) -> None:
    source = tmp_path / "xml"
    source.mkdir()
    for path in [*UPDATES.glob("*.gz"), *(PUBMED / "full-xml").glob("*.gz")]:
        (source / path.name).symlink_to(path)
    assert ingest(environment(tmp_path / "data", xml_dir=source)).returncode == 0
    counts = counts_of(tmp_path / "data")
    assert counts["read"] == 2_213 + 953
    assert counts["dropped_duplicate"] > 0
    assert len({p.pmid for p in Corpus(tmp_path / "data" / "corpus")}) == counts["kept"]


@needs_data
def test_updates_applied_over_the_base_leave_what_a_plain_replay_leaves(tmp_path: Path) -> None:
    source = tmp_path / "xml"
    source.mkdir()
    in_turn = [*sorted(PUBMED.rglob("*.gz")), *sorted(UPDATES.glob("*.gz"))]
    held: dict[str, tuple[int, str]] = {}
    for number, path in enumerate(in_turn):
        (source / f"{number:03d}_{path.name}").symlink_to(path)
        with opened(path) as stream:
            root = ElementTree.parse(stream).getroot()  # noqa: S314 - NLM's own files
        for node in root.iter():
            pmids = node.findall("PMID")
            if node.tag == "MedlineCitation":
                version, title = int(pmids[0].get("Version", "1")), node.find("Article/ArticleTitle")
                text = "" if title is None else " ".join("".join(title.itertext()).split())
                if held.get(str(pmids[0].text), (0, ""))[0] <= version:
                    held[str(pmids[0].text)] = (version, text)
            elif node.tag == "DeleteCitation":
                for pmid in pmids:
                    held.pop(str(pmid.text), None)
    done = ingest(environment(tmp_path / "data", xml_dir=source, require_abstract="0", keep_retracted="1"))
    assert done.returncode == 0, done.stderr
    found = {paper.pmid: paper for paper in Corpus(tmp_path / "data" / "corpus")}
    counts = counts_of(tmp_path / "data")
    assert counts["read"] == 28_936 + 953
    assert counts["deletions"] == 24
    assert found.keys() == held.keys()
    assert {p for p, (_, title) in held.items() if title.strip("[]. ") and title != found[p].title} == set()


@needs_data
@pytest.mark.parametrize(("number", "status"), [(signal.SIGKILL, -signal.SIGKILL), (signal.SIGTERM, 130)])
def test_a_killed_run_leaves_the_old_corpus_and_the_next_run_finishes(
    number: signal.Signals, status: int, tmp_path: Path
) -> None:
    data = tmp_path / "data"
    ingest(environment(data, xml_dir=folder_of(tmp_path / "xml", n1=article_set([1]))))
    environ = environment(data, xml_dir=PUBMED)
    with subprocess.Popen(command(), cwd=ROOT, env=environ, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        next(line for line in process.stderr if "files are scanned" in line)
        process.send_signal(number)
        process.stderr.read()
    assert process.returncode == status
    assert [paper.pmid for paper in Corpus(data / "corpus", verify=True)] == ["1"]
    assert ingest(environment(data, xml_dir=PUBMED / "full-xml")).returncode == 0
    assert counts_of(data)["read"] == 2_213
    assert not list(data.glob(".corpus.building"))
