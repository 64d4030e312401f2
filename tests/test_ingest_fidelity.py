"""Records against independent readers: every field of every full record equals what pubmed_parser reads.

Where it reads something else, or nothing, the field is listed with the reason, and must equal what the standard
library's XML parser finds at the place that is right; a difference in a field that is not listed fails. Titles and
abstracts are also compared with NLM's own MEDLINE text as Biopython reads it.
"""

from collections.abc import Callable, Iterable
from dataclasses import fields
from pathlib import Path
from xml.etree import ElementTree
from xml.etree.ElementTree import Element

import pubmed_parser
import pytest
from Bio import Medline

from services.ingest.folder import opened
from services.ingest.pubmed_xml import Record, read_records
from shared.records import Paper

DATA = Path(__file__).parents[2] / "shared" / "data"
FULL = DATA / "pubmed" / "full-xml"
pytestmark = pytest.mark.skipif(not FULL.is_dir(), reason="the real PubMed records are not beside this checkout")
Other = dict[str, str]


def plain(text: str) -> str:
    """Single spaces."""
    return " ".join(text.split())


def parts(text: str, mark: str = "; ") -> tuple[str, ...]:
    return tuple(plain(one) for one in text.split(mark) if plain(one))


def without_codes(text: str) -> tuple[str, ...]:
    """ "D001:Humans; D002:Rats" without what stands before the colons."""
    return tuple(one.partition(":")[2] for one in parts(text))


def headings(text: str) -> tuple[str, ...]:
    """pubmed_parser's "D1:Lung / Q1:injuries*" as MEDLINE's "Lung/*injuries"."""
    return tuple(
        "/".join(f"*{name[:-1]}" if name.endswith("*") else name for name in without_codes(one.replace(" / ", "; ")))
        for one in parts(text)
    )


def written_names(text: str) -> tuple[str, ...]:
    """ "Last|Fore|Initials|Id;…" as "Fore Last"."""
    people = (person.split("|") for person in text.split(";") if person.strip("|"))
    return tuple(plain(f"{person[1]} {person[0]}") for person in people)


READ: dict[str, Callable[[Other], object]] = {
    "pmid": lambda o: plain(o["pmid"]),
    "title": lambda o: plain(o["title"]),
    "abstract": lambda o: plain(o["abstract"]),
    "authors": lambda o: written_names(o["authors"]),
    "journal": lambda o: plain(o["journal"]),
    "pub_date": lambda o: o["pubdate"],
    "mesh_terms": lambda o: tuple(one.partition("/")[0].lstrip("*") for one in headings(o["mesh_terms"])),
    "mesh_headings": lambda o: headings(o["mesh_terms"]),
    "doi": lambda o: o["doi"],
    "vernacular_title": lambda o: plain(o["vernacular_title"]),
    "journal_abbreviation": lambda o: o["medline_ta"],
    "issn": lambda o: o["issn_linking"],
    "pmc": lambda o: o["pmc"],
    "languages": lambda o: parts(o["languages"], ";"),
    "publication_types": lambda o: without_codes(o["publication_types"]),
    "keywords": lambda o: parts(o["keywords"]),
}


def text_of(element: Element | None) -> str:
    return "" if element is None else plain("".join(element.itertext()))


def all_texts(elements: Iterable[Element]) -> tuple[str, ...]:
    return tuple(filter(None, map(text_of, elements)))


def sections(record: Element) -> str:
    found = []
    for part in record.iterfind(f"{ARTICLE}/Abstract/AbstractText"):
        label = part.get("Label", "UNLABELLED").rstrip(":")
        found.append(text_of(part) if label == "UNLABELLED" or not text_of(part) else f"{label}: {text_of(part)}")
    return " ".join(filter(None, found))


def people(record: Element) -> tuple[str, ...]:
    authors = [a for a in record.iterfind(f"{ARTICLE}/AuthorList/Author") if a.get("ValidYN") != "N"]
    names = ("CollectiveName", "ForeName", "LastName", "Suffix")
    return tuple(plain(" ".join(text_of(author.find(name)) for name in names)) for author in authors)


def starred(name: Element) -> str:
    return "*" * (name.get("MajorTopicYN") == "Y") + text_of(name)


def first_of(record: Element, *paths: str) -> str:
    return next((text for path in paths for place in record.iterfind(path) if (text := text_of(place))), "")


def old_pmc(record: Element) -> str:
    others = all_texts(record.iterfind("MedlineCitation/OtherID"))
    return next((text.partition(" ")[0] for text in others if text.startswith("PMC")), "")


