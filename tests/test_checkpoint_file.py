"""Checkpoint files: what comes back is what went in, bit for bit, or it is refused."""

from __future__ import annotations

import hashlib
import json
import os
import resource
import struct
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import safetensors
import safetensors.torch
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from functional_loop.checkpoint import atomic as durable
from functional_loop.checkpoint import header
from functional_loop.checkpoint.file import read, read_metadata, read_outline, verify, write
from functional_loop.checkpoint.header import NewerFormatError
from functional_loop.core.errors import CheckpointError
from functional_loop.core.record import tensor_bytes, tree_equal

DTYPES = [
    *(torch.bool, torch.uint8, torch.uint16, torch.uint32, torch.uint64),
    *(torch.int8, torch.int16, torch.int32, torch.int64),
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.complex128),
    *(
        torch.float8_e4m3fn,
        torch.float8_e4m3fnuz,
        torch.float8_e5m2,
        torch.float8_e5m2fnuz,
        torch.float8_e8m0fnu,
    ),
]


def random_tensor(dtype: torch.dtype, shape: list[int], seed: int) -> torch.Tensor:
    """Random bits, so that NaNs with payloads, infinities and denormal numbers occur."""
    generator = torch.Generator().manual_seed(seed)
    size = dtype.itemsize
    bits = torch.randint(0, 2 if dtype == torch.bool else 256, (*shape, size), dtype=torch.uint8, generator=generator)
    return bits.view(dtype).squeeze(-1)


tensors = st.builds(
    random_tensor,
    st.sampled_from(DTYPES),
    st.lists(st.integers(0, 3), max_size=3),
    st.integers(0, 2**32 - 1),
)
texts = st.text(st.characters(exclude_categories=())) | st.sampled_from(
    ["", "$tensor", "/", "~", "a/b", "\ud83d\ude00"]
)
floats = st.floats() | st.integers(0, 2**64 - 1).map(lambda bits: struct.unpack("<d", struct.pack("<Q", bits))[0])
scalars = st.none() | st.booleans() | st.integers() | st.integers(2**62, 2**200) | floats | texts


