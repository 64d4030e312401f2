"""The CPU engine on a tiny random model: true log-probabilities, own settings per request, guidance, new weights."""

import asyncio
import re
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_model import save_tiny_model, tiny_model, tiny_tokenizer

from shared.generation import Generated, GenerationEngine, GenerationError, copy_weights, load_folder

PROMPT = list(range(20, 60))


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
