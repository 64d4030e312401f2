"""The model card of trained weights: README.md with Hugging Face's front matter, made of what the artifacts say.

`model_card` is pure. `base_of` looks up the base model's licence: in the card of its folder or, where asked to, of its
page on the Hugging Face hub. A base that is no page there is named in the text and not in the front matter.
"""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shared.files import MANIFEST, Manifest
from shared.model_files import PACKAGE, package_file
from shared.settings import Settings

CARD = "README.md"
LICENCE_KEYS = ("license", "license_name", "license_link")
UNKNOWN = "unknown: see the base model"
TAGS = ["biology", "medical", "pubmed", "question-answering", "search-agent", "reinforcement-learning"]
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
HUB_PATIENCE_S = 5.0
EARLIER_ROUND = "the model that the run began with"

ROLES = {
    "solver": "It answers biomedical questions: it thinks, searches PubMed abstracts with a tool, and gives a short "
    "answer. It was trained with GRPO on questions that a proposer, trained for it, wrote from papers and that were "
    "verified before.",
    "proposer": "It writes biomedical questions of 1 to 4 hops from a paper, searching PubMed abstracts for the hops "
    "between. It was rewarded for well-formed questions that its solver answers sometimes but not always.",
}
SOURCES = {
    "demo": "demo records of textbook biomedicine, which are not PubMed's",
    "xml": "PubMed records from files",
    "entrez": "PubMed records from a query",
}
SHAPED_BY = {
    "steps": "optimizer steps",
    "prompts_per_step": "prompts per step",
    "rollouts_per_prompt": "rollouts per prompt",
    "advantage": "advantage",
    "temperature": "sampling temperature",
    "actor.learning_rate": "learning rate",
    "actor.lora_rank": "rank of LoRA adapters (0: all weights)",
    "actor.dtype": "precision of the passes",
    "reward.variant": "reward",
    "prompts": "set of prompts",
    "max_turns": "most turns",
    "prompt_tokens": "longest prompt, in tokens",
    "response_tokens": "longest rollout, in tokens",
    "seed": "seed",
}


@dataclass(frozen=True, slots=True)
class Base:
    """The model that a run began with; `licence` has the keys of LICENCE_KEYS that its card has."""

    name: str
    on_hub: bool
    licence: Mapping[str, str] = field(default_factory=dict)


def model_card(
    settings: Settings,
    manifests: Mapping[str, Manifest],
    base: Base,
    *,
    evaluation: Mapping[str, Any] | None = None,
    corpus_date: str = "",
) -> str:
    """README.md of the weights of the settings' run, round and role.

    `manifests`, as far as they are there, are those of `publish.folders_behind`; `evaluation` is the content of the
    round's evaluation.json, and `corpus_date` the day on which the corpus was made.
    """
    trainer = settings.trainer
    sections = [
        f"# {trainer.run}: {trainer.role} of round {trainer.round}",
        f"Weights of Dr. Zero Biomedical, a system in which a proposer and a solver teach each other on PubMed. "
        f"{ROLES[trainer.role]}",
        f"- Base model: {base.name}\n- Licence: {base.licence.get('license', UNKNOWN)}",
        "## Data",
        data_lines(manifests, corpus_date),
        "## Training",
        settings_table(manifests),
        "## Scores",
        scores(evaluation) if trainer.role == "solver" else "The proposer is not examined by itself.",
        "## Limits",
        LIMITS,
        "## Use",
        USES[trainer.role],
    ]
    return front_matter(base) + "\n\n".join(section.strip() for section in sections) + "\n"


def front_matter(base: Base) -> str:
    """The YAML block that Hugging Face reads."""
    from huggingface_hub import ModelCardData

    data = ModelCardData(
        base_model=base.name if base.on_hub else None,
        language="en",
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=TAGS,
        license=base.licence.get("license", "unknown"),
        license_name=base.licence.get("license_name"),
        license_link=base.licence.get("license_link"),
    )
    return f"---\n{data.to_yaml()}\n---\n\n"


def data_lines(manifests: Mapping[str, Manifest], corpus_date: str) -> str:
    """What the weights were made from, with identities."""
    lines = []
    corpus = manifests.get("corpus")
    if corpus:
        made = f", made on {corpus_date}" if corpus_date else ""
        source = SOURCES.get(corpus.settings.get("source", ""), "records")
        lines.append(f"- Corpus: {corpus.rows:,} {source}{made} (`{corpus.identity[:12]}`)")
        origins = {name: value for name, value in corpus.made_from.items() if name in ("query", "dates")}
        lines += [f"- Corpus {name}: `{value}`" for name, value in origins.items()]
    for name in ("papers", "questions", "seeds", "training"):
        if name in manifests:
            counts = ", ".join(f"{count:,} {what}" for what, count in sorted(manifests[name].counts.items()))
            lines.append(f"- {name.capitalize()}: {counts or 'made'} (`{manifests[name].identity[:12]}`)")
    return "\n".join(lines) or "Not recorded."


