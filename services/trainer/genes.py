"""Gene and protein symbols: which gene a name stands for, and which words of a text claim to be one. Offline.

`genes.tsv` beside this file has one gene a line: approved symbol, tab, aliases and previous symbols joined by "|". It
is HGNC's data (genenames.org, CC0) without pseudogenes and other loci that papers do not name. Make it again from
HGNC's complete set, or from any HGNC table with symbol, alias, previous symbol, locus type and status columns:
`python -m services.trainer.genes FULL_TABLE`. Full gene names are not in the table, only symbols.
"""

import csv
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

TABLE = Path(__file__).with_name("genes.tsv")

# Columns of HGNC's complete set, then of its custom downloads.
COLUMNS = {
    "symbol": ("symbol", "Approved symbol"),
    "alias": ("alias_symbol", "Alias symbols"),
    "previous": ("prev_symbol", "Previous symbols"),
    "locus": ("locus_type", "Locus type"),
    "status": ("status", "Status"),
}
LOCI = frozenset(
    {
        "gene with protein product",
        "RNA, micro",
        "RNA, long non-coding",
        "RNA, small nucleolar",
        "RNA, small nuclear",
        "RNA, ribosomal",
        "RNA, misc",
        "RNA, vault",
        "RNA, Y",
        "RNA, cluster",
        "T cell receptor gene",
        "immunoglobulin gene",
        "complex locus constituent",
    }
)

GREEK_LETTERS = {
    "α": ("alpha", "a"),
    "β": ("beta", "b"),
    "γ": ("gamma", "g"),
    "δ": ("delta", "d"),
    "ε": ("epsilon", "e"),
    "ζ": ("zeta", "z"),
    "η": ("eta", "h"),
    "θ": ("theta", "q"),
    "κ": ("kappa", "k"),
    "λ": ("lambda", "l"),
    "μ": ("mu", "m"),
    "σ": ("sigma", "s"),
    "τ": ("tau", "t"),
    "ω": ("omega", "w"),
}
TO_NAME = str.maketrans({letter: name for letter, (name, _) in GREEK_LETTERS.items()})
# A letter's name is one in "TNF-alpha" and "TGFbeta1", not in "fetal".
GREEK_NAME = re.compile(
    r"(?<![a-z])(?:"
    + "|".join(f"[{name[0].upper()}{name[0]}]{name[1:]}" for name, _ in GREEK_LETTERS.values())
    + r")(?![a-z])"
)
TO_LATIN = str.maketrans({letter: latin for letter, (_, latin) in GREEK_LETTERS.items()})
LATIN = dict(GREEK_LETTERS.values())
SEPARATORS = str.maketrans("", "", " -‐‑‒–—_/,.'()@")
GREEK = "".join(GREEK_LETTERS)

