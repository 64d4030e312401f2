"""The CPU engine on a tiny random model: true log-probabilities, settings and seeds per request, guidance, weights."""

import asyncio
import re
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_model import save_tiny_model, tiny_model, tiny_tokenizer

from shared.generation import Generated, GenerationEngine, GenerationError, copy_weights, load_folder
from shared.token_masks import draw, draw_key, gumbel_noise

PROMPT = list(range(20, 60))
LETTERS = r"<a>[a-f]{60,90}</a>"


def with_engine(work: Callable[[GenerationEngine], Awaitable[Any]], *, max_running: int = 8) -> Any:
    """Run `work` on an engine of the tiny model."""

    async def main() -> Any:
        engine = GenerationEngine(tiny_model(), tiny_tokenizer(), context_tokens=256, max_running=max_running)
        try:
            return await work(engine)
        finally:
            engine.stop()

    return asyncio.run(main())


def test_the_log_probabilities_are_those_of_the_sampled_tokens() -> None:
    import torch

    async def work(engine: GenerationEngine) -> Generated:
        return await engine.generate(PROMPT, max_new_tokens=24, temperature=0.8)

    done = with_engine(work)
    ids = torch.tensor([PROMPT + done.token_ids])
    with torch.no_grad():
        logits = tiny_model()(ids).logits[0, len(PROMPT) - 1 : -1] / 0.8
    expected = logits.log_softmax(-1).gather(1, torch.tensor(done.token_ids)[:, None])[:, 0].tolist()
    assert done.log_probs == pytest.approx(expected, abs=1e-4)


def test_requests_keep_their_own_temperature_and_length() -> None:
    async def work(engine: GenerationEngine) -> list[Generated]:
        calls = [engine.generate(PROMPT, max_new_tokens=n, temperature=t) for n, t in ((5, 0.0), (9, 0.0), (30, 1.5))]
        return list(await asyncio.gather(*calls))

    short, longer, hot = with_engine(work)
    assert len(short.token_ids) == 5
    assert short.finish_reason == "length"
    assert longer.token_ids[:5] == short.token_ids
    assert max(short.log_probs) > -1e-3
    assert min(hot.log_probs) < -1


def test_a_guided_request_matches_its_expression_and_others_do_not_care() -> None:
    async def work(engine: GenerationEngine) -> list[Generated]:
        guided = [
            engine.generate(PROMPT, max_new_tokens=40, temperature=1.0, regex=r"<a>[a-f]{3,9}</a>") for _ in range(3)
        ]
        return list(await asyncio.gather(*guided, engine.generate(PROMPT, max_new_tokens=40, temperature=1.0)))

    *guided, free = with_engine(work)
    decode = tiny_tokenizer().decode
    for one in guided:
        assert one.finish_reason == "stop"
        assert re.fullmatch(r"<a>[a-f]{3,9}</a>", decode(one.token_ids, skip_special_tokens=True))
        assert one.log_probs[0] == pytest.approx(0, abs=1e-4)  # only "<" is allowed
    assert not decode(free.token_ids, skip_special_tokens=True).startswith("<a>")


def test_new_weights_are_used_after_what_was_running_is_done(tmp_path: Path) -> None:
    folder = Path(save_tiny_model(tmp_path / "other", seed=1))

    async def greedy(engine: GenerationEngine) -> list[int]:
        return (await engine.generate(PROMPT, max_new_tokens=8, temperature=0)).token_ids

    async def work(engine: GenerationEngine) -> tuple[list[int], list[int], list[int]]:
        before = asyncio.create_task(greedy(engine))
        await asyncio.sleep(0)
        await engine.replace_weights(lambda model: load_folder(model, folder))
        return await before, await greedy(engine), await greedy(engine)

    before, after, again = with_engine(work)
    assert before != after == again


def test_weights_that_do_not_fit_are_refused_and_the_old_ones_stay() -> None:
    async def work(engine: GenerationEngine) -> tuple[list[int], list[int]]:
        before = await engine.generate(PROMPT, max_new_tokens=6, temperature=0)
        with pytest.raises(ValueError, match="missing"):
            await engine.replace_weights(lambda model: copy_weights(model, {}))
        return before.token_ids, (await engine.generate(PROMPT, max_new_tokens=6, temperature=0)).token_ids

    before, after = with_engine(work)
    assert before == after


def test_a_request_longer_than_the_context_is_refused_with_the_numbers() -> None:
    async def work(engine: GenerationEngine) -> None:
        with pytest.raises(GenerationError, match="40 prompt tokens and 300 new ones exceed the context of 256"):
            await engine.generate(PROMPT, max_new_tokens=300, temperature=1)

    with_engine(work)


def test_more_requests_than_the_cache_holds_all_finish() -> None:
    async def work(engine: GenerationEngine) -> list[Generated]:
        calls = [engine.generate([*PROMPT, n], max_new_tokens=12, temperature=1) for n in range(24)]
        return list(await asyncio.gather(*calls))

    assert len(with_engine(work, max_running=2)) == 24


async def seeded(engine: GenerationEngine, seed: int, tokens: int = 40, **options: Any) -> list[int]:
    """Token ids of a request with a seed, at temperature 1."""
    return (await engine.generate(PROMPT, max_new_tokens=tokens, temperature=1, seed=seed, **options)).token_ids


