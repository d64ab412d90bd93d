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
"""Loads a model folder through the Auto classes and the pipeline, and saves logits: run by test_clean_environment.py.

    python use_auto_classes.py remote|library FOLDER SCAN OUT.safetensors

`remote`: this package must not be importable, the code beside the weights runs. `library`: the package's own runs.
"""

import importlib.util
import json
import sys


def main(mode: str, folder: str, scan: str, out: str) -> None:
    installed = importlib.util.find_spec("ct_moe") is not None
    if installed != (mode == "library"):
        sys.exit(f"{mode}: ct_moe is {'' if installed else 'not '}importable")
    if installed:
        from ct_moe import CTMoEConfig  # noqa: F401  (registers the Auto classes)
    import torch
    from safetensors.torch import save_file
    from transformers import (
        AutoConfig,
        AutoImageProcessor,
        AutoModel,
        AutoModelForImageTextToText,
        AutoProcessor,
        pipeline,
    )

    trust = {"trust_remote_code": True} if mode == "remote" else {}
    config = AutoConfig.from_pretrained(folder, **trust)
    image_processor = AutoImageProcessor.from_pretrained(folder, **trust)
    processor = AutoProcessor.from_pretrained(folder, **trust)
    messages = [
        {
            "role": "user",
            "content": [{"type": "image", "path": scan}, {"type": "text", "text": "Is the liver normal?"}],
        }
    ]
    inputs = processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    tensors = {f"inputs.{name}": tensor for name, tensor in inputs.items()}
    tensors["image_processor"] = image_processor(scan)["pixel_values"]
    for auto_class in (AutoModel, AutoModelForImageTextToText):
        model = auto_class.from_pretrained(folder, **trust)
        with torch.no_grad():
            tensors[auto_class.__name__] = model(**inputs).logits
            tensors[f"{auto_class.__name__}.generate"] = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    reporter = pipeline("ct-report", model=folder, trust_remote_code=True)
    report = reporter(scan, max_new_tokens=8)
    answer = reporter(scan, question="Is the liver normal?", max_new_tokens=8)
    code = type(model).__module__
    if (mode == "remote") != code.startswith("transformers_modules."):
        sys.exit(f"{mode}: the model's code came from {code}")
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, out)
    print(json.dumps({"model_type": config.model_type, "report": report, "answer": answer}))


if __name__ == "__main__":
    main(*sys.argv[1:])
