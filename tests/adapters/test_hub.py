"""Publishing and loading over real HTTP, by the real client: what comes back, what is said when it fails."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest
from PIL import Image

from tests.support.hub_client import Client, Result, machine
from tests.support.hub_server import TOKEN, HubServer, Repository, serving
from tests.support.models import REPOSITORY, backbone

TRAIN = REPOSITORY / "examples" / "train.py"
RETRIES = not huggingface_hub.__version__.startswith("0.")
"""Whether the client tries again where releases before 1.0 give up with an error."""
LABELS = {0: "cat", 1: "dog", 2: "hen"}
PROCESSOR = {"image_processor_type": "ViTImageProcessor", "size": {"height": 8, "width": 8}}
ADAPTER = {"adapter_config.json", "adapter_model.safetensors", "plasticity.json", "plasticity.png", "README.md"}

LOGITS = """
import json
from PIL import Image
images = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
def logits(model):
    with torch.no_grad():
        return model.eval()(pixel_values=images).logits.tolist()
def classify(model, image_processor):
    answers = pipeline("image-classification", model=model, image_processor=image_processor)
    return {answer["label"]: answer["score"] for answer in answers(Image.open(picture))}
"""

ADAPT = (
    LOGITS
    + """
from plasticity_peft import PlasticityConfig
labels = {int(key): name for key, name in labels.items()}
torch.manual_seed(sum(map(ord, repository)))  # no two are alike, for a file that the server has is not sent again
model = ViTForImageClassification.from_pretrained(
    "user/base", id2label=labels, label2id={name: key for key, name in labels.items()}
)
model = peft.get_peft_model(
    model, PlasticityConfig(criterion="bound", training=training, candidates=["MHA"], init_lora_weights=False)
)
with torch.no_grad():
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(torch.randn_like(parameter) * 0.1)
processor = AutoImageProcessor.from_pretrained("user/base")
"""
)


class World:
    """A Hub with a base model, a machine that knows it, and a picture."""

    def __init__(self, hub: HubServer, client: Client, folder: Path) -> None:
        self.hub, self.client, self.folder = hub, client, folder
        self.picture = str(folder / "picture.png")
        Image.new("RGB", (9, 9), (200, 50, 120)).save(self.picture)

    def run(self, script: str, **options: object) -> Result:
        return self.client.run(script, picture=self.picture, **options)

    def push(self, repository: str, training: str = "lora", push: str = "", **options: object) -> Result:
        """Returns what the adapted model answers, once it was pushed by two calls, or by `push`."""
        push = push or "model.push_to_hub(repository)\nprocessor.push_to_hub(repository)"
        answer = "\nprint(json.dumps({'logits': logits(model), 'labels': classify(model, processor)}))"
        names = {"labels": LABELS, "training": training, "repository": repository}
        return self.run(f"{ADAPT}\n{push}{answer}", **names, **options)

    def files(self, repository: str) -> dict[str, bytes]:
        return self.hub.repositories[repository].files()

    def put(self, repository: str, files: dict[str, bytes], *, private: bool = False) -> None:
        self.hub.repositories[repository] = Repository(private)
        self.hub.repositories[repository].commit("main", files, "as it is")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("hub")
    base = backbone()
    base.config.num_labels = 2  # as in a checkpoint without a head
    base.save_pretrained(folder / "base")
    (folder / "base" / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
    with serving(part_size=10_000) as hub, machine(hub, folder) as client:
        world = World(hub, client, folder)
        world.put("user/base", {path.name: path.read_bytes() for path in (folder / "base").iterdir()})
        yield world
        assert not [fault for fault in hub.faults if fault.times not in (0, 90)], "a fault that never happened"


@pytest.fixture(scope="module")
def published(world: World) -> dict[str, dict]:
    """What two published adapters answered before they were published."""
    return {training: world.push(f"user/{training}", training).values for training in ("lora", "full")}


def digests(files: dict[str, bytes]) -> dict[str, str]:
    return {path: hashlib.sha256(content).hexdigest() for path, content in files.items()}


SNAPSHOT = """
import hashlib, json, pathlib
folder = pathlib.Path(huggingface_hub.snapshot_download(repository))
files = [path for path in folder.rglob("*") if path.is_file()]
print(json.dumps({str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}))
"""


@pytest.mark.parametrize("training", ["lora", "full"])
def test_what_is_published_comes_back_byte_for_byte(training: str, world: World, published: dict) -> None:
    repository = f"user/{training}"
    files = world.files(repository)
    assert set(files) == ADAPTER | {".gitattributes", "preprocessor_config.json"}
    assert world.run(SNAPSHOT, stock=True, repository=repository).values == digests(files)
    assert len(world.hub.repositories[repository].messages) == 3  # made, the model, the image processor
    assert json.loads(files["plasticity.json"])["adapter"]["id2label"] == {str(k): v for k, v in LABELS.items()}
    assert b"library_name: peft" in files["README.md"]
    assert b"base_model: user/base" in files["README.md"]
    uploads = "/storage/[0-9a-f]+/[0-9]+"
    assert world.hub.count("PUT", uploads) > 1, "nothing was uploaded in several parts"


def test_what_is_published_is_what_is_saved(world: World) -> None:
    """Every file but the card, which tells the repository's name."""
    script = "model.push_to_hub(repository)\nmodel.save_pretrained('saved')"
    assert world.push("user/saved", push=script).code == 0
    saved = {path.name: path.read_bytes() for path in (world.folder / "saved").iterdir()}
    assert set(saved) == ADAPTER
    published = world.files("user/saved")
    assert all(published[name] == content for name, content in saved.items() if name != "README.md")


