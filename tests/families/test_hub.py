"""What is fetched from the hub, what counts as fetched, and every way in which that fails; the hub is played here."""

import json
import shutil
from types import SimpleNamespace

import huggingface_hub
import pytest
from huggingface_hub import errors

from sdlora.errors import ModelError
from sdlora.families.hub import cached, configurations, download, looks_like_id, weight_files

FOLDERS = [
    "README.md",
    "model_index.json",
    "v1-5-pruned.safetensors",
    "safety_checker/model.safetensors",
    "safety_checker/config.json",
    "scheduler/scheduler_config.json",
    "tokenizer/vocab.json",
    "tokenizer/merges.txt",
    "text_encoder/config.json",
    "text_encoder/model.safetensors",
    "text_encoder/pytorch_model.bin",
    "text_encoder_2/model.fp16-00001-of-00002.safetensors",
    "text_encoder_2/model.fp16-00002-of-00002.safetensors",
    "text_encoder_2/model.safetensors",
    "text_encoder_2/model.safetensors.index.fp16.json",
    "unet/config.json",
    "unet/diffusion_pytorch_model.safetensors",
    "unet/diffusion_pytorch_model.safetensors.index.json",
    "unet/diffusion_pytorch_model.fp16.safetensors",
    "unet/diffusion_pytorch_model.non_ema.safetensors",
    "vae/config.json",
    "vae/diffusion_pytorch_model.safetensors",
    "vae_1_0/diffusion_pytorch_model.safetensors",
]
GB = 1_000_000_000


class Hub:
    """A hub with one repository, which lies in a folder and is copied file by file, as the real one does."""

    def __init__(self, root, cache, sizes):
        self.root, self.cache, self.sizes, self.fetched, self.error = root, cache, sizes, [], None

    def model_info(self, repository, *, revision, files_metadata, timeout):
        if self.error:
            raise self.error
        assert files_metadata and timeout
        return SimpleNamespace(siblings=[SimpleNamespace(rfilename=f, size=s) for f, s in self.sizes.items()])

    def snapshot_download(self, repository, *, revision=None, allow_patterns=(), local_files_only=False):
        if local_files_only:
            raise errors.IncompleteSnapshotError("most of it is missing", snapshot_path=str(self.cache))
        for file in allow_patterns:
            self.hf_hub_download(repository, file, revision=revision)
        return str(self.cache)

    def hf_hub_download(self, repository, file, *, revision=None):
        self.fetched.append((file, revision))
        (self.cache / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(self.root / file, self.cache / file)
        return str(self.cache / file)


@pytest.fixture
def repository(monkeypatch, tmp_path):
    """Puts a folder on the hub: repository(folder, {file: size in bytes}); sizes are as said or as they are."""

    def put(root, sizes=()):
        (tmp_path / "cache").mkdir()
        files = {str(p.relative_to(root)): p.stat().st_size for p in sorted(root.rglob("*")) if p.is_file()}
        hub = Hub(root, tmp_path / "cache", files | dict(sizes))
        monkeypatch.delenv("HF_HUB_OFFLINE")
        monkeypatch.setattr(huggingface_hub, "HfApi", lambda: hub)
        monkeypatch.setattr(huggingface_hub, "snapshot_download", hub.snapshot_download)
        monkeypatch.setattr(huggingface_hub, "hf_hub_download", hub.hf_hub_download)
        return hub

    return put


@pytest.fixture
def copy_of(tiny_base, tmp_path):
    return shutil.copytree(tiny_base, tmp_path / "copy")


@pytest.fixture
def checkpoint(tmp_path):
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "model.safetensors").write_bytes(b"weights")
    return tmp_path / "root"


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def silent(text):
    """Is told about a download."""


def test_hub_ids_are_owner_and_name_and_maybe_a_file():
    good = ["stable-diffusion-v1-5/stable-diffusion-v1-5", "a/model-2.1", "a/b/c.safetensors", "a/b/c/d.safetensors"]
    assert all(map(looks_like_id, good))
    bad = ["nano", "a/b/c", "../x", "/abs", "a b/c", "", "a/b.safetensors", "a/b.ckpt", "a/b/../c.safetensors"]
    assert not any(map(looks_like_id, bad))


def test_only_one_set_of_weights_is_fetched():
    components = ["unet", "vae", "text_encoder", "text_encoder_2"]
    assert weight_files(FOLDERS, components) == [
        "unet/diffusion_pytorch_model.fp16.safetensors",
        "vae/diffusion_pytorch_model.safetensors",
        "text_encoder/model.safetensors",
        "text_encoder_2/model.fp16-00001-of-00002.safetensors",
        "text_encoder_2/model.fp16-00002-of-00002.safetensors",
        "text_encoder_2/model.safetensors.index.fp16.json",
    ]


