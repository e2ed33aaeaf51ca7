"""Names of networks with arguments are one text, read back as they were."""

import pytest

from kdfast.errors import UsageError
from kdfast.nets.sources.spec import add_arguments, parse_arguments, parse_spec


@pytest.mark.parametrize(
    ("text", "kind", "place", "member"),
    [
        ("resnet8", "name", "", "resnet8"),
        ("torchvision:vit_b_16", "torchvision", "torchvision", "vit_b_16"),
        ("timm:resnet18.a1_in1k", "timm", "timm", "resnet18.a1_in1k"),
        ("hf:/data/vit (1)", "hf", "hf", "/data/vit (1)"),
        ("a b/models.py:Net", "file", "a b/models.py", "Net"),
        ("C:\\nets\\models.py:Net", "file", "C:\\nets\\models.py", "Net"),
        ("package.module:make", "module", "package.module", "make"),
    ],
)
def test_where_a_network_comes_from(text, kind, place, member):
    spec = parse_spec(text)
    assert (spec.kind, spec.place, spec.member, dict(spec.arguments)) == (kind, place, member, {})
    assert str(spec) == text
    again = parse_spec(add_arguments(text, {"b": [1, 2.5], "a": "x=1)"}))
    assert (again.kind, again.place, again.member) == (kind, place, member)
    assert again.arguments == {"a": "x=1)", "b": [1, 2.5]}
    assert str(again) == f"{text}(a='x=1)', b=[1, 2.5])"


def test_values_are_numbers_words_or_text():
    words = [
        "a=1",
        "b=-2.5e3",
        "c=true",
        "d=False",
        "e=none",
        "f=[1, 'x']",
        "g=relu",
        "h=x=y",
        "i=1_000",
        "j=__import__",
    ]
    expected = [1, -2500.0, True, False, None, [1, "x"], "relu", "x=y", 1000, "__import__"]
    assert list(parse_arguments(words).values()) == expected


@pytest.mark.parametrize("words", [["a"], ["=1"], ["a b=1"], ["a=1", "a=2"]])
def test_words_that_are_no_arguments(words):
    with pytest.raises(UsageError, match="net_arg"):
        parse_arguments(words)


def test_an_argument_is_given_once():
    with pytest.raises(UsageError, match="given twice"):
        add_arguments("models.py:Net(a=1)", {"a": 2})
    with pytest.raises(UsageError, match="pass a name of Python"):
        add_arguments("models.py:Net", {"a": object()})


@pytest.mark.parametrize("text", ["models.py:", ":Net", "keras/x:y z", "a-b:c", "models.py:Net.inner"])
def test_text_that_names_nothing_lists_the_forms(text):
    with pytest.raises(UsageError, match=r"timm:NAME, hf:FOLDER, FILE.py:NAME"):
        parse_spec(text)
