"""What is saved comes back bit for bit, and other programs can read it."""

from __future__ import annotations

import hashlib
import stat
import tempfile
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from distbp.checkpoint import (
    Snapshot,
    describe,
    list_checkpoints,
    load,
    parameters_sha256,
    save,
    state_sha256,
    verify,
)
from distbp.checkpoint.layout import DTYPES
from distbp.errors import ConfigError, InputMissing

from .checkpoint_states import assert_same, save_steps, small_snapshot

ORDERS = {
    "C": np.ascontiguousarray,
    "Fortran": np.asfortranarray,
    "reversed": lambda array: array[::-1] if array.ndim else array,
    "transposed": np.transpose,
    "every second": lambda array: np.repeat(array, 2, axis=0)[::2] if array.ndim else array,
    "big-endian": lambda array: array.astype(array.dtype.newbyteorder(">")),
}


@st.composite
def arrays(draw):
    """Draw an array of any stored type, 0 to 4 dimensions, lengths from 0, in any memory layout."""
    dtype = draw(st.sampled_from(list(DTYPES.values())))
    shape = draw(hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=5))
    size = int(np.prod(shape)) * dtype.itemsize
    raw = np.frombuffer(draw(st.binary(min_size=size, max_size=size)), np.uint8)
    if dtype == np.bool_:
        raw = raw & 1
    return ORDERS[draw(st.sampled_from(list(ORDERS)))](raw.view(dtype).reshape(shape))


names = st.text("abcXYZ019._/-", min_size=1, max_size=256)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=100, deadline=None)
@given(
    tensors=st.dictionaries(names, arrays(), max_size=5),
    metadata=st.dictionaries(st.text(), json_values, max_size=3),
    step=st.integers(0, 10**9),
)
def test_any_state_comes_back(tensors, metadata, step):
    """Every type, shape and memory layout, NaN bits included, and all metadata come back bit for bit."""
    snapshot = Snapshot(step, tensors, metadata)
    with tempfile.TemporaryDirectory() as folder:
        path = save(Path(folder) / "checkpoints", snapshot, keep=2)
        found = load(path)
        assert_same(found, snapshot)
        assert verify(path) == []
        assert state_sha256(found.tensors) == state_sha256(tensors)
        assert all(array.flags.writeable and array.flags.owndata for array in found.tensors.values())


@settings(max_examples=50, deadline=None)
@given(tensors=st.dictionaries(names, arrays(), max_size=5))
def test_the_safetensors_library_reads_the_same(tensors):
    """The library safetensors, another implementation of the layout, reads equal types, shapes and bits."""
    with tempfile.TemporaryDirectory() as folder:
        path = save(Path(folder), Snapshot(1, tensors, {}), keep=2)
        found = safetensors.numpy.load_file(path / "state.safetensors")
        assert set(found) == set(tensors)
        assert_same(Snapshot(1, found, {}), Snapshot(1, {name: tensors[name] for name in found}, {}))


def test_the_payload_is_aligned_and_contiguous(tmp_path):
    """The payload begins at a multiple of 64 bytes and ends with the file."""
    (path,) = save_steps(tmp_path, 5)
    data = (path / "state.safetensors").read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    assert start % 64 == 0
    assert len(data) - start == sum(array.nbytes for array in small_snapshot(5).tensors.values())


def test_large_tensors_cross_block_borders(tmp_path):
    """A tensor of several blocks and a half comes back; a save pauses after each block, to the last byte."""
    values = np.random.default_rng(3).integers(0, 255, (9 << 20) + 17, np.uint8)
    seen: list[int] = []
    path = save(tmp_path, Snapshot(1, {"values": values}, {}), keep=2, pause=seen.append)
    assert_same(load(path), Snapshot(1, {"values": values}, {}))
    assert max(seen) == 1 << 20
    assert sum(seen) == sum(file.stat().st_size for file in path.iterdir())


def test_verifying_takes_the_memory_of_a_block(tmp_path):
    """However large the state, `verify` holds one block of 1 MiB of it; `load` holds the state once."""
    state = {"values": np.ones(16 << 20, np.uint8), "flags": np.ones(16 << 20, np.bool_)}
    path = save(tmp_path, Snapshot(1, state, {}), keep=2)
    peaks = []
    for read in (verify, load):
        tracemalloc.start()
        read(path)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[0] < 2 << 20
    assert peaks[1] < 33 << 20


def test_only_the_owner_may_read(tmp_path):
    """Files are 0600 and folders 0700, whatever the umask."""
    (path,) = save_steps(tmp_path / "checkpoints", 1)
    assert stat.S_IMODE(path.stat().st_mode) == 0o700
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert {stat.S_IMODE(file.stat().st_mode) for file in path.iterdir()} == {0o600}