def settings_table(manifests: Mapping[str, Manifest]) -> str:
    """The settings that shaped the training, as its manifest has them."""
    shape = manifests["training"].settings if "training" in manifests else {}
    rows = [(words, found) for name, words in SHAPED_BY.items() if (found := value_of(shape, name)) is not None]
    return table(("Setting", "Value"), rows) if rows else "Not recorded."


def value_of(settings: Mapping[str, Any], name: str) -> Any:
    """The value at a dotted name, or None."""
    value: Any = settings
    for key in name.split("."):
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def scores(evaluation: Mapping[str, Any] | None) -> str:
    """A table of the exams of base and round; who is better by how much, and whether that is more than chance."""
    if not evaluation:
        return "Not evaluated."
    rows = [
        (
            f"{name} ({found['round']['questions']})",
            accuracy(found["base"]),
            accuracy(found["round"]),
            "–" if found["round"]["macro_f1"] is None else f"{found['round']['macro_f1']:.3f}",
            f"{found['change']['difference']:+.3f} (p = {found['change']['p']:.3f})",
        )
        for name, found in sorted(evaluation["sets"].items())
    ]
    head = ("Set (questions)", "Base", "This model", "Macro-F1", "Difference")
    words = (
        "Accuracy with Wilson's 95 % interval, greedy, with the search; the difference with McNemar's exact p. The set "
        "`kept_out` is the run's own: questions that were kept out of training."
    )
    return f"{table(head, rows)}\n\n{words}"


def accuracy(marks: Mapping[str, Any]) -> str:
    """Accuracy and its interval."""
    low, high = marks["interval_95"]
    return f"{marks['accuracy']:.3f} [{low:.3f}, {high:.3f}]"


def table(head: tuple[str, ...], rows: list[tuple[Any, ...]]) -> str:
    """A Markdown table."""
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)


LIMITS = """
- No medical advice. Nothing that it says may decide about anybody's health; it is no medical device.
- It is a small model: it is often wrong, and sounds the same when it is.
- It has read PubMed abstracts only, no full texts, and of these a selection; an abstract can be outdated or retracted.
- It was trained in English, for short answers with a search at hand. Without one it answers from memory.
"""

USES = {
    "solver": """
With Dr. Zero Biomedical, whose prompts and search it was trained with, in the profile of the training:

```sh
export DRZERO_SOLVER__MODEL=/path/to/this/folder
python -m services.solver &
python -m services.trainer.ask "Which kinase does metformin activate?"
```

The files are plain Hugging Face weights: `AutoModelForCausalLM.from_pretrained` loads them.
""",
    "proposer": """
With Dr. Zero Biomedical, whose prompts and search it was trained with, in the profile of the training:

```sh
python -m services.trainer.generate --topic "sepsis biomarkers" --text
```

The files are plain Hugging Face weights: `AutoModelForCausalLM.from_pretrained` loads them.
""",
}


# --- the base model


def base_of(reference: str, *, ask_hub: bool = False) -> Base:
    """The base that a setting names; of weights that this project has published, the base of those."""
    place = package_file(reference) if reference.startswith(PACKAGE) else Path(reference)
    folder = place.parent if place.is_file() else place
    known = read_front_matter(folder / CARD)
    if (folder / MANIFEST).is_file() and known:  # weights of an earlier round
        name = known.get("base_model")
        return Base(str(name or EARLIER_ROUND), on_hub=name is not None, licence=licence_in(known))
    if folder.is_dir() or not HUB_ID.fullmatch(reference):
        return Base(Path(reference).name, on_hub=False, licence=licence_in(known))
    return Base(reference, on_hub=True, licence=licence_in(hub_front_matter(reference)) if ask_hub else {})


def licence_in(known: Mapping[str, Any]) -> dict[str, str]:
    """The licence that a card's front matter names; none for one that it calls unknown."""
    found = {key: str(known[key]) for key in LICENCE_KEYS if known.get(key)}
    return found if found.get("license", "unknown") != "unknown" else {}


def read_front_matter(card: Path) -> Mapping[str, Any]:
    """The front matter of a card; empty when there is none that can be read."""
    return front_matter_in(card.read_text(encoding="utf-8", errors="replace")) if card.is_file() else {}


def hub_front_matter(name: str) -> Mapping[str, Any]:
    """The front matter of a model's page on the hub; empty when it is out of reach."""
    import httpx
    from huggingface_hub import hf_hub_url

    token = os.environ.get("HF_TOKEN", "").strip()
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    try:
        reply = httpx.get(hf_hub_url(name, CARD), headers=headers, timeout=HUB_PATIENCE_S, follow_redirects=True)
    except (httpx.HTTPError, ValueError):
        return {}
    return front_matter_in(reply.text) if reply.is_success else {}


def front_matter_in(text: str) -> Mapping[str, Any]:
    """The front matter of a card's text; empty when there is none that can be read."""
    import yaml  # type: ignore[import-untyped]
    from huggingface_hub import RepoCard

    try:
        return dict(RepoCard(text).data.to_dict()) if text.startswith("---") else {}  # type: ignore[no-untyped-call]
    except (ValueError, TypeError, yaml.YAMLError):
        return {}
