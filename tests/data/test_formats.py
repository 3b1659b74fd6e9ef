"""Parquet files and datasets: a document a row, whatever is in it, in bounded memory; damage is named."""

from __future__ import annotations

import io
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bytelm.data import parquet
from bytelm.data.modalities.image import Config
from bytelm.data.report import SourceReport
from bytelm.data.sources import documents, fingerprint
from bytelm.errors import DataError, MissingExtraError

TEXTS = st.lists(st.one_of(st.none(), st.binary(max_size=40)), max_size=30)


def read(*paths: str | Path, **options: Any) -> list[bytes]:
    return [b"".join(document.pieces) for document in documents(paths, **options)]


def table(values: list[Any], kind: pa.DataType, name: str = "text") -> pa.Table:
    return pa.table({"n": list(range(len(values))), name: pa.array(values, kind)})


# --- Parquet ----------------------------------------------------------------------------------------------------------


@settings(max_examples=25)
@given(
    TEXTS,
    st.sampled_from([pa.binary(), pa.large_binary()]),
    st.integers(1, 9),
    st.booleans(),
    st.sampled_from(["NONE", "SNAPPY", "ZSTD"]),
)
def test_rows_are_documents_byte_for_byte(
    values: list[bytes | None], kind: pa.DataType, group: int, dictionary: bool, compression: str
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "x.parquet")
        options: dict[str, Any] = {"use_dictionary": dictionary, "compression": compression}
        pq.write_table(table(values, kind), path, row_group_size=group, **options)
        report = SourceReport()
        found = read(path, report=report, max_bad=1.0)
        assert found == [value for value in values if value]
        assert (report.bad, report.empty) == (values.count(None), values.count(b"") + (not values))


