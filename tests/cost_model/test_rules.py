"""Rules against bytes and FLOPs counted by hand, static and symbolic, from FX nodes and from plan
steps."""

import operator

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from iocompiler.cost_model.call import Call, Operand, call_of_node, call_of_step
from iocompiler.cost_model.cost import Cost, value_of
from iocompiler.cost_model.rules import RULES, cost, has_rule, price
from iocompiler.plan.data import AtenStep, Ref, TensorSpec

aten = torch.ops.aten
F32, BF16, I64 = torch.float32, torch.bfloat16, torch.int64


def spec(*shape, dtype=F32, stride=None):
    dense = tuple(torch.empty(shape, device="meta").stride())
    return TensorSpec(tuple(shape), dense if stride is None else stride, dtype, "cuda")


def call(target, *args, out=(), **kwargs):
    """Specs among the arguments become operands named by their position."""
    named = tuple(
        Operand(f"a{i}", a) if isinstance(a, TensorSpec) else a for i, a in enumerate(args)
    )
    outputs = out if isinstance(out, tuple) else (out,)
    return Call(target, named, kwargs, outputs)


def last_cost(function, *inputs):
    """The cost of the last operator of a traced function, the output's own views left out."""
    gm = make_fx(function, tracing_mode="fake")(*inputs)
    costs = [cost(n) for n in gm.graph.nodes]
    return [c for c in costs if c != Cost()][-1]


def test_pointwise_reads_and_writes_once():
    c = price(call("aten.add.Tensor", spec(4, 8), spec(4, 8), out=spec(4, 8)))
    assert (c.read_bytes, c.written_bytes, c.flops) == (2 * 128, 128, 32)


def test_a_broadcast_operand_is_read_at_its_own_size():
    c = price(call("aten.mul.Tensor", spec(4, 8), spec(8), out=spec(4, 8)))
    assert c.read_bytes == 128 + 32
    expanded = price(call("aten.mul.Tensor", spec(4, 8), spec(4, 8, stride=(0, 1)), out=spec(4, 8)))
    assert expanded.read_bytes == 128 + 32


def test_one_tensor_as_two_arguments_is_read_once():
    x = torch.randn(6, 5)
    c = last_cost(lambda x: aten.mul.Tensor(x, x), x)
    assert c.read_bytes == c.written_bytes == 120


def test_dtypes_count_by_their_width():
    c = price(call("aten._to_copy.default", spec(10, dtype=F32), out=spec(10, dtype=BF16)))
    assert (c.read_bytes, c.written_bytes, c.flops) == (40, 20, 0)
    assert (
        price(call("aten.lt.Scalar", spec(10), 0, out=spec(10, dtype=torch.bool))).written_bytes
        == 10
    )


def test_transcendentals_are_counted_apart():
    assert price(call("aten.exp.default", spec(10), out=spec(10))).transcendentals == 10
    assert price(call("aten.neg.default", spec(10), out=spec(10))).transcendentals == 0


@pytest.mark.parametrize(
    "name", ["view", "permute", "expand", "slice", "t", "unsqueeze", "split", "detach"]
)
def test_views_are_free(name):
    assert RULES[f"aten.{name}"](call(f"aten.{name}.default", spec(8, 8), out=spec(8, 8))) == Cost()


def test_getitem_and_size_arithmetic_are_free():
    gm = make_fx(lambda x: aten.max.dim(x, 1)[0], tracing_mode="fake")(torch.randn(3, 4))
    items = [n for n in gm.graph.nodes if n.target is operator.getitem]
    assert items
    assert all(cost(n) == Cost() for n in items)


def test_reductions_count_their_input():
    c = price(call("aten.sum.dim_IntList", spec(16, 32), [1], out=spec(16)))
    assert (c.read_bytes, c.written_bytes, c.flops) == (2048, 64, 512)
    several = price(
        call(
            "aten.native_layer_norm.default",
            spec(16, 32),
            [32],
            spec(32),
            spec(32),
            1e-5,
            out=(spec(16, 32), spec(16, 1), spec(16, 1)),
        )
    )
    assert several.bytes == 2048 + 256 + 2048 + 128