def test_configurations_are_the_small_files_that_belong_to_no_weights():
    assert configurations(FOLDERS) == [
        "model_index.json",
        "scheduler/scheduler_config.json",
        "tokenizer/vocab.json",
        "tokenizer/merges.txt",
        "text_encoder/config.json",
        "unet/config.json",
        "vae/config.json",
    ]


def test_a_repository_is_fetched_and_then_found(repository, copy_of):
    (copy_of / "model.safetensors").write_bytes(b"the same again in one file")
    hub, said = repository(copy_of, {"model.safetensors": 4 * GB}), []
    assert cached("a/b") is None
    folder = download("a/b", said.append, "v2")
    assert folder == cached("a/b") == hub.cache
    assert not (folder / "model.safetensors").exists()
    assert said == ["downloading a/b: 0.0 GB, once"]
    assert {revision for _, revision in hub.fetched} == {"v2"}
    names = [name for name, _ in hub.fetched]
    assert len(names) == len(set(names))


@pytest.mark.parametrize(
    "part",
    [
        "unet/diffusion_pytorch_model.safetensors",
        "unet/config.json",
        "vae/diffusion_pytorch_model.safetensors",
        "text_encoder/model.safetensors",
        "tokenizer/tokenizer.json",
        "scheduler/scheduler_config.json",
        "model_index.json",
    ],
)
def test_an_incomplete_cache_does_not_count(repository, copy_of, part):
    hub = repository(copy_of)
    download("a/b", silent)
    (hub.cache / part).unlink()
    assert cached("a/b") is None


def test_the_second_text_encoder_must_be_there_if_the_index_names_one(repository, copy_of):
    hub = repository(copy_of)
    download("a/b", silent)
    edit(hub.cache / "model_index.json", text_encoder_2=["transformers", "CLIPTextModelWithProjection"])
    assert cached("a/b") is None
    shutil.copytree(hub.cache / "text_encoder", hub.cache / "text_encoder_2")
    assert cached("a/b") is None
    shutil.copytree(hub.cache / "tokenizer", hub.cache / "tokenizer_2")
    assert cached("a/b") == hub.cache


