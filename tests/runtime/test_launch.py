"""The launcher: on the CPU against a driver that records what it is given, on the GPU for what only
a GPU shows.
"""

from __future__ import annotations

import gc
import sys
import threading
from typing import Any

import pytest
import torch

from iocompiler.errors import LaunchError
from iocompiler.runtime.compile import Job, compile_kernels
from iocompiler.runtime.driver import INVALID_CONTEXT, Driver
from iocompiler.runtime.launch import Image, Signature, loaded, make_launch
from tests.runtime.cuda import METADATA, FakeLibrary


def launcher(signature: str, **metadata: Any) -> tuple[Any, FakeLibrary]:
    parsed = Signature.parse(signature)
    library = FakeLibrary("".join(p.format for p in parsed.parameters))
    image = Image(b"cubin", {**METADATA, **metadata})
    return make_launch(parsed, image, Driver(library), 0), library


def test_configuration_and_parameters() -> None:
    text = "x:*bf16:16 flag:i1 n:i32 scale:fp32 offset:i64 e:fp64"
    launch, library = launcher(text)
    launch(1 << 40, 7, 2, 3, 1 << 46, True, -5, 0.5, -(1 << 50), 0.1)
    config, values = library.launches[0]
    assert config == (7, 2, 3, 128, 1, 1, 2048, 1 << 40, 0, 0)
    assert values == [1 << 46, True, -5, 0.5, -(1 << 50), 0.1, 0, 0]
    assert str(Signature.parse(text)) == text


def test_what_is_fixed_stands_in_the_buffer() -> None:
    text = "x:*bf16 flag:u1 y:*fp32 n:i32 scale:fp32 offset:i64"
    parsed, library = Signature.parse(text), FakeLibrary("Q?Qifq")
    made = loaded(parsed, Image(b"cubin", METADATA), Driver(library), 0, ["y", "x"])
    launch, other = made([True, -5, 0.5, 1 << 40]), made([False, 6, 0.5, 3])
    launch(9, 7, 1, 1, 1 << 45, 1 << 46)
    other(9, 8, 1, 1, 16, 32)
    launch(9, 9, 1, 1, 16, 32)
    assert [config[0] for config, _ in library.launches] == [7, 8, 9]
    assert library.launches[0][1] == [1 << 46, True, 1 << 45, -5, 0.5, 1 << 40, 0, 0]
    assert library.launches[1][1] == [32, False, 16, 6, 0.5, 3, 0, 0]
    assert library.launches[2][1] == [32, True, 16, -5, 0.5, 1 << 40, 0, 0]


def test_a_tensor_that_is_no_parameter() -> None:
    parsed, image = Signature.parse("x:*bf16"), Image(b"cubin", METADATA)
    with pytest.raises(KeyError, match="y"):
        loaded(parsed, image, Driver(FakeLibrary("Q")), 0, ["x", "y"])


def test_no_parameters() -> None:
    launch, library = launcher("")
    launch(0, 1, 1, 1)
    assert library.launches == [((1, 1, 1, 128, 1, 1, 2048, 0, 0, 0), [0, 0])]


@pytest.mark.parametrize("grid", [(0, 1, 1), (1, 0, 1), (5, 5, 0)])
def test_an_empty_grid_is_no_launch(grid: tuple[int, int, int]) -> None:
    launch, library = launcher("x:*fp32")
    launch(0, *grid, 16)
    assert library.launches == []


def test_big_shared_memory_is_reserved() -> None:
    assert launcher("x:*fp32", shared=48 * 1024)[1].attributes == []
    assert launcher("x:*fp32", shared=100_000)[1].attributes == [(8, 100_000)]


