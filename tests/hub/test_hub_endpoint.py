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
"""The loopback Hub against the real client, `huggingface_hub`, which is what it has to satisfy."""

import hashlib

import pytest
from hub_endpoint import HubEndpoint
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants, hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)


# huggingface_hub 2.4 gives a file to its HTTP library as that one no longer likes it.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>':DeprecationWarning")


@pytest.fixture
def hub():
    with HubEndpoint() as endpoint:
        yield endpoint


@pytest.fixture
def api(hub, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    api = HfApi(endpoint=hub.url, token="hf_any")
    api.create_repo("lab/model")
    return api


def add(**files: bytes) -> list[CommitOperationAdd]:
    return [CommitOperationAdd(name.replace("__", "."), content) for name, content in files.items()]


@pytest.mark.parametrize("part_bytes", [None, 400], ids=["whole", "in parts"])
def test_a_commit_comes_back_byte_for_byte(hub, api, tmp_path, part_bytes):
    hub.part_bytes = part_bytes
    files = {"model.safetensors": bytes(range(256)) * 5, "sub/config.json": b"{}"}
    commit = api.create_commit(
        "lab/model", [CommitOperationAdd(*file) for file in files.items()], commit_message="one"
    )
    assert hub.files("lab/model") == {**files, ".gitattributes": hub.files("lab/model")[".gitattributes"]}
    tree = {entry.path: entry for entry in api.list_repo_tree("lab/model", recursive=True)}
    assert tree["model.safetensors"].lfs.sha256 == hashlib.sha256(files["model.safetensors"]).hexdigest()
    assert tree["sub/config.json"].lfs is None
    downloaded = api.snapshot_download("lab/model", revision=commit.oid, cache_dir=tmp_path)
    for path, content in files.items():
        with open(f"{downloaded}/{path}", "rb") as file:
            assert file.read() == content


def test_commits_branches_and_tags_stay_what_they_are(hub, api, tmp_path):
    first = api.create_commit("lab/model", add(a__txt=b"1"), commit_message="one").oid
    api.create_tag("lab/model", tag="v1")
    api.create_branch("lab/model", branch="next")
    operations = [*add(b__txt=b"2"), CommitOperationDelete("a.txt")]
    second = api.create_commit("lab/model", operations, commit_message="two", parent_commit=first).oid
    assert set(hub.files("lab/model")) == {".gitattributes", "b.txt"}
    for revision in (first, "v1", "next"):
        assert set(hub.files("lab/model", revision)) == {".gitattributes", "a.txt"}
        assert api.model_info("lab/model", revision=revision).sha == first
    assert api.model_info("lab/model").sha == second
    with pytest.raises(EntryNotFoundError):
        hf_hub_download("lab/model", "a.txt", endpoint=hub.url, cache_dir=tmp_path)


def test_a_commit_is_all_or_nothing(hub, api):
    before = api.model_info("lab/model").sha
    with pytest.raises(HfHubHTTPError, match="412"):
        api.create_commit("lab/model", add(a__txt=b"1"), commit_message="late", parent_commit="1" * 40)
    with pytest.raises(HfHubHTTPError, match="404"):
        api.create_commit("lab/model", [*add(a__txt=b"1"), CommitOperationDelete("no.txt")], commit_message="half")
    assert api.model_info("lab/model").sha == before
    assert set(hub.files("lab/model")) == {".gitattributes"}


def test_what_is_not_there_has_the_error_of_the_real_hub(api):
    with pytest.raises(RepositoryNotFoundError):
        api.model_info("lab/other")
    with pytest.raises(RevisionNotFoundError):
        api.model_info("lab/model", revision="other")
    with pytest.raises(HfHubHTTPError, match="409"):
        api.create_repo("lab/model")
    with pytest.raises(ValueError, match="metadata"):
        api.create_commit("lab/model", [CommitOperationAdd("README.md", b"---\n[\n---\n")], commit_message="bad")
