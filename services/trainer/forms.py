"""One form for the ways in which papers write the same thing, and the word lists for it.

`one_form` writes each of these in one way, and nothing else:

- gene and protein symbols of one gene (HER2, ERBB2; p53, TP53), by `genes.py`; full gene names are not listed
- Greek letters and their names (α, alpha); κB and kB
- numbers (two, 2; 1,000, 1000; 0.50, 0.5) and percentages (50 %, 50 percent, 50 per cent)
- units after a number (µg, mcg, micrograms; h, hours; mg/kg, mg per kg); nothing is converted
- hyphens, slashes and spaces (IL-6, IL 6, IL6; beta-catenin, beta catenin)
- plurals and the possessive (receptors, receptor; metastases, metastasis; Crohn's, Crohn)
- British and American spelling (tumour, tumor; leukaemia, leukemia)
"""

import re
import string
import unicodedata

from services.trainer.genes import TO_NAME, canonical_symbol

ARTICLES = re.compile(r"\b(a|an|the)\b")

_TO_NINETEEN = """
    zero one two three four five six seven eight nine ten
    eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen
"""
ONES = {word: number for number, word in enumerate(_TO_NINETEEN.split())}
TENS = {"twenty": 20, "thirty": 30, "forty": 40, "fifty": 50, "sixty": 60, "seventy": 70, "eighty": 80, "ninety": 90}
NUMBER_WORD = re.compile(
    rf"\b(?:(?P<tens>{'|'.join(TENS)})(?:[- ](?P<unit>{'|'.join(list(ONES)[1:10])}))?|(?P<ones>{'|'.join(ONES)}))"
    r"(?=fold\b|\b)",
    re.IGNORECASE,
)
THOUSANDS = re.compile(r"(?<![\w.,])\d{1,3}(?:,\d{3})+(?![\d,])")
DECIMAL = re.compile(r"(?<![\w.])(\d*)\.(\d+)(?![\d.])")
PERCENT = re.compile(r"\s*(?:%|\bper\s?cent\b|\bpct\b)", re.IGNORECASE)

# Spellings by unit; case counts for those of up to three letters, where it tells apart (mM, mm).
UNITS = {
    "kilogram": "kg kilogram kilograms kilogramme kilogrammes",
    "gram": "g gram grams gramme grammes",
    "milligram": "mg milligram milligrams milligramme milligrammes",
    "microgram": "μg ug mcg microgram micrograms microgramme microgrammes",
    "nanogram": "ng nanogram nanograms",
    "picogram": "pg picogram picograms",
    "liter": "L l liter liters litre litres",
    "deciliter": "dL dl deciliter deciliters decilitre decilitres",
    "milliliter": "mL ml ML milliliter milliliters millilitre millilitres cc",
    "microliter": "μL μl uL ul microliter microliters microlitre microlitres",
    "meter": "m meter meters metre metres",
    "centimeter": "cm centimeter centimeters centimetre centimetres",
    "millimeter": "mm millimeter millimeters millimetre millimetres",
    "micrometer": "μm um micrometer micrometers micrometre micrometres micron microns",
    "nanometer": "nm nanometer nanometers nanometre nanometres",
    "mole": "mol mole moles",
    "millimole": "mmol millimole millimoles",
    "micromole": "μmol umol micromole micromoles",
    "nanomole": "nmol nanomole nanomoles",
    "molar": "M molar",
    "millimolar": "mM millimolar",
    "micromolar": "μM uM micromolar",
    "nanomolar": "nM nanomolar",
    "second": "s sec secs second seconds",
    "minute": "min mins minute minutes",
    "hour": "h hr hrs hour hours",
    "day": "d day days",
    "week": "wk wks week weeks",
    "month": "mo mos month months",
    "year": "y yr yrs year years",
    "unit": "U unit units",
    "internationalunit": "IU iu",
    "dalton": "Da dalton daltons",
    "kilodalton": "kDa kDA kilodalton kilodaltons",
    "mmhg": "mmHg mmhg",
    "kilocalorie": "kcal kilocalorie kilocalories",
    "celsius": "°C celsius",
    "gray": "Gy gray grays",
    "hertz": "Hz hertz",
}
UNIT = {spelling: unit for unit, spellings in UNITS.items() for spelling in spellings.split()}
UNIT_WORD = r"(?:°C|mm Hg|[A-Za-zμ]{1,15})"
QUANTITY = re.compile(
    rf"(?<![\w.])(?P<number>\d+(?:\.\d+)?)[-\s]?(?P<unit>{UNIT_WORD})(?P<per>(?:\s?/\s?|\sper\s){UNIT_WORD})*(?!\w)"
)
PER = re.compile(r"\s?/\s?|\sper\s")

# Plural to singular, on lower-case words; the first that fits. "" leaves the word: it is no plural.
PLURALS = [
    (re.compile(pattern), singular)
    for pattern, singular in {
        r"^(diabetes|herpes|series|f(a?)eces|measles|mumps|rickets|shingles|ascites|aids|sars|mers)$": "",
        r"^(rabies|species|caries|scabies|pancreas|bias|gas|atlas|\w+monas|\w*ceps|lens|chaos|asbestos)$": "",
        r"(analys|dialys|paralys|diagnos|prognos|stenos|thrombos|fibros|psychos|neuros|anastomos)es$": r"\1is",
        r"(metastas|hypothes|prosthes|synthes|cris)es$": r"\1is",
        r"(bacteri|atri|ov|ser)a$": r"\1um",
        r"(fung|nucle|alveol|bronch|thromb|embol|foc|loc|bacill|vill|stimul)i$": r"\1us",
        r"(vertebr|larv|fistul|burs|petechi)ae$": r"\1a",
        r"(criteri|mitochondri|phenomen|gangli)a$": r"\1on",
        r"(matr|append)ices$": r"\1ix",
        r"(cort|vert|ind)ices$": r"\1ex",
        r"^mice$": "mouse",
        r"^children$": "child",
        r"^((?:wo)?m)en$": r"\1an",
        r"^(f|t)ee(t|th)$": r"\1oo\2",
        r"(ss|us|is)$": "",
        r"(\w)ies$": r"\1y",
        r"(ss|x|sh|[^a]ch|[^ao]us)es$": r"\1",
        r"(\w{3})s$": r"\1",
    }.items()
]