def test_softmax_counts_an_exponential_an_element():
    c = price(call("aten._softmax.default", spec(4, 100), -1, False, out=spec(4, 100)))
    assert (c.bytes, c.transcendentals) == (3200, 400)


def test_empty_tensors_cost_nothing():
    c = price(call("aten.add.Tensor", spec(0, 8), spec(8, stride=(1,)), out=spec(0, 8)))
    assert (c.written_bytes, c.flops) == (0, 0)


def test_creation_only_writes():
    assert price(call("aten.full.default", [10], 0, out=spec(10))) == Cost(0, 40)
    assert price(call("aten.zeros_like.default", spec(10), out=spec(10))) == Cost(0, 40)
    assert price(call("aten.empty.memory_format", [10], out=spec(10))) == Cost()


# --- contractions


def test_mm():
    c = price(
        call(
            "aten.mm.default",
            spec(3, 5, dtype=BF16),
            spec(5, 7, dtype=BF16),
            out=spec(3, 7, dtype=BF16),
        )
    )
    assert (c.read_bytes, c.written_bytes, c.flops) == (2 * (15 + 35), 42, 2 * 3 * 5 * 7)
    (inner,) = c.contractions
    assert (inner.m, inner.n, inner.k, inner.batch) == (3, 7, 5, 1)


def test_addmm_reads_its_bias_and_counts_no_flops_for_it():
    c = price(call("aten.addmm.default", spec(7), spec(3, 5), spec(5, 7), out=spec(3, 7)))
    assert (c.read_bytes, c.flops) == (4 * (7 + 15 + 35), 210)


@pytest.mark.parametrize("target", ["aten.bmm.default", "aten.baddbmm.default"])
def test_batches(target):
    args = (spec(2, 3, 5), spec(2, 5, 7))
    if "baddbmm" in target:
        args = (spec(2, 3, 7), *args)
    assert price(call(target, *args, out=spec(2, 3, 7))).flops == 2 * 2 * 3 * 5 * 7


def test_linear_and_matmul_agree_with_the_product_they_are():
    linear = price(
        call("aten.linear.default", spec(2, 3, 5), spec(7, 5), spec(7), out=spec(2, 3, 7))
    )
    matmul = price(call("aten.matmul.default", spec(2, 3, 5), spec(5, 7), out=spec(2, 3, 7)))
    broadcast = price(
        call("aten.matmul.default", spec(4, 1, 3, 5), spec(2, 5, 7), out=spec(4, 2, 3, 7))
    )
    assert linear.flops == matmul.flops == 2 * 6 * 5 * 7
    assert broadcast.flops == 2 * 8 * 3 * 5 * 7
    assert price(call("aten.mv.default", spec(3, 5), spec(5), out=spec(3))).flops == 30


@pytest.mark.parametrize(
    ("left", "right", "aligned"),
    [
        (spec(64, 64, dtype=BF16), spec(64, 128, dtype=BF16), True),
        (spec(64, 64, dtype=BF16), spec(64, 50257, dtype=BF16), False),
        (spec(64, 63, dtype=BF16), spec(63, 64, dtype=BF16), False),
        # columns lie dense: the leading stride is that of the columns
        (
            spec(64, 64, dtype=BF16),
            spec(64, 57, dtype=BF16, stride=(1, 64)),
            False,
        ),  # the result is 57 wide
        (spec(8, 64, dtype=F32), spec(64, 12, dtype=F32), True),
        (spec(1, 63, dtype=BF16), spec(63, 64, dtype=BF16), True),
    ],
)
def test_alignment_is_a_multiple_of_16_bytes_of_every_leading_stride(left, right, aligned):
    out = spec(left.shape[0], right.shape[1], dtype=left.dtype)
    (inner,) = price(call("aten.mm.default", left, right, out=out)).contractions
    assert inner.aligned is aligned


