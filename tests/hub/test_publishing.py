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
"""Publishing and coming back, through the real client against a Hub on loopback."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from command_line import fail, invoke
from hub_endpoint import HubEndpoint
from huggingface_hub import HfApi, constants
from safetensors.torch import load_file, save_file

from ct_moe import CTMoEForConditionalGeneration, CTMoEProcessor, ModelError, PublishError
from ct_moe.hub import publishing
from ct_moe.hub.folder import save_folder
from ct_moe.hub.proof import LIMIT, Proof, prove_folder
from ct_moe.hub.publishing import MANIFEST, pull_folder, push_folder, push_to_hub


ROOT = Path(__file__).parents[2]
CT_MOE = Path(sys.executable).with_name("ct-moe")


@pytest.fixture
def hub():
    with HubEndpoint() as endpoint:
        yield endpoint


@pytest.fixture
def client(hub, monkeypatch):
    """This process uses the Hub on loopback, and takes the proof, which is slow, for given."""
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    downloads = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", downloads)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    proofs = []

    def prove(folder, **adapter):
        proofs.append(sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()))
        return Proof(0.0, 1, "float32")

    monkeypatch.setattr(publishing, "prove_folder", prove)
    return proofs


@pytest.fixture
def folder(model_folder, tmp_path):
    out = tmp_path / "model"
    shutil.copytree(model_folder, out)
    (out / "card.yaml").write_text("license: apache-2.0\n")
    return out


def push(folder, **kwargs):
    return push_folder(folder, "lab/model", say=lambda _: None, **kwargs)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_what_was_pushed_comes_back_byte_for_byte(hub, client, folder, tmp_path):
    done = push(folder)
    assert hub.repositories["lab/model"].branches["main"] == done.commit
    commits = hub.repositories["lab/model"].commits
    assert len(commits) == 2  # the empty repository, and one with everything
    manifest = json.loads(hub.files("lab/model")[MANIFEST])
    for path, content in hub.files("lab/model").items():
        if path not in (MANIFEST, ".gitattributes"):
            assert manifest["files"][path] == {
                "bytes": len(content),
                "sha256": hashlib.sha256(content).hexdigest(),
            }
    assert pull_folder("lab/model", tmp_path / "back") == done.commit
    back, wanted = contents(tmp_path / "back"), contents(folder)
    assert back.keys() == {*wanted, "README.md", MANIFEST}
    assert {path: back[path] for path in wanted} == wanted
    card = back["README.md"].decode()
    assert f'model="lab/model", revision="{done.tag}"' in card
    assert pull_folder("lab/model", tmp_path / "tagged", done.tag) == done.commit
    assert client[0] == sorted({*wanted, "README.md"})  # what was proven is what was uploaded


def test_a_card_from_elsewhere_names_the_repository_and_the_commit_it_is_pushed_to(hub, client, folder, tmp_path):
    push(folder)
    pull_folder("lab/model", tmp_path / "back")
    (tmp_path / "back" / "NOTICE").write_text("changed")
    done = push_folder(tmp_path / "back", "other/model", say=lambda _: None)
    card = hub.files("other/model", done.tag)["README.md"].decode()
    assert f'model="other/model", revision="{done.tag}", trust_remote_code' in card
    assert "lab/model" not in card


def test_pushing_again_changes_nothing_and_a_change_is_one_more_commit(hub, client, folder):
    first = push(folder)
    assert push(folder).commit == first.commit
    (folder / "conversion_report.json").unlink()
    (folder / "NOTICE").write_text("Made in a lab.\n")
    second = push(folder)
    assert second.deleted == ["conversion_report.json"]
    assert hub.repositories["lab/model"].commits[second.commit]["parent"] == first.commit
    assert {"NOTICE", ".gitattributes"} <= hub.files("lab/model").keys()
    assert "conversion_report.json" not in hub.files("lab/model")
    assert "conversion_report.json" in hub.files("lab/model", first.tag)
    puts = [path for method, path in hub.requests if method == "PUT"]
    # The weights, and those that the base never reads: what is there is not sent again.
    assert len(puts) == len(set(puts)) == 2


def test_branches_tags_and_private_repositories(hub, client, folder):
    done = push(folder, revision="next", tag="v1", private=True)
    repository = hub.repositories["lab/model"]
    assert repository.private
    assert repository.branches["next"] == repository.tags["v1"] == done.commit
    assert set(hub.files("lab/model", "main")) == {".gitattributes"}
    (folder / "NOTICE").write_text("x")
    with pytest.raises(PublishError, match="tag v1 exists"):
        push(folder, revision="next", tag="v1")
    repository.private = False
    before = hub_state(hub)
    with pytest.raises(PublishError, match="is public"):
        push(folder, private=True)
    assert hub_state(hub) == before


def hub_state(hub) -> dict:
    return {name: (dict(r.branches), dict(r.tags)) for name, r in hub.repositories.items()}


def test_large_files_go_in_parts(hub, client, folder, tmp_path):
    hub.part_bytes = 100_000
    push(folder)
    assert any(path.endswith("/2") for method, path in hub.requests if method == "PUT")
    pull_folder("lab/model", tmp_path / "back")
    assert (tmp_path / "back" / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()


def test_a_dry_run_sends_nothing(hub, client, folder, tmp_path):
    plan = push(folder, dry_run=True)
    assert hub.requests == []
    assert plan.commit is None
    assert plan.files.keys() == {*contents(folder), "README.md", MANIFEST}
    assert len(client) == 1  # but proves the folder
    printed = invoke("push", folder, "lab/model", "--dry-run").stdout
    assert "Would upload to lab/model" in printed
    assert "Proven: " in printed
    assert plan.tag == push(folder).tag


def test_a_push_that_someone_overtakes_is_refused_whole(hub, client, folder):
    def overtake(repository):
        hub.before_commit = None
        repository.branches["main"] = repository.add(repository.branches["main"], {}, "another")

    hub.before_commit = overtake
    with pytest.raises(PublishError, match="changed by someone else"):
        push(folder)
    assert hub.files("lab/model") == {}
    push(folder)
    assert "model.safetensors" in hub.files("lab/model")


def test_a_folder_that_changes_after_its_proof_is_noticed(hub, client, folder, monkeypatch):
    upload, settings = HfApi.preupload_lfs_files, (folder / "generation_config.json").read_bytes()

    def change_and_upload(self, *args, **kwargs):
        (folder / "generation_config.json").write_text("{}")
        weights = {name: tensor + 1 for name, tensor in load_file(folder / "model.safetensors").items()}
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
        return upload(self, *args, **kwargs)

    monkeypatch.setattr(HfApi, "preupload_lfs_files", change_and_upload)
    with pytest.raises(PublishError, match="has changed since the folder was proven"):
        push(folder)
    assert set(hub.files("lab/model")) == {".gitattributes"}
    monkeypatch.setattr(HfApi, "preupload_lfs_files", upload)
    (folder / "generation_config.json").write_bytes(settings)
    push(folder)
    assert hub.files("lab/model")["generation_config.json"] == settings


def test_nothing_is_asked_of_the_hub_before_the_folder_is_found_fit(hub, client, folder, monkeypatch, capsys):
    (folder / "scan.dcm").write_bytes(b"")
    assert "a scan of a patient" in fail(monkeypatch, capsys, "push", folder, "lab/model")
    (folder / "scan.dcm").unlink()
    (folder / "card.yaml").unlink()
    assert "names no licence" in fail(monkeypatch, capsys, "push", folder, "lab/model")
    for name in ("model", "a/b/c", "https://x/y"):
        assert "is no Hub id" in fail(monkeypatch, capsys, "push", folder, name)
    assert "no name of a branch" in fail(monkeypatch, capsys, "push", folder, "lab/model", "--revision", "../x")
    assert "adapter only" in fail(monkeypatch, capsys, "push", folder, "lab/model", "--base", "lab/base")
    assert hub.requests == []
    assert client == []


def test_what_is_pulled_is_what_the_manifest_names(hub, client, folder, tmp_path, monkeypatch, capsys):
    done = push(folder)
    api = HfApi(endpoint=hub.url)
    upload = {"repo_id": "lab/model", "commit_message": "by hand"}
    api.upload_file(path_or_fileobj=b"\x80\x04evil", path_in_repo="pytorch_model.bin", **upload)
    pull_folder("lab/model", tmp_path / "first")
    assert not (tmp_path / "first" / "pytorch_model.bin").exists()  # added later, in no manifest
    api.upload_file(path_or_fileobj=b"{}", path_in_repo="generation_config.json", **upload)
    with pytest.raises(PublishError, match=r"is not the file that manifest\.json"):
        pull_folder("lab/model", tmp_path / "second")
    assert not (tmp_path / "second").exists()
    pull_folder("lab/model", tmp_path / "second", done.commit)
    with pytest.raises(ModelError, match="not an empty folder"):
        pull_folder("lab/model", tmp_path / "second", done.commit)
    manifest = {"files": {"../../evil": {"sha256": "0"}}}
    api.upload_file(path_or_fileobj=json.dumps(manifest).encode(), path_in_repo=MANIFEST, **upload)
    with pytest.raises(PublishError, match="Do not use this repository"):
        pull_folder("lab/model", tmp_path / "third")
    api.delete_file(MANIFEST, "lab/model")
    with pytest.raises(PublishError, match="has no manifest"):
        pull_folder("lab/model", tmp_path / "third")
    assert "no such repository" in fail(monkeypatch, capsys, "pull", "lab/other", tmp_path / "third")
    assert "no such branch" in fail(monkeypatch, capsys, "pull", "lab/model", tmp_path / "third", "--revision", "x")


def test_a_hub_that_cannot_be_reached_is_named(hub, client, folder, monkeypatch, capsys):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
    assert "could not be reached" in fail(monkeypatch, capsys, "push", folder, "lab/model")


def test_a_model_in_memory_is_pushed_with_its_processor(hub, client, model_folder, tmp_path):
    model = CTMoEForConditionalGeneration.from_pretrained(model_folder)
    processor = CTMoEProcessor.from_pretrained(model_folder)
    push_to_hub(model, processor, "lab/model", card="license: mit\n", say=lambda _: None)
    pull_folder("lab/model", tmp_path / "back")
    save_folder(model, processor, tmp_path / "saved")
    back = contents(tmp_path / "back")
    assert {path: back[path] for path in contents(tmp_path / "saved")} == contents(tmp_path / "saved")


@pytest.mark.slow
def test_a_folder_is_proven_or_refused(folder):
    proof = prove_folder(folder)
    assert proof.max_abs_difference <= LIMIT
    assert proof.num_logits > 1000
    code = folder / "modeling_ct_moe.py"
    text = code.read_text()
    weights = load_file(folder / "model.safetensors")
    assert "logits_to_keep" in text
    # Code that multiplies its logits, code that is missing, weights that are incomplete.
    changed = text.replace("logits = self.lm_head(", "logits = 1.001 * self.lm_head(", 1)
    assert changed != text
    code.write_text(changed)
    with pytest.raises(PublishError, match="gives other logits"):
        prove_folder(folder)
    code.unlink()
    with pytest.raises(PublishError, match="does not load and run on its own"):
        prove_folder(folder)
    code.write_text(text)
    weights.pop("lm_head.weight")
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(PublishError, match="tensors are missing"):
        prove_folder(folder)


PUSH_UNPROVEN = """
import sys
from ct_moe.hub import publishing
from ct_moe.hub.proof import Proof
publishing.prove_folder = lambda folder, **adapter: Proof(0.0, 1, "float32")
print(publishing.push_folder(sys.argv[1], "lab/model").commit)
"""


@pytest.mark.slow
def test_a_push_that_is_killed_half_way_leaves_the_remote_unchanged_and_can_be_repeated(hub, client, folder, tmp_path):
    (folder / "NOTICE").write_text("first")
    push(folder)
    before, state = hub.files("lab/model"), hub_state(hub)
    (folder / "NOTICE").write_text("second")
    weights = {name: tensor + 1 for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})

    hub.uploading.clear()
    hub.go_on.clear()
    environment = {**os.environ, **hub.environment(tmp_path)}
    command = [sys.executable, "-c", PUSH_UNPROVEN, str(folder)]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    assert hub.uploading.wait(120)
    process.send_signal(signal.SIGKILL)
    assert process.wait(30) == -signal.SIGKILL
    hub.go_on.set()
    assert hub.files("lab/model") == before
    assert hub_state(hub) == state

    again = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert hub.repositories["lab/model"].branches["main"] == again.stdout.split()[-1]
    after = hub.files("lab/model")
    assert after["NOTICE"] == b"second"
    assert after["model.safetensors"] == (folder / "model.safetensors").read_bytes()


LOAD_BY_ID = """
import importlib.util, json, sys, torch
from transformers import AutoModel, AutoModelForImageTextToText, AutoProcessor, pipeline
assert importlib.util.find_spec("ct_moe") is None
_, repo_id, revision, scan = sys.argv
pinned = {"revision": revision, "trust_remote_code": True}
processor = AutoProcessor.from_pretrained(repo_id, **pinned)
messages = [{"role": "user", "content": [{"type": "image", "path": scan}, {"type": "text", "text": "A nodule?"}]}]
inputs = processor.apply_chat_template(
    [messages], add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
)
sums = []
for auto in (AutoModel, AutoModelForImageTextToText):
    model = auto.from_pretrained(repo_id, **pinned)
    assert type(model).__module__.startswith("transformers_modules."), type(model).__module__
    with torch.no_grad():
        sums.append(model(**inputs).logits.double().sum().item())
