"""What a person reads of an error."""

from __future__ import annotations

from sapo_ray.errors import SapoError, one_line, told


def test_an_error_is_told_in_one_line_which_is_cut_only_where_it_is_not_ours() -> None:
    long = "killed:\n  out of memory  " * 100
    assert told(ValueError("two\n lines")) == "ValueError: two lines"
    assert told(SapoError("two\n lines")) == "two lines"
    assert one_line(RuntimeError(long)) == " ".join(long.split())[:1000] + " …"
    assert told(SapoError(long)) == " ".join(long.split())