def test_convolution_against_the_counter_of_torch():
    x, w = torch.randn(2, 6, 10, 10), torch.randn(8, 3, 3, 3)
    c = last_cost(
        lambda x, w: aten.convolution(x, w, None, [2, 2], [1, 1], [1, 1], False, [0, 0], 2), x, w
    )
    assert c.flops == 2 * (2 * 5 * 5) * 8 * 3 * 9
    assert c.bytes == 4 * (1200 + 216 + 2 * 8 * 25)


def test_transposed_convolution_counts_its_input_points():
    x, w = torch.randn(1, 4, 5, 5), torch.randn(4, 6, 2, 2)
    c = last_cost(
        lambda x, w: aten.convolution(x, w, None, [2, 2], [0, 0], [1, 1], True, [0, 0], 1), x, w
    )
    assert c.flops == 2 * 25 * 4 * 6 * 4


def test_convolution_backward_is_two_convolutions_or_one():
    g, x, w = torch.randn(2, 8, 5, 5), torch.randn(2, 6, 5, 5), torch.randn(8, 6, 3, 3)

    def backward(mask):
        return lambda g, x, w: aten.convolution_backward(
            g, x, w, [8], [1, 1], [1, 1], [1, 1], False, [0, 0], 1, mask
        )[1]

    one = 2 * 50 * 8 * 6 * 9
    assert last_cost(backward([True, True, True]), g, x, w).flops == 2 * one
    assert last_cost(backward([False, True, True]), g, x, w).flops == one


def attention_call(causal, suffix="", **kwargs):
    q, kv = spec(2, 8, 100, 64, dtype=BF16), spec(2, 2, 150, 64, dtype=BF16)
    return call(
        "aten.scaled_dot_product_attention.default", q, kv, kv, None, 0.0, causal, out=q, **kwargs
    )


def test_attention_counts_two_products_and_no_scores_in_memory():
    full = price(attention_call(False))
    assert full.flops == 4 * 16 * 100 * 150 * 64
    assert full.written_bytes == 2 * 16 * 100 * 64
    assert price(attention_call(True)).flops == full.flops // 2


def test_flash_backward_is_five_products():
    x, lse = spec(2, 4, 32, 16, dtype=BF16), spec(2, 4, 32)
    c = price(
        call(
            "aten._scaled_dot_product_flash_attention_for_cpu_backward.default",
            x,
            x,
            x,
            x,
            x,
            lse,
            0.0,
            False,
            out=(x, x, x),
        )
    )
    assert c.flops == 5 * 2 * 8 * 32 * 32 * 16


def test_our_attention_is_priced_like_the_operator_it_stands_for():
    pytest.importorskip("iocompiler.ops.attention")  # loads the operator, and with it its schema
    x = spec(2, 4, 32, 16, dtype=BF16)
    args = (x, x, x, None, 0.25, True, 0.0, "cudnn", "hhhh")
    c = price(
        call("iocompiler.attention_forward.default", *args, out=(x, spec(2, 4, 32), None, None))
    )
    assert c.flops == 4 * 8 * 32 * 32 * 16 // 2


# --- indexing


def test_embedding_reads_the_rows_it_takes_but_never_more_than_the_table():
    few = price(call("aten.embedding.default", spec(1000, 16), spec(4, dtype=I64), out=spec(4, 16)))
    assert (few.read_bytes, few.written_bytes) == (32 + 256, 256)
    many = price(
        call("aten.embedding.default", spec(10, 16), spec(400, dtype=I64), out=spec(400, 16))
    )
    assert many.read_bytes == 3200 + 640


def test_gather_and_index():
    gather = price(
        call("aten.gather.default", spec(8, 100), 1, spec(8, 1, dtype=I64), out=spec(8, 1))
    )
    assert gather.bytes == 64 + 32 + 32
    index = call(
        "aten.index.Tensor", spec(100, 8), (Operand("i", spec(5, dtype=I64)),), out=spec(5, 8)
    )
    assert price(index).bytes == 40 + 160 + 160


