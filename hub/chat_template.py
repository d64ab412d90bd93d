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
"""Chat templates that take strings and lists of blocks alike.

- `fit_chat_template`: a base's template, with a few lines before it where it knows only one of the two.
"""

from typing import Any

from transformers import PreTrainedTokenizerBase

from ct_moe import ConversionError


# Templates of text-only models know strings, those of multimodal ones lists of blocks. Put before such a template,
# these lines translate the messages into what it knows.
_BLOCKS_TO_STRINGS = """\
{%- set translated = namespace(messages=[]) -%}
{%- for message in messages -%}
  {%- set text = namespace(value='' if message['content'] is not string else message['content']) -%}
  {%- for block in (message['content'] if message['content'] is not string else []) -%}
    {%- set text.value = text.value + ('IMAGE_TOKEN\\n' if block['type'] == 'image' else block['text']) -%}
  {%- endfor -%}
  {%- set translated.messages = translated.messages + [{'role': message['role'], 'content': text.value}] -%}
{%- endfor -%}
{%- set messages = translated.messages -%}
"""
_STRINGS_TO_BLOCKS = """\
{%- set translated = namespace(messages=[]) -%}
{%- for message in messages -%}
  {%- set content = message['content'] -%}
  {%- if content is string -%}{%- set content = [{'type': 'text', 'text': content}] -%}{%- endif -%}
  {%- set translated.messages = translated.messages + [{'role': message['role'], 'content': content}] -%}
{%- endfor -%}
{%- set messages = translated.messages -%}
"""


def fit_chat_template(template: str | None, tokenizer: PreTrainedTokenizerBase, image_token: str) -> tuple[str, str]:
    """Make a template take strings and lists of blocks alike and write one placeholder per image.

    Args:
        template: Jinja template of a base.
        tokenizer: gives the template its special tokens.
        image_token: the base's image placeholder.

    Returns:
        The template, and what was done to it, in words that follow "the base's own": nothing if nothing was.

    Raises:
        ConversionError: there is no template, or it writes no prompt with one placeholder for one image.
    """
    if not isinstance(template, str):
        raise ConversionError(
            "chat_template", "the base has none, or several", "Pass chat_template= with the prompt format of this base"
        )
    text = "Is there a nodule?"
    blocks = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}]
    string = [{"role": "user", "content": text}]
    preambles = {
        "": "",
        ", with blocks turned into strings": _BLOCKS_TO_STRINGS.replace("IMAGE_TOKEN", image_token),
        ", with strings turned into blocks": _STRINGS_TO_BLOCKS,
    }
    for change, preamble in preambles.items():
        rendered = [_render(tokenizer, preamble + template, messages) for messages in (blocks, string)]
        if all(text in result for result in rendered) and rendered[0].count(image_token) == 1:
            return preamble + template, change
    raise ConversionError(
        "chat_template",
        f"it does not write a question about one image with one {image_token}",
        "Pass chat_template= with the prompt format of this base",
    )


def _render(tokenizer: PreTrainedTokenizerBase, template: str, messages: list[dict[str, Any]]) -> str:
    """The prompt, or nothing if the template cannot read the messages."""
    try:
        return tokenizer.apply_chat_template(
            messages, chat_template=template, tokenize=False, add_generation_prompt=True
        )
    except Exception:  # whatever the template of a stranger does with what it does not expect
        return ""
