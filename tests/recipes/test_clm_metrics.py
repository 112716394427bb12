"""How answers of a language model are found and compared."""

import pytest

from hf_lsam_recipes.support.text.clm_arguments import GenerationArguments
from hf_lsam_recipes.support.text.clm_metrics import check_answers, find_answer, same_answer


@pytest.mark.parametrize(
    "text, answer",
    [
        ("so 6 * 7 = 42\n#### 42", "42"),
        ("#### 1,234.50. And so on #### 7", "1,234.50"),
        ("####-3", "-3"),
        ("#### $18", "18"),
        ("42", None),
        ("#### many", None),
    ],
)
def test_answers_are_found_by_default_as_in_gsm8k(text, answer):
    assert find_answer(GenerationArguments().answer_pattern, text) == answer


def test_answers_are_found_by_a_pattern():
    assert find_answer("(?s).*", " two\nlines ") == "two\nlines"
    assert find_answer("answer is (.+)", "the answer is yes ") == "yes"
    with pytest.raises(ValueError, match=r"data, row 2: answer_pattern .* finds no answer in the response 'yes'. Set"):
        check_answers(GenerationArguments(), "data", ["#### 1", "yes"])


@pytest.mark.parametrize(
    "left, right, same",
    [
        ("1,000", "1000", True),
        ("1000.0", "1000", True),
        ("yes", "yes", True),
        ("yes", "no", False),
        ("7", "seven", False),
        ("42", "4", False),
        ("NaN", "NaN", True),
        ("sNaN", "1", False),
    ],
)
def test_answers_are_compared_as_numbers_where_they_are(left, right, same):
    assert same_answer(left, right) is same_answer(right, left) is same


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"max_generation_samples": -1}, "max_generation_samples must be at least 0"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1"),
        ({"answer_pattern": "("}, "answer_pattern '\\(' is not a regular expression"),
    ],
)
def test_generation_settings_out_of_range(settings, message):
    with pytest.raises(ValueError, match=message):
        GenerationArguments(**settings)
