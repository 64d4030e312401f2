"""PubMed XML to papers: one pass over a stream in constant memory. The only module of ingest that knows lxml.

In: a binary stream of a `PubmedArticleSet` (PubMed, EFetch) or of the older `MedlineCitationSet`, and small E-utilities
replies. Out: `Record` and `Deletion` in document order; `paper()` builds the paper only when the caller wants it.
Raises `MalformedXml` with the line. Entities are not resolved, no DTD is loaded, nothing is read from the network.
A file is UTF-8, or says which other superset of ASCII it is.
What counts and what does not (duplicates, filters) is the caller's decision. Children are visited once and grouped by
tag, because each `find` walks them again and costs as much as the parsing of what it finds.
"""

import calendar
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import date
from itertools import chain
from typing import IO, Any

from lxml import etree

from shared.records import Paper

ROOTS = ("PubmedArticleSet", "MedlineCitationSet", "PubmedBookArticleSet")
RECORDS = {"PubmedArticle", "PubmedBookArticle"}
NAMES = ("ForeName", "LastName", "Suffix")  # in the order of a written name
CHUNK = 1 << 16
UNUSED = b"ReferenceList"  # a third of all bytes, and no field is made of it
SAFE = {"resolve_entities": False, "no_network": True, "load_dtd": False, "remove_comments": True, "remove_pis": True}
BEFORE_MARK = re.compile(rb"(\xef\xbb\xbf)?(<\?xml[^>]*\?>)?(?=\s*<)")
MARK = b"<?root?>"
MONTHS = {name.lower(): number for number, name in enumerate(calendar.month_abbr) if name}
YEAR = re.compile(r"\b(1[0-9]{3}|20[0-9]{2})\b")
MONTH = re.compile(r"\b(" + "|".join(MONTHS) + r")[a-z]*\b", re.IGNORECASE)

Element = Any  # lxml ships no types
Children = dict[str, list[Element]]  # by tag, in document order


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
        return _paper(self.pmid, self.element)


def read_records(stream: IO[bytes], *, checked: bool = False) -> Iterator[Record | Deletion]:
    """Records and deletions of one file in document order; MalformedXml at the place where it breaks.

    `checked` says that the file is known to be well-formed: what no field is made of is then cut out unparsed.
    """
    try:
        root, start = _opening(stream)
        chunks: Iterator[bytes] = chain([start], iter(lambda: stream.read(CHUNK), b""))
        if checked:
            chunks = without(UNUSED, chunks)
        holders = {"MedlineCitation"} if root == "MedlineCitationSet" else RECORDS
        for element in _grown(chunks):
            if element.tag in holders or element.tag == "DeleteCitation":
                yield from _met(element)
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
        return date(int(year), number, int(day)).isoformat() if day else f"{year}-{number:02d}"
    except ValueError:  # a 31st of June, or no number
        return f"{year}-{number:02d}"


def medline_date(text: str) -> str:
    """ISO date of a free-form `MedlineDate`: what all of the range shares, and the first year of a range of years.

    "1999 Oct 15-31" is "1999-10"; "2000 Nov-Dec" is "2000"; "1998 Dec-1999 Jan" is "1998"; "" when no year is named.
    """
    years, months = YEAR.findall(text), {m[:3].lower() for m in MONTH.findall(text)}
    if not years:
        return ""
    return iso_date(years[0], months.pop()) if len(set(years)) == 1 and len(months) == 1 else years[0]


# --- the stream


def _opening(stream: IO[bytes]) -> tuple[str, bytes]:
    """The name of the root element, and what was read to find it, marked: another kind of file is refused here."""
    scout, read = etree.XMLPullParser(("start",), **SAFE), b""
    while chunk := stream.read(CHUNK):
        read += chunk
        scout.feed(chunk)
        for _, element in scout.read_events():
            if element.tag not in ROOTS:
                raise MalformedXml(f"root element is <{element.tag}>, expected <{ROOTS[0]}>", element.sourceline or 0)
            if not (before := BEFORE_MARK.match(read)):
                raise MalformedXml("the text is UTF-16 or UTF-32, expected UTF-8; convert the file")
            return str(element.tag), before.group() + MARK + read[before.end() :]
    scout.close()  # raises: there is no element
    return "", read


def _grown(chunks: Iterator[bytes]) -> Iterator[Element]:
    """The children of the root, each as soon as it is whole and only until the next is asked for.

    The mark stands before the root. A parser that reports elements calls Python for every one, whatever its tag, which
    is a tenth of all the time; so it reports the mark, and what has grown behind it is looked at after each chunk.
    """
    parser = etree.XMLPullParser(("pi",), **SAFE | {"remove_pis": False})
    mark: Element | None = None
    impure = False
    for chunk in chunks:
        parser.feed(chunk)
        for _, instruction in parser.read_events():
            mark, impure = (instruction, False) if mark is None else (mark, True)
        root: Any = () if mark is None else next(mark.itersiblings("*"), ())
        while len(root) > 1:  # the last child may still grow
            yield _purified(root[0]) if impure else root[0]
            root[0].clear()  # else its nodes are visited once more before they are freed
            del root[0]
    parser.close()
    yield from map(_purified, root) if impure else root