# Acronyms of assays, statistics, clinic and administration, and diseases, that are never taken for genes, though some
# are HGNC symbols (HR, CS, TG, CP) or aliases (ALL and CML of BCR, CT, MS). Compared without case and hyphens.
STOP = frozenset(
    """
    AFM BCA CFU CHIP CLIA CRISPR CT CTA DEXA DXA ECG ECMO EEG EKG ELISA ELISPOT EM EMG EMSA ESI FACS FISH FPLC FRET FTIR
    GC GCMS GWAS HPLC IF IHC IP ISH LC LCMS MALDI MLPA MRA MRI FMRI NGS NMR OCT PAGE PCR PET QPCR RIA RTPCR RTQPCR
    DDPCR SDSPAGE SEM SPECT SPR SDS TEM TUNEL WB WES WGS XRD XRAY MTT CCK8 ATAC SNP SNPS CNV QTL EQTL ORF UTR LOH MSI
    TMB SELEX GSEA GO KEGG PPI TCGA GEO

    ANOVA ANCOVA AUC AUROC AUPRC BIC AIC CI DF FDR GEE HR HRS IQR ITT LASSO MANOVA MCMC NNT NPV NS OR ORS PCA PPV PP RCT
    RCTS ROC RR SD SE SEM SMD WMD ICC RMSE MAE MSE SVM CNN KNN LSTM ML AI DL LLM NLP MR IVW LD MAF PRS OS PFS DFS RFS
    DSS ORR DCR EFS TTP NNH CV CVS IC IC50 EC50 ED50 LD50 GI50 KD KM VMAX MIC MIC90

    ADHD ADL AE AES AF AFIB AIDS AKI ALL ALS AMD AML ARDS ASA ASCVD ASD BC BMD BMI BP BPD BPH BSA CABG CAD CBT CHD CHF
    CIN CKD CLL CML CNS CPR CRC COPD COVID CVD CVA DBP DCM DKA DLBCL DM DVT ED EF EGFRTKI EHR EMR EMT ENT ER ERCP ESRD
    FEV1 FVC GBM GCS GDM GERD GFR GI GVHD HCC HCV HBV HCM HFPEF HFREF HIV HNSCC HPV HSCT HSV HTN IBD IBS ICU ILD IPF
    ITP IUD IV IVF LAD LMP LUAD LUSC LVEF MACE MCI MDD MDR MDS MERS MI MM MS NAFLD NASH NICU NSAID NSAIDS NSCLC NYHA
    OA OCD OSA OSCC PAD PAH PCI PCOS PD PE PICU PTSD PVD RA RBC RSV SARS SBP SCC SCLC SCI SLE STD STEMI STI SIRS SOFA
    T1D T2D T1DM T2DM TAVI TB TBI TIA TKI TKIS TNBC TNM UC URTI UTI VAS VTE WBC WT CMV EBV H2O H2O2 CO2 TAVR TPN MMSE
    MOCA EDSS DAS28 PASI HAMD PANSS SF36 EQ5D QOL HRQOL QALY QALYS HBA1C NO ROS RNS LDL HDL VLDL TG CSF CP CS FBS PBS

    DNA CDNA RNA MRNA MIRNA SIRNA SHRNA LNCRNA CIRCRNA NCRNA RRNA TRNA GDNA CFDNA CTDNA DSDNA DSRNA SSDNA MTDNA SGRNA
    RNASEQ SCRNASEQ DMSO DMEM RPMI EDTA ATP ADP AMP CAMP GTP GDP NAD NADH NADP NADPH FAD COA GSH LPS PMA SCFA SCFAS PUFA
    UV UVA UVB BBB CNS ECM ESC IPSC IPSCS HSC HSCS MSC MSCS NK PBMC PBMCS TME ICI ICIS CART CARTS MHC TCR BCR2 TF TFS
    MOA ADME PK ADMET SAR DAMP DAMPS PAMP PAMPS TCM NP NPS PNS GABA ACH HT KO KD OE

    AHA ASCO CDC EMA ESC ESMO EU FDA GDPR ICD IRB NCBI NCCN NCI NCT NHANES NHS NICE NIH PMID PMC DOI PRISMA STROBE UK
    UN UNICEF US USA USD WHO GRADE PICO CONSORT SEER UKBB MESH OMIM PUBMED MEDLINE II III IV VI VII VIII IX AM PM ID IDS
    QT QRS ST MRSA HMG CRAB MALT ANCA RPR MELAS UMP GMP CGMP NAPQI AL AA JC PAS MAP NT KATP REM RISC SSRI SSRIS PPIS ARB
    ARBS ACEI DOAC DOACS MCV LFT LFTS ALT AST ALP GGT BUN ESR FIO2 PAO2 SPO2 PACO2 DALY SNRI ART PREP ICER YLD ECT TMS
    IE EG VS AND NOT THE FOR WITH NON YES DNR HCP GP GPS MD PHD SOP FAQ PDF URL TABLE FIG NA NR ND SARSCOV SARSCOV2 TV
    """.lower().split()
)

