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
"""Publishing on the Hub: a folder that was looked through and proven, in one commit; and back again, checked.

- `push_folder`: a model folder, or one that holds an adapter only -> a Hub repository.
- `push_to_hub`: a model and its processor in memory -> the same.
- `pull_folder`: a Hub repository at one commit -> a folder, every file with the hash that its manifest names.

Uploads are tested through LFS; through Xet, which `huggingface_hub` prefers where hf-xet is installed, they are not.
"""

import hashlib
import json
import re
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import httpx, validate_repo_id

import ct_moe
from ct_moe.errors_ct_moe import ModelError, PublishError

from .card import model_card
from .folder import check_model, new_folder, save_folder
from .proof import Proof, prove_folder
from .publishable import check_contents, publishable_files


if TYPE_CHECKING:
    from ct_moe import CTMoEForConditionalGeneration, CTMoEProcessor

MANIFEST = "manifest.json"
_KEPT = {".gitattributes"}  # of a repository, although no folder holds it
_LIBRARIES = ("torch", "transformers", "safetensors", "huggingface_hub")
_HUB_ID, _COMMIT = re.compile(r"[\w.-]+/[\w.-]+"), re.compile("[0-9a-f]{40}")
_SNIPPET = re.compile(
    r"""(pipeline\("ct-report",\ model=|PeftModel\.from_pretrained\(model,\ )"[^"\n]*",\ revision="[^"\n]*\"""",
    re.VERBOSE,
)


@dataclass(frozen=True)
class PushPlan:
    """What is or would be uploaded.

    Attributes:
        repo_id, revision: where to: a branch.
        files: path -> bytes.
        deleted: files of the repository that the folder no longer has; unknown in a plan.
        tag: the name under which the card's snippet loads exactly these files.
        proof: what was run before.
        commit: what was made, None for a plan.
    """

    repo_id: str
    revision: str
    files: dict[str, int]
    deleted: list[str]
    tag: str
    proof: Proof
    commit: str | None = None

    def __str__(self) -> str:
        to = f"{self.repo_id}, branch {self.revision}, tag {self.tag}"
        lines = [f"{'Would upload' if self.commit is None else 'Uploaded'} to {to}:"]
        lines += [f"  {size:>15,}  {path}" for path, size in self.files.items()]
        lines += [f"  {'deleted':>15}  {path}" for path in self.deleted]
        total = f"{sum(self.files.values()):,} bytes in {len(self.files)} files"
        lines += [f"{total}, in one commit" + (f": {self.commit}" if self.commit else ""), f"Proven: {self.proof}"]
        return "\n".join(lines)


def push_folder(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool = False,
    revision: str = "main",
    tag: str | None = None,
    base: str | None = None,
    base_revision: str | None = None,
    dry_run: bool = False,
    say: Callable[[str], None] = print,
) -> PushPlan:
    """Look through a folder, prove that it works on its own, and upload it in one commit.

    A repository or a branch that does not exist is made first. Nothing else of the repository changes before the
    commit, which holds all files or does not happen: a push that is killed can be repeated, and what LFS has already
    is not sent again. Files that the folder no longer has are deleted by the same commit.

    Args:
        folder: a model folder, or one with `adapter_config.json` and `adapter_model.safetensors` and no `config.json`.
            Without a README.md a card is generated; in one, the snippet is made to load this commit.
        repo_id: owner/name.
        private: make a private repository; a public one of that name is refused.
        revision: branch.
        tag: name for the commit, by default one made of the hash of all files but the card.
        base, base_revision: of an adapter: Hub id and commit of its model, in place of what adapter_config.json says.
        dry_run: do everything but the upload; the network is not used (except for the base of an adapter).
        say: gets what goes on.

    Raises:
        PublishError: something must not be published, does not work on its own, or the Hub refuses.
    """
    _check_names(repo_id, revision, tag)
    with tempfile.TemporaryDirectory(prefix="ct-moe-push-") as temporary:
        staged = Path(temporary)
        adapter = _stage(Path(folder), staged, repo_id, base, base_revision)
        say(f"Looked through {folder}: nothing that must not be published")
        proof = prove_folder(staged, name=folder, **adapter)
        say(f"Proven: {proof}")
        hashes = {path: _sha256(file) for path, file in _files(staged) if path != "README.md"}
        tag = tag or f"files-{hashlib.sha256(json.dumps(hashes, sort_keys=True).encode()).hexdigest()[:12]}"
        _fill_in(staged / "README.md", repo_id, tag)
        hashes["README.md"] = _sha256(staged / "README.md")
        _write_manifest(staged, hashes, proof, adapter)
        sizes = {path: file.stat().st_size for path, file in _files(staged)}
        plan = PushPlan(repo_id, revision, sizes, [], tag, proof)
        return plan if dry_run else _upload(staged, plan, hashes, private)


