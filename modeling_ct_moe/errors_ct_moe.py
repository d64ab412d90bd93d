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
"""The one exception family of this package: every error says what it is about, what was found and what to do."""


class CTMoEError(ValueError):
    """Base of every error this package raises on bad input.

    Args:
        subject: what the error is about: a file name, an argument, a tensor. Never patient data.
        finding: what was found there.
        remedy: what the reader can do about it.
    """

    def __init__(self, subject: str, finding: str, remedy: str):
        super().__init__(subject, finding, remedy)  # all three in `args`, so that the error survives pickling
        self.subject = str(subject)
        self.finding = finding
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.subject}: {self.finding}. {self.remedy}."


class VolumeError(CTMoEError):
    """A scan that is missing, unreadable, not a CT volume, or too ambiguous to load without guessing."""


class PromptError(CTMoEError):
    """Text and volumes that do not fit together, or a question that asks nothing."""


class ModelError(CTMoEError):
    """A folder, configuration or tensor that this model cannot work with."""


class ConversionError(CTMoEError):
    """A base model that cannot be converted without losing or inventing parameters."""


class DataError(CTMoEError):
    """Rows of a data set that no training step could use, or a column that is missing or of another kind."""


class TrainingError(CTMoEError):
    """A training run that cannot start, go on or be resumed as asked."""


class PublishError(CTMoEError):
    """A folder that must not be published as it is, or a repository that could not be written or read as asked."""
