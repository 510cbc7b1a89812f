"""What a launch of a template hands to the driver, and when it asks for a cubin."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from iocompiler.codegen.kernels.attention_decode import attention_combine
from iocompiler.ops.linear_cross_entropy_rows import (
    Piece,
    Rows,
    Setting,
    launch_rows,
    reference_rows,
)
from iocompiler.runtime import template_launch
from iocompiler.runtime.driver import Driver
from iocompiler.runtime.launch import Image
from iocompiler.runtime.overlap import ATTRIBUTES
from iocompiler.runtime.template_form import Form
from iocompiler.runtime.template_images import image
from iocompiler.runtime.template_launch import Launch, members, watched
from tests.runtime.cuda import FakeLibrary

TENSORS = ("Acc", "V", "Out", "Lse", "Rest")
NUMBERS = {"heads": 5, "rows": 6, "columns": 7, "parts": 8, "lines": 9}
STRIDES = {"v_strides": (100, 101, 102, 1), "out_strides": (103, 104, 105, 106)}
OTHERS = {"GROUP": 2, "E": 32, "BLOCK_E": 64, "BLOCK_P": 16, "BLOCK_N": 64, "KEPT": 1.0,
          "EMPTY": "nan", "PLANES": 1, "num_warps": 8}  # fmt: skip
# the last of "v_strides" is 1: in the code
FORMATS = "QQQQQ" + "iii" + "iiii" + "iiiii"


def memory(offset: int = 0) -> torch.Tensor:
    made = torch.empty(64)
    start = -made.data_ptr() // 4 % 4  # from a multiple of 16 bytes on
    return made[start + offset :]


class Device:
    """A GPU's driver, and the forms that cubins were asked for."""

    def __init__(self) -> None:
        self.library = FakeLibrary(FORMATS)
        self.driver = Driver(self.library)
        self.asked: list[Form] = []

    def image(self, form: Form) -> Image:
        self.asked.append(form)
        return image(form)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Device:
    made = Device()
    monkeypatch.setattr(template_launch, "driver", lambda: made.driver)
    monkeypatch.setattr(template_launch, "image", made.image)
    monkeypatch.setattr(template_launch, "_capability", lambda device: 90)
    template_launch._loaded.cache_clear()
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: 7, raising=False)
    return made


def launched(**changed: Any) -> Launch:
    made = Launch(attention_combine, TENSORS, **{**NUMBERS, **changed}, **STRIDES, **OTHERS)
    made._device = 0
    return made


def test_all_of_a_launch_is_where_the_kernel_reads_it(gpu: Device) -> None:
    launch, tensors = launched(), [memory() for _ in TENSORS]
    launch._run(3, tensors)
    ((config, values),) = gpu.library.launches
    assert config == (3, 1, 1, 256, 1, 1, config[6], 7, *ATTRIBUTES)
    assert config[6] == image(gpu.asked[0]).metadata["shared"] > 0
    assert values[:5] == [x.data_ptr() for x in tensors]
    assert values[5:12] == [100, 101, 102, 103, 104, 105, 106]
    assert values[12:] == [5, 6, 7, 8, 9, 0, 0]


def test_later_runs_bring_the_new_memory(gpu: Device) -> None:
    launch = launched()
    first, second = ([memory() for _ in TENSORS] for _ in range(2))
    launch._run(3, first)
    launch._run(4, second)
    assert len(gpu.asked) == 1
    (_, _), (config, values) = gpu.library.launches
    assert config[0] == 4
    assert values[:5] == [x.data_ptr() for x in second]
    assert values[5:] == gpu.library.launches[0][1][5:]


def test_tensors_of_a_tuple_follow_each_other() -> None:
    x, y = memory(), memory(1)
    pointers, aligned = template_launch._pointers([x, y, x])
    assert pointers == [x.data_ptr(), y.data_ptr(), x.data_ptr()]
    assert aligned == (True, False, True)
    launch = Launch(attention_combine, ("X", *members("operands", 2)))
    assert launch.tensors == ("X", "operands.0", "operands.1")
    assert launch.named([x, y, x]) == {"X": x, "operands": (y, x)}


def test_memory_at_an_odd_place_is_another_kernel(gpu: Device) -> None:
    launch = launched()
    some = memory()
    even, odd = ([some, memory(n), some, some, some] for n in (0, 1))
    for tensors in (even, odd, even, odd):
        launch._run(1, tensors)
    assert len(gpu.asked) == 2
    assert gpu.asked[0] != gpu.asked[1]
    assert [values[1] % 16 for _, values in gpu.library.launches] == [0, 4, 0, 4]


def test_launches_of_one_form_share_what_is_loaded(
    gpu: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    loads: list[bytes] = []
    load = gpu.library.cuModuleLoadData
    monkeypatch.setattr(
        gpu.library, "cuModuleLoadData", lambda m, cubin: loads.append(cubin) or load(m, cubin)
    )
    tensors = [memory()] * len(TENSORS)
    for columns in (7, 1000):
        launch = launched(columns=columns)
        launch._run(1, tensors)
    assert (len(gpu.asked), len(loads)) == (1, 1)
    assert [values[14] for _, values in gpu.library.launches] == [7, 1000]


def test_no_programs_are_no_launch(gpu: Device) -> None:
    launched().run(0, *[memory()] * len(TENSORS))
    assert not gpu.asked


def test_a_device_is_entered_where_it_is_not_current(
    gpu: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    entered: list[int] = []
    monkeypatch.setattr(Launch, "_elsewhere", lambda launch, programs, _: entered.append(programs))
    launch, tensors = launched(), [memory()] * len(TENSORS)
    for current in (0, 1):
        monkeypatch.setattr(template_launch, "_current_device", lambda found=current: found)
        launch.run(3 + current, *tensors)
    assert [config[0] for config, _ in gpu.library.launches] == [3]
    assert entered == [4]


def test_what_is_watched_does_not_run(gpu: Device) -> None:
    seen: list[tuple[Launch, Any]] = []
    launch, tensors = launched(), dict.fromkeys(TENSORS, memory())
    with watched(lambda *each: seen.append(each)):
        launch.run(3, *tensors.values())
        launch.run(0, *tensors.values())
    assert seen == [(launch, tensors)]
    assert not gpu.library.launches


@pytest.mark.gpu
@pytest.mark.parametrize("vocabulary", [1000, 1024])
@pytest.mark.parametrize("recorded", [False, True])
def test_a_template_on_the_gpu(vocabulary: int, recorded: bool) -> None:
    logits = torch.randn(5, 1024, device="cuda")[:, :vocabulary]
    target = torch.arange(5, device="cuda")
    found, expected = (torch.empty(5, device="cuda") for _ in range(2))
    reference_rows(Piece(logits, target, expected), Rows(), Setting())
    launch_rows(Piece(logits, target, found), Rows(), Setting())
    if recorded:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            launch_rows(Piece(logits, target, found), Rows(), Setting())
        found.zero_()
        graph.replay()
    torch.testing.assert_close(found, expected)


@pytest.mark.gpu
def test_on_a_device_that_is_not_current() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    logits = torch.randn(5, 1024, device="cuda:1")
    target = torch.arange(5, device="cuda:1")
    found, expected = (torch.empty(5, device="cuda:1") for _ in range(2))
    reference_rows(Piece(logits, target, expected), Rows(), Setting())
    launch_rows(Piece(logits, target, found), Rows(), Setting())
    torch.testing.assert_close(found, expected)
