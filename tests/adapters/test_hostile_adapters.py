"""Adapters that mean harm: refused with a reason, or harmless, and the model as it was."""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import signal
import struct
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import nn

from plasticity_peft import PlasticityConfig, find_components, load_adapter, measure_plasticity
from plasticity_peft.errors import AdapterError, PlasticityError, ReportError
from tests.support.models import logits, moved, tiny_model
from tests.support.snapshots import assert_same, snapshot

PREFIX = "base_model.model."


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Adapters that load: of ours in both modes, and a plain one."""
    folder = tmp_path_factory.mktemp("good")
    report = measure_plasticity(tiny_model(), criterion="random")
    for training in ("lora", "full"):
        config = PlasticityConfig(report=report, training=training, top_k=2, r=2, candidates=("MHA", "LN2"))
        moved(get_peft_model(tiny_model(), config)).save_pretrained(folder / training)
    paths = [path for part in find_components(tiny_model()) if part.kind == "FC1" for path in part.modules]
    plain = LoraConfig(r=2, target_modules=paths, modules_to_save=["classifier"])
    moved(get_peft_model(tiny_model(), plain)).save_pretrained(folder / "plain")
    return {name: folder / name for name in ("lora", "full", "plain")}


@pytest.fixture(autouse=True)
def no_hang() -> Iterator[None]:
    """Ends a test that hangs: a second is a thousand times what a refusal takes."""

    def stop(*_: object) -> None:
        raise AssertionError("more than 60 seconds")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def copied(source: Path, folder: Path) -> Path:
    return Path(shutil.copytree(source, folder / "adapter"))


def with_config(folder: Path, **changes: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def with_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    path = folder / "adapter_model.safetensors"
    save_file({key: value.contiguous() for key, value in change(load_file(path)).items()}, path)


def with_header(folder: Path, change: Callable[[dict[str, Any]], None], body: bytes | None = None) -> None:
    """Changes the header of the safetensors file, whatever the body is."""
    path = folder / "adapter_model.safetensors"
    raw = path.read_bytes()
    (size,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + size])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + (raw[8 + size :] if body is None else body))


def refused(folder: Path, match: str, error: type[Exception] = AdapterError, **options: Any) -> None:
    model = tiny_model().train()
    before = snapshot(model)
    with pytest.raises(error, match=match):
        load_adapter(model, folder, **options)
    assert_same(before, snapshot(model))


def unchanged(folder: Path, good: Path, recwarn: Any = None) -> nn.Module:
    """The adapter does what the good one does."""
    loaded = load_adapter(tiny_model(), folder)
    torch.testing.assert_close(logits(loaded), logits(load_adapter(tiny_model(), good)))
    return loaded


@pytest.mark.parametrize("name", ["lora", "full", "plain"])
def test_the_good_ones_load(name: str, good: dict[str, Path]) -> None:
    assert not torch.allclose(logits(load_adapter(tiny_model(), good[name])), logits(tiny_model()), atol=1e-3)


# ------------------------------------------------------------------------------------------------------ names


@pytest.mark.parametrize(
    "name",
    ["../../x", "/etc/passwd", "vit/../classifier", "..", "", ".", "a" * 10**5, "classifier.", ".classifier", "\0",
     "vit.layers.0.__class__", "classifier.__init__.__globals__", "(a+)+$", "vit.layers.-1.mlp.fc1",
     "vit.layers.99999999999999999999.mlp.fc1", "classifier\nvit"],
    ids=lambda name: repr(name[:30]),
)  # fmt: skip
@pytest.mark.parametrize("part", ["weight", "lora_A.weight"])
def test_a_module_of_a_strange_name_is_refused(name: str, part: str, good: dict[str, Path], tmp_path: Path) -> None:
    folder = copied(good["plain"], tmp_path)
    with_config(folder, modules_to_save=["classifier", name or "x"])
    more = {f"{PREFIX}{name}.{part}": torch.ones(2, 16), f"{PREFIX}{name}.lora_B.weight": torch.ones(16, 2)}
    if part == "weight":
        more.popitem()
    with_weights(folder, lambda weights: {**weights, **more})
    refused(
        folder,
        "which its config does not name|too long for a module|start with 'base_model|belongs to no component|no such "
        "component|only a part of classifier|has the shape|LoRA of .* is for a layer of shape|both LoRA and full",
    )


@pytest.mark.parametrize("subfolder", ["..", "../..", "a/../..", "/etc", "a\\..\\..", 5, b".."], ids=repr)
def test_a_subfolder_lies_within(subfolder: Any, good: dict[str, Path], tmp_path: Path) -> None:
    refused(copied(good["plain"], tmp_path), "subfolder must lie within", subfolder=subfolder)


@pytest.mark.parametrize(
    "name",
    ["../x", "a/b", "a\\b", "a.b", "", " ", ".", "keys", "items", "training", "\0", "a\nb", "lora_", 5, None],
    ids=repr,
)
def test_a_name_that_no_adapter_can_have(name: Any, good: dict[str, Path], tmp_path: Path) -> None:
    refused(copied(good["plain"], tmp_path), "adapter_name must not contain", adapter_name=name)


@pytest.mark.parametrize("where", ["components", "units", "modules"])
@pytest.mark.parametrize("name", ["../../x", "0.MHA\0", "7.MHA", "__class__", "0.LN1", "*", "\ud800"])
def test_ids_of_plasticity_json(where: str, name: str, good: dict[str, Path], tmp_path: Path) -> None:
    folder = copied(good["lora"], tmp_path)
    path = folder / "plasticity.json"
    values = json.loads(path.read_text())
    if where == "modules":
        values["scores"][1]["modules"][0] = name
        path.write_text(json.dumps(values))
        try:
            unchanged(folder, good["lora"])  # by the known names of the architecture
        except PlasticityError:
            refused(folder, r"scores\.1\.modules|twice|Invalid JSON: unexpected end of hex escape", PlasticityError)
        return
    values["adapter"][where][0] = name
    path.write_text(json.dumps(values))
    refused(folder, rf"plasticity\.json of .*: (adapter\.{where}|.* unexpected end of hex escape)", ReportError)


@pytest.mark.parametrize(
    "changes",
    [
        {"id2label": {"x": "a"}}, {"id2label": {"9" * 5000: "a"}}, {"id2label": [1]}, {"id2label": {"0": 5}},
        {"training": "other"}, {"training": ["lora"]}, {"granularity": "x"}, {"units": []}, {"units": ["FC1", 5]},
        {"components": ["0.MHA"]}, {"components": []}, {"parameters": {"lora": "x"}}, {"model_parameters": "many"},
    ],
    ids=str,
)  # fmt: skip
def test_what_plasticity_json_says_of_the_adapter(
    changes: dict[str, Any], good: dict[str, Path], tmp_path: Path
) -> None:
    folder = copied(good["lora"], tmp_path)
    path = folder / "plasticity.json"
    values = json.loads(path.read_text())
    values["adapter"].update(changes)
    path.write_text(json.dumps(values))
    (name,) = changes
    refused(folder, rf"Cannot read plasticity\.json of .*: adapter\.{name}", ReportError)


# --------------------------------------------------------------------------------------------------- weights

STRANGE_TYPES = ["int64", "int32", "uint8", "bool", "complex64", "float8_e4m3fn", "float8_e5m2"]


@pytest.mark.parametrize("dtype", STRANGE_TYPES)
@pytest.mark.parametrize("part", ["lora_A", "lora_B", "classifier.weight"])
def test_weights_of_a_type_that_no_weights_have(dtype: str, part: str, good: dict[str, Path], tmp_path: Path) -> None:
    folder = copied(good["plain"], tmp_path)
    try:
        with_weights(
            folder, lambda weights: {k: v.to(getattr(torch, dtype)) if part in k else v for k, v in weights.items()}
        )
    except KeyError:
        pytest.skip(f"this release of safetensors cannot write {dtype}")
    refused(folder, rf"contains \S+ for .*{re.escape(part)}|{re.escape(part)} is torch\.{dtype}, in the model")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_weights_of_other_precisions_load(dtype: str, good: dict[str, Path], tmp_path: Path) -> None:
    folder = copied(good["plain"], tmp_path)
    with_weights(folder, lambda weights: {k: v.to(getattr(torch, dtype)) for k, v in weights.items()})
    expected = logits(load_adapter(tiny_model(), good["plain"]))
    torch.testing.assert_close(logits(load_adapter(tiny_model(), folder)), expected, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers(value: float, good: dict[str, Path], tmp_path: Path) -> None:
    folder = copied(good["plain"], tmp_path)
    with_weights(folder, lambda weights: {k: torch.full_like(v, value) for k, v in weights.items()})
    refused(folder, "contains NaN or infinity")


SHAPES: dict[str, Callable[[str, torch.Tensor], torch.Tensor]] = {
    "rank 0": lambda key, value: value[:0] if "lora_A" in key else value[:, :0] if "lora_B" in key else value,
    "a number": lambda key, value: value.sum() if "lora_A" in key else value,
    "a vector": lambda key, value: value[0] if "lora_B" in key else value,
    "three dimensions": lambda key, value: value[None] if "lora" in key else value,
    "two ranks": lambda key, value: torch.cat([value, value]) if "lora_A" in key else value,
    "a huge rank": lambda key, value: (
        value.repeat(10_000, 1) if "lora_A" in key else value.repeat(1, 10_000) if "lora_B" in key else value
    ),
    "a head of more labels": lambda key, value: torch.cat([value, value]) if "classifier" in key else value,
}


@pytest.mark.parametrize("shape", SHAPES)
def test_weights_of_other_shapes(shape: str, good: dict[str, Path], tmp_path: Path) -> None:
    folder = copied(good["plain"], tmp_path)
    with_weights(folder, lambda weights: {key: SHAPES[shape](key, value) for key, value in weights.items()})
    refused(folder, "do not fit together|does not fit")


@pytest.mark.parametrize(
    "shape", [[10**9, 16], [2**40, 2**40], [2**63, 1], [10**30], [-1, 4], ["x"], "x", [2.5], [[1]]]
)
@pytest.mark.parametrize("offsets", [None, [0, 2**62], [2**40, 2**40 + 8], [-8, 8], [8, 0], "x"])
def test_gigantic_shapes_without_data(shape: Any, offsets: Any, good: dict[str, Path], tmp_path: Path) -> None:
    folder = copied(good["plain"], tmp_path)

    def change(header: dict[str, Any]) -> None:
        entry = header[next(key for key in header if "lora_A" in key)]
        entry["shape"] = shape
        entry["data_offsets"] = entry["data_offsets"] if offsets is None else offsets

    with_header(folder, change)
    refused(folder, "Cannot read adapter_model.safetensors")


def test_gigantic_shapes_with_data(good: dict[str, Path], tmp_path: Path) -> None:
    """A file with holes has as many bytes as it says, and takes no disk: shapes are looked at before numbers."""
    folder = copied(good["plain"], tmp_path)
    path = folder / "adapter_model.safetensors"
    name = next(part.modules[0] for part in find_components(tiny_model()) if part.kind == "FC1")
    rows = 2**34
    header = json.dumps(
        {
            f"{PREFIX}{name}.lora_A.weight": {"dtype": "F32", "shape": [rows, 16], "data_offsets": [0, rows * 64]},
            f"{PREFIX}{name}.lora_B.weight": {
                "dtype": "F32", "shape": [32, rows], "data_offsets": [rows * 64, rows * 192]
            },
        }
    ).encode()  # fmt: skip
    path.write_bytes(struct.pack("<Q", len(header)) + header)
    try:
        os.truncate(path, 8 + len(header) + rows * 192)
    except OSError:
        pytest.skip("this file system holds no file of terabytes")
    assert path.stat().st_size > 2**41
    refused(folder, "do not fit together|Cannot read adapter_model.safetensors")


@pytest.mark.parametrize("size", [0, 1, 7, 2**40, 2**64 - 1])
def test_a_header_of_a_wrong_size(size: int, good: dict[str, Path], tmp_path: Path) -> None:
    folder = copied(good["plain"], tmp_path)
    path = folder / "adapter_model.safetensors"
    path.write_bytes(struct.pack("<Q", size) + path.read_bytes()[8:])
    refused(folder, "Cannot read adapter_model.safetensors")


def add(**more: torch.Tensor) -> Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
    return lambda weights: {**weights, **{PREFIX + key.replace("__", "."): value for key, value in more.items()}}


def without(weights: dict[str, torch.Tensor], name: str) -> dict[str, torch.Tensor]:
    return {key: value for key, value in weights.items() if name not in key}


def first(kind: str) -> str:
    return next(part.modules[0] for part in find_components(tiny_model()) if part.kind == kind)


@pytest.mark.parametrize(
    ("more", "text"),
    [
        # what is there already, in the model, and is not said to train
        (lambda: add(vit__layernorm__weight=torch.ones(16)), "which its config does not name"),
        (lambda: add(**{f"{first('FC2')}__weight": torch.ones(16, 32)}), "which its config does not name"),
        (
            lambda: add(
                **{
                        f"{first('FC2')}__lora_A__weight": torch.ones(2, 32),
                        f"{first('FC2')}__lora_B__weight": torch.ones(16, 2),
                    }
            ),
            "which its config does not name",
        ),
        (
            lambda: add(classifier__lora_A__weight=torch.ones(2, 16), classifier__lora_B__weight=torch.ones(3, 2)),
            "both LoRA and full weights for classifier",
        ),
        (lambda: add(classifier__extra=torch.ones(3)), "classifier.extra has the shape"),
        (lambda: add(classifier__dense__weight=torch.ones(3, 16)), "no module of that name"),
        (lambda: add(**{f"{first('FC1')}__lora_magnitude_vector": torch.ones(32)}), "must not contain lora_magnitude"),
        (lambda: add(**{f"{first('FC1')}__lora_B__bias": torch.ones(32)}), "must not contain lora_B.bias of"),
        (lambda: add(**{f"{first('FC1')}__lora_C__weight": torch.ones(32)}), "Expected lora_A and lora_B"),
        (lambda: lambda weights: {key.removeprefix(PREFIX): value for key, value in weights.items()}, "start with"),
        (lambda: lambda weights: without(weights, "classifier.bias"), "only a part of classifier"),
        (lambda: lambda weights: without(weights, "lora_B"), "Expected lora_A and lora_B"),
    ],
)  # fmt: skip
def test_weights_that_the_config_does_not_speak_of(
    more: Any, text: str, good: dict[str, Path], tmp_path: Path
) -> None:
    folder = copied(good["plain"], tmp_path)
    with_weights(folder, more())
    refused(folder, text)


def test_a_layer_under_two_of_its_names(good: dict[str, Path], tmp_path: Path) -> None:
    folder = copied(good["plain"], tmp_path)
    other = "intermediate.dense" if "mlp.fc1" in first("FC1") else "mlp.fc1"
    layer = "encoder.layer.0" if "mlp.fc1" in first("FC1") else "layers.0"
    with_config(folder, target_modules=[first("FC1"), f"vit.{layer}.{other}"])

    def twice(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        mine = {k: v for k, v in weights.items() if first("FC1") in k or "classifier" in k}
        return {**mine, **{k.replace(first("FC1"), f"vit.{layer}.{other}"): v.clone() for k, v in mine.items()}}

    with_weights(folder, twice)
    refused(folder, "twice, under two of its names")


class Payload:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (open, (str(self.path), "w"))


@pytest.mark.parametrize("name", ["adapter_model.bin", "adapter_model.safetensors", "adapter_model.pt"])
@pytest.mark.parametrize("beside", [False, True])
def test_pickles_are_never_read(name: str, beside: bool, good: dict[str, Path], tmp_path: Path) -> None:
    folder, trace = copied(good["plain"], tmp_path), tmp_path / "executed"
    if not beside:
        (folder / "adapter_model.safetensors").unlink()
    (folder / name).write_bytes(pickle.dumps({"base_model.model.classifier.weight": Payload(trace)}))
    for extra in ("rng_state.pth", "training_args.bin", "optimizer.pt", "adapter_config.pkl"):
        (folder / extra).write_bytes(pickle.dumps(Payload(trace)))
    if beside and name != "adapter_model.safetensors":
        unchanged(folder, good["plain"])
    else:
        refused(
            folder, "Cannot read adapter_model.safetensors|Weights in other formats, such as pickles, are not read"
        )
    assert not trace.exists()
    pickle.loads((folder / name).read_bytes())["base_model.model.classifier.weight"].close()
    assert trace.exists()  # it would have been


# --------------------------------------------------------------------------------------------------- options

BOMB = "(a+)+" * 10 + "$"


@pytest.mark.parametrize(
    "changes",
    [
        {"layer_replication": [[0, 2], [0, 2]]}, {"megatron_config": {"x": 1}}, {"bias": "all"}, {"bias": "lora_only"},
        {"trainable_token_indices": [1]}, {"use_qalora": True}, {"alora_invocation_tokens": [1]},
        {"arrow_config": {"top_k": 2}}, {"use_bdlora": {"nblocks": 2}}, {"ensure_weight_tying": True},
        {"init_lora_weights": "pissa"}, {"init_lora_weights": "pissa_niter_999999999"}, {"init_lora_weights": "olora"},
        {"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 4}}, {"init_lora_weights": "corda"},
        {"init_lora_weights": "lora_ga"}, {"init_lora_weights": 5}, {"init_lora_weights": ["pissa"]},
        {"alpha_pattern": {BOMB: 4}}, {"alpha_pattern": {".*": 4}}, {"alpha_pattern": {"": 4}}, {"alpha_pattern": [1]},
        {"alpha_pattern": {"a": float("nan")}}, {"alpha_pattern": {"a": -1}}, {"alpha_pattern": {"a": "1"}},
        {"r": 0}, {"r": -1}, {"r": 2**40}, {"r": "8"}, {"r": 2.5}, {"r": True}, {"r": 10**400},
        {"lora_alpha": 0}, {"lora_alpha": float("inf")}, {"lora_alpha": "4"}, {"lora_alpha": 10**400},
        {"lora_dropout": 1.0}, {"lora_dropout": -1}, {"use_dora": 1}, {"use_dora": True}, {"lora_bias": True},
        {"use_rslora": "yes"}, {"target_modules": []}, {"target_modules": [""]}, {"target_modules": [5]},
        {"target_modules": ["query"]}, {"modules_to_save": "classifier"}, {"modules_to_save": [""]},
        {"modules_to_save": [1]}, {"modules_to_save": None}, {"modules_to_save": ["ier"], "r": "x"},
        {"base_model_name_or_path": 5}, {"revision": ["main"]}, {"peft_type": "IA3"}, {"peft_type": ["LORA"]},
    ],
    ids=lambda value: str(value)[:60],
)  # fmt: skip
def test_an_option_that_does_more_is_refused(changes: dict[str, Any], good: dict[str, Path], tmp_path: Path) -> None:
    folder = copied(good["plain"], tmp_path)
    with_config(folder, **changes)
    refused(folder, f"{'|'.join(changes)}|by its config|which its config does not name|it contains (NaN|Infinity)")


@pytest.mark.parametrize(
    "changes",
    [
        {"auto_mapping": {"base_model_class": "System", "parent_library": "evil_library"}},
        {"task_type": "CAUSAL_LM"}, {"task_type": "SEQ_CLS"}, {"task_type": "no such task"}, {"inference_mode": "x"},
        {"target_modules": BOMB}, {"target_modules": ".*"}, {"target_modules": "all-linear"},
        {"rank_pattern": {BOMB: 3}},
        {"rank_pattern": {".*": 10**9}}, {"exclude_modules": BOMB}, {"exclude_modules": ".*"}, {"r": 2**30},
        {"layers_to_transform": [0], "layers_pattern": BOMB}, {"target_parameters": ["classifier.weight"]},
        {"megatron_core": "evil_library"}, {"init_lora_weights": "eva", "eva_config": {"rho": 1e9}},
        {"loftq_config": {"loftq_iter": 10**9}}, {"corda_config": {"cache_file": "/etc/passwd"}},
        {"lora_ga_config": {"direction": "random"}}, {"init_lora_weights": False}, {"init_lora_weights": "gaussian"},
        {"base_model_name_or_path": "../../../etc"}, {"revision": "../x"}, {"alpha_pattern": {"no.such.module": 3}},
        {"fan_in_fan_out": True}, {"runtime_config": {"ephemeral_gpu_offload": True}}, {"peft_version": "99"},
    ],
    ids=lambda value: str(value)[:60],
)  # fmt: skip
def test_an_option_that_is_not_needed_does_nothing(
    changes: dict[str, Any], good: dict[str, Path], tmp_path: Path
) -> None:
    folder = copied(good["plain"], tmp_path)
    with_config(folder, **changes)
    unchanged(folder, good["plain"])
    assert not {"evil_library", "megatron"} & set(sys.modules)


def test_an_option_that_peft_does_not_know_is_named(good: dict[str, Path], tmp_path: Path) -> None:
    folder = copied(good["plain"], tmp_path)
    with_config(folder, of_the_future=3, also_off=None)
    with pytest.warns(UserWarning, match="does not know, and that are ignored: 'of_the_future'"):
        unchanged(folder, good["plain"])


def test_alphas_of_single_modules_are_read_as_peft_reads_them(good: dict[str, Path], tmp_path: Path) -> None:
    for key in (first("FC1"), f"^{first('FC1')}$", first("FC1").replace(".", r"\."), first("FC1").partition(".")[2]):
        folder = Path(shutil.copytree(good["plain"], tmp_path / str(len(list(tmp_path.iterdir())))))
        with_config(folder, alpha_pattern={key: 100})
        got = logits(load_adapter(tiny_model(), folder))
        paths = [part.modules[0] for part in find_components(tiny_model()) if part.kind == "FC1"]
        config = LoraConfig(r=2, target_modules=paths, modules_to_save=["classifier"], alpha_pattern={key: 100})
        stock = get_peft_model(tiny_model(), config)
        set_peft_model_state_dict(stock, load_file(folder / "adapter_model.safetensors"))
        torch.testing.assert_close(got, logits(stock))
        assert not torch.allclose(got, logits(load_adapter(tiny_model(), good["plain"])), atol=1e-3)


@pytest.mark.parametrize("name", ["adapter_config.json", "plasticity.json"])
@pytest.mark.parametrize(
    "text", ["[" * 10**5, "1" * 10**5, '{"a": 1, "a": 2}', "null", "[]", '"x"', "{", "", "\ufeff{}", "NaN"]
)
def test_a_file_that_is_no_json(name: str, text: str, good: dict[str, Path], tmp_path: Path) -> None:
    folder = copied(good["lora"], tmp_path)
    (folder / name).write_text(text)
    refused(folder, name, PlasticityError)


@pytest.mark.parametrize("name", ["adapter_config.json", "plasticity.json", "adapter_model.safetensors"])
def test_a_file_that_is_no_file(name: str, good: dict[str, Path], tmp_path: Path) -> None:
    for make in (lambda p: p.symlink_to("/dev/zero"), os.mkfifo, lambda p: p.mkdir()):
        folder = Path(shutil.copytree(good["plain"], tmp_path / str(len(list(tmp_path.iterdir())))))
        path = folder / name
        if path.exists():
            path.unlink()
        make(path)
        if name == "plasticity.json":  # as if there were none
            unchanged(folder, good["plain"])
        else:
            refused(folder, f"No {name} in")


def test_a_json_file_that_is_too_large(good: dict[str, Path], tmp_path: Path) -> None:
    folder = copied(good["plain"], tmp_path)
    os.truncate(folder / "adapter_config.json", 2**33)
    refused(folder, "larger than")


@pytest.mark.parametrize("name", ["lora", "plain"])
def test_a_failure_of_peft_is_ours_and_undone(
    name: str, good: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """PEFT raises in the middle of its work: after some layers have been replaced."""
    from peft.tuners.lora import layer

    calls = []
    original = layer.LoraLayer.update_layer

    def third_fails(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        if len(calls) == 2:
            raise RuntimeError("half-way")
        return original(*args, **kwargs)

    monkeypatch.setattr(layer.LoraLayer, "update_layer", third_fails)
    refused(good[name], "PEFT cannot load .*RuntimeError: half-way")
