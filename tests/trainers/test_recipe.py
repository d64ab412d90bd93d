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
"""Recipes in YAML: every setting arrives, every mistake is named."""

import pytest

from ct_moe import TrainingError
from ct_moe.trainers import Stage1Config, Stage2Config, load_recipe


RECIPE = """
model: ./model
train_data: rows.csv
output_dir: run
use_cpu: true
learning_rate: 1e-3          # without a point YAML reads this as a word
per_device_train_batch_size: 3
learning_rates: {projector: 2.0e-4}
stage1:
  num_train_epochs: 2
  train_language_model: full
stage2:
  learning_rates: {task_groups: 1.0e-2}
  lora_r: 4
"""


@pytest.fixture
def write(tmp_path):
    def write(text: str):
        path = tmp_path / "recipe.yaml"
        path.write_text(text)
        return path

    return write


def test_settings_reach_their_stage(write):
    recipe = load_recipe(write(RECIPE))
    assert (recipe.model, recipe.train_data, recipe.output_dir) == ("./model", "rows.csv", "run")
    one, two = recipe.stage1, recipe.stage2
    assert (type(one), type(two)) == (Stage1Config, Stage2Config)
    assert one.learning_rate == two.learning_rate == 1e-3
    assert one.per_device_train_batch_size == two.per_device_train_batch_size == 3
    assert (one.num_train_epochs, two.num_train_epochs) == (2, 5)
    assert (one.train_language_model, two.train_language_model) == ("full", "lora")
    assert (one.learning_rates, two.learning_rates) == ({"projector": 2e-4}, {"task_groups": 1e-2})
    assert (one.lora_r, two.lora_r) == (16, 4)
    assert (one.output_dir, two.output_dir) == ("run/stage1-training", "run/stage2-training")
    assert one.remove_unused_columns is False
    assert one.max_length is None


def test_the_command_line_replaces_settings(write):
    recipe = load_recipe(
        write(RECIPE), ["stage1.num_train_epochs=7", "learning_rate=5.0e-4", "output_dir=other", "stage2.bf16=false"]
    )
    assert (recipe.stage1.num_train_epochs, recipe.stage2.num_train_epochs) == (7, 5)
    assert recipe.stage1.learning_rate == recipe.stage2.learning_rate == 5e-4
    assert recipe.stage1.output_dir == "other/stage1-training"


def test_a_stage_may_be_left_out_or_empty(write):
    recipe = load_recipe(write("output_dir: run\nuse_cpu: true\nattn_implementation: null\nstage1:\n"))
    assert recipe.stage1.train_volume_layers == "full"
    assert recipe.stage2.train_task_groups == "full"
    assert recipe.stage2.even_tasks


def test_words_that_yaml_reads_as_false_are_meant_as_written(write):
    recipe = load_recipe(write("output_dir: run\nuse_cpu: true\ntrain_task_groups: off\nsave_strategy: no"))
    assert recipe.stage2.train_task_groups == "off"
    assert recipe.stage2.save_strategy == "no"


@pytest.mark.parametrize(
    ("text", "finding"),
    [
        ("- a\n- b", "holds no settings"),
        ("a: [", "cannot be read as YAML"),
        ("use_cpu: true", "names no output_dir"),
        ("output_dir: run\nuse_cpu: true\nlearning_rte: 1.0", "unknown settings learning_rte"),
        ("output_dir: run\nuse_cpu: true\nstage1: {lora_rank: 3}", "stage1: unknown settings lora_rank"),
        ("output_dir: run\nuse_cpu: true\nstage2: fast", "stage2 is no list of settings"),
        ("output_dir: run\nuse_cpu: true\nlearning_rate: fast", "learning_rate: invalid float value: 'fast'"),
        ("output_dir: run\nuse_cpu: true\ntrain_projector: maybe", "train_projector"),
        ("output_dir: run\nuse_cpu: true\nlearning_rates: {vision: 1.0}", "'vision' is no part"),
        ("output_dir: run\nuse_cpu: true\neval_strategy: sometimes", "stage1: sometimes is not a valid"),
        ("output_dir: run\nuse_cpu: true\nnum_train_epochs: [1]", "stage1: num_train_epochs is a list"),
        ("output_dir: run\nuse_cpu: true\nseed: {a: 1}", "stage1: seed is a dict"),
        ("output_dir: run\nuse_cpu: true\nfp16: perhaps", "fp16"),
        ("output_dir: run\nuse_cpu: true\nlearning_rate: null", "learning_rate is empty"),
        ("output_dir: run\nuse_cpu: true\nlearning_rate: .nan", "learning_rate is a float (nan)"),
        ("output_dir: run\nuse_cpu: true\nlora_r: 4.5", "lora_r is a float (4.5)"),
        ("output_dir: run\nuse_cpu: true\nlearning_rates: fast", "learning_rates"),
        ("output_dir: run\nuse_cpu: true\nper_device_train_batch_size: -1", "below 1"),
        ("output_dir: run\nuse_cpu: true\nsave_only_model: true", "save_only_model"),
        ("output_dir: run\nuse_cpu: true\nstreaming: 'false'", "streaming: is a str"),
        ("output_dir: run\nuse_cpu: true\nmodel: 5", "model: is a int"),
        ("output_dir: run\nuse_cpu: true\nstage1: {output_dir: x}", "names an output_dir"),
        ("output_dir: run\nuse_cpu: true\nstage1: false", "stage1 is no list of settings"),
    ],
)
def test_mistakes_are_named_with_the_file(write, text, finding):
    with pytest.raises(TrainingError) as caught:
        load_recipe(write(text))
    assert finding in str(caught.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(TrainingError, match=r"none\.yaml: cannot be read"):
        load_recipe(tmp_path / "none.yaml")


@pytest.mark.parametrize("override", ["learning_rate", "stage3.learning_rate=1", "learning_rate=[1"])
def test_overrides_must_be_assignments(write, override):
    with pytest.raises(TrainingError, match="--set"):
        load_recipe(write(RECIPE), [override])
