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
"""Who has which scan open: in memory only, for as long as the page is open, and for that page alone."""

import threading
from collections import OrderedDict

from .answers import OpenScan


class Sessions:
    """Open scans by session, at most `limit` of them: the one that was used least recently makes room."""

    def __init__(self, limit: int):
        self.limit = limit
        self._scans: OrderedDict[str, OpenScan] = OrderedDict()
        self._lock = threading.Lock()

    def put(self, session: str, scan: OpenScan) -> None:
        with self._lock:
            self._scans[session] = scan
            self._scans.move_to_end(session)
            while len(self._scans) > self.limit:
                self._scans.popitem(last=False)

    def get(self, session: str) -> OpenScan | None:
        with self._lock:
            if session in self._scans:
                self._scans.move_to_end(session)
            return self._scans.get(session)

    def close(self, session: str) -> None:
        with self._lock:
            self._scans.pop(session, None)

    def __len__(self) -> int:
        return len(self._scans)