@pytest.mark.fault("D9")
def test_too_many_rows_without_a_value_are_an_error(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    pq.write_table(table(["a"] * 999 + [None], pa.string()), path)
    report = SourceReport()
    assert len(read(path, report=report)) == 999 and report.bad == 1
    pq.write_table(table(["a"] * 998 + [None], pa.string()), path)
    with pytest.raises(DataError, match=r"x\.parquet: 1 of 999 rows have no value .*limit: data\.max_bad = 0\.001"):
        read(path)
    assert len(read(path, max_bad=0.01)) == 998


def test_a_row_that_is_too_long_is_bad(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parquet, "LONGEST", 3)
    pq.write_table(table(["a", "long"], pa.string()), tmp_path / "x.parquet")
    with (tmp_path / "x.parquet").open("rb") as file:
        rows = list(parquet.texts(file, "x.parquet", "text", SourceReport(), max_bad=0.5))
    assert [b"".join(row) for row in rows] == [b"a"]


@pytest.mark.parametrize(
    ("values", "kind", "said"),
    [
        ([1, 2], pa.int64(), "the column 'text' holds int64"),
        ([["a"]], pa.list_(pa.string()), "the column 'text' holds list"),
        ([{"a": 1}], pa.struct({"a": pa.int64()}), "the column 'text' holds struct"),
    ],
)
def test_other_columns_are_named(tmp_path: Path, values: list[Any], kind: pa.DataType, said: str) -> None:
    path = tmp_path / "x.parquet"
    pq.write_table(table(values, kind), path)
    with pytest.raises(DataError, match=said):
        read(path)
    with pytest.raises(DataError, match=r"no column 'body': use --set data\.text_field=NAME; it has n, text"):
        read(path, text_field="body")


KINDS = [pa.string(), pa.large_string(), pa.string_view(), pa.binary(), pa.large_binary(), pa.binary_view()]
KINDS += [pa.dictionary(pa.int32(), pa.string()), pa.dictionary(pa.int8(), pa.large_string())]


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("encoding", [None, "PLAIN", "DELTA_BYTE_ARRAY", "DELTA_LENGTH_BYTE_ARRAY"])
def test_columns_of_any_kind_and_encoding(kind: pa.DataType, encoding: str | None, tmp_path: Path) -> None:
    """As Polars (views), DuckDB (delta encodings) and Arrow itself write them."""
    texts = ["text", None, "", "text", "texture", "ü"] * 3
    values = pa.array(texts).dictionary_encode().cast(kind) if pa.types.is_dictionary(kind) else pa.array(texts, kind)
    options: dict[str, Any] = {"use_dictionary": True}
    if encoding and not pa.types.is_dictionary(kind):
        options = {"use_dictionary": False, "column_encoding": {"text": encoding}}
    pq.write_table(pa.table({"n": range(18), "text": values}), tmp_path / "x.parquet", row_group_size=7, **options)
    report = SourceReport()
    assert read(tmp_path, report=report, max_bad=1.0) == [text.encode() for text in texts if text]
    assert (report.bad, report.empty) == (3, 3)


def test_columns_of_one_size_and_of_json(tmp_path: Path) -> None:
    columns = {"a": pa.array([b"abcd", None, b"abcd"], pa.binary(4))}
    if hasattr(pa, "json_"):  # since version 19
        columns["b"] = pa.ExtensionArray.from_storage(pa.json_(), pa.array(["[]", None, "[]"]))
    for name, column in columns.items():
        for dictionary in (True, False):
            pq.write_table(pa.table({"text": column}), tmp_path / f"{name}.parquet", use_dictionary=dictionary)
            assert read(tmp_path / f"{name}.parquet", max_bad=1.0) == [column[0].as_py() or b""] * 2 or name == "b"
    assert len(columns) == 1 or read(tmp_path / "b.parquet", max_bad=1.0) == [b"[]", b"[]"]


def test_a_reader_that_fails_in_the_middle_gives_no_row_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A column chunk may begin with a dictionary and go on in an encoding that pyarrow gives no dictionary of."""
    texts = [f"text {n}" for n in range(300)]
    pq.write_table(pa.table({"text": texts}), tmp_path / "x.parquet", row_group_size=100)
    monkeypatch.setattr("bytelm.data.parquet._BATCH", 0)  # a row at a time
    rows = parquet._rows

    def failing(source: Any, group: int, batch: int, skipped: int, text_field: str) -> Any:
        for n, value in enumerate(rows(source, group, batch, skipped, text_field)):
            if group == 1 and not skipped and n == 40:
                raise NotImplementedError("DecodeArrow of DictAccumulator")
            yield value

    monkeypatch.setattr(parquet, "_rows", failing)
    assert read(tmp_path) == [text.encode() for text in texts]


@pytest.mark.fault("D8")
def test_values_that_share_their_bytes_are_decoded_a_few_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In DELTA_BYTE_ARRAY a value is what differs from the one before: here 64 MB in less than a kilobyte."""
    monkeypatch.setattr(parquet, "SLACK", 4 << 20)
    how: dict[str, Any] = {"use_dictionary": False, "column_encoding": {"text": "DELTA_BYTE_ARRAY"}}
    values = table([b"x" * (256 << 10)] * 256, pa.binary())
    pq.write_table(values, tmp_path / "x.parquet", compression="ZSTD", **how)
    assert (tmp_path / "x.parquet").stat().st_size < 2000
    del values
    before, most, count = pa.total_allocated_bytes(), 0, 0
    with (tmp_path / "x.parquet").open("rb") as file, pytest.raises(DataError, match=r"x\.parquet expands to"):
        for row in parquet.texts(file, "x.parquet", "text", SourceReport(), 0.0):
            most = max(most, pa.total_allocated_bytes() - before)
            assert sum(map(len, row)) == 256 << 10
            count += 1
    assert count > 15 and most < 16 << 20


def test_to_a_modality_a_parquet_file_is_a_file(tmp_path: Path) -> None:
    pq.write_table(table(["a"], pa.string()), tmp_path / "x.parquet")
    whole = (tmp_path / "x.parquet").read_bytes()
    assert read(tmp_path, text_field=None) == [whole]
    (tmp_path / "x.parquet").rename(tmp_path / "x.parquet.gz")
    with pytest.raises(DataError, match=r"a compressed \.parquet file"):
        read(tmp_path)


@pytest.mark.fault("D9")
@settings(max_examples=60)
@given(st.data())
def test_any_damage_to_a_parquet_file_is_documents_or_one_error(data: st.DataObject) -> None:
    file = io.BytesIO()
    pq.write_table(table([b"some text %d" % i for i in range(50)], pa.binary()), file, compression="ZSTD")
    whole = bytearray(file.getvalue())
    at = data.draw(st.integers(0, len(whole) - 1))
    whole[at : at + 8] = data.draw(st.binary(max_size=12))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "x.parquet")
        path.write_bytes(whole[: data.draw(st.integers(0, len(whole)))] if data.draw(st.booleans()) else whole)
        try:
            read(path, max_bad=1.0)
        except DataError as error:
            assert "x.parquet" in str(error) and "\n" not in str(error)


