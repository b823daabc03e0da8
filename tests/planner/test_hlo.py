"""What programs cost: against arithmetic by hand, for this machine's compiler and a TPU's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxrl_reason.models.experts import Way, mix_experts
from jaxrl_reason.planner.hlo import Collective, Cost, program_cost
from jaxrl_reason.planner.hlo_text import Shape


def cost_of(function, *shapes) -> Cost:
    like = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return program_cost(jax.jit(function).lower(*like).compile().as_text())


def layers(x, kernels):
    return jax.lax.scan(lambda x, kernel: (jnp.tanh(x @ kernel), None), x, kernels)[0]


def test_loops_count_as_often_as_they_run():
    one = 2 * 64 * 32 * 32
    assert cost_of(layers, (64, 32), (7, 32, 32)).flops == 7 * one

    def twice(x, kernels):
        return jax.lax.fori_loop(0, 3, lambda _, x: layers(x, kernels), x)

    assert cost_of(twice, (64, 32), (7, 32, 32)).flops == 3 * 7 * one


def test_the_gradient_of_a_scan_has_three_products_and_a_fourth_where_one_is_done_again():
    def loss(x, kernels):
        return (layers(x, kernels) ** 2).sum()

    def again(x, kernels):
        # Of tanh(tanh(x a) b), the inner product has to be done again.
        body = lambda x, k: (jnp.tanh(jnp.tanh(x @ k) @ k), None)
        return (jax.lax.scan(jax.checkpoint(body), x, kernels)[0] ** 2).sum()

    one = 7 * 2 * 64 * 32 * 32
    assert cost_of(jax.grad(loss, argnums=(0, 1)), (64, 32), (7, 32, 32)).flops == 3 * one
    found = cost_of(jax.grad(again, argnums=(0, 1)), (64, 32), (7, 32, 32)).flops
    assert found in (7 * one, 8 * one)


def test_bytes_of_a_loop_are_those_of_the_slices_it_reads():
    few, many = (cost_of(layers, (64, 32), (n, 32, 32)).memory_bytes for n in (16, 64))
    # A turn reads a kernel, and reads and writes what it works on a few times: it does not read all
    # kernels, of which there are four times as many.
    turn = (many - few) / 48
    kernel, state = 4 * 32 * 32, 4 * 64 * 32
    assert kernel + 2 * state <= turn <= 3 * kernel + 8 * state


def test_a_loop_without_a_known_end_is_named():
    def until(x, n):
        return jax.lax.while_loop(
            lambda s: s[0] < n[0], lambda s: (s[0] + 1, s[1] @ s[1]), (0.0, x)
        )

    found = cost_of(until, (16, 16), (1,))
    assert found.flops == 2 * 16**3
    assert len(found.endless) == 1


def test_a_loop_that_may_end_early_counts_as_if_it_did_not():
    def until(x):
        goes_on = lambda s: (s[0] < 9) & jnp.any(s[1] > 0)
        return jax.lax.while_loop(goes_on, lambda s: (s[0] + 1, s[1] @ s[1]), (0, x))[1]

    found = cost_of(until, (16, 16))
    assert (found.flops, found.endless) == (9 * 2 * 16**3, ())


def test_loops_over_experts_count_as_if_tokens_were_spread_evenly():
    tokens, chosen, experts, width, inner = 64, 2, 8, 16, 32

    def mix(x, gate, up, down):
        order = jnp.zeros((tokens, chosen), jnp.int32)
        projections = {n: {"kernel": k} for n, k in (("gate", gate), ("up", up), ("down", down))}
        return mix_experts(
            x,
            order,
            jnp.ones((tokens, chosen)),
            projections,
            activation=jax.nn.silu,
            way=Way("blocks", 4),
        )

    with jax.set_mesh(jax.sharding.Mesh(jax.devices()[:1], "data")):
        kernels = [(experts, width, inner)] * 2 + [(experts, inner, width)]
        found = cost_of(mix, (tokens, width), *kernels)
    # Of 4 rows a block; of each expert 1.5 rows on average are nobody's.
    rows = tokens * chosen + experts * 1.5
    assert (found.flops, found.endless) == (3 * 2 * rows * width * inner, ())


def test_of_branches_the_dearest_counts():
    def choose(x):
        return jax.lax.switch(
            x[0, 0].astype(int), [lambda x: x, lambda x: x @ x, lambda x: x @ x @ x], x
        )

    assert cost_of(choose, (16, 16)).flops == 2 * 2 * 16**3


MESH = {"a": 4, "b": 2}
SENT = {
    # Of 16 x 32 floats a device, along an axis of 4 or 2, by rings.
    "psum": ("all-reduce", lambda x: jax.lax.psum(x, "a"), 2 * 2048 * 3 / 4, (0, 2, 4, 6)),
    "gather": (
        "all-gather",
        lambda x: jax.lax.all_gather(x, "a", tiled=True),
        2048 * 3,
        (0, 2, 4, 6),
    ),
    "scatter": (
        "reduce-scatter",
        lambda x: jax.lax.psum_scatter(x, "b", tiled=True),
        2048 / 2,
        (0, 1),
    ),
    "permute": (
        "collective-permute",
        lambda x: jax.lax.ppermute(x, "a", [(i, (i + 1) % 4) for i in range(4)]),
        2048,
        (0, 2),
    ),
    "exchange": (
        "all-to-all",
        lambda x: jax.lax.all_to_all(x, "a", 0, 0, tiled=True),
        2048 * 3 / 4,
        (0, 2, 4, 6),
    ),
}


@pytest.mark.parametrize("name", SENT)
def test_collectives_send_what_theory_says(name):
    kind, function, sent, group = SENT[name]
    devices = np.asarray(jax.devices()).reshape(*MESH.values())
    mesh = Mesh(devices, tuple(MESH), axis_types=(AxisType.Auto,) * 2)
    spec = PartitionSpec(*MESH)
    cut = jax.shard_map(function, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
    x = jax.ShapeDtypeStruct((64, 64), jnp.float32, sharding=NamedSharding(mesh, spec))
    found = program_cost(jax.jit(cut).lower(x).compile().as_text())
    assert found.collectives == {Collective(kind, sent, group): 1.0}
    assert found.collective_bytes == sent
    assert found.times(3).collective_bytes == 3 * sent


def test_arrays_are_as_large_as_their_tiles():
    assert Shape("bf16", (3, 100), "1,0:T(8,128)(2,1)").bytes == 2 * 8 * 128
    assert Shape("bf16", (3, 100), "0,1:T(8,128)(2,1)").bytes == 2 * 128 * 104
    assert Shape("f32", (5, 7), "1,0").bytes == 4 * 35
    assert Shape("pred", (), "").bytes == 1
    assert Shape("s4", (16,), "").bytes == 8
    assert not Shape("bf16", (8, 128), "1,0:T(8,128)(2,1)S(1)").is_in_memory


# As the compiler for TPUs writes it: products are convolutions, some arrays lie in a core's memory
# (S(1)), the number of turns is a constant of the condition, and groups are named by axes.
TPU = """\
HloModule jit_f, is_scheduled=true, num_partitions=16

