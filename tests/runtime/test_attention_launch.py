"""When a compiled template is called without Triton."""

from typing import Any

import pytest
import torch

from iocompiler.runtime import attention_launch

triton = pytest.importorskip("triton")


def test_a_compiled_kernel_is_called_without_triton() -> None:
    tried = triton.__version__.startswith("3.6.")
    assert attention_launch._direct() == tried


def test_through_triton_where_somebody_listens_to_launches() -> None:
    def listen(metadata: object) -> None:
        pass

    for hook in (triton.knobs.runtime.launch_enter_hook, triton.knobs.runtime.launch_exit_hook):
        hook.add(listen)
        try:
            assert not attention_launch._direct()
        finally:
            hook.remove(listen)


def test_through_triton_in_a_version_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton, "__version__", "3.9.1")
    assert not attention_launch._direct()


class Kernel:
    do_not_specialize = ("length",)


def test_strides_of_one_kind_share_a_cubin(monkeypatch: pytest.MonkeyPatch) -> None:
    """As of a cache that grows: its strides differ at each step."""
    monkeypatch.setattr(attention_launch, "_known", {})
    kernel, device = Kernel(), torch.device("cpu")
    x = torch.zeros(16)

    def given(strides: tuple[int, ...], length: int = 7) -> dict[str, Any]:
        return {"x": x, "strides": strides, "length": length, "tiles": 64}

    def found(arguments: dict[str, Any]) -> Any:
        return attention_launch._compiled(kernel, arguments, device)

    form = attention_launch._form(kernel, given((48, 3, 1)), device, attention_launch._kinds)
    attention_launch._keep(form, "cubin")
    for _ in range(2):  # by kinds, then as it is
        assert found(given((96, 5, 1), length=9)) == "cubin"
    assert found(given((96, 5, 2))) is None
    assert found(given((97, 5, 1))) is None
    assert found(given((48, 3, 1), length=2**40)) is None
    assert found({**given((48, 3, 1)), "tiles": 32}) is None
    assert found({**given((48, 3, 1)), "x": x[1:]}) is None