def _purified(element: Element) -> Element:
    """The element without the processing instructions in it, which would divide its texts."""
    if element.tag is not etree.PI:
        etree.strip_elements(element, etree.PI, with_tail=False)
    return element


def without(tag: bytes, chunks: Iterator[bytes]) -> Iterator[bytes]:
    """The bytes without the elements of this tag, nested ones included."""
    opening, closing = b"<" + tag + b">", b"</" + tag + b">"
    rest, depth = b"", 0
    for chunk in chunks:
        data, start = rest + chunk, 0
        kept = []
        while (found := data.find(closing if depth else opening, start)) >= 0:
            if depth:
                depth += data.count(opening, start, found) - 1
                start = found + len(closing)
            else:
                kept.append(data[start:found])
                start = found + len(opening)
                depth = 1
        # The last bytes may be the first half of an opening.
        edge = start if depth else max(start, len(data) - len(opening) + 1)
        kept.append(data[start:edge])
        rest = data[edge:]
        yield b"".join(kept)
    yield b"" if depth else rest


def _met(element: Element) -> Iterator[Record | Deletion]:
    if element.tag == "DeleteCitation":
        yield from [Deletion(_text(pmid), _version(pmid)) for pmid in element.iterfind("PMID")]
        return
    holder = element if element.tag == "MedlineCitation" else next(iter(element), element)
    pmid = next(holder.iterchildren("PMID"), None)
    yield Record(_text(pmid), _version(pmid), element)


def _reason(error: etree.XMLSyntaxError) -> str:
    return f"not well-formed: {error.msg or 'no content'}"


# --- one record


def _paper(pmid: str, element: Element) -> Paper:
    citation, article, identifiers = _parts(element)
    journal = _children(_only(article, "Journal", "Book"))
    book_title, vernacular_title = _first(journal, "BookTitle"), _first(article, "VernacularTitle")
    mesh_terms, mesh_headings = _mesh(citation)
    types = _texts([*article.get("PublicationType", ()), *_members(article, "PublicationTypeList")])
    links = tuple(_links(citation))
    pub_date, pub_date_text = _pub_date(journal, article)
    return Paper(
        pmid=pmid,
        title=_title(_first(article, "ArticleTitle"), vernacular_title or book_title),
        abstract=" ".join(filter(None, map(_section, _members(article, "Abstract")))),
        authors=tuple(filter(None, _authors(article.get("AuthorList") or journal.get("AuthorList") or ()))),
        journal=_first(journal, "Title") or book_title,
        pub_date=pub_date,
        mesh_terms=tuple(mesh_terms),
        doi=_doi(article, identifiers),
        vernacular_title=vernacular_title,
        journal_abbreviation=_first(journal, "ISOAbbreviation"),
        issn=_first(_children(_only(citation, "MedlineJournalInfo")), "ISSNLinking") or _first(journal, "ISSN"),
        pub_date_text=pub_date_text,
        pmc=_pmc(citation, identifiers),
        languages=_texts(article.get("Language", ())),
        publication_types=types,
        keywords=_texts(_members(citation, "KeywordList")),
        mesh_headings=tuple(mesh_headings),
        links=links,
        retracted=_retracted(types, links),
    )


def _parts(element: Element) -> tuple[Children, Children, list[Element]]:
    """What holds PMID and MeSH, what holds title and abstract (for books the same), and the paper's own ArticleIds."""
    if element.tag == "MedlineCitation":
        citation, identifiers = _children(element), []
    else:
        outer = _children(element)
        citation = _children(_only(outer, "MedlineCitation", "BookDocument"))
        # Not any ArticleId below: the reference list holds those of other papers.
        places = citation if element.tag == "PubmedBookArticle" else _children(_only(outer, "PubmedData"))
        identifiers = _members(places, "ArticleIdList")
    article = citation if element.tag == "PubmedBookArticle" else _children(_only(citation, "Article"))
    return citation, article, identifiers


def _children(element: Element | None) -> Children:
    found: Children = {}
    for child in () if element is None else element:
        found.setdefault(child.tag, []).append(child)
    return found


def _only(children: Children, *tags: str) -> Element | None:
    """The first child of the first of these tags that is there."""
    for tag in tags:
        if tag in children:
            return children[tag][0]
    return None