# Digits after these make a virus, cell line, scale, histone mark, trial or time, never a gene.
NO_SYMBOL = re.compile(
    r"(?:covid|sars|mers|hiv|hpv|hsv|hhv|htlv|icd|dsm|phq|gad7|sf|eq|fig|figure|table|day|week|month|year|hour|type|stage"
    r"|grade|phase|group|class|level|omega|vitamin|pmid|pmc|nct|rs|pm|hek|mcf|hct|sw|jurkat|thp|raw|nih|bcg|ct|mda|mb)\d+"
    r"\w{0,2}|h\dn\d|h[1-4][kr]\d+\w*|ic\d\d|\d.*[a-z]?\d*(?:st|nd|rd|th)"
)
# Unless the table has them: substitutions (V600E, Glu342Lys), codons and repeats (CAG), words (Interleukin-6, Omega-3).
OTHER_MEANING = re.compile(
    r"[ACDEFGHIKLMNPQRSTVWY]\d{1,4}[ACDEFGHIKLMNPQRSTVWYX]|[A-Z][a-z]{2}\d+[A-Z][a-z]{2}|[ACGTU]{3,}|.*[a-z]{4}.*|\D+-\D+"
)

# Names of families and complexes: genes of several symbols, so they are known but stand for none of them. HGNC gives
# some as an alias of one member.
FAMILIES = frozenset(
    """
    AMPK PI3K MAPK ERK ERK1/2 JNK AKT PKB PKC PKA PKG GSK3 RAS RAF RAC RAB MEK JAK STAT SMAD NFAT NFKB NF-KAPPAB
    CREB CDK CDKS CK TRK WNT NOTCH MTORC1 MTORC2 HIF HIF-1 HIF-2 HSP HSP60 HSP70 HSP90 AP-1 PPAR FXR RXR IL-1 IL-12
    IL-23 IL-35 IFNA IFN-ALPHA TNFR TLR TLRS TGF BMP BMPS FGF FGFS FGFR PDGF PDGFR VEGFR IGF CD1 CD3 CD8 CD16 CD32 HLA
    HLA-DR HLA-DQ HLA-DP HLA-B27 HLA-DQ2 HLA-DQ8 HLA-DR4 DQ2 DQ8 DR15 IGG1 IGG2 IGG3 IGG4 IGA1 NMDA NMDAR AMPAR GABAA
    5-HT 5-HT1 5-HT2 5-HT3 HT3 TRP AQP KIR6 HDAC HDACS SIRT MMP MMPS CASPASE COX NOS NOX ALOX IDH LDH SOD CYP CYP450
    P450 CYP2C CYP2D CYP3A BNP NT-PROBNP TSH FSH LH HCG LC3 APOE2 APOE3 APOE4 CAS9 CAS12A CAS13 GFP GP41 GP120 GP160
    NS3 NS5A NS5B E6 E7
    """.lower()
    .replace("-", "")
    .replace("/", "")
    .split()
)

# What papers mean by names that HGNC lists for several genes.
USUAL = {
    "p21": "CDKN1A",
    "p27": "CDKN1B",
    "p38": "MAPK14",
    "p57": "CDKN1C",
    "p62": "SQSTM1",
    "p63": "TP63",
    "p65": "RELA",
    "p75ntr": "NGFR",
    "pd1": "PDCD1",
    "cox1": "PTGS1",
    "cox2": "PTGS2",
    "inos": "NOS2",
    "psa": "KLK3",
    "cea": "CEACAM5",
    "ca125": "MUC16",
    "mdr1": "ABCB1",
    "nrf2": "NFE2L2",
    "oct4": "POU5F1",
    "prp": "PRNP",
    "rage": "AGER",
    "scl": "TAL1",
    "taz": "WWTR1",
    "tim1": "HAVCR1",
    "trp53": "TP53",
    "cgrp": "CALCA",
    "drp1": "DNM1L",
    "tak1": "MAP3K7",
    "trif": "TICAM1",
}

# One gene, several proteins or hormones with names of their own (GLP-1 and GLP-2, ACTH and MSH, p14ARF and p16INK4a):
# such a name is known, but only the symbol stands for the gene.
SEVERAL_PRODUCTS = frozenset({"GCG", "POMC", "PENK", "PDYN", "CDKN2A", "GNAS", "NFKB1", "NFKB2", "CALCA", "PTHLH"})