%product (p0: bf16[2,1024,512], p1: bf16[512,512]) -> bf16[2,1024,512] {
  %p0 = bf16[2,1024,512]{2,1,0:T(8,128)(2,1)S(1)} parameter(0)
  %p1 = bf16[512,512]{1,0:T(8,128)(2,1)} parameter(1)
  %shaped = bf16[512,512,1]{1,0,2:T(8,128)(2,1)} bitcast(%p1)
  ROOT %c = bf16[2,1024,512]{2,1,0:T(8,128)(2,1)S(1)} convolution(%p0, %shaped), window={size=1}, dim_labels=0bf_oi0->0bf
}

%slice (q0: bf16[12,512,512], q1: s32[]) -> bf16[512,512] {
  %q0 = bf16[12,512,512]{2,1,0:T(8,128)(2,1)} parameter(0)
  %q1 = s32[]{:T(128)S(6)} parameter(1)
  %zero = s32[]{:T(128)} constant(0)
  %one = bf16[1,512,512]{2,1,0:T(8,128)(2,1)} dynamic-slice(%q0, %q1, %zero, %zero), dynamic_slice_sizes={1,512,512}
  ROOT %b = bf16[512,512]{1,0:T(8,128)(2,1)} bitcast(%one)
}

%body (state: (s32[], bf16[2,1024,512], bf16[12,512,512])) -> (s32[], bf16[2,1024,512], bf16[12,512,512]) {
  %state = (s32[]{:T(128)}, bf16[2,1024,512]{2,1,0:T(8,128)(2,1)S(1)}, bf16[12,512,512]{2,1,0:T(8,128)(2,1)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%state), index=0
  %x = bf16[2,1024,512]{2,1,0:T(8,128)(2,1)S(1)} get-tuple-element(%state), index=1
  %all = bf16[12,512,512]{2,1,0:T(8,128)(2,1)} get-tuple-element(%state), index=2
  %kernel = bf16[512,512]{1,0:T(8,128)(2,1)} fusion(%all, %i), kind=kLoop, calls=%slice
  %y = bf16[2,1024,512]{2,1,0:T(8,128)(2,1)S(1)} fusion(%x, %kernel), kind=kOutput, calls=%product
  %sum = bf16[2,1024,512]{2,1,0:T(8,128)(2,1)S(1)} all-reduce(%y), channel_id=27, replica_groups=mesh['axis_0'=4,'axis_1'=1,'axis_2'=4] {'axis_2'}, use_global_device_ids=true, to_apply=%add
  %one.1 = s32[]{:T(128)} constant(1)
  %next = s32[]{:T(128)} add(%i, %one.1)
  ROOT %out = (s32[]{:T(128)}, bf16[2,1024,512]{2,1,0:T(8,128)(2,1)S(1)}, bf16[12,512,512]{2,1,0:T(8,128)(2,1)}) tuple(%next, %sum, %all)
}

%condition (state.1: (s32[], bf16[2,1024,512], bf16[12,512,512])) -> pred[] {
  %twelve = s32[]{:T(128)} constant(12)
  %state.1 = (s32[]{:T(128)}, bf16[2,1024,512]{2,1,0:T(8,128)(2,1)S(1)}, bf16[12,512,512]{2,1,0:T(8,128)(2,1)}) parameter(0)
  %i.1 = s32[]{:T(128)} get-tuple-element(%state.1), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i.1, %twelve), direction=LT
}

