"""The engine as its user sees it: answers, their ends, independence of neighbours, ranks, errors."""

import json
import random
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from plexor import Engine, EngineConfig, SamplingParams
from plexor.errors import CapacityError, ConfigError, PlexorError, RequestError
from plexor.extension.catalog import Catalog
from plexor.extension.specs import Observer
from plexor.runtime.request import Output
from plexor.runtime.stats import StepStats

GREEDY = SamplingParams(temperature=0, max_tokens=16, ignore_end=True)


def prompts(count: int, seed: int = 0) -> list[list[int]]:
    draw = random.Random(seed)
    return [[draw.randrange(3, 301) for _ in range(draw.randint(1, 40))] for _ in range(count)]


def engine(folder: Path, **changes: object) -> Engine:
    settings = {"num_blocks": 64, "max_sequences": 16, **changes}
    return Engine(str(folder), config=EngineConfig(**settings))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def shared(tiny: Path) -> Engine:
    return engine(tiny)


@pytest.mark.parametrize("steps_ahead", [0, 1])
def test_a_batch_equals_one_by_one(tiny: Path, steps_ahead: int) -> None:
    asked = prompts(9)
    with engine(tiny, steps_ahead=steps_ahead, chunk=7) as together, engine(tiny) as alone:
        expected = [alone.generate(prompt, GREEDY)[0].token_ids for prompt in asked]
        assert [answer.token_ids for answer in together.generate(asked, GREEDY)] == expected


def test_a_seed_draws_the_same_alone_and_in_any_batch(shared: Engine) -> None:
    drawing = SamplingParams(temperature=1.3, top_p=0.95, seed=11, max_tokens=24, ignore_end=True)
    mine, *others = prompts(8, seed=5)
    alone = shared.generate(mine, drawing)[0].token_ids
    crowd = shared._ask(shared._prompt(mine), drawing)
    for index, other in enumerate(others):
        crowd += shared._ask(shared._prompt(other), SamplingParams(temperature=1.0, max_tokens=5 + index))
    while shared.core.has_work:
        shared.step()
    assert crowd[0].completion.token_ids == alone


def test_two_seeds_differ_and_answers_to_one_prompt_too(shared: Engine) -> None:
    drawing = SamplingParams(temperature=1.5, seed=1, n=3, max_tokens=16, ignore_end=True)
    answers = shared.generate([5, 6, 7], drawing)
    assert [answer.index for answer in answers] == [0, 1, 2]
    assert len({tuple(answer.token_ids) for answer in answers}) == 3
    again = shared.generate([5, 6, 7], drawing)
    assert [answer.token_ids for answer in again] == [answer.token_ids for answer in answers]


def test_a_stop_string_ends_the_text_before_it(shared: Engine) -> None:
    whole = shared.generate([9, 8, 7], GREEDY)[0].text
    stop = whole[4:6]
    answer = shared.generate([9, 8, 7], SamplingParams(temperature=0, max_tokens=16, ignore_end=True, stop=(stop,)))[0]
    assert answer.text == whole[: whole.index(stop)]
    assert (answer.finish_reason, answer.stop_reason) == ("stop", stop)
    while shared.core.has_work:
        shared.step()
    shared.core.scheduler.check()
    assert shared.core.scheduler.pool.num_free == shared.core.limits.num_blocks


def test_an_end_id_ends_the_answer_and_is_not_part_of_its_text(shared: Engine) -> None:
    ids = shared.generate([9, 8, 7], GREEDY)[0].token_ids
    stopping = SamplingParams(temperature=0, max_tokens=16, ignore_end=True, stop_token_ids=(ids[2],))
    answer = shared.generate([9, 8, 7], stopping)[0]
    assert answer.token_ids == ids[: ids.index(ids[2]) + 1]
    assert (answer.finish_reason, answer.stop_reason) == ("stop", ids[2])
    held_off = SamplingParams(temperature=0, max_tokens=16, min_tokens=9, ignore_end=True, stop_token_ids=(ids[0],))
    later = shared.generate([9, 8, 7], held_off)[0].token_ids
    assert ids[0] not in later[:9]


def test_streaming_gives_the_same_text_in_pieces(shared: Engine) -> None:
    whole = shared.generate([4, 4, 2], GREEDY)[0]
    pieces = [delta.text for _, delta in shared.stream([4, 4, 2], GREEDY)]
    assert "".join(pieces) == whole.text
    assert len(pieces) > 1


def test_leaving_a_stream_aborts_its_request(shared: Engine) -> None:
    for _ in shared.stream([4, 4, 2], GREEDY):
        break
    while shared.core.has_work:
        shared.step()
    assert shared.core.scheduler.pool.num_free == shared.core.limits.num_blocks


def test_one_bad_prompt_in_a_list_leaves_nothing_running(shared: Engine) -> None:
    with pytest.raises(RequestError, match="301"):
        shared.generate([[3, 4], [301]], GREEDY)
    while shared.core.has_work:
        shared.step()
    assert shared.core.scheduler.pool.num_free == shared.core.limits.num_blocks
    assert shared.generate([[3, 4]], GREEDY)[0].finish_reason == "length"