def test_describe_lists_everything(tmp_path):
    """`describe` names every tensor with type, shape and bytes, and says that every hash holds."""
    (path,) = save_steps(tmp_path, 5)
    shown = describe(path)
    assert shown["step"] == 5
    assert shown["metadata"] == small_snapshot(5).metadata
    assert shown["tensors"][0] == {
        "name": "parameters/0.weight",
        "dtype": "F32",
        "shape": [4, 6],
        "bytes": 96,
    }
    assert [file["problem"] for file in shown["files"]] == ["", ""]
    assert shown["problems"] == []


def test_describe_shows_what_is_left_of_a_damaged_checkpoint(tmp_path):
    """With a damaged state, `describe` still shows step and metadata and names the file whose hash fails."""
    (path,) = save_steps(tmp_path, 5)
    with open(path / "state.safetensors", "r+b") as file:
        file.seek(-1, 2)
        file.write(b"\xaa")
    shown = describe(path)
    assert (shown["step"], shown["metadata"]) == (5, small_snapshot(5).metadata)
    assert {file["name"] for file in shown["files"] if file["problem"]} == {"state.safetensors"}


def test_a_missing_folder_is_input_missing(tmp_path):
    """A path that does not exist ends with 66, not with 65."""
    with pytest.raises(InputMissing, match="step-00000001"):
        load(tmp_path / "step-00000001")


@pytest.mark.parametrize(
    ("tensors", "metadata"),
    [
        ({"a b": np.zeros(1)}, {}),
        ({"x" * 257: np.zeros(1)}, {}),
        ({"__metadata__": np.zeros(1)}, {}),
        ({"a": np.zeros((1,) * 9)}, {}),
        ({"a": np.zeros(1, np.complex64)}, {}),
        ({"a": np.array([object()])}, {}),
        ({}, {"a": float("nan")}),
        ({}, {"a": object()}),
        ({}, {1: "a", "1": "b"}),
        ({}, {"a": "x" * (5 << 20)}),
    ],
)
def test_what_could_not_be_loaded_is_not_saved(tmp_path, tensors, metadata):
    """A state outside of the limits of the reader is refused with 2, and leaves nothing behind."""
    with pytest.raises(ConfigError):
        save(tmp_path / "checkpoints", Snapshot(1, tensors, metadata), keep=2)
    assert list(tmp_path.iterdir()) == []


def test_the_limits_themselves_can_be_saved(tmp_path):
    """Names of 256 characters and 8 dimensions are inside the limits."""
    snapshot = Snapshot(1, {"x" * 256: np.ones((1, 2, 1, 1, 3, 1, 1, 2), np.float32)}, {})
    assert_same(load(save(tmp_path, snapshot, keep=2)), snapshot)


def test_state_hash_sees_names_types_shapes_and_bits():
    """Two states share a hash if and only if names, types, shapes and bits agree, in any order or layout."""
    values = np.arange(6, dtype=np.float32).reshape(2, 3)
    base = {"a": values, "b": values + 1}
    same = {"b": values + 1, "a": np.asfortranarray(values)}
    assert state_sha256(base) == state_sha256(same)
    others = [
        {"a": values, "c": values + 1},
        {"a": values, "b": (values + 1).reshape(3, 2)},
        {"a": values, "b": (values + 1).view(np.int32)},
        {"a": values + 1, "b": values},
        {"a": values},
        {"a": -values * 0 + values, "b": np.nextafter(values + 1, np.float32(9))},
    ]
    assert len({state_sha256(state) for state in [base, *others]}) == 1 + len(others)


def test_parameters_hash_is_the_documented_one():
    """The hash of the parameters is that of their bytes in declaration order, and in that order only."""
    first, second = np.arange(6, dtype=np.float32).reshape(2, 3), np.ones(3, np.float32)
    expected = hashlib.sha256(first.astype("<f4").tobytes() + second.astype("<f4").tobytes()).hexdigest()
    assert parameters_sha256([np.asfortranarray(first), second]) == expected
    assert parameters_sha256([second, first]) != expected


def test_steps_beyond_eight_digits_sort_as_numbers(tmp_path):
    """Step 100,000,000 is newer than step 99,999,999 although its name sorts before it."""
    save_steps(tmp_path, 99_999_999, 100_000_000, 5)
    assert [path.name for path in list_checkpoints(tmp_path)] == [
        "step-100000000", "step-99999999", "step-00000005",
    ]  # fmt: skip
