import pytest

from kdfast.errors import UsageError
from kdfast.sweep.spec import MethodSpec, parse_methods


@pytest.mark.parametrize(
    ("text", "specs"),
    [
        ("random", [MethodSpec("random")]),
        (" random , el2n,", [MethodSpec("random"), MethodSpec("el2n")]),
        ("el2n/easy", [MethodSpec("el2n", rule="easy")]),
        ("beta:a=2,b=.5,el2n", [MethodSpec("beta", (("a", 2), ("b", 0.5))), MethodSpec("el2n")]),
        ("el2n/beta:b=3,a=1", [MethodSpec("el2n", rule="beta", rule_options=(("a", 1), ("b", 3)))]),
        (
            "influence:kind=self,l2=.1/beta:a=2,b=3,random",
            [
                MethodSpec("influence", (("kind", "self"), ("l2", 0.1)), "beta", (("a", 2), ("b", 3))),
                MethodSpec("random"),
            ],
        ),
    ],
)
def test_parses_methods(text: str, specs: list[MethodSpec]) -> None:
    assert list(parse_methods(text)) == specs


def test_equal_specs_have_equal_spellings() -> None:
    (first,), (second,) = parse_methods("el2n/beta:b=3,a=1.0"), parse_methods("el2n/beta:a=1.0, b=3")
    assert str(first) == str(second) == "el2n/beta:a=1.0,b=3"
    assert parse_methods(str(first)) == (first,)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ("random,el2n,random", "random twice"),
        ("beta:a", "'a' in 'beta:a'"),
        ("beta:a=1,a=2", "'a=2'"),
        ("beta:", "in 'beta:'"),
        ("/hard", "contains '/hard'"),
        ("el2n/", "contains 'el2n/'"),
        ("a=1,random", "contains 'a=1'"),
    ],
)
def test_rejects_wrong_syntax(text: str, message: str) -> None:
    with pytest.raises(UsageError, match="`methods`") as caught:
        parse_methods(text)
    assert message in str(caught.value)