STOCK = (
    LOGITS
    + """
try:
    import plasticity_peft
except ImportError:
    pass
else:
    raise SystemExit("plasticity_peft could be imported")
with open(huggingface_hub.hf_hub_download(repository, "plasticity.json")) as file:
    id2label = {int(index): name for index, name in json.load(file)["adapter"]["id2label"].items()}
processor = AutoImageProcessor.from_pretrained(repository)
options = {"num_labels": len(id2label), "id2label": id2label}
base = AutoModelForImageClassification.from_pretrained("user/base", **options)
models = {
    "peft": peft.PeftModel.from_pretrained(base, repository),
    "auto": AutoModelForImageClassification.from_pretrained(repository, **options),
}
print(json.dumps({how: {"logits": logits(m), "labels": classify(m, processor)} for how, m in models.items()}))
"""
)


@pytest.mark.parametrize("training", ["lora", "full"])
def test_stock_peft_and_transformers_load_it_with_its_labels(training: str, world: World, published: dict) -> None:
    answers = world.run(STOCK, stock=True, repository=f"user/{training}").values
    assert set(answers) == {"peft", "auto"}
    for answer in answers.values():
        check_same(answer, published[training])


def check_same(answer: dict, expected: dict) -> None:
    assert answer["labels"] == pytest.approx(expected["labels"], rel=1e-4)
    assert set(answer["labels"]) == set(LABELS.values())
    for row, wanted in zip(answer["logits"], expected["logits"], strict=True):
        assert row == pytest.approx(wanted, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize(
    "script",
    [
        'pipeline("image-classification", model="user/lora")',
        'AutoModelForImageClassification.from_pretrained("user/lora")',
    ],
)
def test_what_stock_transformers_cannot_do(script: str, world: World, published: dict) -> None:
    """If one of these fails, the card can say less, and --push_merged is needed less."""
    assert world.run(script, stock=True).code == 1


LOAD = (
    LOGITS
    + """
from plasticity_peft import PlasticityReport, load_pretrained
FIRST
model, image_processor, id2label = load_pretrained(repository, **options)
assert model.config.id2label == id2label == {int(key): name for key, name in labels.items()}
report = PlasticityReport.from_pretrained(repository, **options)
assert report.ranking() == model.peft_config["default"].report.ranking()
print(json.dumps({"logits": logits(model), "labels": classify(model, image_processor)}))
"""
)


def load(world: World, repository: str, options: dict | None = None, *, first: str = "pass", **run: object) -> Result:
    """Returns how the one call for a model, its image processor and its labels went, and what they answer."""
    script = LOAD.replace("FIRST", first)
    return world.run(script, repository=repository, labels=LABELS, options=options or {}, **run)


@pytest.mark.parametrize("training", ["lora", "full"])
def test_one_call_loads_model_processor_and_labels(training: str, world: World, published: dict) -> None:
    check_same(load(world, f"user/{training}").values, published[training])


def test_options_of_the_hub(world: World, published: dict) -> None:
    lora = world.hub.repositories["user/lora"]
    expected = published["lora"]
    before_the_processor = list(lora.commits)[1]
    assert "preprocessor_config.json" not in lora.files(before_the_processor)
    check_same(load(world, "user/lora", {"revision": before_the_processor}).values, expected)
    world.put("user/inside", {f"deep/inside/{path}": content for path, content in lora.files().items()})
    check_same(load(world, "user/inside", {"subfolder": "deep/inside"}).values, expected)
    world.put("user/private", lora.files(), private=True)
    check_same(load(world, "user/private", {"token": TOKEN}, token="").values, expected)


def test_offline_it_loads_what_is_in_the_cache(world: World, published: dict) -> None:
    offline = "huggingface_hub.constants.HF_HUB_OFFLINE = True"
    check_same(load(world, "user/lora").values, published["lora"])
    check_same(load(world, "user/lora", first=offline, keep=True).values, published["lora"])
    assert (
        "AdapterError: user/lora is not a folder, and the Hub cannot be reached"
        in load(world, "user/lora", first=offline).error
    )


@pytest.mark.parametrize(
    ("repository", "options", "token", "text"),
    [
        ("user/nothing", {}, TOKEN, r"neither a folder nor a repository on the Hub that can be read"),
        ("user/secret", {}, "", r"a private one needs token="),
        ("user/lora", {"revision": "v9"}, TOKEN, r"user/lora on the Hub has no revision 'v9'"),
        ("user/lora", {}, "hf_wrong", r"Invalid credentials in Authorization header"),
        ("user/base", {}, TOKEN, r"No adapter_config.json in user/base. It is not an adapter"),
        ("user/orphan", {}, TOKEN, r"Cannot load user/gone, the base model of user/orphan: .* Give base_model"),
    ],
)
def test_what_cannot_be_loaded_is_said(
    repository: str, options: dict, token: str, text: str, world: World, published: dict
) -> None:
    files = world.files("user/lora")
    world.put("user/secret", files, private=True)
    config = json.loads(files["adapter_config.json"]) | {"base_model_name_or_path": "user/gone"}
    world.put("user/orphan", files | {"adapter_config.json": json.dumps(config).encode()})
    error = load(world, repository, options, token=token).error
    assert error.startswith("plasticity_peft.errors.AdapterError: ")
    assert re.search(text, error.replace("\n", " ")), error


@pytest.mark.parametrize("name", ["adapter_config.json", "plasticity.json"])
def test_a_server_that_stays_broken_is_no_missing_file(name: str, world: World, published: dict) -> None:
    """plasticity.json may be missing, but not because the Hub cannot be asked."""
    world.hub.fail("HEAD", f"user/lora/resolve/main/{name}", 500, times=20)
    error = load(world, "user/lora").error
    world.hub.faults.clear()
    assert f"the Hub cannot be reached for {name}" in error


def test_a_download_that_breaks_off_goes_on_where_it_was(world: World, published: dict) -> None:
    weights = hashlib.sha256(world.files("user/full")["adapter_model.safetensors"]).hexdigest()
    world.hub.cut("GET", f"/storage/{weights}", after=5000)
    small_pieces = (
        "huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE = 1000"  # of the last piece, only a whole one is kept
    )
    result = load(world, "user/full", first=small_pieces)
    if not RETRIES:
        assert "AdapterError: Cannot get adapter_model.safetensors of user/full from the Hub" in result.error
        result = load(world, "user/full")
    check_same(result.values, published["full"])
    asked = [head for method, path, head in world.hub.requests if method == "GET" and path.endswith(weights)]
    assert ("bytes=5000-" in [{name.lower(): value for name, value in head.items()}.get("range") for head in asked]
            or not RETRIES)  # fmt: skip


def test_a_server_that_errs_twice_and_then_works(world: World) -> None:
    if RETRIES:
        world.hub.fail("POST", "user/patient/preupload", 429, times=2, Retry_After="7")
        world.hub.fail("POST", "user/patient.git/info/lfs", 500, times=2)
    world.hub.fail("PUT", "/storage/", 503, times=2)
    result = world.push("user/patient", "full", push="model.push_to_hub(repository)")
    assert result.code == 0, result.err
    assert set(world.files("user/patient")) == ADAPTER | {".gitattributes"}
    assert world.run(SNAPSHOT, repository="user/patient").values == digests(world.files("user/patient"))


UPLOADS = {
    "storage": ("PUT", "/storage/", "Error while uploading '"),
    "commit": ("POST", "user/broken-commit/commit", ""),
}


@pytest.mark.parametrize("where", ["storage", pytest.param("commit", marks=pytest.mark.slow)])
def test_an_upload_that_breaks_off_leaves_nothing(where: str, world: World) -> None:
    method, path, text = UPLOADS[where]
    repository = f"user/broken-{where}"
    world.hub.cut(method, path, after=100, times=90)
    result = world.push(repository, "lora" if where == "commit" else "full", push="model.push_to_hub(repository)")
    world.hub.faults.clear()
    assert text in result.error
    assert set(world.files(repository)) == {".gitattributes"}
    assert world.push(repository, push="model.push_to_hub(repository)").code == 0
    assert set(world.files(repository)) == ADAPTER | {".gitattributes"}


def test_a_wrong_token_publishes_nothing(world: World) -> None:
    result = world.push("user/refused", push="model.push_to_hub(repository, token='hf_wrong')")
    assert "401" in result.error
    assert "Invalid credentials in Authorization header" in result.error
    assert "user/refused" not in world.hub.repositories


SHORT = [
    "--model_name_or_path", "user/base", "--max_train_samples", "48", "--max_steps", "2", "--max_samples", "16",
    "--disable_tqdm", "true", "--push_to_hub", "true", "--validation_fraction", "0.02", "--test_fraction", "0.02",
    "--learning_rate", "0.001", "--per_device_train_batch_size", "16",
]  # fmt: skip


def test_the_example_publishes_all_and_the_merged_model(world: World) -> None:
    output = world.folder / "outputs"
    options = ["--push_merged", "true", "--hub_model_id", "user/trained", "--hub_token", TOKEN]
    result = train(world, "--output_dir", str(output), *options, token="")
    assert result.code == 0, result.err
    assert "Published https://huggingface.co/user/trained\n" in result.err
    files = world.files("user/trained")
    assert {*ADAPTER, "preprocessor_config.json"} <= set(files)
    assert not [path for path in files if "checkpoint" in path or "merged" in path or path == "config.json"]
    assert not [path for path, content in files.items() if TOKEN.encode() in content]
    assert len(world.hub.repositories["user/trained"].messages) == 2
    assert digests(files) == digests(
        {".gitattributes": files[".gitattributes"]} | {path: (output / path).read_bytes() for path in files
                                                       if path != ".gitattributes"}
    )  # fmt: skip
    merged = world.files("user/trained-merged")
    assert set(merged) == {
        ".gitattributes",
        "README.md",
        "config.json",
        "model.safetensors",
        "preprocessor_config.json",
    }
    assert b"base_model: user/base" in merged["README.md"]
    answers = world.run(MERGED, stock=True).values
    assert set(answers["merged"]) == {str(digit) for digit in range(10)}
    assert answers["merged"] == pytest.approx(answers["adapter"], abs=1e-5)


MERGED = (
    LOGITS
    + """
def answers(classifier):
    return {answer["label"]: answer["score"] for answer in classifier(Image.open(picture), top_k=10)}
labels = {index: str(index) for index in range(10)}
model = AutoModelForImageClassification.from_pretrained("user/trained", num_labels=10, id2label=labels)
processor = AutoImageProcessor.from_pretrained("user/trained")
print(json.dumps({
    "merged": answers(pipeline(model="user/trained-merged")),
    "adapter": answers(pipeline("image-classification", model=model, image_processor=processor)),
}))
"""
)

RUN_TRAIN = """
import runpy
sys.argv = [train, *arguments]
sys.path.insert(0, str(os.path.dirname(train)))
runpy.run_path(train, run_name="__main__")
"""


def train(world: World, *arguments: str, token: str = TOKEN) -> Result:
    warnings = "import warnings; warnings.simplefilter('default')\n"
    return world.run(warnings + RUN_TRAIN, train=str(TRAIN), arguments=[*SHORT, *arguments], token=token)


@pytest.mark.slow
def test_the_example_says_that_it_could_not_publish(world: World) -> None:
    world.hub.fail("POST", "user/unlucky/commit", 500)
    output = world.folder / "unlucky"
    result = train(world, "--output_dir", str(output), "--hub_model_id", "user/unlucky")
    assert "SystemExit: Publishing user/unlucky failed: " in result.error
    assert f"The trained adapter is in {output}. To publish it: hf upload user/unlucky {output}" in result.error
    assert "Published" not in result.err
    assert set(world.files("user/unlucky")) == {".gitattributes"}
    assert all((output / name).is_file() for name in ADAPTER)


def test_the_example_trains_nothing_that_it_could_not_publish(world: World) -> None:
    output = world.folder / "refused"
    result = train(world, "--output_dir", str(output), "--hub_model_id", "user/refused", token="hf_wrong")
    assert "SystemExit: Publishing user/refused failed: " in result.error
    assert "Nothing was trained." in result.error
    assert not list(output.iterdir())