def push_to_hub(
    model: "CTMoEForConditionalGeneration",
    processor: "CTMoEProcessor",
    repo_id: str,
    *,
    card: str | None = None,
    **push,
) -> PushPlan:
    """As `push_folder`, from memory: what the methods of that name, of a model or a processor alone, cannot do.

    Args:
        model, processor: as in `save_folder`.
        card: content of `card.yaml`, in YAML; it must name the licence.
        **push: of `push_folder`.
    """
    with tempfile.TemporaryDirectory(prefix="ct-moe-push-") as temporary:
        folder = save_folder(model, processor, Path(temporary) / "model")
        if card is not None:
            (folder / "card.yaml").write_text(card, encoding="utf-8")
        return push_folder(folder, repo_id, **push)


def pull_folder(repo_id: str, out: str | Path, revision: str | None = None) -> str:
    """Download a repository as it was at one commit, and check every file against its manifest.

    Args:
        repo_id: owner/name.
        out: folder to create; it must not exist or be empty.
        revision: branch, tag or commit; by default main. What it means now is what is loaded.

    Returns:
        The commit.

    Raises:
        PublishError: there is no such repository or revision, it has no manifest, or a file is not what it names.
        ModelError: `out` holds something.
    """
    _check_names(repo_id, revision or "main", None)
    api = HfApi(library_name="ct-moe", library_version=ct_moe.__version__)
    with _hub_errors(repo_id), new_folder(out) as folder:
        commit = api.repo_info(repo_id, revision=revision).sha
        listed = {entry.path for entry in api.list_repo_tree(repo_id, revision=commit, recursive=True)}
        if MANIFEST not in listed:
            remedy = "Load it with from_pretrained and a revision, or ask its owner to publish it with ct-moe push"
            raise PublishError(repo_id, f"has no {MANIFEST} at {commit}: its files cannot be checked", remedy)
        # The manifest alone decides what is downloaded: a pickle that was added later never gets here.
        api.snapshot_download(repo_id, revision=commit, local_dir=folder, allow_patterns=[MANIFEST])
        wanted = _read_manifest(folder / MANIFEST, repo_id)
        api.snapshot_download(repo_id, revision=commit, local_dir=folder, allow_patterns=sorted(wanted))
        shutil.rmtree(folder / ".cache", ignore_errors=True)
        for path, digest in wanted.items():
            if not (folder / path).is_file() or _sha256(folder / path) != digest:
                finding = f"is not the file that {MANIFEST} of {repo_id} names, at {commit}"
                raise PublishError(path, finding, "Pull another revision, and tell the owner")
    if not (Path(out) / "adapter_config.json").is_file():
        check_model(str(out))
    return commit


def _check_names(repo_id: str, revision: str, tag: str | None) -> None:
    try:
        validate_repo_id(repo_id)
        if repo_id.count("/") != 1:
            raise HFValidationError
    except HFValidationError as error:
        raise PublishError(repo_id, "is no Hub id", "Write owner/name") from error
    for name in (revision, tag):
        if name is not None and (not re.fullmatch(r"[\w][\w./-]*", name) or ".." in name):
            raise PublishError(name, "is no name of a branch, tag or commit", "Use letters, digits, - and .")


