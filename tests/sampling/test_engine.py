"""The engine: log-probs equal the trainer's, and draws depend on the request alone."""

import dataclasses
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_reason.data.batching import fill_rows
from jaxrl_reason.errors import InputError
from jaxrl_reason.models import Model, ModelConfig
from jaxrl_reason.sampling import Engine, Request, Rollout, SamplingConfig, sample
from jaxrl_reason.sharding import MeshConfig, make_mesh, tree_shardings
from jaxrl_reason.steps import model_logprobs

CONFIG = ModelConfig(
    vocab_size=24,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=64,
)
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
STOP, PAD = 1, 0
LONGEST = 20


@pytest.fixture(scope="module")
def model_and_params():
    model = Model(CONFIG)
    params = jax.jit(model.init)(jax.random.key(0))
    # Larger embeddings make a distribution that is far from uniform.
    return model, params | {"embedding": 8 * params["embedding"]}


def prompts_of(count, longest=10, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(2, 24, rng.integers(1, longest + 1)).tolist() for _ in range(count)]


PROMPTS = prompts_of(6)


class Unrounded(Model):
    """Sampled from the parameters as they are stored."""

    def to_sample(self, params):
        return params


class Opening(Engine):
    """As on a TPU: pages that are written are apart from the cache meanwhile."""

    opens = True


def engine_of(model, *, mesh=None, rows=8, sampling=None, kind=Engine, **changes):
    options = {"max_prompt_length": 12, "group_size": 2, "page_size": 8, "steps_per_dispatch": 4}
    return kind(
        model=model,
        mesh=mesh or make_mesh(MeshConfig(), jax.devices()[:1]),
        sampling=SamplingConfig(**(sampling or {})),
        stop_ids=(STOP,),
        max_completion_length=LONGEST,
        max_rows=rows,
        **options | changes,
    )


def requests_of(prompts, group=2, **more):
    return [
        Request(prompt=prompt, id=i, index=g, **more)
        for i, prompt in enumerate(prompts)
        for g in range(group)
    ]


def complete(engine, params, requests, seed=1):
    """Completions by (id, index)."""
    session = engine.session(params, jax.random.key(seed))
    session.submit(requests)
    return {(c.request.id, c.request.index): c for c in session}


def same(a, b, atol=0.0):
    assert a.finish_reason == b.finish_reason
    np.testing.assert_array_equal(a.tokens, b.tokens)
    np.testing.assert_allclose(a.logprobs, b.logprobs, rtol=0, atol=atol)


def trained_logprobs(model, params, pairs, temperature=1.0):
    """Log-probs of completions by the function that training uses."""
    batch = fill_rows([[pair] for pair in pairs], 12 + LONGEST, pad_id=PAD)
    logprobs, _ = model_logprobs(
        model,
        params,
        jnp.asarray(batch["tokens"]),
        positions=jnp.asarray(batch["positions"]),
        segment_ids=jnp.asarray(batch["segment_ids"]),
        temperature=temperature,
        chunk_size=64,
    )
    return np.asarray(logprobs)[batch["completion_mask"]]


@pytest.mark.parametrize(
    "options",
    [{}, {"temperature": 0.6}, {"top_p": 0.8, "top_k": 9}, {"min_p": 0.2}, {"temperature": 0}],
)
def test_sampling_logprobs_and_kept_mass_are_the_trainers(model_and_params, options):
    model, params = model_and_params
    rollout = sample(
        engine_of(model, sampling=options),
        params,
        PROMPTS,
        jax.random.key(1),
        num_generations=3,
        pad_id=PAD,
    )
    prompts = [prompt for prompt in PROMPTS for _ in range(3)]
    pairs = list(zip(prompts, rollout.completions(), strict=True))
    trained = trained_logprobs(model, params, pairs, options.get("temperature", 1.0) or 1.0)
    recorded = rollout.sampling_logprobs + rollout.kept_logmass
    # Both masks run over the completions and then over their tokens.
    np.testing.assert_allclose(recorded[rollout.completion_mask], trained, atol=1e-5)
    assert np.ptp(rollout.lengths) > 0 or options.get("temperature") == 0