%add (l: bf16[], r: bf16[]) -> bf16[] {
  %l = bf16[]{:T(256)} parameter(0)
  %r = bf16[]{:T(256)} parameter(1)
  ROOT %s = bf16[]{:T(256)} add(%l, %r)
}

ENTRY %main (x.1: bf16[2,1024,512], k.1: bf16[12,512,512]) -> bf16[2,1024,512] {
  %x.1 = bf16[2,1024,512]{2,1,0:T(8,128)(2,1)} parameter(0)
  %k.1 = bf16[12,512,512]{2,1,0:T(8,128)(2,1)} parameter(1)
  %start = (bf16[2,1024,512]{2,1,0:T(8,128)(2,1)S(1)}, bf16[2,1024,512]{2,1,0:T(8,128)(2,1)}, u32[]{:S(2)}) copy-start(%x.1)
  %done = bf16[2,1024,512]{2,1,0:T(8,128)(2,1)S(1)} copy-done(%start)
  %kernel.1 = bf16[8,128]{1,0:T(8,128)(2,1)} custom-call(%k.1), custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={
"a": 1
}}, metadata={op_name="jit(f)/kernel"}
  %nought = s32[]{:T(128)} constant(2)
  %init = (s32[]{:T(128)}, bf16[2,1024,512]{2,1,0:T(8,128)(2,1)S(1)}, bf16[12,512,512]{2,1,0:T(8,128)(2,1)}) tuple(%nought, %done, %k.1)
  %loop = (s32[]{:T(128)}, bf16[2,1024,512]{2,1,0:T(8,128)(2,1)S(1)}, bf16[12,512,512]{2,1,0:T(8,128)(2,1)}) while(%init), condition=%condition, body=%body
  ROOT %result = bf16[2,1024,512]{2,1,0:T(8,128)(2,1)S(1)} get-tuple-element(%loop), index=1
}
"""  # noqa: E501


@pytest.mark.parametrize(
    "begun",
    [
        "%g = (bf16[2,512]{1,0}, bf16[8,512]{1,0}) all-gather-start(%x), dimensions={0}",
        "%g = bf16[8,512]{1,0} all-gather(%x), dimensions={0}",
        "%g = (bf16[2,512], bf16[2,512], u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%x)",
        "%g = bf16[2,512]{1,0} collective-permute(%x)",
        "%g = bf16[2,512]{1,0} all-reduce-start(%x)",
    ],
)
def test_a_collective_that_begins_writes_what_it_gives_alone(begun):
    """`-start` names its operand before its result."""
    opcode = begun.split("(%x)")[0].split()[-1]
    text = f"""HloModule m, num_partitions=4