def containers(children: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.lists(children, max_size=3) | st.dictionaries(texts, children, max_size=3)


trees = st.recursive(scalars | tensors, containers, max_leaves=8)
plain_trees = st.recursive(scalars, containers, max_leaves=8)


def same(a: Any, b: Any) -> bool:
    """The same types, keys in the same order, and the same bits, those of NaNs too."""
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and tensor_bytes(a) == tensor_bytes(b)
    if isinstance(a, float):
        return struct.pack("<d", a) == struct.pack("<d", b)
    return bool(a == b)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("files")


def small_file(path: Path) -> bytes:
    write(path, {"a": torch.tensor([1.0, 2.0]), "b": [torch.tensor([3, 4], dtype=torch.int8), "x"]}, {"seed": 0})
    return path.read_bytes()


@settings(max_examples=150, deadline=None)
@given(trees, st.dictionaries(texts, plain_trees, max_size=3))
@example({"__metadata__": torch.ones(1), "~005f_metadata__": torch.zeros(1)}, {})
@example({"a": {"b": torch.ones(1)}, "a/b": torch.zeros(1), "": {"": torch.ones(2)}, "/": torch.ones(3)}, {})
@example({"$dict": [], "\ud83d\ude00": 1, "😀": torch.ones(2), "0" * 64: "0" * 64}, {"$int": float("nan")})
@example(2**64, {"header_sha256": "0" * 64})
@example([10**5000, -(10**5000), -(2**63), 2**63 - 1, 2**63, -0.0, 5e-324, 1.7976931348623157e308], {})
def test_what_is_read_is_what_was_written(folder: Path, tree: Any, metadata: dict[str, Any]) -> None:
    path = folder / "tree.safetensors"
    write(path, tree, metadata)
    tree_read, metadata_read = read(path)
    assert same(tree_read, tree)
    assert same(metadata_read, metadata)
    assert same(read_metadata(path), metadata)


@settings(max_examples=50, deadline=None)
@given(trees)
def test_the_same_tree_makes_the_same_file(folder: Path, tree: Any) -> None:
    first, second = folder / "first.safetensors", folder / "second.safetensors"
    write(first, tree, {})
    write(second, read(first)[0], {})
    assert first.read_bytes() == second.read_bytes()


@settings(max_examples=50, deadline=None)
@given(st.lists(tensors, max_size=5))
def test_safetensors_opens_every_file(folder: Path, values: list[torch.Tensor]) -> None:
    path = folder / "other.safetensors"
    write(path, {"network": values}, {})
    with safetensors.safe_open(path, "pt") as file:
        assert set(file.metadata()) == {"functional_loop"}
        for i, value in enumerate(values):
            read_back = file.get_tensor(f"network/{i}")
            assert tensor_bytes(read_back) == tensor_bytes(value)
            assert read_back.dtype in (value.dtype, torch.uint8)


def test_tensors_have_readable_names(tmp_path: Path) -> None:
    write(tmp_path / "f", {"network": {"0.weight": torch.ones(2)}, "slots": [{"m": torch.zeros(1)}]}, {})
    assert set(safetensors.torch.load_file(tmp_path / "f")) == {"network/0.weight", "slots/0/m"}


@pytest.mark.parametrize(
    "view",
    [
        torch.arange(1000.0)[10:20],
        torch.arange(12).view(3, 4).t(),
        torch.arange(10)[::3],
        torch.ones(1).expand(5),
        torch.tensor([1 + 2j, 3 - 4j]).conj(),
        torch.tensor([1 + 2j, 3 - 4j]).conj().imag,
        torch.arange(4.0).requires_grad_(),
        torch.nn.Parameter(torch.arange(4.0)),
    ],
    ids=["slice", "transposed", "strided", "expanded", "conjugate", "negative", "requires_grad", "parameter"],
)
def test_of_a_view_the_elements_that_it_shows_are_stored(tmp_path: Path, view: torch.Tensor) -> None:
    write(tmp_path / "view", view, {})
    write(tmp_path / "plain", view.detach().resolve_conj().resolve_neg().clone(), {})
    assert (tmp_path / "view").read_bytes() == (tmp_path / "plain").read_bytes()
    back, _ = read(tmp_path / "view")
    assert type(back) is torch.Tensor
    assert back.is_contiguous()
    assert not back.requires_grad
    assert torch.equal(back, view.detach())


def test_tensors_own_their_memory(tmp_path: Path) -> None:
    path = tmp_path / "f"
    write(path, [torch.ones(3), torch.ones(3)], {})
    (a, b), _ = read(path)
    assert a.untyped_storage().nbytes() == 12
    path.write_bytes(bytes(path.stat().st_size))
    a.zero_()
    assert torch.equal(b, torch.ones(3))


def test_a_tied_tensor_is_stored_once_and_comes_back_as_one_object(tmp_path: Path) -> None:
    weight = torch.randn(1000)
    write(tmp_path / "tied", {"encoder": weight, "decoder": [weight]}, {})
    write(tmp_path / "single", {"encoder": weight}, {})
    tree, _ = read(tmp_path / "tied")
    assert tree["encoder"] is tree["decoder"][0]
    assert (tmp_path / "tied").stat().st_size < (tmp_path / "single").stat().st_size + 1000


def test_overlapping_tensors_come_back_separate(tmp_path: Path) -> None:
    base = torch.arange(6.0)
    write(tmp_path / "f", [base, base[1:4], base.view(2, 3)], {})
    (a, b, c), _ = read(tmp_path / "f")
    a.zero_()
    assert torch.equal(b, torch.tensor([1.0, 2.0, 3.0]))
    assert torch.equal(c, torch.arange(6.0).view(2, 3))


def test_writing_leaves_the_tree_alone(tmp_path: Path) -> None:
    tree = {"a": [torch.ones(2), {"$b": 1.0}]}
    tensor, version = tree["a"][0], tree["a"][0]._version
    write(tmp_path / "f", tree, {})
    assert tree["a"][0] is tensor
    assert tensor._version == version
    assert tree_equal(tree, {"a": [torch.ones(2), {"$b": 1.0}]})


class Whole(int):
    pass


class Own(torch.Tensor):
    pass


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"a": [0, (1, 2)]}, r"\['a'\]\[1\]: it is of type tuple"),
        ({"a": {"b": object()}}, r"\['a'\]\['b'\]: it is of type object"),
        ({"a": {1: 2}}, r"\['a'\]: its key 1 is of type int"),
        ([Whole(1)], r"\[0\]: it is of type Whole"),
        ({1, 2}, "the tree: it is of type set"),
        ([b"bytes"], "of type bytes"),
        ([1j], "of type complex"),
        ([torch.ones(2).as_subclass(Own)], r"\[0\]: it is of type Own"),
        ([torch.ones(2).to_sparse()], "a sparse_coo tensor"),
        ([torch.empty(2, device="meta")], "a meta tensor"),
        ([torch.empty(2, dtype=torch.uint4)], "a tensor of torch.uint4"),
    ],
)
def test_what_cannot_be_saved_is_refused_by_its_path(tmp_path: Path, tree: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        write(tmp_path / "f", tree, {})
    assert not list(tmp_path.iterdir())


def test_quantized_tensors_are_refused(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="quantiz"):
        quantized = torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8)
    with pytest.raises(TypeError, match=r"\['w'\]: it is a tensor of torch.qint8"):
        write(tmp_path / "f", {"w": quantized}, {})