def test_a_prompt_longer_than_the_context_is_refused_with_both_numbers(shared: Engine) -> None:
    with pytest.raises(RequestError, match=r"(?s)200.*128|128.*200"):
        shared.generate([5] * 200, GREEDY)


def test_repetition_penalty_equals_that_of_transformers(shared: Engine, tiny: Path) -> None:
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32).eval()
    theirs.generation_config.eos_token_id = None
    prompt = [7, 7, 9, 20]
    made = theirs.generate(torch.tensor([prompt]), max_new_tokens=20, do_sample=False, repetition_penalty=1.4)
    sampling = SamplingParams(temperature=0, max_tokens=20, ignore_end=True, repetition_penalty=1.4)
    assert shared.generate(prompt, sampling)[0].token_ids == made[0, 4:].tolist()


def test_logprobs_are_those_of_the_model(shared: Engine, tiny: Path) -> None:
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32).eval()
    sampling = SamplingParams(temperature=0.7, seed=2, max_tokens=6, ignore_end=True, logprobs=3, presence_penalty=1.0)
    answer = shared.generate([30, 31], sampling)[0]
    with torch.no_grad():
        values = theirs(torch.tensor([[30, 31, *answer.token_ids]])).logits[0, 1:-1].log_softmax(-1)
    for row, found in zip(values, answer.logprobs, strict=True):
        assert found.logprob == pytest.approx(float(row[found.token_id]), abs=1e-4)
        assert found.rank == int((row >= row[found.token_id]).sum())
        assert [token_id for token_id, _ in found.top] == row.topk(3).indices.tolist()


def test_preemption_does_not_change_the_answers(tiny: Path) -> None:
    asked = prompts(6, seed=8)
    drawing = SamplingParams(
        temperature=1.0, seed=4, max_tokens=30, ignore_end=True, repetition_penalty=1.2, frequency_penalty=0.3
    )
    counter = Counter()
    with engine(tiny, num_blocks=9, steps_ahead=1) as small, engine(tiny) as roomy:
        small.core.observe(counter)
        expected = [roomy.generate(prompt, drawing)[0].token_ids for prompt in asked]
        assert [answer.token_ids for answer in small.generate(asked, drawing)] == expected
    assert counter.num_preempted > 0
    assert counter.num_finished == 6


def test_prefix_hits_do_not_change_the_answers(shared: Engine) -> None:
    prompt = prompts(1, seed=3)[0] * 3
    first = shared.generate(prompt[:60], GREEDY)[0]
    again = shared.generate(prompt[:60], GREEDY)[0]
    assert again.num_cached_tokens >= 32
    assert again.token_ids == first.token_ids


@pytest.mark.parametrize("size", [2, 4])
def test_ranks_draw_the_same_tokens_as_one(tiny: Path, shared: Engine, size: int) -> None:
    """Four ranks are more than the KV heads: neighbours then hold copies."""
    asked = prompts(5, seed=2)
    drawing = SamplingParams(temperature=0.8, seed=6, max_tokens=12, ignore_end=True)
    expected = [shared.generate(asked, sampling) for sampling in (GREEDY, drawing)]
    with engine(tiny, tensor_parallel=size, device="cpu", chunk=7) as parallel:
        for sampling, wanted in zip((GREEDY, drawing), expected, strict=True):
            got = parallel.generate(asked, sampling)
            assert [answer.token_ids for answer in got] == [answer.token_ids for answer in wanted]


def test_ranks_that_do_not_divide_the_model_are_refused(tiny: Path) -> None:
    with pytest.raises(ConfigError, match="3"):
        engine(tiny, tensor_parallel=3, device="cpu")


def spoiled(tiny: Path, folder: Path) -> Path:
    """A copy whose last column of one tensor, which only the last rank reads, is NaN."""
    shutil.copytree(tiny, folder)
    name = "model.layers.1.mlp.down_proj.weight"
    shard = folder / json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"][name]
    tensors = load_file(shard)
    tensors[name][:, -1] = float("nan")
    save_file(tensors, shard)
    return folder


def test_a_rank_that_cannot_load_is_heard_at_once(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(PlexorError, match=r"^rank 1: .*down_proj.* holds NaN"):
        engine(spoiled(tiny, tmp_path / "model"), tensor_parallel=2, device="cpu")


def test_a_rank_with_other_plugins_is_heard_before_anybody_waits(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    catalog = Catalog.load()
    monkeypatch.setenv("PLEXOR_PLUGINS", "")
    with pytest.raises(PlexorError, match=r"^rank 1: found the plugins"):
        Engine(str(tiny), config=EngineConfig(tensor_parallel=2, device="cpu", num_blocks=16), catalog=catalog)


def test_a_rank_that_dies_between_steps_ends_the_engine_in_a_sentence(tiny: Path) -> None:
    with engine(tiny, tensor_parallel=2, device="cpu") as parallel:
        (process,) = parallel.core._ranks._processes
        process.kill()
        process.join()
        with pytest.raises(PlexorError, match="rank 1 has died"):
            parallel.generate([5, 6, 7], GREEDY)


def test_an_end_id_beyond_the_vocabulary_does_not_stop_min_tokens(tiny: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny, folder)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 10**6]}))
    with engine(folder) as model:
        (answer,) = model.generate([5, 6, 7], SamplingParams(temperature=0, max_tokens=8, min_tokens=8))
    assert len(answer.token_ids) == 8
    assert 1 not in answer.token_ids