def test_a_missing_piece_of_the_weights_does_not_count(repository, copy_of):
    hub = repository(copy_of)
    download("a/b", silent)
    index = {"weight_map": {"x": "one.safetensors", "y": "two.safetensors"}}
    (hub.cache / "unet" / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    (hub.cache / "unet" / "one.safetensors").write_bytes(b"")
    assert cached("a/b") is None
    (hub.cache / "unet" / "two.safetensors").write_bytes(b"")
    assert cached("a/b") == hub.cache


def test_the_real_library_finds_what_was_fetched_in_part(monkeypatch, tiny_base, tmp_path):
    """It calls a snapshot incomplete if any file of the repository is missing, and most are left out on purpose."""
    store, commit = tmp_path / "models--a--b", "0" * 40
    folder = shutil.copytree(tiny_base, store / "snapshots" / commit)
    for name, content in (
        (f"trees/{commit}.json", {"format_version": 1, "files": {"x.ckpt": {"size": 1, "blob_id": "0"}}}),
        ("refs/main", commit),
    ):
        (store / name).parent.mkdir()
        (store / name).write_text(content if isinstance(content, str) else json.dumps(content))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    assert cached("a/b") == folder
    assert cached("a/b", commit) == folder
    assert cached("a/b", "another-branch") is None
    assert cached("a/c") is None


def test_nothing_is_fetched_of_a_model_that_cannot_be_trained(repository, copy_of):
    edit(copy_of / "unet" / "config.json", in_channels=9)
    hub = repository(copy_of)
    with pytest.raises(ModelError, match="inpainting"):
        download("a/b", silent)
    assert not any(name.endswith(".safetensors") for name, _ in hub.fetched)


def test_pickled_weights_are_named_and_not_fetched(repository, copy_of):
    file = copy_of / "unet" / "diffusion_pytorch_model.safetensors"
    file.rename(file.with_suffix(".bin"))
    hub = repository(copy_of)
    with pytest.raises(ModelError, match=r"unet; unet/diffusion_pytorch_model\.bin is a pickle"):
        download("a/b", silent)
    assert not any(name.endswith((".safetensors", ".bin")) for name, _ in hub.fetched)


def test_a_repository_of_one_checkpoint_is_that_file(repository, checkpoint):
    (checkpoint / "lora.safetensors").write_bytes(b"small")
    hub, said = repository(checkpoint, {"model.safetensors": 2 * GB}), []
    assert download("a/b", said.append, "main") == hub.cache / "model.safetensors"
    assert hub.fetched == [("model.safetensors", "main")]
    assert said == ["downloading model.safetensors of a/b: 2.0 GB, once"]
    assert download("a/b", said.append) == hub.cache / "model.safetensors"
    assert len(hub.fetched) == len(said) == 1


def test_one_file_of_many_can_be_named(repository, checkpoint):
    (checkpoint / "old").mkdir()
    (checkpoint / "old" / "first.safetensors").write_bytes(b"weights")
    hub = repository(checkpoint, {"model.safetensors": 2 * GB})
    assert cached("a/b/old/first.safetensors") is None
    path = download("a/b/old/first.safetensors", silent)
    assert path == cached("a/b/old/first.safetensors") == hub.cache / "old" / "first.safetensors"


@pytest.mark.parametrize(
    ("sizes", "name", "match"),
    [
        ({"x.safetensors": 2 * GB, "y.safetensors": 2 * GB}, "a/b", r"2 checkpoints; name one: --base a/b/x\.safetens"),
        ({"x.safetensors": 2 * GB}, "a/b/z.safetensors", r"no z\.safetensors; name one: --base a/b/x\.safetensors"),
        ({"x.safetensors": GB // 10}, "a/b", "a LoRA or a VAE is no base"),
        ({"x.ckpt": 4 * GB}, "a/b", r"pickles only \(x\.ckpt\).*--allow-pickle"),
        ({}, "a/b", "no base model"),
    ],
)
def test_what_a_repository_lacks_is_said(repository, tmp_path, sizes, name, match):
    (tmp_path / "root").mkdir()
    hub = repository(tmp_path / "root", sizes)
    with pytest.raises(ModelError, match=match):
        download(name, silent)
    assert not hub.fetched


def http(kind, status):
    return kind("it failed", response=SimpleNamespace(status_code=status, headers={}, request=None))


class ConnectError(Exception):
    """Named as in the hub's HTTP library, whose package changes with its version."""


class ReadTimeout(Exception):
    """The same."""


@pytest.mark.parametrize(
    ("error", "match"),
    [
        (http(errors.GatedRepoError, 401), r"licence accepted on https://huggingface\.co/a/b, and a login"),
        (http(errors.GatedRepoError, 403), "licence accepted"),
        (http(errors.RepositoryNotFoundError, 401), "or it is private; check the spelling, or log in"),
        (http(errors.RepositoryNotFoundError, 404), "no repository a/b; check the spelling$"),
        (http(errors.RevisionNotFoundError, 404), "no branch, tag or commit 'v9'"),
        (http(errors.HfHubHTTPError, 401), r"answers 401 .* log in again"),
        (http(errors.HfHubHTTPError, 403), r"answers 403 .* your login may not read it"),
        (http(errors.HfHubHTTPError, 503), r"answers 503 .* try again later"),
        (errors.OfflineModeIsEnabled("off"), "out of reach; use --base nano"),
        (errors.LocalEntryNotFoundError("it broke off"), "out of reach; use --base nano"),
        (OSError("the disk is full"), "the disk is full"),
        (ConnectError("Name or service not known"), "cannot reach the hub .*not known.*use --base nano"),
        (ReadTimeout("slow"), "cannot reach the hub"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_errors_of_the_hub_are_told_apart(repository, checkpoint, error, match):
    hub = repository(checkpoint)
    hub.error = error
    with pytest.raises(ModelError, match=match):
        download("a/b", silent, "v9")


def test_errors_of_the_program_are_not_the_hubs(repository, checkpoint):
    hub = repository(checkpoint)
    hub.error = ZeroDivisionError()
    with pytest.raises(ZeroDivisionError):
        download("a/b", silent)


def test_a_mistyped_path_is_told_from_a_missing_repository(repository, checkpoint):
    hub = repository(checkpoint)
    hub.error = http(errors.RepositoryNotFoundError, 404)
    with pytest.raises(ModelError, match=r"There is no file models/sd/x\.safetensors on this machine either"):
        download("models/sd/x.safetensors", silent)


def test_with_the_hub_switched_off_the_files_that_are_there_are_named(monkeypatch, repository, checkpoint):
    hub = repository(checkpoint)
    hub.hf_hub_download("a/b", "model.safetensors")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert cached("a/b") is None
    with pytest.raises(ModelError, match=r"HF_HUB_OFFLINE is set; .*--base a/b/model\.safetensors"):
        download("a/b", silent)
    (hub.cache / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="use --base nano"):
        download("a/b", silent)
