"""PubMed XML to papers: one pass over a stream in constant memory. The only module of ingest that knows lxml.

In: a binary stream of a `PubmedArticleSet` (PubMed, EFetch) or of the older `MedlineCitationSet`, and small E-utilities
replies. Out: `Record` and `Deletion` in document order; `paper()` builds the paper only when the caller wants it.
Raises `MalformedXml` with the line. Entities are not resolved, no DTD is loaded, nothing is read from the network.
What counts and what does not (duplicates, abstracts) is the caller's decision.
"""

import calendar
import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date
from typing import IO, Any

from lxml import etree

from shared.records import Paper

ROOTS = ("PubmedArticleSet", "MedlineCitationSet", "PubmedBookArticleSet")
RECORDS = ("PubmedArticle", "PubmedBookArticle")
SAFE = {"resolve_entities": False, "no_network": True, "load_dtd": False, "remove_comments": True, "remove_pis": True}
MONTHS = {name.lower(): number for number, name in enumerate(calendar.month_abbr) if name}
YEAR = re.compile(r"\b(1[0-9]{3}|20[0-9]{2})\b")
MONTH = re.compile(r"\b(" + "|".join(MONTHS) + r")[a-z]*\b", re.IGNORECASE)

Element = Any  # lxml ships no types


class MalformedXml(ValueError):
    """The stream is not PubMed XML; `line` is where it ends to be, 0 when unknown."""

    def __init__(self, reason: str, line: int = 0) -> None:
        super().__init__(reason)
        self.reason = reason
        self.line = line


@dataclass(frozen=True, slots=True)
class Deletion:
    """A PMID that NLM has withdrawn (`DeleteCitation`)."""

    pmid: str
    version: int


@dataclass(frozen=True, slots=True)
class Record:
    """One record as met; its element is only valid until the next one is asked for. `pmid` is "" when it has none."""

    pmid: str
    version: int
    element: Element

    def paper(self) -> Paper:
        """The paper of this record."""
        citation, article = _parts(self.element)
        return Paper(
            pmid=self.pmid,
            title=_title(article),
            abstract=_abstract(article.find("Abstract")),
            authors=tuple(_authors(article)),
            journal=_text(article.find("Journal/Title")) or _text(article.find("Book/BookTitle")),
            pub_date=_pub_date(article),
            mesh_terms=tuple(_text(e) for e in citation.iterfind("MeshHeadingList/MeshHeading/DescriptorName")),
            doi=_doi(self.element, article),
        )


def read_records(stream: IO[bytes]) -> Iterator[Record | Deletion]:
    """Records and deletions of one file in document order; MalformedXml at the place where it breaks."""
    root = ""
    try:
        for event, element in etree.iterparse(stream, events=("start", "end"), **SAFE):
            if not root:
                root = str(element.tag)
                if root not in ROOTS:
                    raise MalformedXml(f"root element is <{root}>, expected <{ROOTS[0]}>", element.sourceline or 0)
            if event == "start":
                continue
            if element.tag in RECORDS or (root == "MedlineCitationSet" and element.tag == "MedlineCitation"):
                pmid = _parts(element)[0].find("PMID")
                yield Record(_text(pmid), _version(pmid), element)
                _forget(element)
            elif element.tag == "DeleteCitation":
                yield from [Deletion(_text(pmid), _version(pmid)) for pmid in element.iterfind("PMID")]
                _forget(element)
    except etree.XMLSyntaxError as error:
        raise MalformedXml(_reason(error), error.lineno or 0) from error


def read_reply(body: bytes) -> Element:
    """The root element of a small XML reply; MalformedXml when it is none."""
    try:
        return etree.fromstring(body, etree.XMLParser(**SAFE))
    except etree.XMLSyntaxError as error:
        raise MalformedXml(_reason(error), error.lineno or 0) from error