@pytest.mark.parametrize("field", ["vocab_size", "max_position_embeddings"])
def test_a_model_beyond_the_memory_is_refused_in_a_sentence(tiny: Path, tmp_path: Path, field: str) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, field: 10**15}))
    with pytest.raises(CapacityError, match="does not fit in the memory of cpu"):
        engine(folder, device="cpu")


def test_a_text_config_that_is_no_object_says_nothing_of_the_dtype(tiny: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "text_config": ["x"]}))
    with engine(folder) as model:
        assert model.generate([5, 6, 7], GREEDY)[0].finish_reason == "length"


@pytest.mark.parametrize("bad", [2.5, True, "x", None, -1, 301])
def test_an_id_that_is_no_token_is_refused_and_the_engine_goes_on(shared: Engine, bad: object) -> None:
    with pytest.raises(RequestError, match="the prompt holds token"):
        shared.generate([[5, bad]], GREEDY)  # type: ignore[arg-type]
    assert shared.generate([5, 6, 7], GREEDY)[0].finish_reason == "length"


def test_a_context_beyond_the_model_is_refused(tiny: Path) -> None:
    with pytest.raises(ConfigError, match=r"4096.*128"):
        engine(tiny, max_length=4096)


def test_an_observer_that_a_plugin_brings_is_told(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[Counter] = []

    def build() -> Counter:
        told.append(Counter())
        return told[-1]

    monkeypatch.setattr("plexor.testing.observer_of_a_test", build, raising=False)
    spec = Observer(name="counter", build="plexor.testing:observer_of_a_test")
    monkeypatch.setattr(Catalog, "observers", {"counter": spec})
    with engine(tiny) as watched:
        watched.generate([[3, 4], [5]], GREEDY)
    assert [counter.num_finished for counter in told] == [2]


def test_a_watcher_sees_the_logits_that_tokens_are_drawn_from(tiny: Path) -> None:
    with engine(tiny, steps_ahead=1) as model:
        seen: dict[str, list[torch.Tensor]] = {}

        def watch(request_ids: tuple[str, ...], logits: torch.Tensor) -> None:
            assert len(request_ids) == logits.shape[0]
            for request_id, row in zip(request_ids, logits, strict=True):
                seen.setdefault(request_id, []).append(row)

        model.core.watch_logits(watch)
        asked = prompts(3, seed=6)
        answers = model.generate(asked, SamplingParams(temperature=0, max_tokens=9, min_tokens=3, ignore_end=True))
        model.core.watch_logits(None)
        model.generate([5, 6], GREEDY)
        assert len(seen) == 3
        for prompt, answer, rows in zip(asked, answers, seen.values(), strict=True):
            expected = model.core.logits([*prompt, *answer.token_ids[:-1]])[len(prompt) - 1 :]
            torch.testing.assert_close(torch.stack(rows), expected, rtol=1e-4, atol=1e-5)


def test_measuring_leaves_no_prefix_to_hit(tiny: Path) -> None:
    prompt = prompts(1, seed=3)[0] * 3
    with engine(tiny) as model:
        first = model.generate(prompt[:60], GREEDY)[0]
        model.core.logits([7] * 60)
        again = model.generate(prompt[:60], GREEDY)[0]
    assert again.num_cached_tokens == 0
    assert again.token_ids == first.token_ids


def test_text_comes_at_the_end_or_with_each_token(shared: Engine) -> None:
    """`generate` reads its answers when they have ended, `stream` at once; a first token has a time in both."""
    for sampling in (GREEDY, SamplingParams(temperature=0, max_tokens=16, ignore_end=True, logprobs=0)):
        (whole,) = shared.generate([11, 12], sampling)
        assert 0 < whole.first_token_seconds < whole.total_seconds
        deltas = [delta for _, delta in shared.stream([11, 12], sampling)]
        assert [token_id for delta in deltas for token_id in delta.token_ids] == whole.token_ids
        assert "".join(delta.text for delta in deltas) == whole.text
        assert len(deltas) == 16


class Counter:
    """A StepObserver that adds up."""

    def __init__(self) -> None:
        self.num_preempted = 0
        self.num_finished = 0

    def on_step(self, stats: StepStats) -> None:
        self.num_preempted += stats.num_preempted

    def on_finish(self, output: Output) -> None:
        assert output.finish == "length"
        self.num_finished += 1
