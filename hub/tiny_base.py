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
"""A LLaVA base of a few MB with random weights, built on the spot and written in the library's own format.

- `build_tiny_base`: CLIP tower, MLP projector, Phi-3 or Llama language model, tokenizer and chat template in a folder
  that transformers' own classes load. Demos, tests and benchmarks convert it exactly as they would a real base.
- `radiology_sentences`: the text its tokenizer is trained on.
- `CHAT_TEMPLATE`: its chat template, in the manner of Phi-3.
"""

import itertools
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    Phi3Config,
    PreTrainedTokenizerFast,
)

from .folder import new_folder


# The stop token lies inside the generation markers, so that a model trained on assistant tokens learns to stop.
CHAT_TEMPLATE = """\
{%- macro render(content) -%}
  {%- if content is string -%}
    {{- content -}}
  {%- else -%}
    {%- for block in content -%}
      {%- if block['type'] == 'image' -%}
        {{- '<image>\\n' -}}
      {%- elif block['type'] == 'text' -%}
        {{- block['text'] -}}
      {%- else -%}
        {{- raise_exception('Unknown content type ' + block['type'] + ': use image or text') -}}
      {%- endif -%}
    {%- endfor -%}
  {%- endif -%}
{%- endmacro -%}
{%- for message in messages -%}
  {%- if message['role'] not in ['system', 'user', 'assistant'] -%}
    {{- raise_exception('Unknown role ' + message['role'] + ': use system, user or assistant') -}}
  {%- endif -%}
  {{- '<|' + message['role'] + '|>\\n' -}}
  {%- if message['role'] == 'assistant' -%}
    {%- generation -%}
      {{- render(message['content']) + '<|end|>' -}}
    {%- endgeneration -%}
  {%- else -%}
    {{- render(message['content']) + '<|end|>' -}}
  {%- endif -%}
  {{- '\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
  {{- '<|assistant|>\\n' -}}
{%- endif -%}
"""

_TEXT_CONFIGS = {"phi3": Phi3Config, "llama": LlamaConfig}
_SPECIAL_TOKENS = ["<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "<image>"]


def build_tiny_base(
    out_dir: str | Path,
    *,
    text_model: Literal["phi3", "llama"] = "phi3",
    seed: int = 0,
    vision: dict | None = None,
    text: dict | None = None,
    dtype: torch.dtype = torch.float32,
    sentences: Iterable[str] | None = None,
    tokenizer: PreTrainedTokenizerFast | None = None,
) -> Path:
    """Write a randomly initialised LLaVA base; the same arguments give the same bytes.

    Args:
        out_dir: folder to create; it must not exist or be empty.
        text_model: architecture of the language model.
        seed: seed of every weight.
        vision: fields of `CLIPVisionConfig` that replace the tiny ones (56 px, patch 14, 4 layers of width 64).
        text: fields of the language model's config that replace the tiny ones (2 layers of width 128).
        dtype: dtype of the weights on disk.
        sentences: text its tokenizer is trained on; by default `radiology_sentences()`.
        tokenizer: one that another tiny base has, in place of a new one.

    Returns:
        `out_dir`.

    Raises:
        ModelError: `out_dir` holds something already.
    """
    if tokenizer is None:
        tokenizer = _train_tokenizer(radiology_sentences() if sentences is None else sentences)
    config = _config(tokenizer, text_model, vision or {}, text or {})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlavaForConditionalGeneration(config)
        _randomise_vectors(model)
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )

    size = config.vision_config.image_size
    processor = LlavaProcessor(
        image_processor=CLIPImageProcessorPil(
            size={"shortest_edge": size}, crop_size={"height": size, "width": size}, do_convert_rgb=True
        ),
        tokenizer=tokenizer,
        patch_size=config.vision_config.patch_size,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        num_additional_image_tokens=1,  # the class token, which the strategy "default" drops again
        chat_template=CHAT_TEMPLATE,
    )
    with new_folder(out_dir) as folder:
        model.to(dtype).save_pretrained(folder, max_shard_size="5GB")
        processor.save_pretrained(folder)
    return Path(out_dir)


