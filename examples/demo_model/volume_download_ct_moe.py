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
"""Scans named by a URL: `hf://` through the Hub's cache, `https://` into a temporary file."""

import os
import tempfile
from pathlib import Path

from huggingface_hub import hf_hub_download, parse_hf_uri, snapshot_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HfUriError, LocalEntryNotFoundError
from huggingface_hub.utils import get_session, httpx

from .volume_ct_moe import LoadContext


TIMEOUT_SECONDS = 60

_BLOCK_BYTES = 1 << 20


def fetch(url: str, context: LoadContext) -> Path:
    """Downloads what a URL names and returns where it lies: a file, or for `hf://` also a folder."""
    if url.startswith("hf://"):
        return _from_hub(url, context)
    if url.startswith(("https://", "http://")):
        return _from_web(url, context)
    raise context.error("unknown kind of URL", "Pass a path, hf://[datasets/]owner/name/path, or https://...")


def _from_hub(url: str, context: LoadContext) -> Path:
    try:
        uri = parse_hf_uri(url)
    except HfUriError as error:
        raise context.error("not a valid Hub address", "Write hf://[datasets/]owner/name[@revision]/path") from error
    if uri.is_bucket:
        raise context.error("buckets are not read", "Download the scan and pass its path")
    if not uri.path_in_repo:
        raise context.error("a whole repository", "Add the path of a file, or of the folder of a series")
    where = {"repo_id": uri.id, "repo_type": uri.type, "revision": uri.revision}
    try:
        try:
            return Path(hf_hub_download(filename=uri.path_in_repo, **where))
        except LocalEntryNotFoundError:
            raise
        except EntryNotFoundError:  # no such file: a folder, then
            root = snapshot_download(allow_patterns=f"{uri.path_in_repo}/*", **where)
    except (HfHubHTTPError, httpx.HTTPError, OSError, ValueError) as error:
        raise context.error(
            f"cannot be fetched from the Hub ({type(error).__name__})",
            "Check the address, the network and, for a private or gated repository, `hf auth login`",
        ) from error
    folder = Path(root, uri.path_in_repo)
    if not folder.is_dir():
        raise context.error("no such file or folder in the repository", "Check the path")
    return folder


def _from_web(url: str, context: LoadContext) -> Path:
    descriptor, name = tempfile.mkstemp(prefix="ct_moe_")
    context.files.callback(os.unlink, name)
    received = 0
    try:
        with os.fdopen(descriptor, "wb") as file:
            with get_session().stream("GET", url, follow_redirects=True, timeout=TIMEOUT_SECONDS) as response:
                response.raise_for_status()
                for block in response.iter_bytes(_BLOCK_BYTES):
                    received += len(block)
                    context.claim(received, "the download")
                    file.write(block)
    except httpx.HTTPStatusError as error:
        raise context.error(f"the server answers {error.response.status_code}", "Check the address") from error
    except (httpx.HTTPError, httpx.InvalidURL, OSError) as error:
        raise context.error(
            f"cannot be fetched ({type(error).__name__})", "Check the address and the network"
        ) from error
    return Path(name)
