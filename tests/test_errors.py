from __future__ import annotations

from iocompiler.errors import BadReplacement, UnknownPass, close_match


def test_the_users_line_ends_the_message() -> None:
    error = BadReplacement(name="p", new="f32[2]", old="f32[3]", where="model.py:88")
    assert str(error).endswith("where f32[3] stood (at model.py:88)")
    assert error.where == "model.py:88"


def test_no_line_no_parentheses() -> None:
    error = UnknownPass(name="x", hint="", known="a, b")
    assert str(error) == "no pass named 'x'; the passes are a, b"


def test_close_match() -> None:
    assert close_match("atention", ["attention", "norm"]) == " (did you mean 'attention'?)"
    assert close_match("q", ["attention", "norm"]) == ""
