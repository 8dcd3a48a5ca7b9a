"""Atomic files, digests, tensors with metadata."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fmlib import store

json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**53), 2**53)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=4)
    ),
    max_leaves=10,
)


def leftovers(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name.startswith("."))


class TestAtomicPath:
    def test_appears_whole_and_keeps_its_suffix(self, tmp_path: Path) -> None:
        target = tmp_path / "new" / "a.npy"
        with store.atomic_path(target) as temporary:
            assert temporary.parent == target.parent
            assert temporary.suffix == ".npy"
            np.save(temporary, np.arange(3))
            assert not target.exists()
        assert np.load(target).tolist() == [0, 1, 2]
        assert leftovers(target.parent) == []

    @pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
    def test_failure_leaves_the_old_file(self, tmp_path: Path, error: type[BaseException]) -> None:
        target = tmp_path / "a.txt"
        target.write_text("old")

        def fail() -> None:
            with store.atomic_path(target) as temporary:
                temporary.write_text("half")
                raise error

        with pytest.raises(error):
            fail()
        assert target.read_text() == "old"
        assert leftovers(tmp_path) == []

    def test_nothing_written_is_an_error(self, tmp_path: Path) -> None:
        with (
            pytest.raises(FileNotFoundError, match=r"a\.txt"),
            store.atomic_path(tmp_path / "a.txt"),
        ):
            pass

    def test_killed_process_leaves_no_file_under_the_name(self, tmp_path: Path) -> None:
        code = (
            "import os, signal; from fmlib import store\n"
            f"with store.atomic_path({str(tmp_path / 'a.txt')!r}) as path:\n"
            "    path.write_text('half'); os.kill(os.getpid(), signal.SIGKILL)"
        )
        assert subprocess.run([sys.executable, "-c", code]).returncode == -9
        assert not (tmp_path / "a.txt").exists()


class TestAtomicDirectory:
    def test_replaces_as_a_whole(self, tmp_path: Path) -> None:
        target = tmp_path / "run"
        target.mkdir()
        (target / "stale").write_text("x")
        with store.atomic_directory(target) as temporary:
            (temporary / "fresh").write_text("y")
            assert (target / "stale").exists()
        assert [path.name for path in target.iterdir()] == ["fresh"]
        assert leftovers(tmp_path) == []

    def test_failure_keeps_the_old_folder(self, tmp_path: Path) -> None:
        target = tmp_path / "run"
        target.mkdir()
        (target / "old").write_text("x")

        def fail() -> None:
            with store.atomic_directory(target) as temporary:
                (temporary / "half").write_text("y")
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            fail()
        assert [path.name for path in target.iterdir()] == ["old"]
        assert leftovers(tmp_path) == []

    def test_failing_rename_restores(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        target = tmp_path / "run"
        target.mkdir()
        (target / "old").write_text("x")
        real, calls = store.os.replace, []

        def replace(source: Path, goal: Path) -> None:
            calls.append(goal)
            if len(calls) == 2:
                raise OSError("disk full")
            real(source, goal)

        monkeypatch.setattr(store.os, "replace", replace)
        with pytest.raises(OSError, match="disk full"), store.atomic_directory(target):
            pass
        assert (target / "old").read_text() == "x"
        assert leftovers(tmp_path) == []

    def test_a_file_in_the_way(self, tmp_path: Path) -> None:
        (tmp_path / "run").write_text("x")
        with pytest.raises(FileExistsError), store.atomic_directory(tmp_path / "run"):
            pass


class TestJson:
    @given(json_values)
    def test_round_trip(self, tmp_path_factory: pytest.TempPathFactory, value: object) -> None:
        path = tmp_path_factory.mktemp("json") / "a.json"
        store.write_json(path, value)
        assert store.read_json(path) == value

    def test_scalars_of_numpy_pandas_and_torch(self, tmp_path: Path) -> None:
        @dataclasses.dataclass
        class Point:
            x: float

        value = {
            "float32": np.float32(0.5),
            "int64": np.int64(3),
            "bool": np.bool_(True),
            "array": np.arange(2),
            "tensor": torch.ones(2),
            "nan": float("nan"),
            "na": pd.NA,
            "nat": pd.NaT,
            "time": pd.Timestamp("2020-01-02"),
            "path": Path("a/b"),
            "tuple": (1, 2),
            "point": Point(1.0),
        }
        store.write_json(tmp_path / "a.json", value)
        assert store.read_json(tmp_path / "a.json") == {
            "float32": 0.5,
            "int64": 3,
            "bool": True,
            "array": [0, 1],
            "tensor": [1.0, 1.0],
            "nan": None,
            "na": None,
            "nat": None,
            "time": "2020-01-02T00:00:00",
            "path": "a/b",
            "tuple": [1, 2],
            "point": {"x": 1.0},
        }

    @pytest.mark.parametrize(
        ("value", "place"),
        [
            ({"a": [0.0, float("inf")]}, r"\$\.a\[1\]"),
            ({"a": {1: 2}}, r"\$\.a"),
            ({"a": object()}, r"object at \$\.a"),
        ],
    )
    def test_refusals_name_the_place_and_write_nothing(
        self, tmp_path: Path, value: object, place: str
    ) -> None:
        with pytest.raises(ValueError, match=place):
            store.write_json(tmp_path / "a.json", value)
        assert list(tmp_path.iterdir()) == []

    def test_broken_file_is_named(self, tmp_path: Path) -> None:
        (tmp_path / "a.json").write_text('{"a": ')
        with pytest.raises(ValueError, match=r"a\.json is not valid JSON"):
            store.read_json(tmp_path / "a.json")

    def test_needs_no_torch(self) -> None:
        code = "import sys, fmlib.store as s; s.digest([1]); assert 'torch' not in sys.modules"
        assert subprocess.run([sys.executable, "-c", code]).returncode == 0


class TestDigest:
    def test_known_value_never_changes(self) -> None:
        # manifests and stored shards quote digests: a change of the scheme must be deliberate
        value = {"a": [1, 2.5, None, True, "é"], "b": np.arange(3, dtype=np.int32)}
        assert store.digest(value) == (
            "08b9f94bc4d1a27f86c81dd831d43626f8a1b8e482f795782c1e26f940fd1219"
        )

    @given(json_values, json_values)
    def test_equal_exactly_for_equal_content(self, a: object, b: object) -> None:
        # JSON text tells 1, 1.0 and True apart, as the digest does
        def same(x: object) -> str:
            return json.dumps(x, sort_keys=True)

        assert (store.digest(a) == store.digest(b)) == (same(a) == same(b))

    def test_order_and_layout_do_not_count(self) -> None:
        assert store.digest({"a": 1, "b": 2}) == store.digest({"b": 2, "a": 1})
        assert store.digest({"x", "y", "z"}) == store.digest({"z", "y", "x"})
        assert store.digest((1, 2)) == store.digest([1, 2])
        array = np.arange(6.0).reshape(2, 3)
        assert store.digest(array) == store.digest(np.asfortranarray(array))
        assert store.digest(array) == store.digest(array.astype(">f8"))
        assert store.digest(array) == store.digest(torch.tensor(array))

    def test_what_counts(self) -> None:
        different = [
            1,
            1.0,
            True,
            "1",
            b"1",
            None,
            [1],
            [[1]],
            {1},
            {"1": 1},
            Path("1"),
            np.ones(1),
            np.ones((1, 1)),
            np.ones(1, np.float32),
            torch.ones(1, dtype=torch.bfloat16),
            ["ab", "c"],
            ["a", "bc"],
            np.zeros((0, 2)),
            np.zeros((0, 3)),
        ]
        assert len({store.digest(value) for value in different}) == len(different)

    def test_no_address_is_ever_hashed(self) -> None:
        with pytest.raises(TypeError, match="object"):
            store.digest([object()])
        with pytest.raises(TypeError, match="objects"):
            store.digest(np.array([object()]))

    def test_file(self, tmp_path: Path) -> None:
        (tmp_path / "a").write_bytes(b"abc")
        # the test vector of FIPS 180-2
        assert store.sha256_file(tmp_path / "a") == (
            "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
        )


class TestTensors:
    def test_round_trip_with_views_and_half_precision(self, tmp_path: Path) -> None:
        base = torch.arange(12.0).reshape(3, 4)
        tensors = {
            "base": base,
            "same": base,
            "view": base[1:, ::2],
            "half": torch.randn(3, dtype=torch.bfloat16),
            "graph": torch.ones(2, requires_grad=True) * 2,
            "empty": torch.zeros(0, 3),
        }
        metadata = {"layers": ("a", "b"), "size": np.int64(224), "none": None}
        store.save_tensors(tmp_path / "a.safetensors", tensors, metadata=metadata)
        found, meta = store.load_tensors(tmp_path / "a.safetensors", expect={"layers": ["a", "b"]})
        assert meta == {"layers": ["a", "b"], "size": 224, "none": None}
        assert found.keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert found[name].dtype == tensor.dtype
            assert torch.equal(found[name], tensor.detach())

    def test_mismatch_names_key_expected_and_found(self, tmp_path: Path) -> None:
        path = tmp_path / "a.safetensors"
        store.save_tensors(path, {"x": torch.ones(1)}, metadata={"encoder": "aa", "size": 1})
        with pytest.raises(store.MismatchError, match=r"'encoder' expected 'bb', found 'aa'"):
            store.load_tensors(path, expect={"size": 1, "encoder": "bb"})
        with pytest.raises(store.MismatchError, match=r"'layer' expected 'x', found nothing"):
            store.load_tensors(path, expect={"layer": "x"})

    def test_truncated_and_missing_files_are_named(self, tmp_path: Path) -> None:
        path = tmp_path / "a.safetensors"
        store.save_tensors(path, {"x": torch.ones(100)}, metadata={})
        path.write_bytes(path.read_bytes()[:-10])
        with pytest.raises(ValueError, match=r"a\.safetensors is not a complete tensor file"):
            store.load_tensors(path)
        with pytest.raises(FileNotFoundError, match=r"b\.safetensors"):
            store.load_tensors(tmp_path / "b.safetensors")


def test_notes_keep_every_input(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "NOTES", {})
    store.note("images", "folder:x", "1")
    store.note("images", "folder:x", "1")
    store.note("images", "folder:x", "2")
    store.note("encoders", "e", "3")
    assert store.NOTES == {
        "images": {"folder:x": "1", "folder:x (2)": "2"},
        "encoders": {"e": "3"},
    }