def test_scatter_moves_its_result_in_place_only_what_it_puts():
    out_of_place = call(
        "aten.scatter.src", spec(8, 100), 1, spec(8, 1, dtype=I64), spec(8, 1), out=spec(8, 100)
    )
    in_place = call(
        "aten.scatter_.src", spec(8, 100), 1, spec(8, 1, dtype=I64), spec(8, 1), out=spec(8, 100)
    )
    adding = call(
        "aten.scatter_add_.default",
        spec(8, 100),
        1,
        spec(8, 1, dtype=I64),
        spec(8, 1),
        out=spec(8, 100),
    )
    assert price(out_of_place).bytes == 3200 + 64 + 32 + 3200
    assert price(in_place).bytes == 64 + 32 + 32
    assert price(adding).bytes == 64 + 32 + 32 + 32


def test_a_slice_put_into_a_copy_moves_the_result_once_each_way():
    c = price(call("aten.slice_scatter.default", spec(10, 8), spec(3, 8), 0, 2, 5, out=spec(10, 8)))
    assert (c.read_bytes, c.written_bytes) == (320, 320)


def test_cat_sort_cumsum():
    cat = call(
        "aten.cat.default", (Operand("x", spec(3, 4)), Operand("y", spec(5, 4))), out=spec(8, 4)
    )
    assert price(cat) == Cost(128, 128)
    assert price(call("aten.cumsum.default", spec(10), 0, out=spec(10))).bytes == 80
    ordered = price(
        call("aten.sort.default", spec(10), 0, False, out=(spec(10), spec(10, dtype=I64)))
    )
    assert ordered.bytes == 4 * 40 + 3 * 80 + 4 * 120


# --- in place, lists, the unknown


def test_copy_reads_only_its_source():
    c = price(call("aten.copy_.default", spec(4, 4), spec(4, 4, dtype=BF16)))
    assert (c.read_bytes, c.written_bytes) == (32, 64)


def test_foreach_in_place_writes_what_it_changes():
    left = (Operand("x", spec(4)), Operand("y", spec(6)))
    right = (Operand("u", spec(4)), Operand("v", spec(6)))
    c = price(call("aten._foreach_add_.List", left, right))
    assert (c.read_bytes, c.written_bytes, c.flops) == (80, 40, 10)


def test_an_unknown_operator_moves_everything_once():
    assert not has_rule("aten._linalg_det.default")
    c = price(call("aten._linalg_det.default", spec(5, 5), out=(spec(5), spec(5, 5))))
    assert c.bytes == 100 + 20 + 100
    assert price(call("nobody.knows.default", spec(8), out=spec(8))).bytes == 64


def test_costs_add():
    one = price(call("aten.mm.default", spec(2, 3), spec(3, 4), out=spec(2, 4)))
    both = one + one
    assert both.flops == 2 * one.flops
    assert both.bytes == 2 * one.bytes
    assert len(both.contractions) == 2
    assert both.vector_flops == 0


# --- symbolic, and the two adapters


def symbolic(function, *inputs):
    mode = FakeTensorMode(shape_env=ShapeEnv())
    fakes = [mode.from_tensor(x, static_shapes=False) for x in inputs]
    return make_fx(function)(*fakes)


def test_symbolic_sizes_give_expressions_that_match_every_static_size():
    gm = symbolic(lambda x, w: aten.mm(x, w), torch.randn(6, 5), torch.randn(5, 7))
    (node,) = (n for n in gm.graph.nodes if n.target is aten.mm.default)
    c = cost(node)
    s0, s1, s2 = (
        str(node.args[0].meta["val"].shape[0]),
        str(node.args[0].meta["val"].shape[1]),
        str(node.args[1].meta["val"].shape[1]),
    )
    for m, k, n in ((6, 5, 7), (100, 64, 3)):
        hints = {s0: m, s1: k, s2: n}
        assert value_of(c.flops, hints) == 2 * m * k * n
        assert value_of(c.bytes, hints) == 4 * (m * k + k * n + m * n)


