"""The command line: what it prints, and its errors in one line with exit code 2."""

import pytest
import torch

from iocompiler.cli import main, parse_input
from iocompiler.errors import BadArgument, CacheWarning
from iocompiler.report.doctor import Check, exit_code
from iocompiler.versions import version_tuple

MODEL = """
import torch

class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = torch.nn.Linear(16, 32)

    def forward(self, x):
        return torch.nn.functional.gelu(self.inner(x))

def needs_an_argument(x):
    return x.relu()

broken = 3
"""


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("IOCOMPILER_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def model(tmp_path):
    path = tmp_path / "cli_model.py"
    path.write_text(MODEL)
    return path


def failed(capsys, *arguments):
    """The one line on stderr of a command that must fail."""
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("iocompiler: ")
    assert error.count("\n") == 1
    return error


def test_devices_are_listed_with_their_sources(capsys):
    assert main(["devices"]) == 0
    text = capsys.readouterr().out
    for name in ("h200", "h100", "a100", "l40s", "rtx4090", "b200", "cpu"):
        assert name in text
    assert "datasheet" in text


def test_cache_info_and_clear(capsys, cache):
    assert main(["cache", "info"]) == 0
    assert f"{cache}: empty" in capsys.readouterr().out
    assert main(["cache", "clear"]) == 0
    assert "0 entries removed" in capsys.readouterr().out


@pytest.mark.parametrize("action", ["info", "clear"])
def test_a_cache_that_cannot_be_used(action, capsys, tmp_path, monkeypatch):
    file = tmp_path / "file"
    file.touch()
    monkeypatch.setenv("IOCOMPILER_CACHE_DIR", str(file / "cache"))
    with pytest.warns(CacheWarning):
        assert main(["cache", action]) == 2
    assert "the cache folder cannot be used" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "shape", "dtype"),
    [
        ("8x512:int64", (8, 512), torch.int64),
        ("4", (4,), torch.float32),
        (":bfloat16", (), torch.bfloat16),
        ("0x3:bool", (0, 3), torch.bool),
    ],
)
def test_inputs(text, shape, dtype):
    found = parse_input(text)
    assert (tuple(found.shape), found.dtype) == (shape, dtype)


@pytest.mark.parametrize("text", ["8x:int64", "8,5", "8x5:int65", "x", "-3"])
def test_bad_inputs(text):
    with pytest.raises(BadArgument):
        parse_input(text)


def test_errors_are_one_line(capsys, model):
    assert "model.py:Name" in failed(capsys, "explain", "nothing")
    assert "there is no file" in failed(capsys, "explain", "absent.py:Model")
    assert "has no Absent" in failed(capsys, "explain", f"{model}:Absent")
    assert "cannot be called" in failed(capsys, "explain", f"{model}:broken", "--input", "4")
    assert "needs inputs" in failed(capsys, "explain", f"{model}:Model")
    assert "no dtype" in failed(capsys, "explain", f"{model}:Model", "--input", "4:int65")
    unknown = failed(capsys, "explain", f"{model}:Model", "--input", "4x16", "--device", "h20")
    assert "did you mean" in unknown


def test_wrong_usage_exits_with_2(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["cache"])
    assert stop.value.code == 2


def test_explain_prints_and_saves(capsys, model, tmp_path, cache):
    saved = tmp_path / "report.json"
    arguments = [
        "explain",
        f"{model}:Model",
        "--input",
        "4x16",
        "--no-compile",
        "--save",
        str(saved),
    ]
    assert main(arguments) == 0
    text = capsys.readouterr().out
    assert "iocompiler on h200" in text
    assert "cli_model.py:" in text
    assert saved.exists()


def test_doctor_looks_at_everything_and_fails_only_for_what_is_needed(capsys, cache):
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    for name in ("Python", "torch", "triton", "GPU", "kernel compiler", "C++ compiler", "cache"):
        assert name in text
    assert exit_code((Check("a", "missing", ""),)) == 0
    assert exit_code((Check("a", "broken", "", needed=True),)) == 1


def test_versions_are_compared_as_numbers():
    assert version_tuple("2.13.0+cpu") == (2, 13, 0)
    assert version_tuple("2.9") < (2, 11) <= version_tuple("2.11.0a0")