ENTRY %main (x: bf16[2,512]) -> bf16[2,512] {{
  %x = bf16[2,512]{{1,0}} parameter(0)
  {begun}, replica_groups={{{{0,1,2,3}}}}, source_target_pairs={{{{0,1}}}}
  ROOT %r = bf16[2,512]{{1,0}} add(%x, %x)
}}
"""
    part = 2 * 2 * 512
    written = 4 * part if opcode.startswith("all-gather") else part
    assert program_cost(text).memory_bytes == part + written + 3 * part


def test_the_text_of_a_tpu_is_read():
    found = program_cost(TPU)
    turns, kernel, state = 10, 2 * 512 * 512, 2 * 2 * 1024 * 512
    assert found.flops == turns * 2 * 2 * 1024 * 512 * 512
    # The state comes in once; a turn reads a kernel, writes it and reads it, and nothing else of it
    # is in memory.
    scalars = found.memory_bytes - state - turns * 3 * kernel
    # A kernel reads all kernels and writes a tile.
    scalars -= 12 * kernel + 2 * 8 * 128
    assert 0 <= scalars < turns * 4096
    (sent,) = found.collectives
    assert (sent.kind, sent.bytes, sent.group) == ("all-reduce", 2 * state * 3 / 4, (0, 1, 2, 3))
    assert found.collectives[sent] == turns
    assert (found.endless, found.kernels) == ((), ("jit(f)/kernel",))


def test_a_counter_may_grow_by_more_than_one():
    # As in loops that overlap products with the parts of a gather, which do two parts in a turn.
    assert TPU.count("%one.1 = s32[]{:T(128)} constant(1)") == 1
    found = program_cost(
        TPU.replace("%one.1 = s32[]{:T(128)} constant(1)", "%one.1 = s32[] constant(3)")
    )
    assert found.flops == 4 * 2 * 2 * 1024 * 512 * 512  # 2, 5, 8 and 11 are less than 12
    # The counter may be copied first.
    copied = "%i.2 = s32[]{:T(128)S(6)} copy(%i)\n  %next = s32[]{:T(128)} add(%i.2, %one.1)"
    again = TPU.replace("%one.1 = s32[]{:T(128)} constant(1)", "%one.1 = s32[] constant(3)")
    again = again.replace("%next = s32[]{:T(128)} add(%i, %one.1)", copied)
    assert program_cost(again).flops == found.flops


def test_what_a_fusion_within_a_fusion_hands_on_is_read():
    # Products for TPUs take their operands through fusions that are nothing but another view.
    view = """%view (v: bf16[512,512]) -> bf16[512,512,1] {
  %v = bf16[512,512]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %w = bf16[512,512,1]{1,0,2:T(8,128)(2,1)} bitcast(%v)
}

