"""The parts that only the reward variant `biomedical` pays: citations, genes, reasoning and novelty.

Each is a pure function of plain values into [0, 1], with its formula and degenerate case; nothing here asks a network.
They measure wording, not truth: a part is worth a small bonus, never more than the difficulty. `scores.py` weighs them.
"""

import re
from collections.abc import Callable, Collection, Sequence

from rapidfuzz import fuzz, process

from services.trainer.genes import gene_claims
from services.trainer.matching import normalise, strip_citations

REASONING_TYPES = ("mechanism", "cause", "comparison", "intervention", "association", "quantity", "entity", "other")
REASONING_WORTH = {
    "mechanism": 1.0,
    "cause": 1.0,
    "comparison": 1.0,
    "intervention": 1.0,
    "association": 0.5,
    "quantity": 0.5,
    "entity": 0.25,
    "other": 0.0,
}

# In this order, because a question of several types has the first: "how many" asks for a number whatever is counted,
# "by which mechanism does the drug" for a mechanism, "which drug" for an intervention before an entity.
PATTERNS = [
    (kind, re.compile(rf"\b(?:{pattern})\b", re.IGNORECASE))
    for kind, pattern in [
        ("quantity", r"how (?:many|much|long|often|old|large|high|low|far|frequently)"),
        ("quantity", r"what (?:percentage|proportion|fraction|number|share|prevalence|incidence|dose|concentration)"),
        (
            "mechanism",
            r"mechanisms?|mechanistic(?:ally)?|pathways?|mediat(?:es?|ed|ing)|molecular basis|mode of action",
        ),
        ("mechanism", r"how (?:do|does|did|is|are|can|could|might|may)|(?:by|through|via) (?:which|what)"),
        ("cause", r"why|caus(?:es?|ed|al|ing)|leads? to|results? in|responsible for|due to|trigger(?:s|ed)?"),
        ("cause", r"a?etiolog(?:y|ies|ical)|underl(?:ies?|ying)|gives? rise to|induc(?:es?|ed|ing)"),
        ("comparison", r"compar(?:es?|ed|ing|isons?)|versus|vs|than|differ(?:s|ed|ences?|ent)?|superior|inferior"),
        ("intervention", r"treat(?:s|ed|ments?|ing)?|therap(?:y|ies|eutics?)|drugs?|inhibitors?|interventions?"),
        ("intervention", r"vaccin(?:es?|ation)|surg(?:ery|ical)|prevent(?:s|ed|ion)?|antibiotics?|prescribed"),
        ("association", r"associat(?:es?|ed|ions?)|correlat(?:es?|ed|ions?)|link(?:s|ed)?|relat(?:es?|ed|ionships?)"),
        ("association", r"risk(?: factors?)?|predict(?:s|ed|ors?|ive)?|biomarkers?|prognos(?:is|tic)"),
        ("quantity", r"percentages?|proportion|prevalence|incidence|frequency|rate|number of|sensitivity|specificity"),
        ("entity", r"what|which|who|whom|whose|where|when|name"),
    ]
]


def citation_part(cited: Sequence[str], seen: Collection[str], known: Callable[[str], bool]) -> float:
    """Share of the cited PMIDs that this rollout saw (seed paper or search result) and that are in the corpus.

    |{p ∈ cited : p ∈ seen and known(p)}| / |cited|, each PMID once; 0 when nothing is cited. `known` looks into the
    corpus at hand and is asked only about PMIDs that were seen.
    """
    once = set(cited)
    return sum(pmid in seen and known(pmid) for pmid in once) / len(once) if once else 0.0


def gene_part(text: str) -> float:
    """Share of the claimed gene and protein symbols that the table knows; 1 when none is claimed."""
    claims = gene_claims(text)
    return sum(claims.values()) / len(claims) if claims else 1.0


def reasoning_type(question: str) -> str:
    """What a question asks for, one of `REASONING_TYPES`: the first of `PATTERNS` with a word in it, or "other"."""
    return next((kind for kind, pattern in PATTERNS if pattern.search(question)), "other")


def reasoning_part(question: str) -> float:
    """1 for mechanism, cause, comparison and intervention, ½ for association and quantity, ¼ for entity.

    0 for any other and for an empty question.
    """
    return REASONING_WORTH[reasoning_type(question)]


def novelty_part(question: str, recent: Sequence[str], threshold: float) -> float:
    """1 up to similarity `threshold` to the most similar recent question, then linear down to 0 at a copy.

    (1 − s) / (1 − threshold) for s > threshold, s in [0, 1] on normalised text without citations. 1 when nothing is
    recent, 0 for an empty question.
    """
    similarity = likeness(question, recent)
    if not _comparable(question):
        return 0.0
    return 1.0 if similarity <= threshold else (1.0 - similarity) / (1.0 - threshold)


def likeness(question: str, others: Sequence[str]) -> float:
    """Similarity in [0, 1] of a question to the most similar other one; 1 is a copy, 0 when there is no other."""
    # Sorted tokens: the same question in another word order is a copy. Not the token-set ratio, which is 1 as soon as
    # one question's words all stand in the other: a two-hop question would count as a copy of its first hop.
    asked, known = _comparable(question), [_comparable(one) for one in others]
    closest = process.extractOne(asked, known, scorer=fuzz.token_sort_ratio)
    return closest[1] / 100 if closest else 0.0


def _comparable(question: str) -> str:
    return normalise(strip_citations(question))
