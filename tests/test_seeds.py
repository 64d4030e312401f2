"""Seeds: exact hop ratio, reproducible, held-out papers apart, a clear word when there are too few."""

from pathlib import Path

import pyarrow.parquet as pq
import pytest

from services.trainer.seeds import draw_seeds, seed_row, spread_hops, write_rows
from shared.command import UsageError
from shared.records import Paper, Seed
from shared.settings import TrainerSettings

PAPERS = [Paper(str(n), f"Title {n}", "word " * (20 + n)) for n in range(100)]
SETTINGS = TrainerSettings(seeds=40, eval_seeds=10, prompts_per_step=4, min_abstract_words=30)


def keep(text: str) -> str:
    return text


@pytest.mark.parametrize(
    ("count", "expected"),
    [(10, [4, 3, 2, 1]), (100, [40, 30, 20, 10]), (7, [3, 2, 1, 1]), (1, [1, 0, 0, 0]), (0, [0] * 4)],
)
def test_hops_follow_the_ratio_exactly(count: int, expected: list[int]) -> None:
    hops = spread_hops(count, (4, 3, 2, 1))
    assert [hops.count(hop) for hop in (1, 2, 3, 4)] == expected


def test_every_stretch_of_ten_seeds_has_its_share_of_hops() -> None:
    hops = spread_hops(100, (4, 3, 2, 1))
    for start in range(0, 100, 10):
        assert [hops[start : start + 10].count(hop) for hop in (1, 2, 3, 4)] == [4, 3, 2, 1]


def test_the_same_seed_draws_the_same_papers_and_another_does_not() -> None:
    first, second = draw_seeds(PAPERS, SETTINGS, keep), draw_seeds(PAPERS, SETTINGS, keep)
    other = draw_seeds(PAPERS, SETTINGS.model_copy(update={"seed": 7}), keep)
    assert first == second != other


def test_held_out_papers_are_no_training_papers_and_short_abstracts_are_none() -> None:
    train, held_out = draw_seeds(PAPERS, SETTINGS, keep)
    assert len(train) == 40
    assert len(held_out) == 10
    assert not {s.pmid for s in train} & {s.pmid for s in held_out}
    assert all(int(s.pmid) >= 10 for s in train + held_out)


def test_too_few_papers_are_named_with_a_remedy() -> None:
    with pytest.raises(UsageError, match=r"expected 50 papers .* found 20 .*DRZERO_TRAINER__SEEDS"):
        draw_seeds(PAPERS[:30], SETTINGS, keep)


def test_rows_survive_parquet_with_verls_columns(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    write_rows([seed_row(Seed(0, "123", 2, "A paper."), "train", 2)], str(path))
    row = pq.read_table(path).to_pylist()[0]
    assert row["data_source"] == "search_biomedical_2"
    assert row["extra_info"]["tools_kwargs"]["search"]["create_kwargs"]["data_source"] == "search_biomedical_2"
    assert row["prompt"][-1]["role"] == "user"
    assert {"prompt", "data_source", "ability", "reward_model", "agent_name", "extra_info"} == set(row)