def test_a_tree_that_contains_itself_is_refused(tmp_path: Path) -> None:
    tree: dict[str, Any] = {}
    tree["a"] = [tree]
    with pytest.raises(ValueError, match=r"\['a'\]\[0\]\['a'\]"):
        write(tmp_path / "f", tree, {})


def test_a_hundred_levels_are_not_too_deep(tmp_path: Path) -> None:
    tree: Any = torch.ones(1)
    for level in range(100):
        tree = [tree] if level % 2 else {"$": tree}
    write(tmp_path / "f", tree, {})
    assert same(read(tmp_path / "f")[0], tree)
    with pytest.raises(ValueError, match="nested deeper than 100 levels"):
        write(tmp_path / "g", [tree], {})


def test_metadata_holds_no_tensors(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="metadata can't hold tensors"):
        write(tmp_path / "f", {}, {"a": torch.ones(1)})


def assert_damaged(path: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        read(path)
    assert str(path) in str(caught.value)


def test_every_flipped_bit_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "f"
    data = small_file(path)
    with open(path, "r+b", buffering=0) as file:
        for i, byte in enumerate(data):
            for bit in range(8):
                os.pwrite(file.fileno(), bytes([byte ^ 1 << bit]), i)
                assert_damaged(path)
            os.pwrite(file.fileno(), bytes([byte]), i)
    assert path.read_bytes() == data


def test_every_truncation_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "f"
    for length in reversed(range(len(small_file(path)))):
        os.truncate(path, length)
        assert_damaged(path)


def test_every_zeroed_tail_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "f"
    data = small_file(path)
    with open(path, "r+b", buffering=0) as file:
        for i in reversed(range(len(data))):
            os.pwrite(file.fileno(), b"\0", i)
            if any(data[i:]):
                assert_damaged(path)


@pytest.mark.parametrize("extra", [b"\0", b" ", bytes(8), bytes(4096)])
def test_appended_bytes_are_an_error(tmp_path: Path, extra: bytes) -> None:
    path = tmp_path / "f"
    path.write_bytes(small_file(path) + extra)
    assert_damaged(path)


def test_swapped_tensors_are_an_error_that_names_one(tmp_path: Path) -> None:
    path = tmp_path / "f"
    write(path, {"first": torch.zeros(2), "second": torch.ones(2)}, {})
    data = path.read_bytes()
    path.write_bytes(data[:-16] + data[-8:] + data[-16:-8])
    with pytest.raises(CheckpointError, match="tensor 'first'"):
        read(path)


def test_metadata_is_read_without_the_tensors(tmp_path: Path) -> None:
    path = tmp_path / "f"
    data = small_file(path)
    path.write_bytes(data[:-1] + b"\xff")
    assert read_metadata(path) == {"seed": 0}
    with pytest.raises(CheckpointError):
        read(path)


def test_a_file_of_safetensors_itself_is_no_checkpoint(tmp_path: Path) -> None:
    safetensors.torch.save_file({"w": torch.ones(1000)}, tmp_path / "f")
    with pytest.raises(CheckpointError, match="no checkpoint"):
        read(tmp_path / "f")


def sealed(header: bytes, rest: bytes = b"") -> bytes:
    """A file with any header, whose length and checksum are right."""
    header += b" " * (-len(header) % 8)
    header = len(header).to_bytes(8, "little") + header
    at = header.find(b"0" * 64)
    if at < 0:
        return header + rest
    return header[:at] + hashlib.sha256(header).hexdigest().encode() + header[at + 64 :] + rest


def header_of(index: dict[str, Any], **entries: Any) -> bytes:
    text = json.dumps({"header_sha256": "0" * 64, **index}, separators=(",", ":"))
    return json.dumps({"__metadata__": {"functional_loop": text}, **entries}, separators=(",", ":")).encode()


VALID = {"version": 1, "metadata": {}, "tree": None, "tensors": {}}
SHA = hashlib.sha256(b"").hexdigest()


def one_tensor(shape: Any, **changes: Any) -> bytes:
    index = {
        **VALID,
        "tree": {"w": {"$tensor": "w"}},
        "tensors": {"w": {"dtype": "float32", "shape": shape, "sha256": SHA}},
    }
    size = 0 if not isinstance(shape, list) or 0 in shape else 4 * shape[0]
    entry = {"dtype": "F32", "shape": shape, "data_offsets": [0, size], **changes}
    return header_of(index, w=entry)


def test_the_sealed_headers_of_these_tests_are_accepted(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(sealed(header_of(VALID)))
    assert read(tmp_path / "f") == (None, {})
    (tmp_path / "f").write_bytes(sealed(one_tensor([0])))
    assert same(read(tmp_path / "f")[0], {"w": torch.empty(0)})


@pytest.mark.parametrize(
    "header",
    [
        header_of({}),
        header_of({**VALID, "version": "1"}),
        header_of({**VALID, "metadata": []}),
        header_of({**VALID, "tensors": []}),
        header_of({**VALID, "tree": {"$tensor": "w"}}),
        header_of({**VALID, "tree": {"$tensor": []}}),
        header_of({**VALID, "tree": {"$int": "xyz"}}),
        header_of({**VALID, "tree": {"$int": 1}}),
        header_of({**VALID, "tree": {"$float": "00"}}),
        header_of({**VALID, "tree": {"$str": "ff"}}),
        header_of({**VALID, "tree": {"$dict": 1}}),
        header_of({**VALID, "tree": {"$dict": [[[], 1]]}}),
        header_of({**VALID, "tree": {"$dict": [[{"$int": "1"}, 1]]}}),
        header_of({**VALID, "tree": {"$dict": [["$a", 1], ["$a", 2]]}}),
        header_of({**VALID, "tree": {"$dict": [["a", 1]]}}),
        header_of({**VALID, "tree": {"$int": "0x1"}}),
        header_of({**VALID, "tree": {"$float": "3ff0000000000000"}}),
        header_of({**VALID, "tree": float("nan")}),
        header_of({**VALID, "version": True}),
        header_of({**VALID, "version": 0}),
        header_of({**VALID, "extra": 1}),
        header_of(VALID).replace(b'\\"tree\\":null', b'\\"tree\\":{\\"a\\":1,\\"a\\":2}'),
        header_of(VALID).replace(b'\\"tree\\":null', b'\\"tree\\":1,\\"tree\\":null'),
        header_of(VALID).replace(b'\\"tree\\":null', b'\\"tree\\":1e999'),
        header_of(VALID).replace(b'\\"tree\\":null', b'\\"tree\\":1.50'),
        header_of(VALID).replace(b'\\"tree\\":null', b'\\"tree\\": null'),
        one_tensor([0]).replace(b'{\\"$tensor\\":\\"w\\"}', b"null"),
        one_tensor([0]).replace(b'\\"w\\":{\\"$tensor', b'\\"v\\":{\\"$tensor'),
        one_tensor([0]).replace(b'{\\"$tensor\\":\\"w\\"}', b'[{\\"$tensor\\":\\"w\\"}]'),
        one_tensor([True]),
        one_tensor([2**200]),
        one_tensor([0], data_offsets=[0, -4]),
        header_of({**VALID, "tree": {"$pickle": "gASVBQAAAAAAAACMAWGULg=="}}),
        header_of({**VALID, "tree": {"$int": "1", "b": 1}}),
        header_of(VALID, w={"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}),
        one_tensor([2**40]),
        one_tensor([0, 2**62, 2**62]),
        one_tensor([-1]),
        one_tensor([0.0]),
        one_tensor("12"),
        one_tensor(None),
        one_tensor([0], dtype="I32"),
        one_tensor([0], data_offsets=[8, 8]),
        header_of({**VALID, "tree": json.loads("[" * 900 + "]" * 900)}),
        header_of(VALID).replace(b'\\"tree\\":null', b'\\"tree\\":' + b"[" * 100_000 + b"]" * 100_000),
        header_of(VALID).replace(b'\\"tree\\":null', b'\\"tree\\":' + b"9" * 10_000),
        header_of(VALID)[:-1],
        header_of(VALID)[:-1] + b',"\xff":1}',
    ],
)
def test_nonsense_with_a_right_checksum_is_a_checkpoint_error(tmp_path: Path, header: bytes) -> None:
    (tmp_path / "f").write_bytes(sealed(header))
    with pytest.raises(CheckpointError, match=str(tmp_path / "f")):
        read(tmp_path / "f")


def test_a_newer_format_is_told_from_damage(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(sealed(header_of({**VALID, "version": 2})))
    with pytest.raises(NewerFormatError, match="format 2"):
        read(tmp_path / "f")


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=300) | st.binary(max_size=100).map(lambda b: len(b).to_bytes(8, "little") + b))
@example(b"")
@example(b"\xff" * 8)
@example((2**40).to_bytes(8, "little") + bytes(200))
def test_any_bytes_are_a_checkpoint_error(folder: Path, data: bytes) -> None:
    path = folder / "fuzz"
    path.write_bytes(data)
    with pytest.raises(CheckpointError):
        read(path)


VALUES = st.sampled_from(['"', "{", "[", "1", "null", '\\"$tensor\\"', "-1", "1e400", "NaN", "\\\\ud800", '\\"w\\"'])


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_mutated_headers_with_a_right_checksum_are_refused_or_read(folder: Path, data: st.DataObject) -> None:
    header = header_of(
        {
            **VALID,
            "tree": {"a": [{"$tensor": "w"}, 1.5]},
            "tensors": {"w": {"dtype": "int8", "shape": [2], "sha256": SHA}},
        },
        w={"dtype": "I8", "shape": [2], "data_offsets": [0, 2]},
    )
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(header.find(b"0" * 64) + 64, len(header)))
        header = header[:at] + data.draw(VALUES).encode() + header[at + data.draw(st.integers(0, 6)) :]
    path = folder / "mutated"
    path.write_bytes(sealed(header, b"\0\0"))
    with pytest.raises(CheckpointError):
        read(path)


@pytest.mark.parametrize("part", ["[],", "{},", "1,", '"",', "null,", '{"a":1},', '["data_offsets",1],'])
@pytest.mark.parametrize("place", ["tree", "metadata", "tensors", "beside"])
def test_a_header_of_too_many_parts_is_refused_before_it_is_parsed(tmp_path: Path, part: str, place: str) -> None:
    path, parts = tmp_path / "f", "[" + (part * 2_000_001)[:-1] + "]"
    if place == "beside":
        text = header_of(VALID, beside="@").decode()
    else:
        text, parts = header_of({**VALID, place: "@"}).decode(), parts.replace('"', '\\"')
    text = text.replace('"@"', parts) if place == "beside" else text.replace('\\"@\\"', parts)
    path.write_bytes(sealed(text.encode()))
    tracemalloc.start()
    for function in (read, verify, read_metadata, read_outline):
        with pytest.raises(CheckpointError, match=r"its header holds .* lists, dicts and other values"):
            function(path)
    assert tracemalloc.get_traced_memory()[1] < 2 * path.stat().st_size
    tracemalloc.stop()


def test_what_is_written_has_not_too_many_parts_to_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(header, "_MOST_PARTS", 100)

    def is_written(n: int, of_tensors: int) -> bool:
        tree = {"tensor": torch.zeros(of_tensors, dtype=torch.uint8), "list": [[i] for i in range(n)]}
        try:
            write(tmp_path / "f", tree, {})
        except ValueError as error:
            return "keep long lists of numbers as tensors" not in str(error)
        return bool(read(tmp_path / "f")[0]["list"] == tree["list"])

    found = [[is_written(n, of_tensors) for n in range(0, 400, 7)] for of_tensors in (0, 4000)]
    assert all(written == sorted(written, reverse=True) for written in found)
    assert 0 < found[0].count(True) < found[1].count(True) < len(found[1])


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity"])
@pytest.mark.parametrize("place", ["tree", "metadata"])
def test_numbers_that_json_lacks_are_refused_in_all_readers(tmp_path: Path, number: str, place: str) -> None:
    text = header_of({**VALID, place: {"a": 0.123}}).replace(b"0.123", number.encode())
    (tmp_path / "f").write_bytes(sealed(text))
    for function in (read, verify, read_metadata, read_outline):
        with pytest.raises(CheckpointError, match="no JSON"):
            function(tmp_path / "f")


def test_a_claim_of_more_than_there_is_costs_no_memory(tmp_path: Path) -> None:
    path = tmp_path / "f"
    for data in ((2**62).to_bytes(8, "little") + bytes(1000), sealed(one_tensor([2**40]), bytes(1000))):
        path.write_bytes(data)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        with pytest.raises(CheckpointError):
            read(path)
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 10_000


@pytest.mark.parametrize("call", ["open", "write", "fsync", "close", "replace"])
def test_a_failing_call_leaves_the_old_file_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    path = tmp_path / "f"
    write(path, {"step": 1}, {})

    def fail(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(f"os.{call}", fail)
        with pytest.raises(OSError, match="No space") as caught:
            write(path, {"step": 2}, {})
    assert caught.value.errno == 28
    assert any(str(path) in note for note in caught.value.__notes__)
    assert read(path)[0] == {"step": 1}
    assert os.listdir(tmp_path) == ["f"]


def test_a_full_disk_leaves_the_old_file_and_no_other(tmp_path: Path) -> None:
    path = tmp_path / "f"
    write(path, {"step": 1}, {})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(OSError, match="too large"):
            write(path, {"w": torch.ones(100_000)}, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert read(path)[0] == {"step": 1}
    assert os.listdir(tmp_path) == ["f"]


def test_a_folder_that_cannot_be_synced_is_an_error_with_an_intact_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "f"

    def fail(*_: Any) -> None:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patched:
        patched.setattr(durable, "_sync", fail)
        with pytest.raises(OSError, match="Input/output"):
            write(path, {"step": 2}, {})
    assert read(path)[0] == {"step": 2}
    assert os.listdir(tmp_path) == ["f"]


def test_interruption_leaves_the_old_file_and_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "f"
    write(path, {"step": 1}, {})

    def interrupt(_: int) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("os.fsync", interrupt)
        with pytest.raises(KeyboardInterrupt):
            write(path, {"step": 2}, {})
    assert read(path)[0] == {"step": 1}
    assert os.listdir(tmp_path) == ["f"]


@pytest.mark.parametrize("function", [read, read_metadata])
def test_an_absent_file_is_a_file_not_found_error(tmp_path: Path, function: Any) -> None:
    with pytest.raises(FileNotFoundError):
        function(tmp_path / "absent")