def _members(children: Children, tag: str) -> list[Element]:
    """The children of all children of this tag."""
    return [member for group in children[tag] for member in group] if tag in children else []


def _first(children: Children, tag: str) -> str:
    return _text(children[tag][0]) if tag in children else ""


def _texts(elements: Iterable[Element]) -> tuple[str, ...]:
    return tuple(filter(None, map(_text, elements)))


def _text(element: Element | None) -> str:
    """All text of an element, that of inline markup included, with single spaces; "" for None."""
    if element is None:
        return ""
    text = "".join(element.itertext()) if len(element) else element.text
    if not text:
        return ""
    # Most text is clean already, and to split it only to join it again is a tenth of all the time. What is white space
    # and no blank is not printable.
    clean = text.isprintable() and "  " not in text
    return text.strip() if clean else " ".join(text.split())


def _version(pmid: Element | None) -> int:
    text = "1" if pmid is None else pmid.get("Version", "1")
    return int(text) if text.isdecimal() else 1


def _title(title: str, other: str) -> str:
    return other or title if title.strip("[]. ").lower() in ("", "not available") else title


def _section(part: Element) -> str:
    """One section of an abstract as "LABEL: text"; "" for the copyright line."""
    if part.tag != "AbstractText":
        return ""
    text, label = _text(part), part.get("Label", "").strip().rstrip(":")
    return f"{label}: {text}" if text and label and label != "UNLABELLED" else text


def _authors(groups: Iterable[Element]) -> Iterator[str]:
    for group in groups:
        if group.get("Type") == "editors":
            continue
        name, valid = "", True
        for part in group.iter("Author", "CollectiveName", *NAMES):
            tag = part.tag
            if tag == "Author":
                if name and valid:
                    yield " ".join(name.split())
                name, valid = "", part.get("ValidYN") != "N"  # N is a misspelling that another entry corrects
            elif tag == "ForeName":  # PubMed writes it after the LastName
                name = f"{part.text or ''} {name}"
            else:
                name = f"{name} {_text(part) if len(part) else part.text or ''}"
        if name and valid:
            yield " ".join(name.split())


def _mesh(citation: Children) -> tuple[list[str], list[str]]:
    """Descriptors, and headings as MEDLINE writes them: "Neoplasms/*genetics/therapy"."""
    terms: list[str] = []
    headings: list[str] = []
    for group in citation.get("MeshHeadingList", ()):
        for name in group.iter("DescriptorName", "QualifierName"):
            text = _text(name)
            starred = f"*{text}" if name.get("MajorTopicYN") == "Y" else text
            if name.tag == "DescriptorName":
                terms.append(text)
                headings.append(starred)
            elif headings:
                headings[-1] += f"/{starred}"
    return terms, headings


def _links(citation: Children) -> Iterator[str]:
    for link in _members(citation, "CommentsCorrectionsList"):
        kind = link.get("RefType", "")
        if kind != "Cites":  # references, not what became of the paper
            yield f"{kind} {_text(link.find('PMID')) or _text(link.find('RefSource'))}".strip()


def _retracted(publication_types: tuple[str, ...], links: tuple[str, ...]) -> bool:
    if "retracted publication" in [kind.lower() for kind in publication_types]:
        return True
    return bool(links) and any(link.startswith("RetractionIn ") for link in links)


def _pub_date(journal: Children, article: Children) -> tuple[str, str]:
    """ISO date and its text as written, of the issue or book, else of the electronic article."""
    issue = _children(_only(journal, "JournalIssue"))
    written = ""
    for place in (*issue.get("PubDate", ()), *journal.get("PubDate", ()), *article.get("ArticleDate", ())):
        parts = {part.tag: _text(part) for part in place}
        text = " ".join(filter(None, parts.values()))
        written = written or text
        found = iso_date(*[parts.get(tag, "") for tag in ("Year", "Month", "Day")])
        found = found or medline_date(parts.get("MedlineDate", ""))
        if found:
            return found, text
    return "", written


def _doi(article: Children, identifiers: list[Element]) -> str:
    for place in article.get("ELocationID", ()):
        if place.get("EIdType") == "doi" and place.get("ValidYN") != "N" and _text(place):
            return _text(place)
    return _identifier(identifiers, "doi")


def _pmc(citation: Children, identifiers: list[Element]) -> str:
    """The PMC id; records of before the ArticleIdList hold it as "PMC123 [Available on …]" among other ids."""
    found = _identifier(identifiers, "pmc")
    if found or "OtherID" not in citation:
        return found
    return next((text.partition(" ")[0] for text in _texts(citation["OtherID"]) if text.startswith("PMC")), "")


def _identifier(identifiers: list[Element], kind: str) -> str:
    for place in identifiers:
        if place.get("IdType") == kind and (text := _text(place)):
            return text
    return ""
