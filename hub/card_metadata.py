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
"""The metadata at the top of a model card, checked without a network as the Hub checks it on a commit."""

import re
from typing import Any

from huggingface_hub.repocard_data import model_index_to_eval_results

from ct_moe.errors_ct_moe import PublishError


# https://huggingface.co/docs/hub/repositories-licenses
LICENCES = frozenset(
    """
    apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0 bigcode-openrail-m
    afl-3.0 artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear c-uda cc cc0-1.0 cc-by-2.0 cc-by-2.5
    cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nd-4.0 cc-by-nc-nd-3.0
    cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cdla-sharing-1.0 cdla-permissive-1.0
    cdla-permissive-2.0 wtfpl ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 eupl-1.2 agpl-3.0 gfdl gpl gpl-2.0 gpl-3.0
    lgpl lgpl-2.1 lgpl-3.0 isc h-research intel-research lppl-1.3c ms-pl apple-ascl apple-amlr mpl-2.0 odc-by odbl
    openmdw-1.0 openrail++ osl-3.0 postgresql ofl-1.1 ncsa unlicense zlib pddl lgpl-lr deepfloyd-if-license
    fair-noncommercial-research-license llama2 llama3 llama3.1 llama3.2 llama3.3 llama4 gemma unknown other
    """.split()
)
RELATIONS = ("finetune", "adapter", "merge", "quantized")
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_REQUIRED = {"library_name": "transformers", "pipeline_tag": "image-text-to-text"}


def check_metadata(data: dict[str, Any], file: str = "README.md") -> None:
    """Refuse metadata that the Hub would refuse, or that hides the model from those who look for its kind.

    Raises:
        PublishError: names the entry.
    """

    def refuse(finding: str, remedy: str) -> None:
        raise PublishError(file, finding, remedy)

    licence = data.get("license")
    if licence is None:
        refuse("names no licence", "Set license in card.yaml: weights keep the licence of their base")
    if licence not in LICENCES:
        refuse(
            f"license {licence!r} is none of the Hub's", "Use one of its list, or other with license_name and _link"
        )
    if licence == "other" and not (data.get("license_name") and data.get("license_link")):
        refuse("license is other, without a name and a link", "Set license_name and license_link")
    for name, value in _REQUIRED.items():
        wanted = ("peft", value) if name == "library_name" else (value,)
        if data.get(name) not in wanted:
            refuse(f"{name} is {data.get(name)!r}", f"Set it to {value}")
    for name in ("tags", "datasets", "language", "base_model", "metrics"):
        values = data.get(name) or []
        if isinstance(values, str) and name != "tags":
            values = [values]
        if not isinstance(values, list) or not all(isinstance(value, str) and value.strip() for value in values):
            refuse(f"{name} is no list of words", "Write a YAML list")
        if name in ("datasets", "base_model") and (bad := [v for v in values if not _HUB_ID.fullmatch(v)]):
            refuse(f"{name} {bad[0]!r} is no Hub id", "Write owner/name, or say it in the text only")
        if name == "language" and (bad := [v for v in values if not re.fullmatch("[a-z]{2,3}|code|multilingual", v)]):
            refuse(f"language {bad[0]!r} is no ISO 639 code", "Write en for English")
    if "ct-report" not in data.get("tags", ()):
        refuse("has no tag ct-report", "Add it: that is how such models are found")
    if data.get("base_model_relation", RELATIONS[0]) not in RELATIONS:
        refuse(f"base_model_relation is {data['base_model_relation']!r}", f"Use one of {', '.join(RELATIONS)}")
    if "model-index" in data:
        try:
            model_index_to_eval_results(data["model-index"])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            refuse(f"model-index cannot be read ({type(error).__name__})", "Generate it: ct-moe card DIR --write")
