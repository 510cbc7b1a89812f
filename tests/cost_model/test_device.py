"""The device table: plausible dense rows, found by name and by what the driver says."""

from types import SimpleNamespace

import pytest
import torch

from iocompiler.cost_model.device import DEVICES, current_device, device, row_for
from iocompiler.errors import UnknownDevice


@pytest.mark.parametrize("row", DEVICES.values(), ids=DEVICES)
def test_rows_are_complete_and_of_the_right_size(row):
    assert row.source
    assert 50e9 <= row.hbm_bytes_per_s <= 10e12
    assert row.memory_rate <= row.hbm_bytes_per_s < row.l2_bytes_per_s
    assert row.matmul_flops[torch.bfloat16] >= row.vector_flops
    assert 1e-7 < row.launch_s < 1e-4
    # less than what one multiplier a clock could not do: no row counts sparsity
    assert row.matmul_flops[torch.bfloat16] <= 2.3e15


@pytest.mark.parametrize("name", [n for n in DEVICES if n != "cpu"])
def test_rates_halve_as_operands_double(name):
    row = DEVICES[name]
    half = row.matmul_flops[torch.bfloat16]
    assert row.matmul_flops[torch.float16] == half
    assert row.tf32_flops == pytest.approx(half / 2, rel=0.05)
    if torch.float8_e4m3fn in row.matmul_flops:
        assert row.matmul_flops[torch.float8_e4m3fn] == pytest.approx(2 * half, rel=0.05)


def test_tf32_is_taken_only_where_asked_and_only_for_float32():
    row = DEVICES["a100"]
    assert row.matmul_rate(torch.float32) < row.matmul_rate(torch.float32, tf32=True)
    assert row.matmul_rate(torch.bfloat16, tf32=True) == row.matmul_rate(torch.bfloat16)


def test_peaks_of_datasheets_are_derated_and_measured_rates_are_not():
    assert DEVICES["h200"].matmul_rate(torch.bfloat16) == 790e12
    assert DEVICES["h200"].memory_rate == 4.3e12
    assert 0.75 < DEVICES["h100"].matmul_rate(torch.bfloat16) / 989.5e12 < 0.85


def test_names_are_forgiving_and_unknown_ones_list_what_exists():
    assert device("H200") is DEVICES["h200"]
    assert device("RTX 4090") is DEVICES["rtx4090"]
    with pytest.raises(UnknownDevice, match=r"h100.*cpu") as error:
        device("h20")
    assert "did you mean" in str(error.value)


def test_the_cpu_is_known_without_a_gpu():
    assert current_device(torch.device("cpu")) is DEVICES["cpu"]
    with pytest.raises(UnknownDevice):
        current_device(torch.device("meta"))


def properties(name, major, minor, sms, memory=80 * 10**9, **more):
    return SimpleNamespace(
        name=name, major=major, minor=minor, multi_processor_count=sms, total_memory=memory, **more
    )


@pytest.mark.parametrize(
    ("name", "capability", "sms", "row"),
    [
        ("NVIDIA H200", (9, 0), 132, "h200"),
        ("NVIDIA H100 80GB HBM3", (9, 0), 132, "h100"),
        ("NVIDIA A100-SXM4-80GB", (8, 0), 108, "a100"),
        ("NVIDIA L40S", (8, 9), 142, "l40s"),
        ("NVIDIA GeForce RTX 4090", (8, 9), 128, "rtx4090"),
        ("NVIDIA B200", (10, 0), 148, "b200"),
    ],
)
def test_driver_names_find_their_row(name, capability, sms, row):
    assert row_for(properties(name, *capability, sms)) is DEVICES[row]


def test_a_part_of_a_gpu_is_scaled_by_its_sms():
    part = row_for(
        properties(
            "NVIDIA H200 MIG 1g.18gb", 9, 0, 16, memory_clock_rate=3201000, memory_bus_width=6144
        )
    )
    assert part.sm_count == 16
    assert part.hbm_bytes_per_s == pytest.approx(4.3e12 * 16 / 132)
    assert part.matmul_rate(torch.bfloat16) == pytest.approx(790e12 * 16 / 132)


@pytest.mark.parametrize(
    ("name", "capability", "sms", "known"),
    [
        ("NVIDIA H100 80GB HBM3", (9, 0), 132, True),
        ("NVIDIA H200 MIG 1g.18gb", (9, 0), 16, True),
        ("NVIDIA H100 PCIe", (9, 0), 114, True),
        ("NVIDIA of another generation", (9, 1), 132, False),
        ("NVIDIA A100-SXM4-80GB", (8, 0), 108, False),
        ("NVIDIA B200", (10, 0), 148, False),
    ],
)
def test_the_templates_share_is_that_of_equal_sms(name, capability, sms, known):
    found = row_for(properties(name, *capability, sms))
    assert found.matmul_template == (DEVICES["h100"].matmul_template if known else None)
    assert found.gelu_beside_product == (DEVICES["h100"].gelu_beside_product if known else None)


def test_an_unknown_gpu_takes_the_nearest_generation_and_the_drivers_bandwidth():
    found = row_for(
        properties(
            "NVIDIA A100-PCIE-40GB", 8, 0, 108, memory_clock_rate=1215000, memory_bus_width=5120
        )
    )
    assert found.hbm_bytes_per_s == pytest.approx(1.555e12, rel=0.01)
    assert found.capability == (8, 0)
    assert "a100" in found.source
    assert row_for(properties("NVIDIA GH200 480GB", 9, 0, 132)).name != "h200"
