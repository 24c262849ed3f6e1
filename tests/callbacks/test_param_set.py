"""Parameters from signatures, and values that are checked by them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Optional, Protocol, TypeVar

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from functional_loop.callbacks.objects.callback_set import CallbackSet
from functional_loop.callbacks.registry.param_set import REQUIRED, Param, ParamSet, Values, fits, params_of

if TYPE_CHECKING:
    from somewhere import Something  # type: ignore[import-not-found]


class CallbackSetExample(CallbackSet):
    def __init__(self, path: str | Path, every: int = 1, *, keep: int | None = None) -> None: ...


def example(patience: int, min_delta: float = 0.0, *, id: str = "example") -> None: ...


def test_a_class_has_the_parameters_of_its_init() -> None:
    assert params_of(CallbackSetExample) == ParamSet(
        [Param("path", str | Path), Param("every", int, 1), Param("keep", int | None, None)]
    )
    assert params_of(CallbackSet) == ParamSet()


def test_a_subclass_inherits_them() -> None:
    class CallbackSetMore(CallbackSetExample):
        pass

    assert params_of(CallbackSetMore) == params_of(CallbackSetExample)


def test_a_function_has_those_of_its_signature_but_for_the_id() -> None:
    params = params_of(example)
    assert list(params) == ["patience", "min_delta"]
    assert params["patience"].required
    assert params["patience"].default is REQUIRED
    assert (params["min_delta"].default, params["min_delta"].required) == (0.0, False)
    assert repr(params) == "ParamSet(patience: int, min_delta: float = 0.0)"


def test_other_names_are_taken_where_the_function_takes_them() -> None:
    def anything(known: int = 1, *args: Any, **hooks: Any) -> None: ...

    params = params_of(anything)
    assert (list(params), params.open) == (["known"], True)
    params.check("another", object(), "it")
    with pytest.raises(TypeError, match="known must be of type int"):
        params.check("known", "x", "it")
    assert repr(params) == "ParamSet(known: int = 1, ...)"


def test_what_has_no_annotation_or_none_that_can_be_resolved_takes_everything() -> None:
    def vague(a, b: Something, c: int = 3) -> None: ...  # type: ignore[no-untyped-def]

    params = params_of(vague)
    assert list(params) == ["a", "b", "c"]
    for name in ("a", "b"):
        params.check(name, object(), "it")
        assert params[name].type is Any


def test_two_parameters_of_one_name_are_refused() -> None:
    with pytest.raises(ValueError, match="more than one parameter is called 'a'"):
        ParamSet([Param("a"), Param("a")])


class Shape(Protocol):
    def area(self) -> float: ...


T = TypeVar("T")


@pytest.mark.parametrize(
    ("annotation", "fitting", "unfit"),
    [
        (int, [0, -3], [1.0, True, "1", None]),
        (float, [1.5, 2, float("inf")], [True, "1", None]),
        (bool, [True, False], [0, 1, None]),
        (str, ["", "a"], [b"a", 1, None, Path("a")]),
        (None, [None], [0, ""]),
        (int | None, [1, None], ["1", True, 1.5]),
        (Optional[float], [1, None], ["1"]),  # noqa: UP045
        (str | Path, ["a", Path("a")], [1]),
        (Literal["min", "max"], ["min"], ["mean", None]),
        (Annotated[int, "positive"], [1], ["1"]),
        (list[int], [[1], [], ["not looked at"]], [(1,), 1]),
        (Sequence[str], [["a"], ("a",), "a"], [1, {"a"}]),
        (Mapping[str, int], [{"a": 1}], [[("a", 1)]]),
        (Callable[[str], bool], [str.isalpha, lambda x: x], ["a", 1]),
        (type[torch.optim.Optimizer], [torch.optim.SGD], ["SGD"]),
        (torch.Tensor, [torch.ones(1)], [1.0]),
        (list[int] | dict[str, int] | None, [[1], {"a": 1}, None], [1]),
        (Any, [1, None, object()], []),
        (Shape, [1, object()], []),
        (T, [1, object()], []),
    ],
)
def test_values_fit_their_types(annotation: Any, fitting: list[Any], unfit: list[Any]) -> None:
    assert all(fits(value, annotation) for value in fitting)
    assert not any(fits(value, annotation) for value in unfit)


plain = st.one_of(st.integers(), st.floats(), st.booleans(), st.text(), st.none())
types = st.sampled_from([int, float, bool, str, None])


@given(plain, types, types)
def test_a_union_takes_what_one_of_its_parts_takes(value: Any, one: Any, other: Any) -> None:
    if one is other:
        return
    assert fits(value, Optional[one] if other is None else one | other) == (  # noqa: UP045
        fits(value, one) or fits(value, other)
    )


def test_a_wrong_name_suggests_the_right_one() -> None:
    with pytest.raises(TypeError, match="callback 'x' has no parameter 'patence'; did you mean 'patience'"):
        params_of(example).check("patence", 3, "callback 'x'")
    with pytest.raises(TypeError, match="callback 'x' has no parameter 'a'; there is none"):
        ParamSet().check("a", 3, "callback 'x'")


def test_a_wrong_value_says_what_is_wanted() -> None:
    with pytest.raises(TypeError, match=r"callback 'x': path must be of type str \| pathlib.Path, not 3"):
        params_of(CallbackSetExample).check("path", 3, "callback 'x'")


def test_the_default_always_fits() -> None:
    def odd(a: int = None) -> None: ...  # type: ignore[assignment]  # noqa: RUF013

    params_of(odd).check("a", None, "it")


def test_missing_are_the_required_ones_without_a_value() -> None:
    assert params_of(CallbackSetExample).missing({}) == ["path"]
    assert params_of(CallbackSetExample).missing({"path": "a"}) == []


def test_values_are_a_dict_that_is_checked() -> None:
    values = Values(params_of(example), "callback 'x'", {"patience": 3})
    values["min_delta"] = 0.5
    values.update(patience=4)
    assert values == {"patience": 4, "min_delta": 0.5}
    assert dict(**values) == {"patience": 4, "min_delta": 0.5}
    del values["min_delta"]
    assert (repr(values), len(values), "min_delta" in values) == ("{'patience': 4}", 1, False)
    for wrong in ({"patience": "4"}, {"patence": 4}, {"id": "x"}):
        with pytest.raises(TypeError, match="callback 'x'"):
            values.update(wrong)
        with pytest.raises(TypeError, match="callback 'x'"):
            Values(params_of(example), "callback 'x'", wrong)
    assert values == {"patience": 4}