def _stage(folder: Path, staged: Path, repo_id: str, base: str | None, revision: str | None) -> dict[str, str]:
    """Put what will be uploaded into `staged`: links to weights, copies, what is generated.

    Returns:
        Arguments of the proof.
    """
    files = publishable_files(folder)
    is_adapter = "config.json" not in files
    if base is not None and not is_adapter:
        raise PublishError("--base", "is for a folder that holds an adapter only", "Leave it out")
    files.pop(MANIFEST, None)  # of an earlier push, or of what this was made of
    for path, file in files.items():
        target = staged / path
        target.parent.mkdir(exist_ok=True)
        if path.endswith(".safetensors"):
            target.symlink_to(file.resolve())
        else:  # small; from here on nobody changes it
            shutil.copyfile(file, target)
    adapter = {}
    if is_adapter:
        target = staged / "adapter_config.json"
        config = json.loads(target.read_text(encoding="utf-8"))
        if base is not None:
            config |= {"base_model_name_or_path": base, "revision": revision}
            target.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        adapter = {"base": config.get("base_model_name_or_path"), "base_revision": config.get("revision")}
        if not _HUB_ID.fullmatch(adapter["base"] or "") or not _COMMIT.fullmatch(adapter["base_revision"] or ""):
            remedy = "Publish the base first, then push with --base ORG/NAME --base-revision SHA"
            raise PublishError("adapter_config.json", "names no base on the Hub at a commit", remedy)
    if "README.md" not in files:
        (staged / "README.md").write_text(str(model_card(staged)), encoding="utf-8")
    check_contents(staged, repo_id=repo_id)
    return adapter


def _files(folder: Path) -> list[tuple[str, Path]]:
    found = ((path.relative_to(folder).as_posix(), path) for path in folder.rglob("*") if path.is_file())
    return sorted(found)


