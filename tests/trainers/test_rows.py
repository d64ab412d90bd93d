# Copyright 2026 The CT-MoE authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""Rows are the same from every format, streamed or not; what cannot be used is named and never quoted."""

import gc
import json
import pickle
from collections import Counter
from itertools import islice
from pathlib import Path

import datasets
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, IterableDataset, List, Nifti, Value
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from ct_moe import DataError, load_volume
from ct_moe.trainers.phantoms.chest import write_phantom
from ct_moe.trainers.rows import ROW_FEATURES, check_tasks, count_tasks, interleave_tasks, load_rows


SECRET = "Doe Jane 1951 nodule"
AWKWARD = ['say "nodule"; or, not\nat all', "Größe: 5 mm ± 肺 🫁", "NA", "007", "True", " spaces ", "None"]
NIFTI_FEATURES = Features({**ROW_FEATURES, "images": List(Nifti(decode=False))})


# `datasets` leaves the closing of CSV files that it streams to the garbage collector.
pytestmark = pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")


@pytest.fixture(scope="module", autouse=True)
def _close_files():
    yield
    gc.collect()  # while the warning is ignored


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    """The cache of `datasets`, which holds copies of the texts."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder)
    return folder


@pytest.fixture(scope="module")
def scan(tmp_path_factory):
    return write_phantom(tmp_path_factory.mktemp("scan") / "phantom.nii.gz", shape=(4, 16, 16))


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def row(number=1, images=(), prompt="q", completion="a", task=None):
    return {
        "images": list(images),
        "prompt": [user(prompt)],
        "completion": [assistant(completion)],
        "task": task,
        "row": number,
    }


def write(path, records):
    """Write the records in the format that the suffix names."""
    table = pd.DataFrame(records)
    if path.suffix in (".csv", ".tsv"):
        table.to_csv(path, index=False, sep="," if path.suffix == ".csv" else "\t")
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    elif path.suffix == ".json":
        path.write_text(json.dumps(records, ensure_ascii=False, indent=1), encoding="utf-8")
    elif path.suffix == ".parquet":
        table.to_parquet(path)
    elif path.name == "saved":
        Dataset.from_list(records).save_to_disk(path)
    else:
        (path / "data").mkdir(parents=True)
        table.to_parquet(path / "data" / "train-00000-of-00001.parquet")
    return path


def both(source, **kwargs):
    """The rows, which are the same whether streamed or not."""
    rows, streamed = load_rows(source, **kwargs), load_rows(source, streaming=True, **kwargs)
    assert isinstance(rows, Dataset)
    assert isinstance(streamed, IterableDataset)
    assert rows.features == streamed.features
    assert list(rows) == list(streamed)
    return rows


def refusal(source, **kwargs):
    """The error of reading all rows, which is the same whether streamed or not but for the count of bad rows."""
    with pytest.raises(DataError) as caught:
        load_rows(source, **kwargs)
    with pytest.raises(DataError) as streamed:
        list(load_rows(source, streaming=True, **kwargs))
    finding = caught.value.finding.partition(" rows cannot be used: ")[2] or caught.value.finding
    assert finding.startswith(streamed.value.finding)
    assert SECRET not in str(caught.value) + str(streamed.value)
    return str(caught.value)


FORMATS = ["rows.csv", "rows.tsv", "rows.jsonl", "rows.json", "rows.parquet", "saved", "repository"]


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_the_same_rows(tmp_path, name):
    records = [
        {"image": "a.nii.gz", "prompt": "Describe the scan.", "completion": text, "task": "report", "other": i}
        for i, text in enumerate(AWKWARD)
    ]
    records.append({"image": "", "prompt": "What is CT?", "completion": "An X-ray method", "task": "", "other": 9})
    rows = both(write(tmp_path / name, records))
    folder = tmp_path if "." in name else tmp_path / name
    assert rows.features == ROW_FEATURES
    assert list(rows) == [
        *(
            row(i, [str(folder / "a.nii.gz")], "Describe the scan.", text, "report")
            for i, text in enumerate(AWKWARD, start=1)
        ),
        row(len(AWKWARD) + 1, [], "What is CT?", "An X-ray method"),
    ]


@pytest.mark.parametrize("suffix", [".csv", ".tsv"])
@given(data=st.data())
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_cells_come_back_as_they_were_written(tmp_path_factory, suffix, data):
    # Without NUL and a lone carriage return, which no CSV reader keeps apart from a line end.
    text = st.text(st.characters(codec="utf-8", exclude_characters="\0\r"), min_size=1).filter(str.strip)
    cells = data.draw(st.lists(st.tuples(text, text), min_size=1, max_size=4))
    path = tmp_path_factory.mktemp("cells") / f"rows{suffix}"
    write(path, [{"images": "", "prompt": prompt, "completion": completion} for prompt, completion in cells])
    assert list(load_rows(path, streaming=True)) == [row(i, [], *texts) for i, texts in enumerate(cells, start=1)]


def test_a_cell_holds_several_paths_between_semicolons(tmp_path):
    path = write(tmp_path / "rows.csv", [{"images": "a.nii; sub/b.nii ;", "prompt": "q", "completion": "a"}])
    assert both(path)["images"][0] == [str(tmp_path / "a.nii"), str(tmp_path / "sub" / "b.nii")]
    path = write(tmp_path / "rows.jsonl", [{"images": "a;b.nii", "prompt": "q", "completion": "a"}])
    assert both(path)["images"][0] == [str(tmp_path / "a;b.nii")]


def test_a_header_of_excel_and_a_short_row_are_read(tmp_path):
    (tmp_path / "rows.csv").write_bytes("\ufeffimages,prompt,completion,task\na.nii,Größe?,5 mm\n".encode())
    assert list(both(tmp_path / "rows.csv")) == [row(1, [str(tmp_path / "a.nii")], "Größe?", "5 mm")]


def test_only_relative_paths_start_at_the_folder_of_the_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lists").mkdir()
    images = ["a.nii", "../scans/b.nii", "/abs/c.nii", "https://host/d.nii", "hf://datasets/owner/name/e.nii"]
    path = write(Path("lists", "rows.jsonl"), [{"images": images, "prompt": "q", "completion": "a"}])
    own, beside, *others = both(path)["images"][0]
    assert own == str(tmp_path / "lists" / "a.nii")
    assert beside == str(tmp_path / "scans" / "b.nii")
    assert others == images[2:]
    in_memory = Dataset.from_dict({"images": [images], "prompt": ["q"], "completion": ["a"]})
    assert both(in_memory)["images"][0] == images


def test_messages_and_text_blocks_become_messages_of_text(tmp_path):
    record = {
        "images": ["/a.nii", "/b.nii"],
        "prompt": [
            {"role": "system", "content": "Be brief."},
            {
                "role": "user",
                "content": [{"type": "image"}, {"type": "text", "text": "x"}, {"type": "text", "text": "y"}],
            },
            {"role": "assistant", "content": [{"type": "text", "text": "z"}]},
            {"role": "user", "content": [{"type": "text", "text": "And now?"}, {"type": "image"}]},
        ],
        "completion": [{"role": "assistant", "content": "Nothing.", "name": "model"}],
    }
    expected = row(1, record["images"], "And now?", "Nothing.")
    expected["prompt"] = [{"role": "system", "content": "Be brief."}, user("x\ny"), assistant("z"), user("And now?")]
    assert list(both(write(tmp_path / "rows.jsonl", [record]))) == [expected]
    # Arrow gives all blocks of a column the same keys.
    blocks = [{"type": "image", "text": None}, {"type": "text", "text": "q"}]
    rows = Dataset.from_list([{"image": None, "prompt": [{"role": "user", "content": blocks}], "completion": "a"}])
    assert list(both(rows)) == [row()]


def test_text_and_messages_may_be_mixed_in_one_file(tmp_path):
    records = [{"image": None, "prompt": prompt, "completion": "a"} for prompt in ("q", [user("q")])]
    assert list(both(write(tmp_path / "rows.jsonl", records))) == [row(1), row(2)]


def test_task_names_come_from_class_labels(tmp_path):
    features = Features({"task": ClassLabel(names=["report", "vqa"])})
    features |= dict.fromkeys(("image", "prompt", "completion"), Value("string"))
    records = [{"task": task, "image": "", "prompt": "q", "completion": "a"} for task in (1, 0, None, -1)]
    Dataset.from_list(records, features=features).to_parquet(tmp_path / "rows.parquet")
    assert both(tmp_path / "rows.parquet")["task"][:] == ["vqa", "report", None, None]


def test_one_split_of_a_folder_is_read(tmp_path):
    record = {"image": "a.nii", "prompt": "q", "completion": "a"}
    parts = DatasetDict(train=Dataset.from_list([record] * 2), test=Dataset.from_list([record]))
    parts.save_to_disk(tmp_path / "saved")
    (tmp_path / "repository").mkdir()
    for name, part in parts.items():
        part.to_parquet(tmp_path / "repository" / f"{name}-00000-of-00001.parquet")
    for folder in ("saved", "repository"):
        assert len(both(tmp_path / folder)) == 2
        assert len(both(tmp_path / folder, split="test")) == 1
        for streaming in (False, True):
            with pytest.raises(DataError, match=r"split.*dev.*'?train'?, '?test'?"):
                load_rows(tmp_path / folder, split="dev", streaming=streaming)
    with pytest.raises(DataError, match="is a DatasetDict"):
        load_rows(parts)


@pytest.mark.parametrize("single", [True, False])
def test_nifti_values_are_not_decoded(tmp_path, scan, monkeypatch, single):
    broken = {"path": "b.nii.gz", "bytes": b"no scan"}
    scans = [{"path": str(scan), "bytes": None}, {"path": "rel/c.nii.gz", "bytes": None}, broken, None]
    feature = Nifti() if single else List(Nifti())
    values = scans if single else [[one] if one else [] for one in scans]
    name = "image" if single else "images"
    features = Features({name: feature, "prompt": Value("string"), "completion": Value("string")})
    source = Dataset.from_dict({name: values, "prompt": list("pqrs"), "completion": ["a"] * 4}, features=features)
    expected = [[one] if one else [] for one in scans]

    rows = both(source)
    assert rows.features == NIFTI_FEATURES
    assert list(rows["images"]) == expected
    assert list(both(rows)) == list(rows)
    assert load_volume(rows[0]["images"][0]).hu.shape == (4, 16, 16)

    # The indices of a shuffled data set, and tables in several pieces.
    several = datasets.concatenate_datasets([source.select([3, 0]), source.select([2, 1])])
    assert list(both(several)["images"]) == [expected[i] for i in (3, 0, 2, 1)]
    assert list(both(several)["row"]) == [1, 2, 3, 4]

    source.to_parquet(tmp_path / "rows.parquet")
    monkeypatch.chdir(scan.parent)  # paths in a file start there, and not where the program runs
    places = [expected[0], [{"path": str(tmp_path / "rel/c.nii.gz"), "bytes": None}], expected[2], expected[3]]
    assert list(both(tmp_path / "rows.parquet")["images"]) == places


def test_the_bytes_of_scans_are_not_copied():
    features = Features({"image": Nifti(), "prompt": Value("string"), "completion": Value("string")})
    image = [{"path": "a.nii", "bytes": b"0" * 2**20}] * 20
    source = Dataset.from_dict({"image": image, "prompt": ["q"] * 20, "completion": ["a"] * 20}, features=features)
    before = pa.total_allocated_bytes()
    rows = load_rows(source)
    assert pa.total_allocated_bytes() - before < 2**20
    assert len(rows[19]["images"][0]["bytes"]) == 2**20


def test_nifti_entries_without_scan_are_refused_beside_other_bad_rows(tmp_path):
    features = Features({"images": List(Nifti()), "prompt": Value("string"), "completion": Value("string")})
    images = [[{"path": "a.nii", "bytes": None}, None], [], [None], [{"path": "", "bytes": None}]]
    table = {"images": images, "prompt": ["q", " ", " ", "q"], "completion": ["a"] * 4}
    message = refusal(Dataset.from_dict(table, features=features))
    assert "4 of 4 rows" in message
    assert "row 1, images: has an empty entry; row 2, prompt: is blank; row 3, images: has an empty entry" in message


def test_scans_of_a_nifti_folder_are_found(tmp_path):
    write_phantom(tmp_path / "a.nii.gz", shape=(4, 16, 16))
    write(tmp_path / "metadata.jsonl", [{"image_file_name": "a.nii.gz", "prompt": "q", "completion": "a"}])
    rows = both(tmp_path)
    assert rows.features == NIFTI_FEATURES
    assert rows[0]["images"] == [{"bytes": None, "path": str(tmp_path / "a.nii.gz")}]


def good(**changes):
    return {"images": [], "prompt": [user("q")], "completion": [assistant("a")], "task": "report", **changes}


@pytest.mark.parametrize(
    ("changes", "finding"),
    [
        ({"completion": [assistant("  \n")]}, "completion: is blank"),
        ({"completion": []}, "completion: is blank"),
        ({"completion": None}, "completion: is blank"),
        ({"completion": [user(SECRET)]}, "completion: is not by the assistant"),
        ({"completion": [assistant(SECRET), assistant(SECRET)]}, "completion: has 2 messages"),
        ({"completion": [assistant(None)]}, "completion: has a message without text"),
        ({"prompt": [user("   ")]}, "prompt: is blank"),
        ({"prompt": None}, "prompt: is blank"),
        ({"prompt": [user(SECRET), assistant(SECRET)]}, "prompt: does not end with a user message"),
        ({"prompt": [{"role": SECRET, "content": SECRET}]}, "prompt: has a message without a known role"),
        ({"prompt": [{"role": "tool", "content": SECRET}]}, "prompt: has a message without a known role"),
        ({"images": ["/a.nii", None]}, "images: has an empty entry"),
        ({"images": [" "]}, "images: has an empty entry"),
    ],
)
def test_a_bad_row_is_named_and_not_quoted(tmp_path, changes, finding):
    path = write(tmp_path / "rows.parquet", [good(images=["/a.nii"]), good(**changes), good()])
    message = refusal(path)
    assert message.startswith(f"{path}: 1 of 3 rows cannot be used: row 2, {finding}. ")


def blocks(*contents):
    return {"prompt": [{"role": "user", "content": list(contents)}]}


@pytest.mark.parametrize(
    ("changes", "finding"),
    [
        (blocks({"type": "video"}, {"type": "text", "text": SECRET}), "prompt: has a block that is neither text nor"),
        (blocks({"type": "text", "text": SECRET}, {"type": SECRET}), "prompt: has a block that is neither text nor"),
        (blocks({"type": "text"}), "prompt: has a block that is neither text nor"),
        (blocks({"type": "image", "path": SECRET}), "prompt: has a scan in an image block"),
        (blocks({"type": "image"}), "prompt: is blank"),
        (blocks(SECRET), "prompt: has a message without text"),
        ({"prompt": [SECRET]}, "prompt: has a message without a known role"),
        ({"prompt": {"role": "user", "content": SECRET}}, "prompt: is of type dict"),
        ({"completion": 5}, "completion: is of type int"),
        ({"images": 5}, "images: has an entry of type int"),
        ({"task": 5}, "task: is of type int"),
    ],
)
def test_a_value_of_a_wrong_kind_is_named_and_not_quoted(tmp_path, changes, finding):
    assert f"1 of 1 rows cannot be used: row 1, {finding}" in refusal(write(tmp_path / "a.jsonl", [good(**changes)]))


def test_all_bad_rows_are_counted_and_five_are_named(tmp_path):
    records = [{"image": "", "prompt": "q", "completion": "" if i % 2 else SECRET} for i in range(20)]
    records[2]["prompt"] = " "
    message = refusal(write(tmp_path / "rows.csv", records))
    assert "11 of 20 rows" in message
    assert [part.split(",")[0] for part in message.split("row ")[1:6]] == ["2", "3", "4", "6", "8"]
    assert message.count("row ") == 5 + message.count("the row ")


@given(text=st.text(min_size=12).filter(lambda text: text.strip() and not text.isascii()))
@settings(max_examples=30, deadline=None)
def test_no_error_quotes_a_row(text):
    bad = [
        {"prompt": [user(text), assistant(text)]},
        {"prompt": [{"role": text, "content": text}]},
        {"completion": [assistant(text), assistant(text)]},
        {"completion": [{"role": "assistant", "content": None}], "images": [text]},
    ]
    for changes in bad:
        with pytest.raises(DataError) as caught:
            load_rows(Dataset.from_list([good(**changes)]))
        assert text.strip() not in str(caught.value)
        assert text.strip() not in repr(caught.value.__cause__)
    with pytest.raises(DataError) as caught:
        check_tasks(load_rows(Dataset.from_list([good(task=text)])), ["report"])
    assert text.strip() not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "finding"),
    [
        ("rows.csv", "", "cannot be read (No columns to parse from file)"),
        ("rows.csv", "images,prompt,completion\n", "has no rows"),
        ("rows.jsonl", "", "has no rows"),
        ("rows.json", "[]", "has no rows"),
        ("rows.csv", f"images,prompt,completion\n,q,a\n,q,a,{SECRET}\n", "Expected 3 fields in line 3, saw 4)"),
        ("rows.csv", f"images,prompt,completion\n,q,a,{SECRET}\n", "rows have more cells than the header"),
        ("rows.csv", f"scan.nii,{SECRET},{SECRET}\nscan.nii,q,a\n", "found: no known name; is the header missing?"),
        (
            "rows.csv",
            "images,question,answer\n,q,a\n",
            "no column prompt, completion; found: images, question, answer",
        ),
        ("rows.jsonl", '{"prompt": "q", "completion": "a"}\n', "no column images; found: prompt, completion"),
        ("rows.jsonl", '{"image": "", "images": [], "prompt": "q", "completion": "a"}\n', "both `image` and `images`"),
        ("rows.jsonl", f'{{"images": [], "prompt": "{SECRET}\n', "cannot be read (JSON parse error"),
        ("rows.parquet", SECRET, "cannot be read (ArrowInvalid)"),
        ("rows.xlsx", SECRET, "unknown file type .xlsx. Use .csv, .tsv, .json, .jsonl, .parquet"),
        ("rows", SECRET, "unknown file type without suffix"),
    ],
)
def test_a_file_that_is_not_of_rows_is_refused(tmp_path, name, content, finding):
    (tmp_path / name).write_text(content, encoding="utf-8")
    message = refusal(tmp_path / name)
    assert message.startswith(f"{tmp_path / name}: ")
    assert finding in message


def test_text_in_another_encoding_is_refused(tmp_path):
    (tmp_path / "rows.csv").write_bytes("images,prompt,completion\n,Größe?,5 mm\n".encode("cp1252"))
    message = refusal(tmp_path / "rows.csv")
    assert "'utf-8' codec can't decode" in message
    assert "Repair" in message


def test_missing_files_and_empty_data_sets_are_refused(tmp_path):
    assert "there is no such file" in refusal(tmp_path / "rows.csv")
    assert "there is no such file or folder" in refusal(tmp_path / "folder")
    (tmp_path / "folder").mkdir()
    assert "cannot be read (EmptyDatasetError)" in refusal(tmp_path / "folder")
    assert "has no rows" in refusal(Dataset.from_dict({"images": [], "prompt": [], "completion": []}))
    assert "has no rows" in refusal(Dataset.from_dict({}))
    pq.write_table(pa.table({name: pa.array([], pa.string()) for name in good()}), tmp_path / "rows.parquet")
    assert "has no rows" in refusal(tmp_path / "rows.parquet")
    assert "is a list" in refusal([good()])


@pytest.mark.parametrize(
    ("feature", "kind"),
    [
        (Image(), "Image"),
        (List(Image()), "Image"),
        (List(List(Value("string"))), "List"),
        ({"a": Value("string")}, "dict"),
    ],
)
def test_images_of_another_kind_are_refused(feature, kind):
    features = Features({"images": feature, "prompt": Value("string"), "completion": Value("string")})
    rows = Dataset.from_dict({"images": [None], "prompt": ["q"], "completion": ["a"]}, features=features)
    assert f"column images holds {kind} values" in refusal(rows)


@pytest.mark.parametrize("column", ["messages", "conversations"])
def test_the_messages_form_is_refused_with_the_reason(tmp_path, column):
    path = write(tmp_path / "rows.jsonl", [{"images": [], column: [user(SECRET), assistant(SECRET)]}])
    message = refusal(path)
    assert f"has the form `{column}`" in message
    assert "could contain the answer" in message
    assert "Split it into `prompt`" in message
    both(Dataset.from_list([{**good(), column: [user("q"), assistant("a")]}]))  # dropped like any other column


TEXT = st.text(st.characters(codec="utf-8"), max_size=8)
QUESTION = TEXT.filter(str.strip)
RECORDS = st.lists(
    st.fixed_dictionaries(
        {
            "images": st.lists(st.text("ab./; ", min_size=1).filter(str.strip), max_size=2),
            "prompt": st.builds(
                lambda before, last: [*before, user(last)],
                st.lists(
                    st.builds(
                        lambda role, text: {"role": role, "content": text},
                        st.sampled_from(["system", "user", "assistant"]),
                        TEXT,
                    ),
                    max_size=2,
                ),
                QUESTION,
            ),
            "completion": QUESTION | QUESTION.map(lambda text: [assistant(text)]),
            "task": st.none() | TEXT,
        }
    ),
    min_size=1,
    max_size=4,
)


@given(records=RECORDS)
@settings(max_examples=25, deadline=None)
def test_rows_stay_what_they_are_when_loaded_again(records):
    features = Features({**ROW_FEATURES, "completion": datasets.Json()})
    features.pop("row")
    columns = {name: [record[name] for record in records] for name in features}
    columns["completion"] = [c if isinstance(c, list) else [assistant(c)] for c in columns["completion"]]
    rows = load_rows(Dataset.from_dict(columns, features=features))
    assert list(both(rows)) == list(rows)


def test_rows_keep_their_numbers_when_some_are_taken_out(tmp_path):
    path = write(tmp_path / "rows.csv", [{"image": f"{i}.nii", "prompt": "q", "completion": "a"} for i in range(1, 5)])
    rows = load_rows(path).select([3, 1])
    assert list(both(rows)["row"]) == [4, 2]
    load_rows(path).to_parquet(tmp_path / "again.parquet")
    assert list(both(tmp_path / "again.parquet")) == list(load_rows(path))
    # A column that happens to have the name is none of ours.
    other = Dataset.from_list([{"image": None, "prompt": "q", "completion": "a", "row": 77}])
    assert list(both(other)["row"]) == [1]


def test_streaming_leaves_nothing_in_the_cache_and_rows_add_nothing(tmp_path, cache):
    records = [{"image": "a.nii", "prompt": "q", "completion": SECRET, "task": "report"}] * 3
    for name in ("rows.csv", "rows.jsonl", "rows.parquet"):
        list(interleave_tasks(load_rows(write(tmp_path / name, records), streaming=True), tasks=["report"]))
    assert not [file for file in cache.rglob("*") if file.is_file() and file.stat().st_size]
    rows = load_rows(tmp_path / "rows.csv")
    assert rows.cache_files == []
    files = [file for file in cache.rglob("*") if file.is_file()]
    assert [file.name for file in files if SECRET.encode() in file.read_bytes()] == ["csv-train.arrow"]
    load_rows(rows)
    interleave_tasks(rows)
    assert len(list(cache.rglob("*.arrow"))) == 1


def test_a_changed_file_is_read_again(tmp_path):
    path = write(tmp_path / "rows.csv", [{"image": "", "prompt": "q", "completion": "before"}])
    load_rows(path)
    write(path, [{"image": "", "prompt": "q", "completion": "afterwards"}])
    assert load_rows(path)["completion"][0] == [assistant("afterwards")]


def test_data_loader_workers_read_streamed_rows(tmp_path):
    path = write(tmp_path / "rows.csv", [{"image": "a.nii", "prompt": "q", "completion": "a"}] * 2)
    rows = load_rows(path, streaming=True)
    assert list(DataLoader(rows, batch_size=None, num_workers=1)) == list(rows)
    assert list(pickle.loads(pickle.dumps(rows))) == list(rows)  # as workers get them that are not forked


def rows_of(counts):
    """Rows with so many of every task, task after task."""
    tasks = [task for task, count in counts.items() for _ in range(count)]
    return load_rows(Dataset.from_list([{**good(), "task": task} for task in tasks]))


def test_tasks_are_counted_without_the_unlabelled_rows():
    assert count_tasks(rows_of({"vqa": 2, None: 3, "report": 1})) == {"report": 1, "vqa": 2}
    assert count_tasks(rows_of({None: 2})) == {}


def test_unknown_tasks_are_named():
    rows = rows_of({"report": 1, "raport": 2, None: 1, SECRET: 1})
    assert check_tasks(rows, ["report", "raport", SECRET]) is rows
    with pytest.raises(DataError) as caught:
        check_tasks(rows, ["report", "vqa"], source="rows.csv")
    assert str(caught.value) == (
        "rows.csv: 3 of 5 rows cannot be used: row 2, task: is 'raport', which the model does not have; "
        "row 3, task: is 'raport', which the model does not have; "
        "row 5, task: is no name, which the model does not have. Use report, vqa, or leave it empty."
    )
    streamed = check_tasks(load_rows(rows, streaming=True), ["report", "vqa"])
    assert streamed.features == ROW_FEATURES
    assert [one["row"] for one in islice(streamed, 1)] == [1]
    with pytest.raises(DataError, match="row 2, task: is 'raport'"):
        list(streamed)


COUNTS = st.dictionaries(st.sampled_from(["report", "vqa_open", "vqa_closed", None]), st.integers(1, 7), min_size=1)


@given(counts=COUNTS, seed=st.integers(0, 3))
@settings(max_examples=25, deadline=None)
def test_a_pass_has_as_many_rows_of_every_task_and_all_rows(counts, seed):
    rows = rows_of(counts)
    taken = interleave_tasks(rows, seed)
    largest = max(counts.values())
    assert Counter(taken["task"]) == dict.fromkeys(counts, largest)
    assert set(taken["row"]) == set(rows["row"])
    times = Counter(taken["row"])
    for one in rows:
        assert times[one["row"]] in (largest // counts[one["task"]], -(-largest // counts[one["task"]]))
    assert list(taken) == list(interleave_tasks(rows, seed))
    assert taken.features == ROW_FEATURES


@given(counts=COUNTS)
@settings(max_examples=15, deadline=None)
def test_streamed_rows_take_turns_until_all_were_seen(counts):
    rows = rows_of(counts)
    taken = list(
        interleave_tasks(load_rows(rows, streaming=True), tasks=["report", "absent", "vqa_open", "vqa_closed"])
    )
    assert {one["row"] for one in taken} == set(rows["row"])
    kinds = [task for task in ("report", "vqa_open", "vqa_closed", None) if task in counts]
    assert [one["task"] for one in taken] == [kinds[i % len(kinds)] for i in range(len(taken))]
    assert len(kinds) * (max(counts.values()) - 1) < len(taken) <= len(kinds) * max(counts.values())


def test_tasks_take_turns_in_the_order_given_and_the_seed_decides_inside():
    rows = rows_of({"report": 20, "vqa": 20, None: 20})
    assert interleave_tasks(rows)["task"][:4] == ["report", "vqa", None, "report"]
    assert interleave_tasks(rows, tasks=["vqa", "absent", "report"])["task"][:4] == ["vqa", "report", None, "vqa"]
    assert interleave_tasks(rows, 0)["row"][:] != interleave_tasks(rows, 1)["row"][:]


def test_one_kind_of_rows_comes_back_unchanged():
    for counts in ({"report": 3}, {None: 2}):
        rows = rows_of(counts)
        assert interleave_tasks(rows) is rows
        streamed = load_rows(rows, streaming=True)
        assert interleave_tasks(streamed, tasks=["report", "vqa"]) is streamed


def test_rows_of_other_tasks_are_not_left_out_silently():
    rows = rows_of({"report": 1, "vqa": 1})
    with pytest.raises(DataError, match="row 2, task: is 'vqa'"):
        interleave_tasks(rows, tasks=["report"])
    with pytest.raises(DataError, match="row 2, task: is 'vqa'"):
        list(interleave_tasks(load_rows(rows, streaming=True), tasks=["report"]))
    with pytest.raises(DataError, match="missing for streamed rows"):
        interleave_tasks(load_rows(rows, streaming=True))


def test_interleaving_leaves_scans_undecoded():
    features = Features(
        {"image": Nifti(), "prompt": Value("string"), "completion": Value("string"), "task": Value("string")}
    )
    image = [{"path": f"{i}.nii", "bytes": b"no scan"} for i in range(3)]
    table = {"image": image, "prompt": ["q"] * 3, "completion": ["a"] * 3, "task": ["report", "report", "vqa"]}
    rows = load_rows(Dataset.from_dict(table, features=features))
    for taken in (interleave_tasks(rows), interleave_tasks(load_rows(rows, streaming=True), tasks=["report", "vqa"])):
        assert taken.features == NIFTI_FEATURES
        assert {one["images"][0]["path"] for one in taken} == {"0.nii", "1.nii", "2.nii"}
