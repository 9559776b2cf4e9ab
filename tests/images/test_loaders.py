"""DataLoaders and streams are read as a training loop reads them, and left as they were found."""

from __future__ import annotations

import json
import logging
import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from peft import get_peft_model
from torch.nn import functional as F
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
    default_collate,
)
from transformers import PreTrainedModel, default_data_collator

from plasticity_peft import PlasticityConfig, find_components, measure_plasticity
from plasticity_peft.errors import ConfigError, DataError
from plasticity_peft.images import sources
from plasticity_peft.images.indexed import Images
from plasticity_peft.images.sampler import Batches, Pairs, SingleImages
from tests.support.crossing import crossed
from tests.support.models import random_images

IMAGES = random_images(48)
LABELS = torch.arange(48) % 3
KEPT = range(20)


class Recorded(Dataset):
    """Images with labels, which records what is read."""

    def __init__(self, images: torch.Tensor = IMAGES) -> None:
        self.images, self.read = images, set()
        self.generator = np.random.default_rng(3)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Any]:
        self.read.add(int(index))
        return {"pixel_values": self.images[index], "labels": int(LABELS[index])}


def stacked(items: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """A collate_fn as users write it, of which nobody knows that it treats each image by itself."""
    return {
        "pixel_values": torch.stack([item["pixel_values"] for item in items]),
        "labels": torch.tensor([item["labels"] for item in items]),
    }


def means(report: Any) -> list[float]:
    return [row.mean for row in report.scores]


def sampler_of(name: str, data: Dataset) -> dict[str, Any]:
    """Returns options of a loader over the images of KEPT alone."""
    weights = [1.0 if index in KEPT else 0.0 for index in range(len(data))]  # type: ignore[arg-type]
    options: dict[str, dict[str, Any]] = {
        "SubsetRandomSampler": {"batch_size": 8, "sampler": SubsetRandomSampler(KEPT)},
        "a list": {"batch_size": 8, "sampler": list(reversed(KEPT))},
        "RandomSampler over fewer": {"batch_size": 8, "sampler": RandomSampler(KEPT)},
        "batch_sampler": {"batch_sampler": BatchSampler(SubsetRandomSampler(KEPT), 7, drop_last=False)},
        "a list of batches": {"batch_sampler": [list(KEPT[:9]), list(KEPT[9:])]},
        "drop_last": {"batch_size": 20, "sampler": SequentialSampler(range(30)), "drop_last": True},
        "weights": {"batch_size": 8, "sampler": WeightedRandomSampler(weights, 20, replacement=False)},
    }
    return options[name]


SAMPLERS = (
    "SubsetRandomSampler", "a list", "RandomSampler over fewer", "batch_sampler", "a list of batches", "drop_last",
    "weights",
)  # fmt: skip


@crossed(
    name=SAMPLERS,
    collate=[
        pytest.param(None, id="torch's"),
        pytest.param(stacked, id="stacked"),
        pytest.param(default_data_collator, id="transformers'"),
    ],
)
def test_only_the_images_of_the_sampler_are_measured(
    vit: PreTrainedModel, name: str, collate: Callable[..., Any] | None
) -> None:
    data = Recorded()
    loader = DataLoader(data, collate_fn=collate, **sampler_of(name, data))
    report = measure_plasticity(vit, loader, settle=None)
    assert data.read == set(KEPT)
    assert report.samples == report.target_provenance.images == 20
    # The numbers of images in whole batches, and with them the directions of the estimate, are those of the loader.
    ordered = collate is not stacked or name in ("a list of batches", "drop_last")
    expected = means(measure_plasticity(vit, IMAGES[:20], settle=None))
    assert means(report) == pytest.approx(expected, rel=1e-6 if ordered else 0.5)
    pairs = measure_plasticity(vit, loader, IMAGES[40:], inputs="embedding", settle=None, max_samples=64)
    assert pairs.samples == 64
    assert data.read == set(KEPT)


def test_a_sampler_that_yields_all_images_is_measured_as_the_dataset(vit: PreTrainedModel) -> None:
    expected = means(measure_plasticity(vit, IMAGES, max_samples=16))
    for options in ({}, {"shuffle": True}, {"sampler": DistributedSampler(Recorded(), num_replicas=2, rank=1)}):
        assert means(measure_plasticity(vit, DataLoader(Recorded(), 8, **options), max_samples=16)) == expected


def test_a_sampler_that_repeats_images_gives_them_as_often() -> None:
    loader = DataLoader(TensorDataset(IMAGES), 4, sampler=[3, 3, 3, 1])
    images = Images(loader, "target", 0)
    assert len(images) == 4
    assert [torch.equal(images[index]["pixel_values"], IMAGES[3]) for index in range(4)] == [False, True, True, True]


def test_a_sampler_without_an_end_is_read_in_part(monkeypatch: pytest.MonkeyPatch) -> None:
    class Endless(Sampler):
        def __iter__(self) -> Iterator[int]:
            while True:
                yield from range(10)

    monkeypatch.setattr("plasticity_peft.images.loaders.MOST_UNSIZED", 100)
    assert len(Images(DataLoader(TensorDataset(IMAGES), 4, sampler=Endless()), "target", 0)) == 100


# ------------------------------------------------------------------------------------- collators of whole batches


def padded(items: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    widest = max(image.shape[-1] for image in items)
    return {"pixel_values": torch.stack([F.pad(image, (0, widest - image.shape[-1])) for image in items])}


@pytest.mark.parametrize(
    "options", [{}, {"inputs": "embedding"}, {"inputs": "activation"}, {"criterion": "feature_norm"}], ids=str
)
def test_batches_are_padded_each_as_it_needs(vit: PreTrainedModel, options: dict[str, Any]) -> None:
    """Images keep the padding of their batch: passes and pairs are made of images of one width."""
    widths = [8, 4, 4, 8, 4, 4, 4, 4, 8, 8, 4, 8]
    rows = [IMAGES[number][..., :width] for number, width in enumerate(widths)]
    loader = DataLoader(rows, 4, collate_fn=padded)
    kwargs = {"forward_kwargs": {"interpolate_pos_encoding": True}, "settle": None}
    report = measure_plasticity(vit, loader, **kwargs, **options)
    assert report.samples >= (2 if options.get("criterion") else 12)


def test_passes_are_made_of_images_of_one_width() -> None:
    widths = [8, 4, 4, 8, 4, 4, 4, 4, 8, 8, 4, 8]
    rows = [IMAGES[number][..., :width] for number, width in enumerate(widths)]
    target = Images(DataLoader(rows, 4, collate_fn=padded), "target", 100)  # type: ignore[arg-type]
    options = {"batch_size": 32, "seed": 0, "device": torch.device("cpu"), "dtype": torch.float32}
    for kind in (SingleImages, Pairs):
        sampler, done, seen = kind(target=target, max_samples=12, **options), 0, []
        numbers = sampler.arranged(range(12))
        while done < 12:
            batch = sampler.alike(numbers[done : done + 5])
            loaded = sampler.load(batch)
            images = loaded.both if kind is Pairs else loaded.images
            seen.append(images["pixel_values"].shape[-1])
            done += len(batch)
        assert sorted(numbers) == list(range(12))
        assert set(seen) == {4, 8}
        assert len(seen) == 3 if kind is SingleImages else len(seen) <= 4


def test_what_a_collator_mixes_is_what_is_measured() -> None:
    def mixed(items: list[torch.Tensor]) -> torch.Tensor:
        images = torch.stack(items)
        return 0.5 * images + 0.5 * images.flip(0)

    loader = DataLoader(IMAGES, 8, collate_fn=mixed)  # type: ignore[arg-type]
    images = Images(loader, "target", 0)
    rows = torch.cat(list(loader))
    assert len(images) == 48
    assert all(torch.equal(images[index]["pixel_values"], rows[index]) for index in range(48))


FORMS: dict[str, Callable[[list[Any]], Any]] = {
    "a dictionary": lambda items: stacked([{"pixel_values": image, "labels": label} for image, label in items]),
    "images and labels": lambda items: tuple(default_collate(items)),
    "a list of both": lambda items: list(default_collate(items)),
    "items": lambda items: items,
    "dictionaries": lambda items: [{"pixel_values": image, "label": label} for image, label in items],
    "lists of both": lambda items: tuple(zip(*items, strict=True)),
    "lists of tensors": lambda items: ([image for image, _ in items], [torch.tensor(label) for _, label in items]),
    "arrays": lambda items: {"pixel_values": np.stack([i.numpy() for i, _ in items]), "label": [n for _, n in items]},
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_batches_of_any_form_are_told_apart_with_their_labels(vit: PreTrainedModel, form: str) -> None:
    items = [(image, int(label)) for image, label in zip(IMAGES[:12], LABELS, strict=False)]
    loader = DataLoader(items, 5, collate_fn=FORMS[form])  # type: ignore[arg-type]
    images = Images(loader, "target", 0)
    assert len(images) == 12
    assert all(torch.equal(torch.as_tensor(images[i]["pixel_values"]), IMAGES[i]) for i in range(12))
    assert [int(images.labels(index)["labels"]) for index in range(12)] == LABELS[:12].tolist()
    report = measure_plasticity(vit, loader, criterion="gradient_norm", settle=None)
    expected = []
    for start in (0, 5, 10):
        part = slice(start, min(start + 5, 12))
        model = vit.train().eval()
        loss = model(pixel_values=IMAGES[part], labels=LABELS[part][: 12 - start]).loss
        gradients = torch.autograd.grad(loss, list(model.get_submodule(find_components(model)[3].path).parameters()))
        expected.append(torch.cat([gradient.flatten() for gradient in gradients]).norm())
    assert next(row.mean for row in report.scores if row.id == "0.FC1") == pytest.approx(
        float(torch.stack(expected).mean()), rel=1e-4
    )


def test_images_without_labels_in_a_list_are_images() -> None:
    loader = DataLoader(IMAGES, 6, collate_fn=lambda items: items)  # type: ignore[arg-type]
    images = Images(loader, "target", 0)
    assert len(images) == 48
    with pytest.raises(DataError, match="has no label"):
        images.labels(3)


@pytest.mark.parametrize(
    ("collate", "text"),
    [
        (lambda items: "batch", "batches are of type str"),
        (lambda items: {"images": torch.stack(items)}, "target_data has no 'pixel_values'"),
        (
            lambda items: {"pixel_values": torch.stack(items), "interpolate_pos_encoding": True},
            r"one row for each of the 8 images .* Got True.* forward_kwargs=\{'interpolate_pos_encoding'",
        ),
        (lambda items: {"pixel_values": torch.zeros(())}, "one row of pixel_values per image"),
    ],
)
def test_batches_that_cannot_be_told_apart_are_refused(
    vit: PreTrainedModel, collate: Callable[..., Any], text: str
) -> None:
    with pytest.raises(DataError, match=text):
        measure_plasticity(vit, DataLoader(IMAGES, 8, collate_fn=collate))  # type: ignore[arg-type]


@pytest.mark.parametrize("pieces", [1, 4])
def test_a_loader_without_batches_gives_images_or_batches(vit: PreTrainedModel, pieces: int) -> None:
    data = IMAGES if pieces == 1 else IMAGES.reshape(-1, pieces, 3, 8, 8)
    report = measure_plasticity(vit, DataLoader(TensorDataset(data), batch_size=None), settle=None)
    assert means(report) == pytest.approx(means(measure_plasticity(vit, IMAGES, settle=None)), rel=1e-6)


def test_batches_of_a_collator_are_those_of_the_criterion() -> None:
    loader = DataLoader(Recorded(), batch_sampler=[[0, 1, 2], [5, 4], [7, 6, 9, 8]], collate_fn=stacked)
    target = Images(loader, "target", 100, whole_batches=True)
    options = {"batch_size": 32, "seed": 0, "device": torch.device("cpu"), "dtype": torch.float32}
    sampler = Batches(target=target, max_samples=100, **options)
    assert sampler.available(100) == 3
    found = {}
    for number in range(3):
        batch = sampler.load([number])
        found[len(batch.images["pixel_values"])] = (batch.images["pixel_values"], sampler.labels(batch))
    for images, labels in ((batch["pixel_values"], batch["labels"]) for batch in loader):
        assert torch.equal(found[len(images)][0], images)
        assert torch.equal(found[len(images)][1], labels)


def test_arrays_that_are_not_to_be_written_to_are_read(vit: PreTrainedModel) -> None:
    arrays = [image.numpy() for image in IMAGES[:4]]
    for array in arrays:
        array.flags.writeable = False
    assert means(measure_plasticity(vit, arrays)) == means(measure_plasticity(vit, IMAGES[:4]))


# --------------------------------------------------------------------------------------------------- left as found


class Epochs(Sampler):
    """A sampler that counts its epochs, and has random generators of its own."""

    def __init__(self) -> None:
        self.epoch, self.order, self.numbers = 0, random.Random(0), np.random.default_rng(0)

    def __iter__(self) -> Iterator[int]:
        self.epoch += 1
        indices = list(range(48))
        self.order.shuffle(indices)
        return iter(indices[: 40 + int(self.numbers.integers(4))])

    def __len__(self) -> int:
        return 40


class Mixer:
    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(5)

    def __call__(self, items: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        batch = stacked(items)
        return {**batch, "pixel_values": batch["pixel_values"] * torch.rand((), generator=self.generator)}


@pytest.mark.parametrize("criterion", ["parameter_plasticity", "gradient_norm", "rate_of_change"])
@pytest.mark.parametrize("collate", [None, stacked, Mixer])
@pytest.mark.parametrize("fails", [False, True])
def test_a_loader_is_left_as_found(
    vit: PreTrainedModel, collate: Callable[..., Any] | None, criterion: str, fails: bool
) -> None:
    generator = torch.Generator().manual_seed(7)
    collate = Mixer() if collate is Mixer else collate
    loader = DataLoader(Recorded(), 8, shuffle=True, generator=generator, collate_fn=collate)
    other = DataLoader(Recorded(), 8, sampler=Epochs(), collate_fn=collate)
    before = [pictured(loader), pictured(other)]
    if fails:
        handle = vit.classifier.register_forward_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            measure_plasticity(vit, loader, other, criterion=criterion, max_samples=8)
        handle.remove()
    else:
        measure_plasticity(vit, loader, other, criterion=criterion, max_samples=8)
        measure_plasticity(vit, other, criterion=criterion, max_samples=8)
    assert [pictured(loader), pictured(other)] == before
    assert other.sampler.epoch == 0  # type: ignore[attr-defined]


def pictured(loader: DataLoader) -> dict[str, Any]:
    """Returns what a loader has, and what it would yield next."""
    states = {}
    for holder in (loader, loader.sampler, loader.batch_sampler, loader.collate_fn, loader.dataset):
        for name, value in vars(holder).items() if hasattr(holder, "__dict__") else ():
            if isinstance(value, torch.Generator):
                states[name] = value.get_state().tolist()
            elif isinstance(value, random.Random):
                states[name] = value.getstate()
            elif isinstance(value, np.random.Generator):
                states[name] = str(value.bit_generator.state)
            elif isinstance(value, (int, str, type(None))):
                states[f"{type(holder).__name__}.{name}"] = value
    return states


def test_a_loader_with_workers_is_left_without_them(vit: PreTrainedModel) -> None:
    loader = DataLoader(Stream(), 4, num_workers=1, persistent_workers=True)
    measure_plasticity(vit, loader, max_samples=8)
    assert loader._iterator is None


# -------------------------------------------------------------------------------------------------------- streams


class Stream(IterableDataset):
    """Images in the order of their classes: 8 images of each of 6 classes, told apart by their brightness."""

    def __init__(self, copies: int = 1) -> None:
        self.copies = copies

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for number in range(48 * self.copies):
            label = number // (8 * self.copies)
            yield {"pixel_values": IMAGES[number % 48] * 0.1 + label, "labels": label}


def classes(images: Images, count: int) -> list[int]:
    return [round(float(images[index]["pixel_values"].mean())) for index in range(count)]


@pytest.fixture
def small_buffer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "BUFFER_IMAGES", 200)


@pytest.mark.parametrize("how", ["items", "batches", "collated"])
@pytest.mark.usefixtures("small_buffer")
def test_a_stream_sorted_by_class_is_shuffled_through_a_buffer(how: str) -> None:
    data = Stream(copies=8)
    collate = stacked if how == "collated" else None
    holder = data if how == "items" else DataLoader(data, 16, collate_fn=collate)
    images = Images(holder, "target", 64)
    found = classes(images, 64)
    assert images.stream
    assert len(images) == 64
    assert len(set(found[:20])) >= 3
    assert found == classes(Images(holder, "target", 64), 64)
    assert found != classes(Images(holder, "target", 64, seed=1), 64)


def test_a_stream_that_fits_into_the_buffer_is_measured_as_a_dataset(vit: PreTrainedModel) -> None:
    expected = means(measure_plasticity(vit, list(Stream()), max_samples=12))
    for holder in (Stream(), iter(Stream()), DataLoader(Stream(), 5), DataLoader(Stream(), 5, collate_fn=stacked)):
        assert means(measure_plasticity(vit, holder, max_samples=12)) == pytest.approx(expected, rel=1e-6)


@pytest.mark.usefixtures("small_buffer")
def test_a_stream_is_read_no_further_than_its_buffer_and_what_is_drawn() -> None:
    read = []

    def endless() -> Iterator[torch.Tensor]:
        while True:
            read.append(0)
            yield IMAGES[len(read) % 48]

    images = Images(endless(), "target", 1000)
    assert images.has(9)
    assert len(read) == 210
    assert not images.has(1000)
    assert len(images) == 1000


def test_large_images_fill_a_buffer_sooner(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "BUFFER_BYTES", 10 * IMAGES[0].nbytes)
    read = []
    images = Images((read.append(0) or image for image in IMAGES), "target", 5)  # type: ignore[func-returns-value]
    assert images.stream
    assert len(read) == 10


@pytest.mark.skipif(transformers.__version__.startswith("4."), reason="transformers 4 logs and checks sizes otherwise")
@pytest.mark.parametrize(
    ("data", "level", "text"),
    [
        (lambda: Stream(copies=8), logging.WARNING, "It is sorted by label"),
        (lambda: (row["pixel_values"] for row in Stream(copies=8)), logging.WARNING, "If it is sorted by class"),
        (lambda: (Recorded()[number % 48] for number in range(400)), logging.INFO, "drawn from a buffer of"),
        (lambda: IMAGES, None, ""),
    ],
)
@pytest.mark.usefixtures("small_buffer")
def test_one_line_says_that_a_stream_is_shuffled(
    vit: PreTrainedModel, data: Callable[[], Any], level: int | None, text: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="transformers.plasticity_peft.measuring.measure"):
        measure_plasticity(vit, data(), max_samples=8, settle=None)
    lines = [(record.levelno, record.message) for record in caplog.records if "is a stream" in record.message]
    assert len(lines) == (level is not None)
    assert all(found == level and text in line for found, line in lines)


# ------------------------------------------------------------------------------------------------- forward_kwargs

LARGE = random_images(8, size=12)
INTERPOLATED = {"interpolate_pos_encoding": True}


def test_images_of_another_size_are_measured_with_forward_kwargs(vit: PreTrainedModel) -> None:
    with pytest.raises(DataError, match=r"refused .*\(3, 12, 12\).*forward_kwargs=\{'interpolate_pos_encoding': True"):
        measure_plasticity(vit, LARGE, max_samples=4)
    seen = []
    handle = vit.vit.embeddings.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["interpolate_pos_encoding"]), with_kwargs=True
    )
    for options in ({}, {"inputs": "embedding"}, {"inputs": "activation"}, {"criterion": "bound"}):
        report = measure_plasticity(vit, LARGE, max_samples=4, forward_kwargs=INTERPOLATED, **options)
        assert all(row.mean > 0 for row in report.scores)
    assert seen
    assert all(seen)
    handle.remove()


def test_forward_kwargs_in_a_config(vit: PreTrainedModel) -> None:
    expected = means(measure_plasticity(vit, LARGE, max_samples=4, forward_kwargs=INTERPOLATED))
    config = PlasticityConfig(training="lora", target_data=LARGE, forward_kwargs=INTERPOLATED)
    assert config.to_dict()["forward_kwargs"] == INTERPOLATED
    get_peft_model(vit, config)
    assert len(means(config.report)) == len(expected)
    assert "forward_kwargs" not in config.to_dict()
    json.dumps(config.to_dict())


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (
            {"interpolate_pos_encodin": True},
            "no argument 'interpolate_pos_encodin'. Did you mean 'interpolate_p",
        ),
        ({"something": 1}, "no argument 'something'. It has: .*interpolate_pos_encoding"),
        ({"pixel_values": 1}, "pixel_values comes from the images"),
        ({"labels": 1}, "labels comes from the images"),
        (["interpolate_pos_encoding"], "forward_kwargs must map names"),
        ({1: 2}, "forward_kwargs must map names"),
        ({"attention_mask": torch.ones(2)}, r"forward_kwargs\['attention_mask'\] must be a number.* Got Tensor"),
    ],
)
def test_forward_kwargs_that_the_model_does_not_take_are_refused(vit: PreTrainedModel, value: Any, text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        measure_plasticity(vit, IMAGES, forward_kwargs=value)
    with pytest.raises(ConfigError, match=text):
        get_peft_model(vit, PlasticityConfig(training="lora", target_data=IMAGES, forward_kwargs=value))


@pytest.mark.skipif(transformers.__version__.startswith("4."), reason="transformers 4 logs and checks sizes otherwise")
def test_an_argument_of_the_backbone_that_the_model_hands_on(vit: PreTrainedModel) -> None:
    """Not in the signature of CLIPForImageClassification.forward, which takes anything."""
    from tests.support.families import FAMILIES

    model = FAMILIES["clip"].build()
    images = random_images(4, size=24)
    with pytest.raises(DataError, match="forward_kwargs="):
        measure_plasticity(model, images)
    assert measure_plasticity(model, images, forward_kwargs=INTERPOLATED).samples == 4
    with pytest.raises(ConfigError, match="has no argument 'interpolate'"):
        measure_plasticity(model, images, forward_kwargs={"interpolate": True})
