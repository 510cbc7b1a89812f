"""When a compiled template is called without Triton."""

import pytest

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