def iso_date(year: str, month: str = "", day: str = "") -> str:
    """ISO date as far as the parts are real: "2021-03-09", "2021-03", "2021" or "". Months are numbers or names."""
    if not YEAR.fullmatch(year):
        return ""
    number = int(month) if month.isdecimal() else MONTHS.get(month[:3].lower(), 0)
    if not 1 <= number <= 12:
        return year
    try:
        return date(int(year), number, int(day)).isoformat()
    except ValueError:  # no day, or a 31st of June
        return f"{year}-{number:02d}"


def medline_date(text: str) -> str:
    """ISO date of a free-form `MedlineDate`: what all of the range shares, and the first year of a range of years.

    "1999 Oct 15-31" is "1999-10"; "2000 Nov-Dec" is "2000"; "1998 Dec-1999 Jan" is "1998"; "" when no year is named.
    """
    years, months = YEAR.findall(text), {m[:3].lower() for m in MONTH.findall(text)}
    if not years:
        return ""
    return iso_date(years[0], months.pop()) if len(set(years)) == 1 and len(months) == 1 else years[0]


def _reason(error: etree.XMLSyntaxError) -> str:
    return f"not well-formed: {error.msg or 'no content'}"


def _forget(element: Element) -> None:
    # Emptied siblings would still pile up under the root, so they are cut off as well.
    element.clear()
    parent = element.getparent()
    while element.getprevious() is not None:
        del parent[0]


def _parts(element: Element) -> tuple[Element, Element]:
    """The element that holds PMID and MeSH, and the one that holds title and abstract."""
    if element.tag == "PubmedBookArticle":
        book = element.find("BookDocument")
        book = element if book is None else book
        return book, book
    citation = element if element.tag == "MedlineCitation" else element.find("MedlineCitation")
    citation = element if citation is None else citation
    article = citation.find("Article")
    return citation, citation if article is None else article


def _text(element: Element | None) -> str:
    """All text of an element, that of inline markup included, with single spaces; "" for None."""
    return "" if element is None else " ".join("".join(element.itertext()).split())


def _version(pmid: Element | None) -> int:
    text = "1" if pmid is None else pmid.get("Version", "1")
    return int(text) if text.isdecimal() else 1


def _title(article: Element) -> str:
    title = _text(article.find("ArticleTitle"))
    if title.strip("[]. ").lower() in ("", "not available"):
        return _text(article.find("VernacularTitle")) or _text(article.find("Book/BookTitle")) or title
    return title


def _abstract(abstract: Element | None) -> str:
    """Sections as "LABEL: text", joined by spaces, without the copyright line."""
    if abstract is None:
        return ""
    return " ".join(filter(None, (_section(part) for part in abstract.iterfind("AbstractText"))))


def _section(part: Element) -> str:
    text, label = _text(part), part.get("Label", "").strip().rstrip(":")
    return f"{label}: {text}" if text and label and label != "UNLABELLED" else text


def _authors(article: Element) -> Iterator[str]:
    for group in article.iterfind("AuthorList"):
        if group.get("Type") == "editors":
            continue
        for author in group.iterfind("Author"):
            names = (_text(author.find(tag)) for tag in ("ForeName", "LastName", "Suffix"))
            name = _text(author.find("CollectiveName")) or " ".join(filter(None, names))
            if name and author.get("ValidYN") != "N":  # N marks a misspelling that another entry corrects
                yield name


def _pub_date(article: Element) -> str:
    for path in ("Journal/JournalIssue/PubDate", "Book/PubDate", "ArticleDate"):
        place = article.find(path)
        if place is None:
            continue
        parts = (_text(place.find(tag)) for tag in ("Year", "Month", "Day"))
        found = iso_date(*parts) or medline_date(_text(place.find("MedlineDate")))
        if found:
            return found
    return ""


def _doi(element: Element, article: Element) -> str:
    for place in article.iterfind("ELocationID"):
        if place.get("EIdType") == "doi" and place.get("ValidYN") != "N" and _text(place):
            return _text(place)
    # The full path: the reference list holds the identifiers of other papers under the same tags.
    for path in ("PubmedData/ArticleIdList/ArticleId", "BookDocument/ArticleIdList/ArticleId"):
        for place in element.iterfind(path):
            if place.get("IdType") == "doi" and _text(place):
                return _text(place)
    return ""