def test_unaligned_pointers_and_odd_sizes_go_elsewhere() -> None:
    signature = Signature.parse("x:*fp32:16 y:*fp32 n:i32:16 m:i32")
    library = FakeLibrary("QQii")
    taken: list[tuple[str, Any]] = []
    launch = make_launch(
        signature,
        Image(b"", METADATA),
        Driver(library),
        0,
        unaligned=lambda *a: taken.append(("unaligned", a)),
        odd_sizes=lambda *a: taken.append(("odd", a)),
    )
    launch(0, 1, 1, 1, 32, 4, 64, 3)
    assert (taken, len(library.launches)) == ([], 1)
    launch(0, 1, 1, 1, 36, 4, 64, 3)
    launch(0, 1, 1, 1, 32, 4, 65, 3)
    assert taken == [("unaligned", (0, 1, 1, 1, 36, 4, 64, 3)), ("odd", (0, 1, 1, 1, 32, 4, 65, 3))]
    assert len(library.launches) == 1


def test_positions_that_are_divisible() -> None:
    signature = Signature.parse("x:*fp32:16 y:*fp32 n:i32:16 m:i32")
    assert signature.divisible(True, True) == (0, 2)
    assert signature.divisible(True, False) == (0,)
    assert signature.divisible(False, False) == ()


def test_an_error_says_what_failed() -> None:
    launch, library = launcher("x:*fp32")
    library.codes = [700]
    with pytest.raises(
        LaunchError, match=r"kernel 'k': launching failed: some error \(CUDA error 700\)"
    ):
        launch(0, 1, 1, 1, 16)
    launch(0, 1, 1, 1, 16)
    assert len(library.launches) == 1


def test_a_thread_without_a_context_gets_one() -> None:
    launch, library = launcher("x:*fp32")
    entered = library.entered
    library.codes = [INVALID_CONTEXT]
    launch(0, 1, 1, 1, 48)
    assert library.entered == entered + 1
    assert [values[0] for _, values in library.launches] == [48]


def test_a_cubin_is_loaded_once_per_device() -> None:
    library = FakeLibrary("Q")
    driver = Driver(library)
    loads: list[int] = []
    library.cuModuleLoadData = lambda module, cubin: loads.append(1) or 0  # type: ignore[method-assign,func-returns-value]
    for device in (0, 0, 1):
        driver.function(b"cubin", "k", 0, device)
    assert len(loads) == 2


def test_clusters_are_refused() -> None:
    with pytest.raises(LaunchError, match="clusters"):
        launcher("x:*fp32", num_ctas=2)