def links(record: Element) -> tuple[str, ...]:
    found = record.iterfind("MedlineCitation/CommentsCorrectionsList/CommentsCorrections")
    return tuple(
        f"{one.get('RefType')} {first_of(one, 'PMID', 'RefSource')}" for one in found if one.get("RefType") != "Cites"
    )


def written_date(record: Element) -> str:
    places = (f"{ARTICLE}/Journal/JournalIssue/PubDate", f"{ARTICLE}/ArticleDate")
    return next((text for path in places for d in record.iterfind(path) if (text := " ".join(all_texts(d)))), "")


def was_retracted(record: Element) -> bool:
    types = all_texts(record.iterfind(f"{ARTICLE}/PublicationTypeList/PublicationType"))
    return "Retracted Publication" in types or any(link.startswith("RetractionIn ") for link in links(record))


ARTICLE = "MedlineCitation/Article"
IDENTIFIER = "PubmedData/ArticleIdList/ArticleId[@IdType='{}']"
DIFFERENT: dict[str, tuple[str, Callable[[Element], object]]] = {
    "title": ("drops text after some inline markup", lambda r: text_of(r.find(f"{ARTICLE}/ArticleTitle"))),
    "abstract": ("labels without a colon, UNLABELLED as a label, none for a single section", sections),
    "authors": ("leaves out collective names and suffixes", people),
    "doi": (
        "looks at the last ELocationID only, whatever its type",
        lambda r: first_of(r, f"{ARTICLE}/ELocationID[@EIdType='doi']", IDENTIFIER.format("doi")),
    ),
    "pmc": (
        "reads OtherID only, with its release date",
        lambda r: first_of(r, IDENTIFIER.format("pmc")) or old_pmc(r),
    ),
    "issn": (
        "knows the linking ISSN only",
        lambda r: first_of(r, "MedlineCitation/MedlineJournalInfo/ISSNLinking", f"{ARTICLE}/Journal/ISSN"),
    ),
    "journal_abbreviation": (
        "gives MEDLINE's abbreviation, without dots and of today's title",
        lambda r: text_of(r.find(f"{ARTICLE}/Journal/ISOAbbreviation")),
    ),
    "keywords": ("keeps the first list only", lambda r: all_texts(r.iterfind("MedlineCitation/KeywordList/Keyword"))),
    "mesh_headings": (
        "misses the star of a descriptor",
        lambda r: tuple("/".join(map(starred, h)) for h in r.iterfind("MedlineCitation/MeshHeadingList/MeshHeading")),
    ),
    "pub_date_text": ("keeps the normalised date only", written_date),
    "links": ("does not read them", links),
    "retracted": ("does not read it", was_retracted),
}


@pytest.mark.parametrize("path", sorted(FULL.glob("*.xml.gz")), ids=lambda path: path.name)
def test_every_field_of_every_record_is_what_independent_readers_find(path: Path) -> None:
    with opened(path) as stream:
        ours = [record.paper() for record in read_records(stream) if isinstance(record, Record)]
    theirs = list(pubmed_parser.parse_medline_xml(str(path), year_info_only=False, parse_downto_mesh_subterms=True))
    with opened(path) as stream:
        trees = ElementTree.parse(stream).getroot().findall("PubmedArticle")  # noqa: S314 - NLM's own files
    for paper, other, tree in zip(ours, theirs, trees, strict=True):
        for name in (field.name for field in fields(Paper)):
            value = getattr(paper, name)
            if name in READ and value == READ[name](other):
                continue
            assert name in DIFFERENT, f"{paper.pmid}: {name} is {value!r}, pubmed_parser has {READ[name](other)!r}"
            reason, find = DIFFERENT[name]
            assert value == find(tree), f"{paper.pmid}: {name}, of which pubmed_parser {reason}"


def test_titles_and_abstracts_are_those_of_the_medline_text() -> None:
    medline: dict[str, dict[str, str]] = {}
    for path in sorted((DATA / "entrez-replies").glob("pubmed_result*.txt")):
        with path.open(encoding="utf-8") as stream:
            medline |= {record["PMID"]: record for record in Medline.parse(stream) if "PMID" in record}
    compared = 0
    for path in sorted((DATA / "pubmed" / "title-abstract-xml").glob("*.xml.gz")):
        with opened(path) as stream:
            for record in read_records(stream):
                if isinstance(record, Record) and record.pmid in medline:
                    paper, other = record.paper(), medline[record.pmid]
                    assert (paper.title, paper.abstract) == (plain(other["TI"]), plain(other["AB"]))
                    compared += 1
    assert compared == len(medline)
