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
"""The published data sets by name, as items and as rows for training: `DATA_SETS`, `read_items`, `data_set_rows`.

```python
rows = data_set_rows("ct-rate", "/data/CT-RATE", split="train")
train_two_stage(dataset=rows, recipe=load_recipe("recipe.yaml"))
```

In a recipe: `train_data: ct-rate:/data/CT-RATE`, with `train_split`.
"""

import json
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
from datasets import Dataset, Features, IterableDataset, List, Value

from ct_moe import DataError

from . import ct_rate, m3d, own, radgenome, three_d_rad
from .item import BadRow, Item


class DataSetWarning(UserWarning):
    """Lines of a data set that training leaves out."""


@dataclass(frozen=True)
class DataSet:
    """A published data set.

    Attributes:
        title: its own name.
        read: (folder, split) -> items and bad rows.
        splits: that it has; the first is for training.
        licence: as its publishers state it.
        url: of its card.
        commercial: whether the licence allows commercial use of what is trained on it.
        intensity: what its scans hold: "hu", "display" for arrays in [0, 1], or `None` for what a model takes.
        protocol: what a reader of results must know about how it is asked.
    """

    title: str
    read: Callable[[Path, str], Iterator[Item | BadRow]]
    splits: tuple[str, ...]
    licence: str
    url: str
    commercial: bool
    intensity: str | None = "hu"
    protocol: str = ""


_HUB = "https://huggingface.co/datasets/"
_CT_RATE = "CC BY-NC-SA 4.0"
DATA_SETS = {
    "m3d-cap": DataSet(
        "M3D-Cap",
        m3d.read_cap,
        m3d.CAP_SPLITS,
        "Apache 2.0 by its card, from Radiopaedia (non-commercial); the Hub disabled it after a takedown notice",
        f"{_HUB}GoodBaiBai88/M3D-Cap",
        commercial=False,
        intensity="display",
    ),
    "m3d-vqa": DataSet(
        "M3D-VQA",
        m3d.read_vqa,
        tuple(m3d.VQA_SPLITS),
        "Apache 2.0 by its card, about the scans of M3D-Cap",
        f"{_HUB}GoodBaiBai88/M3D-VQA",
        commercial=False,
        intensity="display",
        protocol="every question closed and open; where the texts do not tell the right choice, by the letter alone",
    ),
    "ct-rate": DataSet(
        "CT-RATE, reports",
        ct_rate.read_reports,
        tuple(ct_rate.SPLITS),
        _CT_RATE,
        f"{_HUB}ibrahimhamamci/CT-RATE",
        commercial=False,
    ),
    "ct-rate-vqa": DataSet(
        "CT-RATE, questions of CT-CHAT",
        ct_rate.read_vqa,
        tuple(ct_rate.SPLITS),
        _CT_RATE,
        f"{_HUB}ibrahimhamamci/CT-RATE",
        commercial=False,
        protocol="a question comes after the earlier ones of its conversation, with their true answers",
    ),
    "radgenome": DataSet(
        "RadGenome-ChestCT",
        radgenome.read_vqa,
        tuple(ct_rate.SPLITS),
        f"CC BY 4.0 by its latest card (CC BY-NC-SA 4.0 before); its scans are CT-RATE's, {_CT_RATE}",
        f"{_HUB}RadGenome/RadGenome-ChestCT",
        commercial=False,
        protocol="in validation the publishers' one wording per part and their answers, without their model's marks",
    ),
    "3d-rad": DataSet(
        "3D-RAD",
        three_d_rad.read_vqa,
        three_d_rad.SPLITS,
        f"Apache 2.0 by its card; its scans are CT-RATE's, {_CT_RATE}",
        f"{_HUB}Tang-xiaoxiao/3D-RAD",
        commercial=False,
        protocol="existence with and without choices; the score of a task is the mean over its files",
    ),
    "own": DataSet("your own", own.read_own, ("train", "validation", "test"), "yours", "", True, intensity=None),
}
# Of the rows that come of items; `load_rows` numbers them.
ITEM_FEATURES = Features(
    {
        "images": List(Value("string")),
        "prompt": List({"role": Value("string"), "content": Value("string")}),
        "completion": List({"role": Value("string"), "content": Value("string")}),
        "task": Value("string"),
    }
)
_AT_ONCE = 10_000  # rows that are put into a table together


