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
from ct_moe.hub.app.sessions import Sessions


def test_each_session_has_its_own_scan_until_it_closes():
    sessions = Sessions(limit=2)
    sessions.put("a", "scan of a")
    sessions.put("b", "scan of b")
    assert (sessions.get("a"), sessions.get("b"), sessions.get("c")) == ("scan of a", "scan of b", None)
    sessions.close("a")
    sessions.close("a")
    assert sessions.get("a") is None
    assert len(sessions) == 1


def test_the_scan_that_was_not_used_for_longest_makes_room():
    sessions = Sessions(limit=2)
    for session in "ab":
        sessions.put(session, session)
    sessions.get("a")
    sessions.put("c", "c")
    assert (sessions.get("a"), sessions.get("b"), sessions.get("c")) == ("a", None, "c")