WORD = re.compile(rf"[A-Za-z0-9{GREEK}]+(?:[-‐‑–][A-Za-z0-9{GREEK}]+)*")
# The parts of a hyphenated word, with what belongs to the part before it: a number, a Greek letter, one capital.
PART = re.compile(
    rf"[A-Za-z0-9{GREEK}]+"
    rf"(?:[-‐‑–](?:\d+[A-Za-z]?|[{GREEK}][A-Z]?\d*|alpha\d*|beta\d*|gamma\d*|[A-Z]\d*)(?![A-Za-z0-9{GREEK}]))*"
)
NUMBER = re.compile(r"\d+")
# Of these only approved symbols count (C3, F8): T4 is a hormone before it is CD4, a T cell has no TBXT.
ONE_LETTER = re.compile(r"[A-OQ-Za-oq-z]-?\d{0,2}|[Pp]-?\d?")
PROTEIN = re.compile(r"p\d{2,3}")  # p53
WORDED_PREFIX = re.compile(r"(?:mi[Rr]|c-[A-Z]|hsa-)")  # miR-21, c-Myc


@dataclass(frozen=True, slots=True)
class Genes:
    """The table, read. Keys have no case and no separators; a name of several genes has the symbol ""."""

    symbols: frozenset[str]
    names: Mapping[str, str]


def canonical_symbol(name: str) -> str | None:
    """The approved symbol that a name stands for; `None` when it stands for none, or for no single one.

    Case, hyphens and spaces do not count; Greek letters may be written as letter, name or Latin letter. An approved
    symbol means its own gene even where other genes list it; of several genes with the same alias none is meant,
    unless papers settled on one (`USUAL`). Families, acronyms of the `STOP` list and names of one of several products
    mean none, nor do plain lower-case words ("set", "rest"), which are English first, nor a letter with a number that
    is only an alias (T4).
    """
    name = name.strip()
    if name in genes().symbols and _key(name) not in STOP:
        return name
    if not _may_be_symbol(name) or ONE_LETTER.fullmatch(name):
        return None
    for key in _keys(name):
        if key in STOP or key in FAMILIES:
            return None
        if key in genes().names:
            return genes().names[key] or None
    return None


def gene_claims(text: str) -> dict[str, bool]:
    """Words that look like a gene or protein symbol, as written and in order → whether the table knows them.

    Such words are: letters with digits or Greek letters and a capital (TP53, IL-6, Il-6, TGF-β1, HLA-DRB1), p53-style
    names, miR-21, c-Myc, and words of 2 to 6 capitals, unless the whole text is in capitals. Never: what the `STOP`
    list has, amino-acid substitutions (V600E), and single letters with a number (B12, T4). A mouse symbol is known when
    the human one has the same letters.
    """
    claims: dict[str, bool] = {}
    shouted = text.upper() == text
    for word in WORD.findall(text):
        for part in _split(word, shouted):
            if _looks_like_symbol(part, shouted) and not _never_symbol(part):
                known = _known(part)
                if known or not OTHER_MEANING.fullmatch(part):
                    claims[part] = known
    return claims


@cache
def genes() -> Genes:
    """The table beside this file, read once."""
    lines = [line.split("\t") for line in TABLE.read_text(encoding="utf-8").splitlines()]
    approved: dict[str, set[str]] = {}
    aliases: dict[str, set[str]] = {}
    for symbol, joined in lines:
        approved.setdefault(_key(symbol), set()).add(symbol)
        listed = {_key(alias) for alias in joined.split("|")} - {""}
        unsure = listed if symbol in SEVERAL_PRODUCTS else _numbered_apart(_key(symbol), listed)
        for key in listed:
            aliases.setdefault(key, set()).add("" if key in unsure else symbol)
    found = {**aliases, **{key: {symbol} for key, symbol in USUAL.items()}, **approved}
    names = {key: next(iter(symbols)) if len(symbols) == 1 else "" for key, symbols in found.items()}
    return Genes(frozenset(symbol for symbol, _ in lines), names)