def test_threads_do_not_mix_their_parameters() -> None:
    launch, library = launcher("x:*fp32 n:i32")
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)

    def work(thread: int) -> None:
        for i in range(500):
            launch(thread, i + 1, 1, 1, 1000 * thread + i, thread)

    threads = [threading.Thread(target=work, args=(t,)) for t in range(1, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    sys.setswitchinterval(interval)
    assert len(library.launches) == 2000
    for config, (pointer, number, *_) in library.launches:
        assert (config[7], pointer) == (number, 1000 * number + config[0] - 1)


def test_launching_leaves_no_garbage() -> None:
    launch, _ = launcher("x:*fp32")
    launch(0, 1, 1, 1, 16)
    gc.collect()
    gc.disable()
    before = sys.getallocatedblocks()
    for _ in range(1000):
        launch(0, 0, 1, 1, 16)
    grown = sys.getallocatedblocks() - before
    gc.enable()
    assert grown < 100


SOURCE = """\
import triton
import triton.language as tl


@triton.jit
def affine(x, out, scale, shift, flag, n):
    i = tl.program_id(0) * 1024 + tl.arange(0, 1024)
    value = tl.load(x + i, mask=i < n) * scale + shift.to(tl.float32)
    tl.store(out + i, tl.where(flag, value, -value), mask=i < n)


@triton.jit
def product(x, out):
    i = tl.arange(0, 128)
    a = tl.load(x + i[:, None] * 128 + i[None, :])
    tl.store(out + i[:, None] * 128 + i[None, :], tl.dot(a, tl.trans(a), input_precision="ieee"))
"""


def on_gpu(name: str, signature: str, hinted: bool = True) -> tuple[Any, Image]:
    from iocompiler.runtime.driver import driver

    parsed = Signature.parse(signature)
    major, minor = torch.cuda.get_device_capability()
    divisible = parsed.divisible(hinted, hinted)
    job = Job(SOURCE, name, parsed.types, divisible, 4, 2, 10 * major + minor)
    compiled = compile_kernels([(job, "kernel.py")])[0]
    image = Image(compiled.cubin, compiled.metadata)
    return make_launch(parsed, image, driver(), torch.cuda.current_device()), image


AFFINE = "x:*fp32:16 out:*fp32:16 scale:fp32 shift:fp64 flag:i1 n:i32"


def stream() -> int:
    return torch.cuda.current_stream().cuda_stream


@pytest.mark.gpu
def test_gpu_scalars_and_zero_grid() -> None:
    launch, _ = on_gpu("affine", AFFINE)
    x, out = torch.randn(3000, device="cuda"), torch.zeros(3000, device="cuda")
    launch(stream(), 0, 1, 1, x.data_ptr(), out.data_ptr(), 2.0, 0.25, True, 3000)
    assert not out.any()
    launch(stream(), 3, 1, 1, x.data_ptr(), out.data_ptr(), 2.0, 0.25, False, 3000)
    torch.testing.assert_close(out, -(x * 2 + 0.25))


@pytest.mark.gpu
def test_gpu_unaligned() -> None:
    plain, _ = on_gpu("affine", AFFINE, hinted=False)
    _, image = on_gpu("affine", AFFINE)
    from iocompiler.runtime.driver import driver

    launch = make_launch(Signature.parse(AFFINE), image, driver(), 0, unaligned=plain)
    x, out = torch.randn(2049, device="cuda")[1:], torch.empty(2048, device="cuda")
    launch(stream(), 2, 1, 1, x.data_ptr(), out.data_ptr(), 1.0, 0.0, True, 2048)
    torch.testing.assert_close(out, x)


@pytest.mark.gpu
def test_gpu_big_shared_memory() -> None:
    launch, image = on_gpu("product", "x:*fp32:16 out:*fp32:16")
    assert image.metadata["shared"] > 48 * 1024
    x, out = torch.randn(128, 128, device="cuda"), torch.empty(128, 128, device="cuda")
    launch(stream(), 1, 1, 1, x.data_ptr(), out.data_ptr())
    torch.testing.assert_close(out.double(), x.double() @ x.double().T, rtol=1e-4, atol=1e-3)


@pytest.mark.gpu
def test_gpu_threads_and_side_streams() -> None:
    launch, _ = on_gpu("affine", AFFINE)
    x = torch.randn(4096, device="cuda")
    torch.cuda.synchronize()
    outs: dict[int, torch.Tensor] = {}

    def work(thread: int) -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            out = torch.empty(4096, device="cuda")
            for i in range(200):
                launch(
                    stream(),
                    4,
                    1,
                    1,
                    x.data_ptr(),
                    out.data_ptr(),
                    float(thread),
                    float(i),
                    True,
                    4096,
                )
            torch.cuda.current_stream().synchronize()
            outs[thread] = out

    threads = [threading.Thread(target=work, args=(t,)) for t in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for thread, out in outs.items():
        torch.testing.assert_close(out, x * thread + 199)


@pytest.mark.gpu
def test_gpu_inside_a_cuda_graph() -> None:
    launch, _ = on_gpu("affine", AFFINE)
    x, out = torch.ones(1024, device="cuda"), torch.zeros(1024, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        launch(stream(), 1, 1, 1, x.data_ptr(), out.data_ptr(), 3.0, 1.0, True, 1024)
    x.fill_(2)
    graph.replay()
    torch.testing.assert_close(out, torch.full_like(out, 7.0))


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_gpu_second_device() -> None:
    with torch.cuda.device(1):
        launch, _ = on_gpu("affine", AFFINE)
        x, out = torch.randn(1024, device="cuda"), torch.zeros(1024, device="cuda")
        launch(stream(), 1, 1, 1, x.data_ptr(), out.data_ptr(), 1.0, 0.0, True, 1024)
        torch.testing.assert_close(out, x)