def test_a_step_and_a_node_are_priced_alike():
    gm = make_fx(lambda x, w: aten.mm(x, w), tracing_mode="fake")(
        torch.randn(6, 5), torch.randn(5, 7)
    )
    (node,) = (n for n in gm.graph.nodes if n.op == "call_function")
    specs = {"x": spec(6, 5), "w": spec(5, 7)}
    step = AtenStep("aten.mm.default", (Ref("x"), Ref("w")), (), (("mm", spec(6, 7)),), False)
    assert price(call_of_step(step, specs)) == price(call_of_node(node))


def test_arguments_are_found_by_their_schema_name():
    c = attention_call(True)
    assert c.argument("is_causal") is True
    assert attention_call(False, scale=0.5).argument("scale") == 0.5
    assert c.argument("enable_gqa") is False
    assert c.argument("no_such", "default") == "default"


@pytest.mark.parametrize("products", [1, 2, 3])
def test_a_head_with_its_loss_counts_its_products(products):
    pytest.importorskip("iocompiler.ops.linear_cross_entropy")
    x, weight, target = spec(64, 32), spec(100, 32), spec(64)
    setting = (-100, 0.0, 1.0, 1.0, False, False)
    if products == 1:
        name, args = "losses", (x, weight, None, target, None, None, *setting)
    else:
        masks = (True, products == 3, False)
        name, args = "gradients", (x, weight, None, target, None, None, *setting, *masks)
    c = price(call(f"iocompiler.linear_cross_entropy_{name}.default", *args, out=spec(64)))
    assert len(c.contractions) == products
    assert sum(each.flops for each in c.contractions) == products * 2 * 64 * 32 * 100


@pytest.mark.parametrize("given", [False, True])
def test_a_divergence_counts_the_products_of_both_heads(given):
    pytest.importorskip("iocompiler.ops.linear_divergence")
    x, weight, rows = spec(64, 32), spec(100, 32), spec(64)
    other = (spec(64, 100), None, None) if given else (spec(64, 16), spec(100, 16), None)
    setting = (-100, 0.0, 1.0, 1.0, False, 0.5, "logits", 0.5, 1.0, False, True, False, 0.0)
    args = (x, weight, None, *other, None, None, None, rows, *setting)
    one, two = 2 * 64 * 32 * 100, 0 if given else 2 * 64 * 16 * 100
    c = price(call("iocompiler.linear_divergence_losses.default", *args, out=spec(64)))
    assert sum(each.flops for each in c.contractions) == one + two
    assert c.read_bytes >= 64 * 100 * 4 * (1 if given else 2)
    masks = (True, True, False, not given, False, False)
    c = price(call("iocompiler.linear_divergence_gradients.default", *args, *masks, out=spec(64)))
    assert sum(each.flops for each in c.contractions) == 3 * one + 2 * two


def test_an_odd_product_is_staged_where_its_rows_leave_unaligned():
    pytest.importorskip("iocompiler.ops.aligned_mm")
    a, b = spec(64, 32, dtype=torch.bfloat16), spec(32, 37, dtype=torch.bfloat16, stride=(1, 32))
    padded = spec(64, 37, dtype=torch.bfloat16, stride=(64, 1))
    exact = spec(64, 37, dtype=torch.bfloat16)
    name = "iocompiler.aligned_mm.default"
    assert price(call(name, a, b, None, 64, out=padded)).staged_bytes == 0
    c = price(call(name, a, b, None, 37, out=exact))
    assert c.staged_bytes == 64 * 37 * 2
    assert c.contractions[0].aligned
    assert c.bytes == price(call("aten.mm.default", a, b, out=exact)).bytes