def compact(rows: Iterator[Mapping[str, str]]) -> list[str]:
    """Lines of `genes.tsv`, sorted, from the rows of an HGNC table; ValueError when a column is missing."""
    lines = set()
    for row in rows:
        symbol, locus = _cell(row, "symbol"), _cell(row, "locus")
        listed = re.split(r"\||, ", f"{_cell(row, 'alias')}|{_cell(row, 'previous')}")
        aliases = list(dict.fromkeys(name.strip() for name in listed if name.strip() and name.strip() != symbol))
        # Long non-coding RNAs without any other name are numbers in a catalogue, not names in papers.
        unnamed = locus == "RNA, long non-coding" and not aliases
        if _cell(row, "status") == "Approved" and locus in LOCI and not unnamed:
            lines.add(f"{symbol}\t{'|'.join(aliases)}")
    return sorted(lines)


def main(arguments: list[str]) -> None:
    """Write `genes.tsv` from the full table named as the only argument."""
    if len(arguments) != 1:
        sys.exit("expected one argument, HGNC's full table: python -m services.trainer.genes FULL_TABLE")
    with Path(arguments[0]).open(encoding="utf-8", newline="") as stream:
        lines = compact(csv.DictReader(stream, delimiter="\t"))
    TABLE.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"{TABLE.name}: {len(lines)} genes, {TABLE.stat().st_size} bytes")


def _cell(row: Mapping[str, str], column: str) -> str:
    for header in COLUMNS[column]:
        if header in row:
            return row[header] or ""
    raise ValueError(
        f"expected a column {' or '.join(COLUMNS[column])}, found {', '.join(row)}: take HGNC's full table"
    )


def _key(name: str) -> str:
    return name.lower().translate(SEPARATORS)


def _keys(name: str) -> Iterator[str]:
    """The keys under which a name may stand: Greek as names, then as Latin letters."""
    named = name.translate(TO_NAME)
    yield _key(named)
    latin = _key(GREEK_NAME.sub(lambda found: LATIN[found[0].lower()], name.translate(TO_LATIN)))
    # IFN-γ is IFNG, but "alpha" and "beta" alone are no gene A or B.
    if len(latin) > 2:
        yield latin


def _numbered_apart(symbol: str, aliases: set[str]) -> set[str]:
    """Aliases that differ in their numbers only, from each other or the symbol (MAPK2 of MAPK1): they mean others."""
    numbered = [key for key in {symbol, *aliases} if not key.isalpha()]
    skeletons: dict[str, set[str]] = {}
    for key in numbered if len(numbered) > 1 else ():
        skeletons.setdefault(NUMBER.sub("#", key), set()).add(key)
    return {key for same in skeletons.values() if len(same) > 1 for key in same} - {symbol}


def _may_be_symbol(name: str) -> bool:
    """Whether anything marks a name as one: a capital, a digit, a hyphen, or a Greek letter, also "tnf alpha"."""
    greek = any(sign in GREEK for sign in name) or (" " in name and GREEK_NAME.search(name) is not None)
    return greek or "-" in name or any(sign.isupper() or sign.isdigit() for sign in name)


def _split(word: str, shouted: bool) -> list[str]:
    """The word when it is a known symbol as a whole (GM-CSF), nothing when it is never one, else its parts."""
    if _never_symbol(word):
        return []
    return [word] if _looks_like_symbol(word, shouted) and _known(word) else PART.findall(word)


def _never_symbol(word: str) -> bool:
    key = _key(word)
    return key in STOP or NO_SYMBOL.fullmatch(key) is not None


def _known(word: str) -> bool:
    """Whether the table or the list of families knows a word; a microRNA also without its arm and locus number."""
    micro = re.sub(r"[35]p$", "", _key(word).removeprefix("hsa"))
    candidates = [*_keys(word), *([micro, f"{micro}1"] if micro.startswith("mir") else [])]
    return any(one in genes().names or one in FAMILIES for one in candidates)


def _looks_like_symbol(word: str, shouted: bool) -> bool:
    letters = [sign for sign in word if sign.isalpha()]
    if PROTEIN.fullmatch(word):
        return True
    if len(letters) < 2 or not (word[0].isupper() or word[0].isdigit() or WORDED_PREFIX.match(word)):
        return False
    marked = any(sign.isdigit() or sign in GREEK for sign in word) or "-" in word
    if marked:
        return any(sign.isupper() for sign in word) and not word[0].isdigit()
    return word.isupper() and 2 <= len(word) <= 6 and not shouted


if __name__ == "__main__":
    main(sys.argv[1:])