"""
    plain = "bitcast(%p1)\n  ROOT %c"
    assert TPU.count(plain) == 1
    nested = TPU.replace("%product (", f"{view}%product (")
    nested = nested.replace(plain, "fusion(%p1), kind=kLoop, calls=%view\n  ROOT %c")
    assert program_cost(nested) == program_cost(TPU)
    # And a slice of it is read as a slice.
    handed = view.replace("ROOT %w = bf16[512,512,1]{1,0,2:T(8,128)(2,1)} bitcast(%v)", "").replace(
        "%v = bf16[512,512]{1,0:T(8,128)(2,1)} parameter(0)",
        "ROOT %v = bf16[12,512,512]{2,1,0:T(8,128)(2,1)} parameter(0)",
    )
    sliced = TPU.replace("%slice (", f"{handed}%slice (").replace(
        "%one = bf16[1,512,512]{2,1,0:T(8,128)(2,1)} dynamic-slice(%q0,",
        "%q2 = bf16[12,512,512]{2,1,0:T(8,128)(2,1)} fusion(%q0), kind=kLoop, calls=%view\n"
        "  %one = bf16[1,512,512]{2,1,0:T(8,128)(2,1)} dynamic-slice(%q2,",
    )
    assert sliced != TPU
    assert program_cost(sliced) == program_cost(TPU)


def test_a_slice_that_is_fetched_ahead_is_read_once():
    plain = "%done = bf16[2,1024,512]{2,1,0:T(8,128)(2,1)S(1)} copy-done(%start)"
    assert TPU.count(plain) == 1
    ahead = """
  %ahead = ((bf16[12,512,512]{2,1,0:T(8,128)(2,1)}), bf16[2,512,512]{2,1,0:T(8,128)(2,1)S(1)}, s32[]{:S(2)}) slice-start(%k.1), slice={[0:2], [0:512], [0:512]}
  %part = bf16[2,512,512]{2,1,0:T(8,128)(2,1)S(1)} slice-done(%ahead)
"""  # noqa: E501
    more = program_cost(TPU.replace(plain, plain + ahead)).memory_bytes
    assert more - program_cost(TPU).memory_bytes == 2 * 2 * 512 * 512


def test_computations_of_other_cores_are_read():
    # They end with the name of the thread that they run in.
    other = """%slice.1 (q: bf16[512,512]) -> bf16[512,512] {
  %q = bf16[512,512]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %c.1 = bf16[512,512]{1,0:T(8,128)(2,1)} copy(%q)
}, execution_thread="sparsecore"

"""
    assert program_cost(TPU.replace("%slice (", f"{other}%slice (")) == program_cost(TPU)


GROUPS = {
    "replica_groups={{0,4,8,12},{1,5,9,13}}": (0, 4, 8, 12),
    "replica_groups=[4,4]<=[16]": (0, 1, 2, 3),
    "replica_groups=[4,4]<=[4,4]T(1,0)": (0, 4, 8, 12),
    "replica_groups=[8,2]<=[2,4,2]T(1,2,0)": (0, 8),
    "replica_groups=mesh['axis_0'=4,'axis_1'=1,'axis_2'=4] {'axis_0'}": (0, 4, 8, 12),
    "replica_groups={}": tuple(range(16)),
}


@pytest.mark.parametrize("written", GROUPS)
def test_groups_are_read_however_they_are_written(written):
    known = "replica_groups=mesh['axis_0'=4,'axis_1'=1,'axis_2'=4] {'axis_2'}"
    (sent,) = program_cost(TPU.replace(known, written)).collectives
    assert sent.group == GROUPS[written]


# A batch of 3 products of 5 x 7 and 7 x 11 as a convolution: dilation holds the batch apart.
BATCHED = """\
HloModule m

ENTRY %main (a: f32[3,5,7], b: f32[3,7,11]) -> f32[3,5,11] {
  %a = f32[3,5,7]{2,1,0} parameter(0)
  %b = f32[3,7,11]{2,1,0} parameter(1)
  ROOT %c = f32[3,5,11]{2,1,0} convolution(%a, %b), window={size=3 stride=2 pad=0_0 lhs_dilate=3}, dim_labels=0bf_0io->0bf
}
"""  # noqa: E501


def test_a_convolution_that_is_a_batch_of_products_counts_as_one():
    assert program_cost(BATCHED).flops == 3 * 2 * 5 * 7 * 11


def test_a_text_without_an_entry_is_refused():
    with pytest.raises(ValueError, match="no entry computation"):
        program_cost("HloModule empty")
