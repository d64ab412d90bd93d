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
"""What a row must have as prompt, completion and task: `prompt_messages`, `completion_messages`, `task_name`.

One set of checks for rows that are trained and rows that are scored. Errors quote nothing.
"""

from typing import Any


class UnusableError(Exception):
    """Column, finding and remedy for a row that cannot be used."""


def prompt_messages(value: Any) -> list[dict[str, str]]:
    """Messages that end with a user's, of a text or of messages."""
    messages = _messages(value, "prompt", "user")
    if messages[-1]["role"] != "user":
        raise UnusableError("prompt", "does not end with a user message", "Move the answer into `completion`")
    if not messages[-1]["content"].strip():
        raise UnusableError("prompt", "is blank", "Write the question, or leave the row out")
    return messages


def completion_messages(value: Any) -> list[dict[str, str]]:
    """One message by the assistant."""
    messages = _messages(value, "completion", "assistant")
    if len(messages) > 1:
        raise UnusableError("completion", f"has {len(messages)} messages", "Move all but the last into `prompt`")
    if messages[0]["role"] != "assistant":
        raise UnusableError("completion", "is not by the assistant", "Give it the role assistant")
    if not messages[0]["content"].strip():
        raise UnusableError("completion", "is blank", "Write the answer, or leave the row out")
    return messages


def task_name(value: Any) -> str | None:
    """A task's name; `None` for an unlabelled row."""
    if not isinstance(value, (str, type(None))):
        raise UnusableError("task", f"is of type {type(value).__name__}", "Write the name of a task")
    return (value or "").strip() or None


def _messages(value: Any, column: str, role: str) -> list[dict[str, str]]:
    if value is None or value == []:
        raise UnusableError(column, "is blank", f"Write the {column}, or leave the row out")
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    if not isinstance(value, list):
        raise UnusableError(
            column, f"is of type {type(value).__name__}", "Write text or messages, the same in all rows; quote numbers"
        )
    if not all(
        isinstance(message, dict) and message.get("role") in ("system", "user", "assistant") for message in value
    ):
        raise UnusableError(column, "has a message without a known role", "Use system, user or assistant")
    return [{"role": message["role"], "content": _text(message.get("content"), column)} for message in value]


def _text(content: Any, column: str) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list) or not all(isinstance(block, dict) for block in content):
        raise UnusableError(column, "has a message without text", "Write text or a list of text blocks")
    for block in content:
        if block.get("type") == "image":
            if any(block.get(key) is not None for key in ("image", "path", "url")):
                raise UnusableError(column, "has a scan in an image block", "Move it into the column `images`")
        elif block.get("type") != "text" or not isinstance(block.get("text"), str):
            raise UnusableError(column, "has a block that is neither text nor image", "Keep the text blocks")
    return "\n".join(block["text"] for block in content if block["type"] == "text")
