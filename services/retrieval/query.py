"""What is asked of a search: one query with how it wants to be searched and which papers may be found."""

from dataclasses import dataclass
from typing import Literal

from shared.settings import RetrievalSettings

Mode = Literal["dense", "bm25", "hybrid"]


@dataclass(frozen=True, slots=True)
class Filters:
    """Which papers may be found: all that fulfil every condition given.

    Of the names of one field any may match; case does not matter. A paper without a year fulfils no condition on it.
    """

    year_from: int | None = None
    year_to: int | None = None
    journals: tuple[str, ...] = ()
    mesh_terms: tuple[str, ...] = ()
    publication_types: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return self != NO_FILTERS


NO_FILTERS = Filters()


@dataclass(frozen=True, slots=True)
class Query:
    """A text and the best `top_k` papers wanted for it, fewer when fewer can be found."""

    text: str
    top_k: int
    mode: Mode
    rerank: bool = False
    highlight: bool = False
    filters: Filters = NO_FILTERS

    @classmethod
    def plain(cls, text: str, settings: RetrievalSettings, top_k: int | None = None) -> "Query":
        """A query as the settings have it."""
        return cls(text, settings.top_k if top_k is None else top_k, settings.mode)
