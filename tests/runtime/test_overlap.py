"""Kernels that are placed before the one before them is done: they wait for it."""

from __future__ import annotations

import ctypes

import pytest
import torch

from iocompiler.runtime.compile import Job, compile_kernels
from iocompiler.runtime.launch import Image, Launch, Signature, make_launch
from iocompiler.runtime.overlap import waiting
from tests.runtime.test_launch import launcher, stream

PTX = """\
.version 8.7
.target sm_90a

.func  (.param .b32 out) helper()
{
// %bb.0:
	ret;
}
.visible .entry k(
	.param .u64 .ptr .global .align 1 k_param_0
)
.reqntid 128
{
	.reg .b64 	%rd<2>;
$L__func_begin0:
// %bb.0:                               // %entry
	ld.param.b64 	%rd1, [k_param_0];
	ret;
}
"""

SOURCE = """\
import triton
import triton.language as tl


@triton.jit
def turned(x, out, n):
    i = tl.program_id(0).to(tl.int64) * 1024 + tl.arange(0, 1024)
    tl.store(out + i, tl.load(x + (n - 1 - i), mask=i < n) + 1.0, mask=i < n)
"""
TURNED = "x:*fp32:16 out:*fp32:16 n:i32"


def test_the_wait_is_the_kernel_s_first_instruction() -> None:
    found = waiting(PTX)
    assert found is not None
    lines, before = found.splitlines(), PTX.splitlines()
    first = before.index("// %bb.0:                               // %entry") + 1
    assert lines[:first] == before[:first]
    assert [line.strip() for line in lines[first : first + 2]] == [
        "griddepcontrol.wait;",
        "griddepcontrol.launch_dependents;",
    ]
    assert lines[first + 2 :] == before[first:]


def test_a_beginning_that_is_not_found() -> None:
    assert waiting(PTX.replace("// %bb.0:   ", "// %entry")) is None
    assert waiting("") is None


def job(capability: int) -> Job:
    parsed = Signature.parse(TURNED)
    return Job(SOURCE, "turned", parsed.types, parsed.divisible(True, False), 4, 2, capability)


@pytest.mark.parametrize(("capability", "waits"), [(80, False), (90, True), (100, True)])
def test_who_waits(capability: int, waits: bool) -> None:
    compiled = compile_kernels([(job(capability), "k.py")])[0]
    assert compiled.metadata["waits"] is waits


def test_only_who_waits_is_launched_early() -> None:
    for waits in (True, False):
        launch, library = launcher("x:*fp32", waits=waits)
        launch(0, 1, 1, 1, 16)
        ((*_, address, count), _) = library.launches[0]
        assert count == waits
        assert bool(address) == waits
    launch, library = launcher("x:*fp32", waits=True)
    launch(0, 1, 1, 1, 16)
    attribute = library.launches[0][0][8]
    assert ctypes.c_uint32.from_address(attribute).value == 6  # programmatic serialization
    assert ctypes.c_int32.from_address(attribute + 8).value == 1


def on_gpu() -> Launch:
    from iocompiler.runtime.driver import driver

    major, minor = torch.cuda.get_device_capability()
    compiled = compile_kernels([(job(10 * major + minor), "k.py")])[0]
    image = Image(compiled.cubin, compiled.metadata)
    return make_launch(Signature.parse(TURNED), image, driver(), torch.cuda.current_device())


@pytest.mark.gpu
@pytest.mark.parametrize("n", [1 << 10, (1 << 17) + 5, (1 << 23) + 77])
@pytest.mark.parametrize("is_graph", [False, True])
def test_a_chain_reads_what_was_written(n: int, is_graph: bool) -> None:
    """Every program reads what the program at the other end wrote, or torch did, or will write
    over."""
    launch = on_gpu()
    buffers = [torch.empty(n, device="cuda") for _ in range(3)]
    given = torch.randn(n, device="cuda").round()

    def chain() -> None:
        buffers[0].copy_(given)
        for turn in range(60):
            x, out = buffers[turn % 3], buffers[(turn + 1) % 3]
            launch(stream(), -(-n // 1024), 1, 1, x.data_ptr(), out.data_ptr(), n)
            if turn % 7 == 0:
                out.mul_(-1.0)

    expected = given.clone()
    for turn in range(60):
        expected = expected.flip(0) + 1.0
        if turn % 7 == 0:
            expected = -expected
    if is_graph:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            chain()
        for each in buffers:
            each.fill_(float("nan"))
        graph.replay()
    else:
        chain()
    assert torch.equal(buffers[0], expected)