def test_parquet_without_its_package_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x.parquet").write_bytes(b"x")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(MissingExtraError, match=r"pyarrow.*bytelm\[data\]"):
        read(tmp_path)


# --- datasets ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A dataset in a folder, of two splits; and nothing of the library's is written elsewhere, or asked of its hub."""
    import datasets
    import huggingface_hub.constants

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "set").mkdir()
    rows = [{"text": "one é"}, {"text": ""}, {"text": "two"}]
    (tmp_path / "set/train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    pq.write_table(table(["held", "out"], pa.string()), tmp_path / "set/validation.parquet")
    return tmp_path / "set"


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")
def test_datasets_are_streamed_by_split(folder: Path, tmp_path: Path) -> None:
    (folder / "validation.parquet").unlink()
    report = SourceReport()
    assert read("hf:./set", report=report) == ["one é".encode(), b"two"]
    assert (report.files, report.empty, report.bad) == (1, 1, 0)
    first = fingerprint(["hf:set"])
    assert first is not None and first == fingerprint(["hf:set"])
    (folder / "train.jsonl").write_text('{"text": "other"}')
    os.utime(folder / "train.jsonl", (9, 9))
    assert fingerprint(["hf:set"]) != first
    (folder / "train.jsonl").unlink()
    pq.write_table(table(["held", None, "out"], pa.string()), folder / "validation.parquet")
    with pytest.raises(DataError, match=r"hf:\./set#validation: 1 of 3 rows have no string"):
        read("hf:./set#validation")
    assert read("hf:./set#validation", max_bad=0.5) == [b"held", b"out"]


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")
def test_what_save_to_disk_wrote_is_loaded(folder: Path, tmp_path: Path) -> None:
    import datasets

    datasets.disable_progress_bars()
    rows = datasets.Dataset.from_dict({"text": ["one é", "", None, "two"], "n": [1, 2, 3, 4]})
    rows.save_to_disk("saved@[1]:v", num_shards=2)
    report = SourceReport()
    assert read("hf:saved@[1]:v", report=report, max_bad=0.25) == ["one é".encode(), b"two"]
    assert (report.files, report.empty, report.bad) == (1, 1, 1)
    first = fingerprint(["hf:saved@[1]:v"])
    assert first is not None and first == fingerprint(["hf:saved@[1]:v"])
    os.utime(tmp_path / "saved@[1]:v/state.json", (9, 9))
    assert fingerprint(["hf:saved@[1]:v"]) != first
    datasets.DatasetDict({"train": rows, "test": rows.select([3])}).save_to_disk("both")
    assert read("hf:both#test") == [b"two"] and len(read("hf:./both", max_bad=0.5)) == 2
    for path, said in (
        ("hf:saved@[1]:v#test", "was saved as one split alone: leave #test out"),
        ("hf:both#valid", "has no split 'valid': it has train, test"),
        ("hf:both:de", "has no configurations or revisions"),
        ("hf:both@v1", "has no configurations or revisions"),
    ):
        with pytest.raises(DataError, match=said):
            read(path)
    with pytest.raises(DataError, match=r"hf:both has no 'body': use --set data\.text_field=NAME; it has text, n"):
        read("hf:both", text_field="body")
    (tmp_path / "both/train/state.json").write_text("{}")
    with pytest.raises(DataError, match="hf:both cannot be loaded"):
        read("hf:both")


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")
@pytest.mark.parametrize("name", ["a@b", "a:b", "a#b", "a@b:c#d", "set@v1"])
def test_a_folder_of_any_name_is_a_dataset(name: str, folder: Path, tmp_path: Path) -> None:
    (tmp_path / name).mkdir()
    (tmp_path / name / "test.jsonl").write_text('{"text": "of its own"}')
    assert read(f"hf:./{name}#test") == read(f"hf:{tmp_path / name}#test") == [b"of its own"]


@pytest.mark.parametrize("name", ["a*", "a[1]", "a?", "a::b"])
def test_a_folder_that_the_library_takes_for_a_pattern_is_refused(name: str, folder: Path, tmp_path: Path) -> None:
    """It would read the folder a2 too, or nothing."""
    for each in (name, "a2"):
        (tmp_path / each).mkdir()
        (tmp_path / each / "train.jsonl").write_text('{"text": "x"}')
    with pytest.raises(DataError, match="in the name of a folder makes a pattern of it to the library: rename"):
        read(f"hf:./{name}")


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")
@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("hf:", "names no dataset"),
        ("hf:a@", "names no dataset"),
        ("hf:json", "write hf:OWNER/NAME"),
        ("hf:nobody/nothing", "hf:nobody/nothing cannot be loaded"),
        ("hf:./set#nope", "hf:./set#nope cannot be loaded"),
        ("hf:./set:nope", "hf:./set:nope cannot be loaded"),
    ],
)
def test_datasets_that_are_not_there_are_one_line(folder: Path, path: str, said: str) -> None:
    with pytest.raises(DataError, match=said) as caught:
        read(path)
    assert "\n" not in str(caught.value)