def test_with_one_set_of_shapes_the_tokens_are_the_same_in_any_company(model_and_params):
    model, params = model_and_params
    # Eight rows are the smallest level, and each has one page: there is a single decode program.
    engine = engine_of(model, page_size=64)
    assert [level.own_pages for level in engine.levels] == [(8,)]
    whole = complete(engine, params, requests_of(PROMPTS, 5))
    assert len(whole) == 30  # more than there are rows: some enter while others leave
    for chosen in ([(3, 2)], [(5, 4), (0, 0)], [(4, 1), (4, 3), (2, 2), (0, 4), (5, 0)]):
        wanted = [Request(prompt=PROMPTS[i], id=i, index=g) for i, g in chosen]
        for request, completion in complete(engine, params, wanted).items():
            # Log-probs differ by how the CPU's matmul rounds in one row of it or another.
            same(completion, whole[request], atol=2e-6)


@pytest.mark.parametrize(
    "changes",
    [
        {"rows": 32},
        {"rows": 1, "group_size": 1},
        {"steps_per_dispatch": 50},
        {"page_size": 1},
        {"page_size": 64},
        {"group_size": 1, "max_contexts": 3},
        {"kind": Opening},
        {"kind": Opening, "page_size": 5, "steps_per_dispatch": 50},
        {"kind": Opening, "rows": 32, "page_size": 64},
    ],
)
def test_sizes_change_no_completion(model_and_params, changes):
    model, params = model_and_params
    expected = complete(engine_of(model), params, requests_of(PROMPTS, 4))
    found = complete(engine_of(model, **changes), params, requests_of(PROMPTS, 4))
    assert found.keys() == expected.keys()
    for request, completion in found.items():
        same(completion, expected[request], atol=1e-5)


@pytest.mark.parametrize("sizes", [{}, {"fsdp": 4, "tensor": 2}])
def test_what_is_computed_in_bfloat16_is_sampled_from_copies_in_bfloat16(sizes):
    model = Model(dataclasses.replace(CONFIG, dtype="bfloat16", **EXPERTS))
    params = jax.jit(model.init)(jax.random.key(0))
    mesh = make_mesh(MeshConfig(**sizes), jax.devices()[: 8 if sizes else 1])
    params = jax.device_put(params, tree_shardings(mesh, model.axes(), params))
    engine = engine_of(model, mesh=mesh)
    placed = engine.place(params)
    assert engine.copies(params)
    wide = {
        jax.tree_util.keystr(path)
        for path, leaf in jax.tree_util.tree_leaves_with_path(placed)
        if leaf.dtype == jnp.float32
    }
    assert len(wide) == 6
    assert all("norm" in name or "router" in name for name in wide)
    like = jax.tree.map(lambda x: (x.shape, x.dtype, x.sharding), engine.placed_like(params))
    assert like == jax.tree.map(lambda x: (x.shape, x.dtype, x.sharding), placed)
    assert not engine.copies(placed)
    # Nothing that they give changes.
    unrounded = engine_of(Unrounded(model.config), mesh=mesh)
    assert unrounded.copies(params) == bool(sizes)
    expected = complete(unrounded, params, requests_of(PROMPTS))
    found = complete(engine, params, requests_of(PROMPTS))
    assert found.keys() == expected.keys()
    for request, completion in found.items():
        same(completion, expected[request], atol=1e-6)


def test_the_key_the_id_and_the_index_make_the_draws(model_and_params):
    model, params = model_and_params
    engine = engine_of(model)
    draws = lambda i, g, seed: complete(
        engine, params, [Request(prompt=PROMPTS[0], id=i, index=g)], seed
    )[i, g].tokens.tolist()
    assert draws(0, 0, 1) == draws(0, 0, 1)
    assert len({tuple(draws(*of)) for of in ((0, 0, 1), (1, 0, 1), (0, 1, 1), (0, 0, 2))}) == 4


