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
"""Tasks of a saved model: listed, renamed, removed and added without touching any other weight.

In Python the same is `model.add_task`, `model.remove_task` and `model.rename_task`.
"""

from collections.abc import Iterable
from pathlib import Path

from ct_moe import CTMoEConfig

from .folder import check_model, load_folder, save_folder


def list_tasks(model: str, revision: str | None = None) -> list[str]:
    """Names of the tasks of a model folder or Hub id; their places in the list are the `task_ids`.

    Raises:
        ModelError: there is no CT-MoE model.
    """
    return CTMoEConfig.from_pretrained(model, revision=check_model(model, revision)).tasks


def edit_tasks(
    model: str,
    out: str | Path,
    *,
    rename: Iterable[tuple[str, str]] = (),
    remove: Iterable[str] = (),
    add: Iterable[tuple[str, str | None]] = (),
    revision: str | None = None,
) -> list[str]:
    """Write a copy of a model with other tasks.

    Args:
        model: folder or Hub id; it is not changed.
        out: folder to create; it must not exist or be empty.
        rename: (old name, new name).
        remove: names.
        add: (name, task whose experts and routers it starts as a copy of, or None). Names after renaming.
        revision: branch, tag or commit of a Hub repository.

    Returns:
        The names of all tasks.

    Raises:
        ModelError: there is no CT-MoE model, `out` holds something, a name is unknown, taken or empty.
    """
    network, processor, _ = load_folder(model, revision=revision)
    for old, new in rename:
        network.rename_task(old, new)
    for name in remove:
        network.remove_task(name)
    for name, source in add:
        network.add_task(name, init_from=source)
    processor.tasks = list(network.config.tasks)
    save_folder(network, processor, out)
    return processor.tasks