def licence_text(data_set: DataSet) -> str:
    """The licence, and whether what is trained on the data may be used commercially."""
    return data_set.licence + ("" if data_set.commercial else "; not for commercial use, nor are models trained on it")


def find_data_set(name: str) -> DataSet:
    """By its name; raises `DataError` for one that is unknown."""
    if name not in DATA_SETS:
        raise DataError(name, "is no known data set", f"Use one of {', '.join(DATA_SETS)}")
    return DATA_SETS[name]


def read_items(name: str, root: str | Path, split: str) -> Iterator[Item | BadRow]:
    """Items of one split in the order of its files, and the lines that give none.

    Args:
        name: from `DATA_SETS`.
        root: folder of the download, laid out as it is published; for "own" also a file.
        split: one of the data set's.

    Raises:
        DataError: a file is missing, cannot be read or lacks a column, or the split is unknown.
    """
    ids: dict[str, tuple[str, int]] = {}
    for item in find_data_set(name).read(Path(root), split):
        if isinstance(item, Item):
            first = ids.setdefault(item.id, item.where)
            finding = f"its id is that of line {first[1]}" if first != item.where else _unwritable(item)
            if finding:
                item = BadRow(*item.where, finding)
        yield item


def data_set_rows(name: str, root: str | Path, split: str, *, streaming: bool = False) -> Dataset | IterableDataset:
    """Rows for training, which `load_rows` takes. Lines that cannot be used are left out, with a warning at the end;
    streamed rows, which may never come to their end, warn at the first such line too.

    Args:
        name, root, split: as in `read_items`.
        streaming: read rows as they are needed; otherwise all of them now, into memory.

    Raises:
        DataError: as in `read_items`, or no line can be used.
    """
    if streaming:
        settings = {"name": name, "root": str(root), "split": split, "streaming": True}
        return IterableDataset.from_generator(_rows, gen_kwargs=settings, features=ITEM_FEATURES)
    tables, rows = [], []
    for row in _rows(name, str(root), split):
        rows.append(row)
        if len(rows) == _AT_ONCE:
            tables.append(pa.Table.from_pylist(rows, ITEM_FEATURES.arrow_schema))
            rows = []
    if rows or not tables:
        tables.append(pa.Table.from_pylist(rows, ITEM_FEATURES.arrow_schema))
    table = pa.concat_tables(tables)
    if not len(table):
        raise DataError(str(root), f"{name} has no row that can be used in {split}", "Run: ct-moe check")
    return Dataset(table)


def _unwritable(item: Item) -> str | None:
    """What neither a table nor a file system takes, though JSON can write it."""
    if any("\0" in image for image in item.images):
        return "a path with a NUL character"
    try:
        json.dumps([item.images, item.prompt, item.completion, item.id], ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return "a text with half a character"
    return None


def _rows(name: str, root: str, split: str, streaming: bool = False) -> Iterator[dict[str, Any]]:
    def warn(lines: str) -> None:
        # At this place, whoever reads the rows: a filter for this package must find it.
        message = f"{name}: {lines} cannot be used, the first is {first}. All: ct-moe check"
        warnings.warn(message, DataSetWarning, stacklevel=1)

    bad, first = 0, None
    for item in read_items(name, root, split):
        if isinstance(item, BadRow):
            if not item.is_left_out:
                bad, first = bad + 1, first or item
                if streaming and bad == 1:
                    warn("lines")
            continue
        row = item.row()
        prompt = row["prompt"] if isinstance(row["prompt"], list) else [{"role": "user", "content": row["prompt"]}]
        yield {**row, "prompt": prompt, "completion": [{"role": "assistant", "content": row["completion"]}]}
    if bad:
        warn(f"{bad} lines")
