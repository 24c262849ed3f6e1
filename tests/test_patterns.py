from __future__ import annotations

import pytest

from functional_loop.core.patterns import check_patterns, matches, select

NAMES = ["b.weight", "bn.weight", "bn.bias", "head.0.weight"]


@pytest.mark.parametrize(
    ("patterns", "selected"),
    [
        ("b.*", ["b.weight"]),
        ("*.weight", ["b.weight", "bn.weight", "head.0.weight"]),
        ("BN.*", None),
        ("b?.weight", ["bn.weight"]),
        (["head.*", "bn.bias"], ["bn.bias", "head.0.weight"]),
        (lambda name: name.count(".") == 2, ["head.0.weight"]),
        (["*.bias", lambda name: name.startswith("b.")], ["b.weight", "bn.bias"]),
    ],
)
def test_globs_are_of_the_whole_name_and_the_order_is_that_of_the_names(patterns, selected):
    assert [name for name in NAMES if matches(patterns, name)] == (selected or [])
    if selected is not None:
        assert select(patterns, NAMES) == selected


def test_every_pattern_must_match_something():
    with pytest.raises(ValueError, match=r"'bn\.wieght' matches no parameter; did you mean 'bn\.weight'\?"):
        select(["b.*", "bn.wieght"], NAMES)

    def is_scale(name: str) -> bool:
        return "scale" in name

    with pytest.raises(ValueError, match="is_scale matches no parameter"):
        select(is_scale, NAMES)


@pytest.mark.parametrize("wrong", [3, None, [], ["*.bias", 3], iter(["*.bias"]), {"*.bias"}])
def test_what_is_no_pattern_is_a_type_error(wrong):
    with pytest.raises(TypeError, match="params must be a pattern"):
        check_patterns(wrong, "params")