def test_requests_in_flight_together_each_keep_their_seed() -> None:
    async def work(engine: GenerationEngine) -> list[list[list[int]]]:
        forwards = await asyncio.gather(*[seeded(engine, seed) for seed in range(6)])
        backwards = await asyncio.gather(*[seeded(engine, seed) for seed in reversed(range(6))])
        return [forwards, backwards[::-1]]

    once, again = with_engine(work)
    assert once == again
    assert len({tuple(tokens) for tokens in once}) == 6


def test_a_seeded_request_draws_the_same_alone_and_in_company() -> None:
    async def work(engine: GenerationEngine) -> list[list[int]]:
        alone = await seeded(engine, 7, regex=LETTERS, tokens=120), await seeded(engine, 7)
        company = [engine.generate(PROMPT[n:], max_new_tokens=60, temperature=1) for n in range(5)]
        wanted = asyncio.gather(seeded(engine, 7, regex=LETTERS, tokens=120), seeded(engine, 7))
        await asyncio.gather(*company)
        return [*alone, *await wanted]

    guided, free, guided_again, free_again = with_engine(work)
    assert (guided, free) == (guided_again, free_again)
    assert re.fullmatch(LETTERS, tiny_tokenizer().decode(guided, skip_special_tokens=True))


def test_requests_that_lose_their_place_in_the_cache_go_on_as_if_they_had_not() -> None:
    async def work(engine: GenerationEngine) -> list[list[int]]:
        calls = [seeded(engine, seed, regex=LETTERS, tokens=120) for seed in range(5)]
        return list(await asyncio.gather(*calls))

    crowded, roomy = with_engine(work, max_running=2), with_engine(work, max_running=16)
    assert crowded == roomy
    for tokens in crowded:
        assert re.fullmatch(LETTERS, tiny_tokenizer().decode(tokens, skip_special_tokens=True))


def test_a_seed_leaves_the_shared_random_numbers_alone_and_gives_no_log_probabilities() -> None:
    import torch

    async def work(engine: GenerationEngine) -> Generated:
        await engine.generate(PROMPT, max_new_tokens=1, temperature=1)  # the engine's start has a seed of its own
        before = torch.initial_seed()
        done = await engine.generate(PROMPT, max_new_tokens=30, temperature=1, seed=3)
        assert torch.initial_seed() == before
        return done

    assert with_engine(work).log_probs == []


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draws_over_many_seeds_follow_the_distribution_at_the_requests_temperature(temperature: float) -> None:
    import torch

    async def work(engine: GenerationEngine) -> list[int]:
        calls = [engine.generate(PROMPT, max_new_tokens=1, temperature=temperature, seed=n) for n in range(500)]
        return [done.token_ids[0] for done in await asyncio.gather(*calls)]

    drawn = with_engine(work)
    with torch.no_grad():
        expected = (tiny_model()(torch.tensor([PROMPT])).logits[0, -1] / temperature).softmax(-1)
    for token in expected.topk(5).indices.tolist():
        assert drawn.count(token) / len(drawn) == pytest.approx(float(expected[token]), abs=0.06)


def test_draws_follow_softmax_and_never_take_a_forbidden_token() -> None:
    import torch

    scores = torch.tensor([0.0, 1.0, -torch.inf, 2.0])
    drawn = [draw(scores, draw_key(seed, [1]), 0) for seed in range(20_000)]
    shares = [drawn.count(token) / len(drawn) for token in range(4)]
    assert shares == pytest.approx(scores.softmax(-1).tolist(), abs=0.015)
    assert shares[2] == 0


@given(seed=st.integers(0, 2**63 - 1), place=st.integers(0, 2**20))
def test_noise_is_finite_and_belongs_to_seed_prompt_and_place(seed: int, place: int) -> None:
    noise = gumbel_noise(draw_key(seed, [1, 2]), place, 64)
    assert noise.isfinite().all()
    assert noise.equal(gumbel_noise(draw_key(seed, [1, 2]), place, 64))
    assert not noise.equal(gumbel_noise(draw_key(seed, [1, 2]), place + 1, 64))
    assert not noise.equal(gumbel_noise(draw_key(seed, [12]), place, 64))


def test_a_cancelled_request_makes_room() -> None:
    async def work(engine: GenerationEngine) -> tuple[int, int]:
        task = asyncio.create_task(engine.generate(PROMPT, max_new_tokens=200, temperature=1, regex="x*"))
        await asyncio.sleep(0)
        running = engine.running
        task.cancel()
        await asyncio.wait([task])
        return running, engine.running

    assert with_engine(work) == (1, 0)


def test_weights_are_replaced_right_after_many_requests_were_cancelled() -> None:
    async def work(engine: GenerationEngine) -> Generated:
        for _ in range(5):
            tasks = [
                asyncio.create_task(engine.generate(PROMPT, max_new_tokens=150, temperature=1.0)) for _ in range(20)
            ]
            await engine.generate(PROMPT, max_new_tokens=2, temperature=1.0)  # by then some of them are running
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            async with asyncio.timeout(30):
                await engine.replace_weights(lambda _: None)
        return await engine.generate(PROMPT, max_new_tokens=5, temperature=0.0)

    assert len(with_engine(work, max_running=4).token_ids) == 5