# British to American, and κB, on lower-case words.
SPELLINGS = [
    (re.compile(pattern), american)
    for pattern, american in {
        r"oedem": "edem",
        r"oesoph": "esoph",
        r"oestr": "estr",
        r"foet": "fet",
        r"aem": "em",
        r"paed": "ped",
        r"gynaec": "gynec",
        r"caec": "cec",
        r"faec": "fec",
        r"aesth": "esth",
        r"aetio": "etio",
        r"caesa": "cesa",
        r"coeli": "celi",
        r"rrhoea": "rrhea",
        r"pnoea": "pnea",
        r"homoeo": "homeo",
        r"amoeb": "ameb",
        r"manoeuv": "maneuv",
        r"phaeo": "pheo",
        r"naev": "nev",
        r"(tum|col|behavi|lab|hum|od|fav|neighb|flav|vap|vig|harb|hon)our": r"\1or",
        r"iz(e|ed|es|er|ers|ing|ation|ations)$": r"is\1",
        r"yz(e|ed|es|er|ers|ing)$": r"ys\1",
        r"(fib|lit|cent|met|tit|goit|calib|theat)re(s|d)?$": r"\1er\2",
        r"(label|signal|model|channel|travel|tunnel|counsel|fuel)l(ed|ing|er|ers)$": r"\1\2",
        r"sulph": "sulf",
        r"leuco": "leuko",
        r"^grey": "gray",
        r"programme(s)?$": r"program\1",
        r"defence": "defense",
        r"ageing": "aging",
        r"^mould": "mold",
        r"(cata|ana|homo|ortho|para|dia)logue(s)?$": r"\1log\2",
        r"artefact": "artifact",
        r"aluminium": "aluminum",
        r"neurone(s)?$": r"neuron\1",
        r"judgement": "judgment",
        r"kappab": "kb",  # papers write NF-κB and NF-kB
    }.items()
]
COMPOUND = re.compile(r"/|-(?=[a-z]{4})")  # PI3K/AKT, HER2-positive
NAME_IN_TWO_WORDS = re.compile(r"[A-Za-z]*[A-Z][A-Za-z]* (?:\d+[A-Za-z]?|alpha|beta|gamma|[α-ω])")
WORD = re.compile(r"\d+\.\d+|[^\W_]+")


def one_form(text: str) -> str:
    """The text with each form of the list at the top of this file written in one way, and without spaces."""
    text = _plain_numbers(unicodedata.normalize("NFKC", text).replace("’", "'"))
    text = _plain_units(re.sub(r"'s\b", "", text))
    plain = canonical_symbol(text) or _plain_genes(text)
    words = WORD.findall(plain.lower().translate(TO_NAME))
    words = [_singular(_american(word)) for word in words if not ARTICLES.fullmatch(word)]
    # Two numbers in a row stay apart: "1 000" could be a list.
    return re.sub(r"(?<!\d) | (?!\d)", "", " ".join(words))


def _plain_numbers(text: str) -> str:
    """Numbers in digits without separators and idle zeros, and percent as a word."""
    text = THOUSANDS.sub(lambda found: found[0].replace(",", ""), text)
    text = NUMBER_WORD.sub(_digits, text)
    text = DECIMAL.sub(_shortest, text)
    return PERCENT.sub(" percent", text)


def _digits(found: re.Match[str]) -> str:
    if found["ones"]:
        return str(ONES[found["ones"].lower()])
    return str(TENS[found["tens"].lower()] + (ONES[found["unit"].lower()] if found["unit"] else 0))


def _shortest(found: re.Match[str]) -> str:
    whole, part = found[1] or "0", found[2].rstrip("0")
    return f"{whole}.{part}" if part else whole


def _plain_units(text: str) -> str:
    """Units after a number by their full name, "per" for a slash between two."""
    return QUANTITY.sub(_quantity, text)


def _quantity(found: re.Match[str]) -> str:
    rest = found[0][len(found["number"]) :].lstrip("- \t\n").replace("mm Hg", "mmHg")
    units = [UNIT.get(part) or UNIT.get(part.lower() if len(part) > 3 else part) for part in PER.split(rest)]
    return f"{found['number']} {' per '.join(unit for unit in units if unit)}" if all(units) else found[0]


def _plain_genes(text: str) -> str:
    """Every word that is a gene's name as the approved symbol, also with a number or Greek letter after it (IL 6)."""
    words, plain = COMPOUND.sub(" ", text).split(), []
    while words:
        pair = " ".join(words[:2])
        symbol = canonical_symbol(pair) if NAME_IN_TWO_WORDS.fullmatch(pair) else None
        taken = 2 if symbol else 1
        plain.append(symbol or canonical_symbol(words[0].strip(string.punctuation)) or words[0])
        words = words[taken:]
    return " ".join(plain)


def _american(word: str) -> str:
    for pattern, american in SPELLINGS:
        word = pattern.sub(american, word)
    return word


def _singular(word: str) -> str:
    for pattern, singular in PLURALS:
        if pattern.search(word):
            return pattern.sub(singular, word) if singular else word
    return word
