"""Packed files that are truncated, altered or hostile: an error of one line, or the same model; never anything else."""

from __future__ import annotations

import copy
import json
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from support import Project, untrained_model

from nnunetv2_e2enet.deployment import Description, PackedModel, Segmenter, packed, read_packed, write_packed
from nnunetv2_e2enet.deployment.packed import serialized
from nnunetv2_e2enet.deployment.packing import stored_names
from nnunetv2_e2enet.errors import E2ENetError
from nnunetv2_e2enet.network import maskable_layers

MOST_MEMORY = 1 << 30  # bytes above those in use that reading a file may ask for

fuzz = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module")
def model(project: Project) -> PackedModel:
    return untrained_model(project, base=2, maximum=4)[0]


@pytest.fixture(scope="module")
def file(model: PackedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("fuzz") / "model.e2enet"
    write_packed(path, model)
    return path


@contextmanager
def bounded_memory() -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    in_use = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (in_use + MOST_MEMORY, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def outcome(path: Path, content: bytes, use: Callable[[Path], Any]) -> Any:
    """What ``use`` makes of a file of this content; None for the right kind of error."""
    spoilt = path.with_name("spoilt.e2enet")
    spoilt.write_bytes(content)
    message = ""
    found = None
    with bounded_memory():
        try:
            found = use(spoilt)
        except E2ENetError as error:
            message = str(error)
    assert "\n" not in message
    assert found is not None or str(spoilt) in message
    return found


def assert_error_or_same(path: Path, content: bytes, model: PackedModel) -> None:
    found = outcome(path, content, read_packed)
    if found is not None:
        assert found.description == model.description
        for name, array in model.folds["0"].items():
            np.testing.assert_array_equal(found.folds["0"][name], array)


def test_the_file_itself_is_read(file: Path, model: PackedModel) -> None:
    assert outcome(file, file.read_bytes(), read_packed) is not None
    assert_error_or_same(file, file.read_bytes(), model)


@fuzz
@given(st.data())
def test_truncated_files(file: Path, data: st.DataObject) -> None:
    content = file.read_bytes()
    length = data.draw(st.integers(0, 200) | st.integers(0, len(content) - 1))
    tail = data.draw(st.binary(max_size=100)) if data.draw(st.booleans()) else b""
    if content[length:] != tail:
        assert outcome(file, content[:length] + tail, read_packed) is None


@fuzz
@given(st.data())
def test_altered_bytes(file: Path, model: PackedModel, data: st.DataObject) -> None:
    content = bytearray(file.read_bytes())
    header = 8 + int.from_bytes(content[:8], "little")
    places = st.integers(0, 16) | st.integers(0, header) | st.integers(0, len(content) - 1)
    for place in data.draw(st.lists(places, min_size=1, max_size=4)):
        content[place] = data.draw(st.integers(0, 255))
    assert_error_or_same(file, bytes(content), model)


@fuzz
@given(st.data())
def test_declared_types_shapes_and_places(file: Path, model: PackedModel, data: st.DataObject) -> None:
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    entry = header[data.draw(st.sampled_from(sorted(set(header) - {"__metadata__"})))]
    numbers = st.integers(0, 64) | st.integers(-(2**64), 2**65) | st.integers(2**31, 2**40)
    change = data.draw(st.sampled_from(["dtype", "shape", "data_offsets"]))
    if change == "dtype":
        entry["dtype"] = data.draw(st.sampled_from(["BF16", "F16", "F64", "U8", "I64", "F8_E4M3", "C64", "BOOL", "F4"]))
        entry["shape"] = data.draw(st.sampled_from([entry["shape"], [2 * n for n in entry["shape"]]]))
    else:
        entry[change] = data.draw(st.lists(numbers, max_size=70 if change == "shape" else 3))
    text = json.dumps(header).encode()
    assert_error_or_same(file, len(text).to_bytes(8, "little") + text + content[8 + length :], model)


def leaves(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where something stands in nested JSON."""
    if path:
        yield path
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in pairs:
        yield from leaves(item, (*path, key))


def put(value: Any, path: tuple[Any, ...], new: Any) -> None:
    for key in path[:-1]:
        value = value[key]
    value[path[-1]] = new


HOSTILE: list[Any] = [
    None,
    True,
    -1,
    0,
    3,
    10**9,
    2**63,
    10**30,
    1e308,
    float("nan"),
    float("inf"),
    "",
    "os.system",
    "__doc__",
]
HOSTILE += ["../../evil", "torch.nn.Transformer", "default_num_processes", [], {}, [[1]], [10**9] * 3, {"a": 1}, ["os"]]


@settings(fuzz, max_examples=50)
@given(st.data())
def test_hostile_descriptions_with_a_right_checksum(file: Path, model: PackedModel, data: st.DataObject) -> None:
    description = json.loads(json.dumps(model.description.as_json()))
    used = {"configurations": {"3d_fullres": description["plans"]["configurations"]["3d_fullres"]}}
    network = used["configurations"]["3d_fullres"]["architecture"]
    of_network = [("plans", "configurations", "3d_fullres", "architecture", *path) for path in leaves(network)]
    path = data.draw(
        st.sampled_from(of_network)
        | st.sampled_from([("plans", *p) for p in leaves(used)][2:])
        | st.sampled_from(list(leaves(description)))
    )
    put(description, path, data.draw(st.sampled_from(HOSTILE)))
    arrays = {f"0/{name}": array for name, array in model.folds["0"].items()}
    outcome(file, serialized(description, arrays), Segmenter.load)


@settings(fuzz, max_examples=20)
@given(st.data())
def test_hostile_weights_with_a_right_checksum(file: Path, model: PackedModel, data: st.DataObject) -> None:
    """Other values of weights are weights. All else is an error."""
    arrays: dict[str, Any] = {f"0/{name}": array for name, array in model.folds["0"].items()}
    name = data.draw(st.sampled_from(sorted(arrays)))
    array = arrays[name]
    changes: dict[str, Callable[[], Any]] = {
        "dropped": lambda: arrays.pop(name),
        "renamed": lambda: arrays.update({data.draw(st.text(max_size=9)): arrays.pop(name)}),
        "flat": lambda: arrays.update({name: array.reshape(-1, 1)}),
        "short": lambda: arrays.update({name: array[1:]}),
        "of another type": lambda: arrays.update({name: array.astype(np.int64)}),
        "of all ones": lambda: arrays.update({name: np.full_like(array, -1 if array.dtype.kind == "f" else 255)}),
    }
    changes[data.draw(st.sampled_from(sorted(changes)))]()
    found = outcome(file, serialized(model.description.as_json(), arrays), read_packed)
    former = {f"0/{own}": array for own, array in model.folds["0"].items()}
    assert (found is not None) == (without_values(arrays) == without_values(former))
    if found is not None:
        for own, array in found.folds["0"].items():
            np.testing.assert_array_equal(array, arrays[f"0/{own}"])


def without_values(arrays: dict[str, np.ndarray]) -> dict[str, tuple[Any, ...]]:
    """Types and shapes by name; of the topology its bits as well."""
    return {name: (a.dtype, a.shape, None if a.dtype.kind == "f" else a.tobytes()) for name, a in arrays.items()}


@pytest.mark.parametrize("content", [b"", b"\0" * 8, b"\xff" * 64, b"[" * 100_000, b"PK\x03\x04" + b"\0" * 100])
def test_other_files(file: Path, content: bytes) -> None:
    assert outcome(file, content, read_packed) is None
    assert outcome(file, len(content).to_bytes(8, "little") + content, read_packed) is None


def test_memory_is_taken_for_arrays_of_the_network_alone(file: Path, tmp_path: Path) -> None:
    """A file of few bytes on the disk declares an array of 400 MiB that no network has."""
    content, spoilt = file.read_bytes(), tmp_path / "large.e2enet"
    length = int.from_bytes(content[:8], "little")
    header, stored, more = json.loads(content[8 : 8 + length]), len(content) - 8 - length, 400 << 20
    header["0/more"] = {"dtype": "U8", "shape": [more], "data_offsets": [stored, stored + more]}
    text = json.dumps(header).encode()
    with spoilt.open("wb") as written:
        written.write(len(text).to_bytes(8, "little") + text + content[8 + length :])
        written.truncate(8 + len(text) + stored + more)
    with bounded_memory(), pytest.raises(E2ENetError, match="more and 0 more are missing, or not part of the network"):
        read_packed(spoilt)


def test_a_file_of_a_newer_version_is_kept(model: PackedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.e2enet"
    with monkeypatch.context() as patch:
        patch.setattr(packed, "FORMAT", packed.FORMAT + 1)
        write_packed(path, model)
    with pytest.raises(E2ENetError, match=r"written by a newer version of this package.*: update the package$"):
        read_packed(path)


def test_a_checkpoint_is_called_that(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint_final.pth"
    torch.save({"network_weights": {}}, path)
    with pytest.raises(E2ENetError, match=r"is a checkpoint, .*: export its model folder \(e2enet export MODEL_FOLDER FILE\)"):
        read_packed(path)


def architecture(description: dict[str, Any]) -> dict[str, Any]:
    return description["plans"]["configurations"]["3d_fullres"]["architecture"]


def test_nothing_that_plans_name_is_called(file: Path, model: PackedModel, tmp_path: Path) -> None:
    mark = tmp_path / "executed"
    description = copy.deepcopy(model.description.as_json())
    entry = architecture(description)
    entry["arch_kwargs"].update(nonlin="os.system", nonlin_kwargs={"command": f"touch {mark}"})
    arrays = {f"0/{name}": array for name, array in model.folds["0"].items()}
    assert outcome(file, serialized(description, arrays), Segmenter.load) is None
    assert not mark.exists()
    # what a reader without this check does
    get_network_from_plans(entry["network_class_name"], entry["arch_kwargs"], entry["_kw_requires_import"], 1, 5)
    assert mark.exists()


@pytest.mark.parametrize(
    "change",
    [
        lambda d: d["dataset"].update(file_ending="/../../evil.nii.gz"),
        lambda d: d["plans"].update(image_reader_writer="os"),
        lambda d: d["plans"]["configurations"]["3d_fullres"].update(preprocessor_name="multiprocessing"),
        lambda d: d["plans"]["configurations"]["3d_fullres"].update(normalization_schemes=["ABC"]),
        lambda d: d["plans"]["configurations"]["3d_fullres"].update(resampling_fn_data="partial"),
        lambda d: d["plans"]["configurations"]["3d_fullres"].update(patch_size=[2**20] * 3),
        lambda d: d["plans"]["configurations"]["3d_fullres"].update(inherits_from="3d_fullres"),
        lambda d: architecture(d).update(network_class_name="torch.nn.Transformer"),
        lambda d: architecture(d)["arch_kwargs"].update(n_stages=10**9, features_per_stage=2, strides=1),
        lambda d: architecture(d)["arch_kwargs"].update(features_per_stage=10**9),
        lambda d: architecture(d)["arch_kwargs"].update(n_conv_per_stage=10**9),
        lambda d: d.update(mirroring_axes=[3]),
        lambda d: d.update(folds=["0", "../1"]),
    ],
    ids=[
        *("path escape", "reader", "preprocessor", "normalization", "resampling", "patch", "inheritance", "network", "levels"),
        *("channels", "convolutions", "axes", "folds"),
    ],
)
def test_each_kind_of_hostile_description_is_refused(
    file: Path, model: PackedModel, change: Callable[[dict[str, Any]], Any]
) -> None:
    description = copy.deepcopy(model.description.as_json())
    change(description)
    arrays = {f"0/{name}": array for name, array in model.folds["0"].items()}
    assert outcome(file, serialized(description, arrays), read_packed) is None


def test_a_large_network_from_few_weights_is_refused(file: Path, model: PackedModel) -> None:
    """Layers without an active connection: kilobytes that would stand for gigabytes of zeros."""
    content = model.description.as_json()
    content["plans"]["configurations"]["3d_fullres"]["patch_size"] = [128, 64, 64]
    strides = [[1, 1, 1], [64, 64, 64]]
    architecture(content)["arch_kwargs"].update(n_stages=2, features_per_stage=[32, 64], strides=strides, n_conv_per_stage=2)
    network = Description(**content).network()
    assert sum(value.nbytes for value in network.state_dict().values()) > 2 * MOST_MEMORY
    shapes = network.state_dict()
    masked = {f"{name}.weight" for name, _ in maskable_layers(network)}
    arrays = {f"0/{name}": np.zeros(shapes[name].shape, np.float32) for name in stored_names(network) if name not in masked}
    for name, layer in maskable_layers(network):
        arrays[f"0/{name}.mask"] = np.zeros(-(-layer.n_connections // 8), np.uint8)
        arrays[f"0/{name}.weight"] = np.zeros((0, *layer.weight.shape[2:]), np.float32)
    assert outcome(file, serialized(content, arrays), read_packed) is None