@pytest.mark.parametrize("kind", [Engine, Opening])
@pytest.mark.parametrize("sizes", [{"data": 8}, {"data": 2, "fsdp": 2, "tensor": 2}])
def test_eight_devices_draw_what_one_draws(model_and_params, sizes, kind):
    model, params = model_and_params
    mesh = make_mesh(MeshConfig(**sizes))
    spread = jax.device_put(params, tree_shardings(mesh, model.axes(), params))
    one = complete(engine_of(model, rows=32), params, requests_of(PROMPTS * 2))
    many = complete(
        engine_of(model, rows=32, mesh=mesh, kind=kind), spread, requests_of(PROMPTS * 2)
    )
    assert many.keys() == one.keys()
    for request, completion in many.items():
        same(completion, one[request], atol=1e-5)


def test_a_prompt_is_prefilled_once_for_its_completions(model_and_params):
    model, params = model_and_params
    engine = engine_of(model, rows=32, group_size=8)
    session = engine.session(params, jax.random.key(0))
    session.submit(requests_of(PROMPTS[:4], 8))
    list(session)
    assert session.stats["prefill_tokens"] == sum(len(prompt) - 1 for prompt in PROMPTS[:4])
    assert session.stats["moves"] > 0  # also when groups go to smaller arrays in pieces


def test_finished_rows_make_room_and_nothing_is_lost(model_and_params):
    model, params = model_and_params
    session = engine_of(model).session(params, jax.random.key(0))
    session.submit(requests_of(PROMPTS, 8))
    done = list(session)
    assert sorted((c.request.id, c.request.index) for c in done) == [
        (i, g) for i in range(6) for g in range(8)
    ]
    stats = session.stats
    assert stats["tokens"] == sum(len(c.tokens) for c in done)
    assert stats["wasted_tokens"] == stats["row_steps"] - stats["tokens"]
    # One after the other, the batches of eight would wait for the longest of each.
    longest = np.asarray([len(c.tokens) for c in done]).reshape(-1, 8).max(axis=1).sum()
    assert stats["steps"] < longest


def test_requests_may_come_while_others_run(model_and_params):
    model, params = model_and_params
    engine = engine_of(model)
    session = engine.session(params, jax.random.key(1))
    session.submit(requests_of(PROMPTS[:2], 2))
    found, rest = {}, requests_of(PROMPTS, 2)[4:]
    for completion in session:
        found[completion.request.id, completion.request.index] = completion
        session.submit(rest[:3])
        rest = rest[3:]
    expected = complete(engine, params, requests_of(PROMPTS, 2))
    assert found.keys() == expected.keys()
    for request, completion in found.items():
        same(completion, expected[request], atol=1e-5)


def test_the_first_stop_token_or_the_longest_length_ends_a_completion(model_and_params):
    model, params = model_and_params
    done = complete(engine_of(model), params, requests_of(PROMPTS, 16)).values()
    reasons = {c.finish_reason for c in done}
    assert reasons == {"stop", "length"}
    for c in done:
        assert STOP not in c.tokens[:-1]
        assert (c.tokens[-1] == STOP) == (c.finish_reason == "stop")
        assert c.finish_reason == "stop" or len(c.tokens) == LONGEST


def test_a_request_may_have_a_length_of_its_own(model_and_params):
    model, params = model_and_params
    short = [dataclasses.replace(r, max_tokens=r.index) for r in requests_of(PROMPTS, 5)]
    free = complete(engine_of(model), params, requests_of(PROMPTS, 5))
    for of, completion in complete(engine_of(model), params, short).items():
        np.testing.assert_array_equal(completion.tokens, free[of].tokens[: of[1]])
        assert len(completion.tokens) <= of[1]


def test_forced_tokens_come_first_and_are_marked(model_and_params):
    model, params = model_and_params
    forced = (5, 6, 7)
    done = complete(engine_of(model), params, requests_of(PROMPTS, 2, forced=forced))
    for (i, _), c in done.items():
        assert c.tokens[:3].tolist() == list(forced)
        assert c.sampled.tolist() == [False] * 3 + [True] * (len(c.tokens) - 3)
        assert c.versions.tolist() == [-1] * 3 + [0] * (len(c.tokens) - 3)
        trained = trained_logprobs(model, params, [(PROMPTS[i], c.tokens.tolist())])
        np.testing.assert_allclose(c.logprobs[3:], trained[3:], atol=1e-5)
    only = [Request(prompt=[4], id=0, forced=range(2, 22))]
    assert complete(engine_of(model), params, only)[0, 0].finish_reason == "length"