def test_what_datasets_cannot_give_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "validation.parquet").unlink()
    with pytest.raises(DataError, match=r"hf:\./set has no 'body': use --set data\.text_field=NAME; it has text"):
        read("hf:./set", text_field="body")
    with pytest.raises(DataError, match="gives text, and --as needs files"):
        read("hf:./set", text_field=None)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingExtraError, match=r"datasets.*bytelm\[data\]"):
        read("hf:./set")


@pytest.mark.fault("D12", "K5")
def test_the_script_of_a_dataset_and_pickled_arrays_are_refused(folder: Path, tmp_path: Path) -> None:
    """A script would leave a mark, and so would unpickling."""
    mark = tmp_path / "mark"
    for path in folder.iterdir():
        path.unlink()
    (folder / "set.py").write_text(f"open({str(mark)!r}, 'w')")
    with pytest.raises(DataError, match="cannot be loaded"):
        read("hf:./set")

    class Bomb:
        def __reduce__(self) -> Any:
            return open, (str(mark), "w")

    file = io.BytesIO()
    np.save(file, np.array([Bomb()], object), allow_pickle=True)
    (tmp_path / "x.npy").write_bytes(file.getvalue())
    from bytelm.data.convert import read as converted

    report = SourceReport()
    assert list(converted([tmp_path / "x.npy"], Config().build(), report=report)) == []
    assert "an array of object" in report.skipped[0][1]
    assert not mark.exists()


def test_names_of_columns_are_shown_on_one_line(tmp_path: Path) -> None:
    pq.write_table(pa.table({"te\nt": ["a"]}), tmp_path / "x.parquet")
    with pytest.raises(DataError) as refused:
        list(documents([tmp_path / "x.parquet"]))
    assert "\n" not in str(refused.value) and r"it has 'te\nt'" in str(refused.value)