reporter = pipeline("ct-report", model=repo_id, **pinned)
result = reporter(scan, max_new_tokens=4, do_sample=False)
print(json.dumps({"sums": sums, "text": result["text"], "model": result["model"], "revision": result["revision"]}))
"""


@pytest.mark.slow
def test_a_clean_environment_loads_by_id_at_a_pinned_revision(
    hub, folder, python_without_package, test_data, tmp_path
):
    python = str(python_without_package)
    scan = str(test_data / "totalseg" / "example_ct_sm.nii.gz")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

    def run(cache: str, *command: str) -> str:
        variables = {**environment, **hub.environment(tmp_path / cache)}
        done = subprocess.run(command, cwd=tmp_path, env=variables, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    printed = run("owner", str(CT_MOE), "push", str(folder), "lab/model", "--tag", "v1")
    assert "in a process without this package" in printed
    first = hub.repositories["lab/model"].branches["main"]
    weights = {name: tensor * 1.5 for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    run("owner", str(CT_MOE), "push", str(folder), "lab/model")
    assert hub.repositories["lab/model"].branches["main"] != first

    by_commit, by_tag, by_branch = (
        json.loads(run(f"user-{revision}", python, "-c", LOAD_BY_ID, "lab/model", revision, scan).splitlines()[-1])
        for revision in (first, "v1", "main")
    )
    assert by_commit == by_tag
    assert by_commit["revision"] == first
    assert by_commit["model"] == "lab/model"
    assert by_commit["sums"][0] == by_commit["sums"][1]
    assert by_branch["sums"] != by_commit["sums"]  # the pin is what keeps the first one


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # PEFT's
def test_an_adapter_is_published_alone_and_names_its_base_at_a_commit(hub, folder, tmp_path):
    from peft import LoraConfig, get_peft_model

    environment = {**os.environ, **hub.environment(tmp_path)}

    def ct_moe(*arguments: str) -> subprocess.CompletedProcess:
        command = [str(CT_MOE), *map(str, arguments)]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)

    assert ct_moe("push", folder, "lab/base").returncode == 0
    base = hub.repositories["lab/base"].branches["main"]
    network = CTMoEForConditionalGeneration.from_pretrained(folder)
    lora = LoraConfig(r=2, target_modules=r".*language_model.*(o_proj|down_proj)", init_lora_weights=False)
    adapter = tmp_path / "adapter"
    torch.manual_seed(0)
    get_peft_model(network, lora).save_pretrained(adapter)
    (adapter / "README.md").unlink()
    (adapter / "card.yaml").write_text("license: apache-2.0\n")

    refused = ct_moe("push", adapter, "lab/adapter")
    assert refused.returncode == 1
    assert "adapter_config.json: names no base on the Hub at a commit" in refused.stderr
    done = ct_moe("push", adapter, "lab/adapter", "--base", "lab/base", "--base-revision", base)
    assert done.returncode == 0, done.stderr
    files = hub.files("lab/adapter")
    assert {"adapter_config.json", "adapter_model.safetensors", "README.md", MANIFEST} <= files.keys()
    assert not {"config.json", "model.safetensors"} & files.keys()
    config = json.loads(files["adapter_config.json"])
    assert (config["base_model_name_or_path"], config["revision"]) == ("lab/base", base)
    card = files["README.md"].decode()
    assert "base_model_relation: adapter" in card
    assert f'"lab/base", revision="{base}"' in card
    pulled = ct_moe("pull", "lab/adapter", tmp_path / "back")
    assert pulled.returncode == 0, pulled.stderr