def test_a_forbidden_token_never_comes_and_another_may_be_forced_by_its_bias(model_and_params):
    model, params = model_and_params
    engine = engine_of(model)
    forbidden = {STOP: -np.inf, 7: -np.inf}
    mixed = requests_of(PROMPTS, 2)
    mixed = [dataclasses.replace(r, logit_bias=forbidden) if r.index else r for r in mixed]
    plain, found = (
        complete(engine, params, requests_of(PROMPTS, 2)),
        complete(engine, params, mixed),
    )
    for of, c in found.items():
        if of[1]:
            assert not np.isin(c.tokens, [STOP, 7]).any()
            assert len(c.tokens) == LONGEST
        else:
            same(c, plain[of], atol=1e-5)
    sure = [Request(prompt=[4], id=0, logit_bias={9: 1e4})]
    assert complete(engine, params, sure)[0, 0].tokens.tolist() == [9] * LONGEST
    with pytest.raises(ValueError, match="logit_bias has 17 tokens; at most 16"):
        complete(engine, params, [Request(prompt=[4], id=0, logit_bias=dict.fromkeys(range(17)))])


def test_a_stop_string_ends_a_completion_after_the_token_that_completes_it(model_and_params):
    model, params = model_and_params
    text = lambda ids: "".join(chr(ord("a") + i) for i in ids)
    engine = engine_of(model, detokenize=text)
    free = complete(engine, params, requests_of(PROMPTS, 4))
    # Two letters that occur together somewhere.
    stop = text(max((c.tokens for c in free.values()), key=len)[4:6])
    found = complete(engine, params, requests_of(PROMPTS, 4, stop=(stop, "?")))
    hits = 0
    for of, c in found.items():
        at = text(free[of].tokens).find(stop)
        length = len(free[of].tokens) if at < 0 else at + 2
        np.testing.assert_array_equal(c.tokens, free[of].tokens[:length])
        hits += at >= 0
        assert at < 0 or c.finish_reason == "stop"
    assert hits > 0
    with pytest.raises(ValueError, match="stop strings need an engine with detokenize"):
        complete(engine_of(model), params, requests_of(PROMPTS, 1, stop=("a",)))


def test_new_tokens_are_streamed(model_and_params):
    model, params = model_and_params
    seen: dict = {}

    def on_tokens(request, tokens):
        seen.setdefault((request.id, request.index), []).extend(tokens.tolist())

    session = engine_of(model).session(params, jax.random.key(1), on_tokens=on_tokens)
    session.submit(requests_of(PROMPTS, 2))
    done = {(c.request.id, c.request.index): c.tokens.tolist() for c in session}
    assert seen == done


def test_an_aborted_completion_goes_on_where_it_was(model_and_params):
    model, params = model_and_params
    engine = engine_of(model)
    whole = complete(engine, params, requests_of(PROMPTS, 3))
    session = engine.session(params, jax.random.key(1), version=4)
    session.submit(requests_of(PROMPTS, 3))
    first = [next(session) for _ in range(5)]
    partial = session.abort()
    assert {c.finish_reason for c in partial} == {"aborted"}
    assert 0 < sum(len(c.tokens) > 0 for c in partial) < len(partial)
    first += list(session)  # those that had ended in the same dispatch

    later = engine.session(params, jax.random.key(1), version=5)
    later.submit(dataclasses.replace(c.request, resume=c) for c in partial)
    rest = list(later)
    assert len(first) + len(rest) == 18
    begun = {(c.request.id, c.request.index): len(c.tokens) for c in partial}
    for c in rest:
        of = c.request.id, c.request.index
        same(c, whole[of], atol=1e-5)
        assert c.versions.tolist() == [4] * begun[of] + [5] * (len(c.tokens) - begun[of])


