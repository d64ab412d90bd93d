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
"""The page of `ct-moe app` as a Space, or in any container: the model is named by the variable MODEL.

MODEL=../demo_model python app.py
"""

import os

from ct_moe.hub.app.interface import launch
from ct_moe.hub.app.uploads import UploadLimits


if __name__ == "__main__":
    launch(
        os.environ["MODEL"],
        host="0.0.0.0",
        port=int(os.environ.get("PORT", "7860")),
        limits=UploadLimits(upload_mb=int(os.environ.get("MAX_UPLOAD_MB", "256"))),
        ready=lambda address: print(f"Serving on {address}", flush=True),
    )
