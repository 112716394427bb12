"""Scalars of a YAML of settings stay text, and what is no YAML is one line of an error."""

import pytest

from hf_lsam_recipes.support.yaml_text import read_yaml_text


def test_scalars_stay_text(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("a: no\nb: null\nc: 5e-2\nd: [1, 'x', ~]\ne:\nf: !!int 3\ng: {h: 0x1F, i: 2026-01-01}\n")
    assert read_yaml_text(path) == {
        "a": "no",
        "b": "null",
        "c": "5e-2",
        "d": ["1", "x", "~"],
        "e": "",
        "f": "3",
        "g": {"h": "0x1F", "i": "2026-01-01"},
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: 2\na: 3\n", "line 3 sets a a second time. Remove one of the two"),
        ("a:\n  - {b c: 1, b c: 2}\n", "line 2 sets b c a second time. Remove one of the two"),
        ("a: [1\n", "line 2: expected ',' or ']'"),
        ("a: 1\n---\nb: 2\n", "line 2: but found another document"),
        ("a: \x07\n", "special characters are not allowed"),
    ],
)
def test_what_is_no_yaml_is_one_line(tmp_path, text, message):
    path = tmp_path / "a.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message.replace("[", r"\[")) as error:
        read_yaml_text(path)
    assert "\n" not in str(error.value)


def test_other_encodings_are_a_value_error(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_bytes("a: é\n".encode("latin-1"))
    with pytest.raises(UnicodeDecodeError):
        read_yaml_text(path)
