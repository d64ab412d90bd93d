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
"""The page in the browser: a scan in, slices, report, answers and documents out. `pip install "ct-moe[app]"`.

- `uploads.py`: a file from a stranger -> a `Volume`, or a refusal.
- `answers.py`: one model for all users; what does not depend on the question is computed once per scan.
- `slices.py`: pictures of the slices, and what the experts did with them.
- `documents.py`: report and answers as JSON; `report_pdf.py`, `structured_report.py`: as PDF and DICOM SR.
- `interface.py`: the page itself, `build_app` and `launch`.
"""