def _sha256(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def _fill_in(card: Path, repo_id: str, tag: str) -> None:
    """Let the card's snippet load what is uploaded now, whatever it named before."""
    text = _SNIPPET.sub(rf'\g<1>"{repo_id}", revision="{tag}"', card.read_text(encoding="utf-8"))
    card.write_text(text, encoding="utf-8")


def _write_manifest(staged: Path, hashes: dict[str, str], proof: Proof, base: dict[str, str]) -> None:
    manifest = {
        "format": 1,
        "date": datetime.now(UTC).date().isoformat(),
        "ct_moe": ct_moe.__version__,
        "versions": {name: version(name) for name in _LIBRARIES},
        "base_model": base.get("base"),
        "base_revision": base.get("base_revision"),
        "proof": asdict(proof),
        "files": {
            path: {"bytes": (staged / path).stat().st_size, "sha256": digest}
            for path, digest in sorted(hashes.items())
        },
    }
    (staged / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")


def _read_manifest(file: Path, repo_id: str) -> dict[str, str]:
    """Path -> sha256; a path must not lead out of the folder."""
    try:
        files = json.loads(file.read_text(encoding="utf-8"))["files"]
        wanted = {path: entry["sha256"] for path, entry in files.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        finding = f"its {MANIFEST} cannot be read ({type(error).__name__})"
        raise PublishError(repo_id, finding, "Pull another revision") from error
    for path in wanted:
        if Path(path).is_absolute() or ".." in Path(path).parts or re.search(r"[*?\[\]\\]", path):
            raise PublishError(repo_id, f"its {MANIFEST} names {path!r}", "Do not use this repository")
    return wanted


def _upload(staged: Path, plan: PushPlan, hashes: dict[str, str], private: bool) -> PushPlan:
    api = HfApi(library_name="ct-moe", library_version=ct_moe.__version__)
    with _hub_errors(plan.repo_id):
        api.create_repo(plan.repo_id, private=private or None, exist_ok=True)
        if private and not api.repo_info(plan.repo_id).private:
            raise PublishError(plan.repo_id, "exists and is public", "Leave out --private, or name another one")
        if plan.revision != "main":
            api.create_branch(plan.repo_id, branch=plan.revision, exist_ok=True)
        parent = api.repo_info(plan.repo_id, revision=plan.revision).sha
        remote = [
            entry.path
            for entry in api.list_repo_tree(plan.repo_id, revision=parent, recursive=True)
            if hasattr(entry, "blob_id")
        ]
        deleted = sorted(set(remote) - set(plan.files) - _KEPT)
        additions = [CommitOperationAdd(path, str(staged / path)) for path in plan.files]
        api.preupload_lfs_files(plan.repo_id, additions, revision=plan.revision, free_memory=False)
        for addition in additions:
            path = addition.path_in_repo
            if path in hashes and addition.upload_info.sha256.hex() != hashes[path]:
                finding = "has changed since the folder was proven; nothing was committed"
                raise PublishError(path, finding, "Leave the folder alone during a push, and push again")
        operations = [*additions, *(CommitOperationDelete(path) for path in deleted)]
        commit = api.create_commit(
            plan.repo_id,
            operations,
            commit_message=f"Publish {plan.tag}, with ct-moe {ct_moe.__version__}",
            revision=plan.revision,
            parent_commit=parent,
        ).oid
        _check_upload(api, plan, commit, staged, hashes)
        _name_commit(api, plan, commit)
    return PushPlan(**{**vars(plan), "deleted": deleted, "commit": commit})


def _check_upload(api: HfApi, plan: PushPlan, commit: str, staged: Path, hashes: dict[str, str]) -> None:
    """Ask the Hub for the hash of every file: what was proven is what lies there."""
    there = {entry.path: entry for entry in api.list_repo_tree(plan.repo_id, revision=commit, recursive=True)}
    for path in plan.files:
        entry = there.get(path)
        if entry is None:
            is_same = False
        elif entry.lfs is not None:
            is_same = entry.lfs.sha256 == hashes.get(path)
        else:
            is_same = entry.blob_id == _git_hash(staged / path)
        if not is_same:
            raise PublishError(path, f"is another file in commit {commit} than here", "Push again")


def _git_hash(file: Path) -> str:
    content = file.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _name_commit(api: HfApi, plan: PushPlan, commit: str) -> None:
    tags = {ref.name: ref.target_commit for ref in api.list_repo_refs(plan.repo_id).tags}
    if plan.tag not in tags:
        api.create_tag(plan.repo_id, tag=plan.tag, revision=commit)
    elif not plan.tag.startswith("files-") and tags[plan.tag] != commit:
        finding = f"tag {plan.tag} exists and names commit {tags[plan.tag]}; the files are in commit {commit}"
        raise PublishError(plan.repo_id, finding, "Push with another --tag")


@contextmanager
def _hub_errors(repo_id: str) -> Iterator[None]:
    """What the Hub and the network say, in this package's words."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of huggingface_hub 2.4 by its HTTP library
            yield
    except RepositoryNotFoundError as error:
        remedy = "Check the name; a private one needs a login: hf auth login"
        raise PublishError(repo_id, "no such repository, or none that you may see", remedy) from error
    except RevisionNotFoundError as error:
        raise PublishError(repo_id, "has no such branch, tag or commit", "Check the revision") from error
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else None
        if status == 412:
            finding = "was changed by someone else during the push, and nothing was uploaded"
            raise PublishError(repo_id, finding, "Push again") from error
        if status in (401, 403):
            raise PublishError(repo_id, "you may not write there", "Log in: hf auth login") from error
        raise PublishError(repo_id, f"the Hub refused ({_one_line(error)})", "Repeat it later") from error
    except (httpx.HTTPError, OfflineModeIsEnabled, RuntimeError, OSError) as error:
        if isinstance(error, RuntimeError) and not isinstance(error.__cause__, httpx.HTTPError | HfHubHTTPError):
            raise
        finding = f"the Hub could not be reached, or broke off ({_one_line(error)})"
        raise PublishError(repo_id, finding, "Repeat it") from error
    except ValueError as error:
        if isinstance(error, PublishError | ModelError):
            raise
        raise PublishError(repo_id, f"the Hub refused ({_one_line(error)})", "Repair that") from error


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:200]
