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
"""Load a folder as its users will, run one scan, save what came out: a script, run by file name in its own process.

    python clean_process.py FOLDER SCAN OUT.safetensors [BASE]

It imports nothing of this package and hides it from all others, so that the code beside the weights runs. With BASE,
a model folder, FOLDER holds an adapter of it. The last line of its output is the text of the pipeline, as JSON.
"""

import json
import sys


QUESTION = "Is there a pleural effusion?"
NEW_TOKENS = 8


class _Hidden:
    """An import hook that has never heard of this package."""

    @staticmethod
    def find_spec(name, path=None, target=None):
        if name.partition(".")[0] == "ct_moe":
            raise ModuleNotFoundError(f"{name} is hidden from this process", name=name)


def outputs(model, processor, scan: str) -> dict:
    """Logits of one question about a scan, and of what was asked."""
    import torch

    messages = [{"role": "user", "content": [{"type": "image", "path": scan}, {"type": "text", "text": QUESTION}]}]
    inputs = processor.apply_chat_template(
        [messages], add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    with torch.no_grad():
        logits = model(**inputs).logits
    return {"logits": logits.float().contiguous(), "input_ids": inputs["input_ids"].contiguous()}


def say(reporter, scan: str) -> dict:
    """The pipeline's report and answer, both without chance."""
    call = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "num_beams": 1}
    return {"report": reporter(scan, **call)["text"], "answer": reporter(scan, question=QUESTION, **call)["text"]}


def main(folder: str, scan: str, out: str, base: str | None = None) -> None:
    sys.meta_path.insert(0, _Hidden)
    from safetensors.torch import save_file
    from transformers import AutoModel, AutoModelForImageTextToText, AutoProcessor, pipeline

    auto_class = AutoModel if base else AutoModelForImageTextToText
    processor = AutoProcessor.from_pretrained(base or folder, trust_remote_code=True)
    model = auto_class.from_pretrained(base or folder, trust_remote_code=True)
    if base:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, folder).merge_and_unload()
    model.eval()
    if not type(model).__module__.startswith("transformers_modules."):
        sys.exit(f"the model's code came from {type(model).__module__}, not from the folder")
    save_file(outputs(model, processor, scan), out)
    if not base:
        del model
    reporter = pipeline("ct-report", model=base or folder, trust_remote_code=True)  # loads its own, as for its users
    if base:
        reporter.model = model
    print(json.dumps(say(reporter, scan)))


if __name__ == "__main__":
    main(*sys.argv[1:])