def test_new_weights_count_from_the_next_dispatch_on(model_and_params):
    model, params = model_and_params
    other = jax.tree.map(lambda x: x * 1.5, params)
    session = engine_of(model).session(params, jax.random.key(1))
    session.submit(requests_of(PROMPTS, 2))
    first = next(session)
    session.update(other, version=1)
    rest = list(session)
    assert set(first.versions) == {0}
    mixed = next(c for c in rest if set(c.versions) == {0, 1})
    cut = int(np.argmax(mixed.versions == 1))
    trained = trained_logprobs(model, params, [(mixed.request.prompt, mixed.tokens.tolist())])
    np.testing.assert_allclose(mixed.logprobs[:cut], trained[:cut], atol=1e-5)
    assert np.abs(mixed.logprobs[cut:] - trained[cut:]).max() > 1e-3


def test_after_precompiling_nothing_is_compiled(model_and_params, caplog):
    model, params = model_and_params
    engine = engine_of(model, rows=16, page_size=16)
    engine.programs.forget()
    assert engine.precompile(params) > 10
    with caplog.at_level(logging.WARNING):
        for seed in range(3):
            session = engine.session(params, jax.random.key(seed))
            session.submit(requests_of(prompts_of(12, seed=seed), 3))
            list(session)
            assert session.stats["compiles"] == 0
        assert not caplog.records
        complete(engine, params, requests_of(PROMPTS, 1, logit_bias={3: 1.0}))
        assert "sampling compiled ('decode', 8, " in caplog.text
        assert "after warm-up" in caplog.text


def test_memory_follows_the_tokens_in_use(model_and_params):
    model, params = model_and_params
    engine = engine_of(model, group_size=8)
    few = engine.session(params, jax.random.key(1))
    few.submit(requests_of(PROMPTS[:1], 8, max_tokens=3))
    list(few)
    many = engine.session(params, jax.random.key(1))
    many.submit(requests_of(PROMPTS[:1], 8))
    list(many)
    prompt_pages = -(-(len(PROMPTS[0]) - 1) // 8)
    assert few.stats["most_pages"] == prompt_pages + 8
    assert many.stats["most_pages"] > few.stats["most_pages"] + 2


def test_prompts_that_do_not_fit_are_refused(model_and_params):
    model, params = model_and_params
    engine = engine_of(model)
    with pytest.raises(InputError, match="prompt 1 has 13 tokens; allowed are 1 to"):
        complete(engine, params, requests_of([[1], [2] * 13]))
    with pytest.raises(InputError, match="prompt 0 has 0 tokens"):
        complete(engine, params, requests_of([[]]))
    with pytest.raises(InputError, match="max_position_embeddings=64"):
        dataclasses.replace(engine, max_completion_length=60)
    with pytest.raises(ValueError, match="page_size=-1 must be at least 1"):
        dataclasses.replace(engine, page_size=-1)


def test_a_rollout_holds_what_the_completions_hold(model_and_params):
    model, params = model_and_params
    done = complete(engine_of(model), params, requests_of(PROMPTS, 2, forced=(9,)))
    done = [done[i, g] for i in range(6) for g in range(2)]
    rollout = Rollout.of(PROMPTS, 2, done, pad_id=PAD, max_completion_length=LONGEST)
    assert rollout.completions() == [c.tokens.tolist() for c in done]
    for r, c in enumerate(done):
        n = len(c.tokens)
        assert rollout.lengths[r] == n
        assert rollout.finished[r] == (c.finish_reason == "stop")
        assert (rollout.tokens[r, n:] == PAD).all()
        np.testing.assert_array_equal(rollout.sampled[r, :n], c.sampled)
        np.testing.assert_array_equal(rollout.sampling_logprobs[r, :n], c.logprobs)
        np.testing.assert_array_equal(rollout.kept_logmass[r, :n], c.kept_logmass)
        np.testing.assert_array_equal(rollout.versions[r, :n], c.versions)
        assert not rollout.sampled[r, n:].any()