def radiology_sentences() -> list[str]:
    """Sentences in the manner of CT reports and of questions about them: the tokenizer's training text."""
    slots = {
        "side": ["left", "right"],
        "lobe": ["right upper lobe", "right middle lobe", "right lower lobe", "left upper lobe", "left lower lobe"],
        "size": ["3 mm", "6 mm", "8 mm", "11 mm", "14 x 9 mm", "2.3 x 1.8 cm", "4.1 cm"],
        "organ": ["liver", "spleen", "pancreas", "gallbladder", "urinary bladder"],
        "degree": ["mild", "moderate", "severe", "minimal"],
        "level": ["T7", "T12", "L1", "L3"],
        "vessel": ["ascending aorta", "abdominal aorta", "main pulmonary artery", "superior mesenteric artery"],
    }
    return [
        template.format(**dict(zip(names, values)))
        for template in _TEMPLATES
        for names in [[name for name in slots if f"{{{name}}}" in template]]
        for values in itertools.product(*(slots[name] for name in names))
    ]


def _train_tokenizer(sentences: Iterable[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE: every text can be encoded, so there is no unknown token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1024 - len(_SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(sentences, trainer)
    tokenizer.add_special_tokens(_SPECIAL_TOKENS)  # added last: they take the highest ids, as in Phi-3
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens={"image_token": "<image>"},
        padding_side="left",
        model_max_length=4096,
        clean_up_tokenization_spaces=False,
    )


def _config(tokenizer: PreTrainedTokenizerFast, text_model: str, vision: dict, text: dict) -> LlavaConfig:
    vision_config = CLIPVisionConfig(
        **{
            "hidden_size": 64,
            "intermediate_size": 128,
            "projection_dim": 64,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "image_size": 56,
            "patch_size": 14,
            **vision,
        }
    )
    text_config = _TEXT_CONFIGS[text_model](
        **{
            "vocab_size": len(tokenizer),
            "hidden_size": 128,
            "intermediate_size": 256,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 4096,
            "bos_token_id": None,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
            "tie_word_embeddings": False,
            **text,
        }
    )
    return LlavaConfig(
        vision_config=vision_config,
        text_config=text_config,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=(vision_config.image_size // vision_config.patch_size) ** 2,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        tie_word_embeddings=text_config.tie_word_embeddings,
    )


@torch.no_grad()
def _randomise_vectors(model: torch.nn.Module) -> None:
    """Move biases and norm scales off 0 and 1, where a swapped or forgotten one could not be noticed."""
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.add_(0.1 * torch.randn_like(parameter))


_TEMPLATES = [
    # findings: chest
    "There is a {size} solid nodule in the {lobe}.",
    "A ground-glass nodule measuring {size} is seen in the {lobe}, unchanged since the prior examination.",
    "Calcified granuloma in the {lobe}.",
    "Consolidation with air bronchograms in the {lobe}, in keeping with pneumonia.",
    "{degree} centrilobular emphysema, predominantly in the upper lobes.",
    "Linear atelectasis in the {lobe}.",
    "Patchy ground-glass opacities in both lungs with {degree} interlobular septal thickening.",
    "Bronchiectasis and bronchial wall thickening in the {lobe}.",
    "Small {side} pleural effusion with adjacent compressive atelectasis.",
    "There is a {degree} {side} pneumothorax.",
    "No focal consolidation, pleural effusion or pneumothorax.",
    "The lungs are clear. The central airways are patent.",
    "Cavitary lesion of {size} in the {lobe} with surrounding tree-in-bud opacities.",
    "Spiculated mass of {size} in the {lobe}, suspicious for malignancy.",
    "Subpleural reticulation and honeycombing in the lower lobes, consistent with usual interstitial pneumonia.",
    "Mosaic attenuation on the expiratory series suggests air trapping.",
    "Mediastinal lymph nodes are not enlarged by size criteria.",
    "Enlarged {side} hilar lymph node with a short axis of {size}.",
    "The heart is normal in size without pericardial effusion.",
    "{degree} cardiomegaly with coronary artery calcification.",
    "Filling defects in the segmental branches of the {lobe} artery, consistent with acute pulmonary embolism.",
    "The {vessel} is dilated, with a maximum diameter of 4.1 cm.",
    "{degree} atherosclerotic calcification of the {vessel}.",
    "No aortic dissection or intramural haematoma.",
    "Endotracheal tube with its tip 3 cm above the carina.",
    "Central venous catheter with its tip in the superior vena cava.",
    "The thyroid gland is heterogeneous with a hypodense nodule of {size} in the {side} lobe.",
    "{degree} hiatal hernia.",
    # findings: abdomen and pelvis
    "The {organ} is unremarkable.",
    "The {organ} is normal in size and attenuation.",
    "Hypodense lesion of {size} in the liver, too small to characterise.",
    "{degree} diffuse hepatic steatosis.",
    "Simple cyst of {size} in the {side} kidney.",
    "Non-obstructing calculus of {size} in the lower pole of the {side} kidney.",
    "{degree} {side} hydronephrosis caused by a calculus in the proximal ureter.",
    "Cholelithiasis without signs of acute cholecystitis.",
    "The common bile duct measures {size}. No intrahepatic biliary dilatation.",
    "The appendix is dilated to 11 mm with surrounding fat stranding, consistent with acute appendicitis.",
    "Colonic diverticulosis without diverticulitis.",
    "Dilated small bowel loops with a transition point in the {side} lower quadrant.",
    "No bowel obstruction. No free air and no free fluid.",
    "{degree} ascites in the pelvis and around the liver.",
    "The adrenal glands are normal.",
    "{side} adrenal nodule of {size} with attenuation below 10 HU, consistent with adenoma.",
    "The portal vein and its branches are patent.",
    "Peripancreatic fat stranding and fluid, consistent with {degree} acute pancreatitis.",
    "Splenomegaly of 14 cm without focal lesion.",
    "The prostate is enlarged. The seminal vesicles are symmetric.",
    "The uterus and ovaries are unremarkable for age.",
    "Retroperitoneal lymph nodes are not enlarged.",
    "Small fat-containing umbilical hernia.",
    # findings: bones and soft tissue, technique
    "Compression fracture of the {level} vertebral body with {degree} loss of height.",
    "Degenerative changes of the thoracic and lumbar spine, most marked at {level}.",
    "Sclerotic lesion in the {level} vertebral body, likely a bone island.",
    "Nondisplaced fracture of the {side} sixth rib.",
    "No aggressive osseous lesion.",
    "Soft tissues of the chest wall are unremarkable.",
    "Technique: axial images of the chest were acquired without intravenous contrast, slice thickness 1.25 mm.",
    "Technique: portal venous phase CT of the abdomen and pelvis after 100 mL of iodinated contrast.",
    "Comparison: CT of the chest from six months earlier.",
    "Indication: shortness of breath and fever. Evaluate for pulmonary embolism.",
    "Indication: staging of known malignancy. Indication: abdominal pain and weight loss.",
    # impressions
    "Impression: no acute cardiopulmonary abnormality.",
    "Impression: {size} nodule in the {lobe}. Follow-up CT in 6 to 12 months is recommended.",
    "Impression: findings consistent with {degree} pneumonia of the {lobe}.",
    "Impression: acute pulmonary embolism without right heart strain.",
    "Impression: {degree} {side} pleural effusion, increased since the prior study.",
    "Impression: no evidence of metastatic disease in the chest, abdomen or pelvis.",
    "Impression: uncomplicated acute appendicitis.",
    "Impression: stable appearance of the {organ}, no new lesion.",
    "Impression: aneurysmal dilatation of the {vessel}.",
    "Impression: 1. Emphysema. 2. Coronary calcification. 3. No suspicious nodule.",
    # questions and answers
    "Write a radiology report for this CT scan.",
    "Describe the findings and give an impression.",
    "Could you provide a detailed caption for this volume?",
    "Please generate the findings section of the report for this chest CT.",
    "Is there a pleural effusion on the {side} side?",
    "Is there evidence of pneumothorax? Answer yes or no.",
    "What is the size of the nodule in the {lobe}?",
    "Which organ shows the abnormality?",
    "Which plane is this image acquired in? Choices: A. Axial B. Coronal C. Sagittal D. Oblique",
    "What is the phase of the contrast? Choices: A. Non-contrast B. Arterial C. Portal venous D. Delayed",
    "Where is the lesion located? Choices: A. {organ} B. {side} kidney C. stomach D. colon",
    "Is the {organ} enlarged? Choices: A. Yes B. No C. Cannot be determined D. Partially",
    "What abnormality is seen in the {lobe}?",
    "How severe is the emphysema? It is {degree}.",
    "Does the {vessel} show calcification? Yes, {degree} calcification.",
    "The answer is A. The answer is B. The answer is C. The answer is D.",
    "Yes, there is a {degree} effusion. No, there is none.",
    "No abnormality is seen in the {organ}.",
    "The nodule lies in the {lobe} and measures {size}.",
    "The scan shows {degree} cardiomegaly and {side} basal atelectasis.",
    "You are a helpful assistant for radiology. Answer the question about the CT volume.",
    "This is machine-made text and not a medical report.",
    "Findings: the lungs, heart, liver, spleen, kidneys, bowel and bones are normal.",
    "Arterial phase, portal venous phase, delayed phase, non-contrast, with and without intravenous contrast.",
    "0 1 2 3 4 5 6 7 8 9 10 12 15 20 25 30 40 50 60 70 80 90 100 HU mm cm mL kg/m2 %",
]
