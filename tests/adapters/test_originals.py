"""Training in full holds once on the device what it trains: the originals wait in CPU memory.

The device is torch's lazy one. The reference is stock PEFT, with the same modules and weights on the same device,
which holds everything twice; and training without PEFT, which holds everything once.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.hooks import attach_execution_device_hook
from peft import LoraConfig, PeftModel, get_base_model_state_dict, get_peft_model, set_base_model_state_dict
from peft.utils.other import ModulesToSaveWrapper
from torch import nn
from transformers import PreTrainedModel, Trainer, TrainingArguments, ViTForImageClassification

from plasticity_peft import PlasticityConfig, fit_head, load_adapter, measure_plasticity
from plasticity_peft.adapters.model import merged_copy
from plasticity_peft.adapters.originals import TrainedInFull, keep_originals_away
from plasticity_peft.components.architecture import find_components
from tests.support.devices import bytes_held, on_cpu, second_device
from tests.support.models import moved, random_images, saved_base, tiny_model
from tests.support.training import trainer_of

IMAGES = random_images(4)


def small_model() -> PreTrainedModel:
    """Returns a model of one block, because the lazy device compiles slowly."""
    return tiny_model(num_hidden_layers=1)


REPORT = measure_plasticity(small_model(), criterion="bound")
pytestmark = pytest.mark.filterwarnings(
    "ignore:Adapter .* was active which is now deleted", "ignore::UserWarning:peft", "ignore:Already found a `peft_con"
)


def config(**options: Any) -> PlasticityConfig:
    return PlasticityConfig(**{"report": REPORT, "candidates": "FC1", "training": "full", "r": 2, **options})


def adapted(**options: Any) -> PeftModel:
    """Returns a model with a trained adapter, on the second device."""
    return moved(get_peft_model(small_model(), config(**options))).eval().to(second_device())


def twin(model: PeftModel) -> PeftModel:
    """Returns a model of stock PEFT with the adapter of `model`, on the second device."""
    return moved(get_peft_model(small_model(), model.peft_config["default"].to_lora())).eval().to(second_device())


def outputs(model: nn.Module, **options: Any) -> torch.Tensor:
    device = next(model.parameters()).device
    with torch.no_grad():
        return model(pixel_values=IMAGES.to(device), **options).logits.cpu()


def wrappers(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, ModulesToSaveWrapper)]


def devices(model: nn.Module) -> set[str]:
    """Returns the types of device of all that PEFT or torch find in a model."""
    return {tensor.device.type for tensor in (*model.parameters(), *model.buffers())}


def check_waiting(model: nn.Module) -> None:
    assert wrappers(model)
    for wrapper in wrappers(model):
        assert {parameter.device.type for parameter in wrapper.original_module.parameters()} == {"cpu"}
    assert devices(model) == {"lazy"}
    assert not [name for name, _ in model.named_parameters() if "original_module" in name]


# Memory.


def trained_step(model: nn.Module) -> Any:
    """Trains a model for a step on the second device, and returns the optimizer."""
    model.train().to(second_device())
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=1e-3, momentum=0.9)
    labels = torch.arange(len(IMAGES)) % 3
    model(pixel_values=IMAGES.to(second_device()), labels=labels.to(second_device())).loss.backward()
    optimizer.step()
    return optimizer


def bytes_of_training(build: Callable[[], nn.Module]) -> int:
    """Returns the bytes on the device after a step: weights, gradients and the state of the optimizer."""

    def trained() -> object:
        model = build()
        return model, trained_step(model)

    return bytes_held(second_device(), trained)


def without_peft() -> nn.Module:
    model = small_model().requires_grad_(False)
    for name, module in model.named_modules():
        if name.endswith(("mlp.fc1", "intermediate.dense", "classifier")):
            module.requires_grad_(True)
    return model


def stock() -> PeftModel:
    chosen = config()
    get_peft_model(small_model(), chosen)
    return get_peft_model(small_model(), chosen.to_lora())


def test_training_in_full_holds_on_the_device_what_training_without_peft_does() -> None:
    plain = bytes_of_training(without_peft)
    assert bytes_of_training(lambda: get_peft_model(small_model(), config())) == plain
    assert bytes_of_training(lambda: get_peft_model(small_model().to(second_device()), config())) == plain
    originals = sum(p.numel() * p.element_size() for p in without_peft().parameters() if p.requires_grad)
    assert bytes_of_training(stock) == plain + originals


# What PEFT does.


def disabled(model: PeftModel) -> Any:
    with model.disable_adapter():
        off = outputs(model)
    return off, outputs(model)


def added(model: PeftModel) -> Any:
    chosen = model.peft_config["default"]
    model.add_adapter("two", chosen.to_lora() if isinstance(chosen, PlasticityConfig) else copy.copy(chosen))
    beside = outputs(model)
    model.set_adapter("two")
    return beside, outputs(model)


def added_and_deleted(model: PeftModel) -> Any:
    first = added(model)
    model.delete_adapter("two")
    return first, model.set_adapter("default"), outputs(model)


def lora_beside(model: PeftModel) -> Any:
    other = LoraConfig(r=2, target_modules=["mlp.fc2", "output.dense"], init_lora_weights=False)
    torch.manual_seed(0)
    model.add_adapter("two", other)
    beside = outputs(model)
    model.set_adapter("two")
    alone = outputs(model)
    model.set_adapter("default")
    return beside, alone, outputs(model)


def loaded_state(model: PeftModel) -> Any:
    state = {name: value + 1 for name, value in model.state_dict().items()}
    found = model.load_state_dict(state)
    some = model.load_state_dict(dict(list(state.items())[:-7]), strict=False)
    with pytest.raises(RuntimeError, match="unknown"):
        model.load_state_dict({**state, "unknown": torch.zeros(1)})
    return list(found), list(some), disabled(model)


def assigned_state(model: PeftModel) -> Any:
    model.load_state_dict({name: value * 2 for name, value in model.state_dict().items()}, assign=True)
    return disabled(model)


def base_state(model: PeftModel) -> Any:
    state = {name: value.cpu() * 2 for name, value in get_base_model_state_dict(model).items()}
    set_base_model_state_dict(model, state)
    return list(state.values())


def modes(model: PeftModel) -> Any:
    seen = []
    for change in (model.train, model.eval, model.base_model.train):
        change()
        seen += [[part.training for part in wrapper.original_module.modules()] for wrapper in wrappers(model)]
    return seen


def backward_through_the_original(model: PeftModel) -> Any:
    images = IMAGES.to(second_device()).requires_grad_(True)
    with model.disable_adapter():
        total = model(pixel_values=images).logits.sum()
    total.backward()
    assert images.grad is not None
    return images.grad.cpu()


def in_inference_mode(model: PeftModel) -> Any:
    with torch.inference_mode(), model.disable_adapter():
        pass
    assert not any(p.is_inference() for wrapper in wrappers(model) for p in wrapper.original_module.parameters())
    return backward_through_the_original(model)


def converted(*arguments: Any) -> Callable[[PeftModel], None]:
    def convert(model: PeftModel) -> None:
        model.to(*arguments)

    return convert


def there_and_back(model: PeftModel) -> Any:
    on_the_cpu = disabled(model.cpu())
    model.to(second_device())
    return on_the_cpu, disabled(model)


VERBS: dict[str, Callable[[PeftModel], Any]] = {
    "nothing": lambda model: None,
    "disable_adapter": disabled,
    "disable_adapter, and train": lambda model: (disabled(model), trained_step(model))[0],
    "disable_adapter in inference mode": in_inference_mode,
    "backward after disable_adapter": backward_through_the_original,
    "add_adapter": added,
    "delete_adapter": added_and_deleted,
    "add_adapter(LoraConfig)": lora_beside,
    "to(dtype)": converted(torch.float16),
    "to(device)": converted("lazy"),
    "to(device, dtype)": converted("lazy", torch.bfloat16),
    "to(cpu), and back": there_and_back,
    "load_state_dict": loaded_state,
    "load_state_dict(assign)": assigned_state,
    "set_base_model_state_dict": base_state,
    "modes": modes,
    "merge_and_unload": lambda model: outputs(copy.deepcopy(model).merge_and_unload()),
    "deepcopy": lambda model: disabled(copy.deepcopy(model)),
}


def plain(value: Any) -> Any:
    """Returns a value that can be compared with ==."""
    if isinstance(value, torch.Tensor):
        return str(value.dtype), value.detach().cpu().tolist()
    return [plain(each) for each in value] if isinstance(value, (list, tuple)) else value


def everything(model: PeftModel) -> dict[str, Any]:
    """Returns what stock PEFT and this package must have in common, in order."""
    return {
        "state": [(name, plain(value)) for name, value in model.state_dict().items()],
        "trains": [name for name, parameter in model.named_parameters() if parameter.requires_grad],
        "adapters": model.active_adapters,
        "outputs": plain(disabled(model.float())),
    }


@pytest.mark.parametrize("verb", VERBS)
def test_a_model_on_a_device_does_what_stock_peft_does(verb: str) -> None:
    ours = adapted()
    stock = twin(ours)
    check_waiting(ours)
    assert plain(VERBS[verb](ours)) == plain(VERBS[verb](stock))
    here, there = everything(ours), everything(stock)
    for what, expected in there.items():
        assert here[what] == expected, what
    if ours.active_adapters == ["default"]:
        check_waiting(ours)


def test_disabled_the_model_is_the_base_bit_for_bit_and_the_originals_wait_again_afterwards() -> None:
    base = small_model().to(second_device())
    expected = outputs(base)
    model = get_peft_model(base, config())
    check_waiting(model)
    with model.disable_adapter():
        assert torch.equal(outputs(model), expected)
        assert all(next(wrapper.original_module.parameters()).device.type == "lazy" for wrapper in wrappers(model))
    check_waiting(model)


def test_the_original_is_on_the_device_while_no_adapter_replaces_it() -> None:
    model = adapted()
    model.add_adapter("two", LoraConfig(r=2, target_modules=["mlp.fc2", "output.dense"]))
    model.set_adapter("two")
    assert {next(wrapper.original_module.parameters()).device.type for wrapper in wrappers(model)} == {"lazy"}
    model.set_adapter("default")
    check_waiting(model)
    model.delete_adapter("default")
    assert torch.equal(outputs(model), outputs(small_model().to(second_device())))


def test_unloaded_the_base_model_is_on_its_device() -> None:
    base = adapted().unload()
    assert devices(base) == {"lazy"}
    assert not wrappers(base)
    expected = small_model().to(second_device()).state_dict()
    for name, value in base.state_dict().items():
        if not name.startswith("classifier"):  # the head keeps its trained weights
            assert torch.equal(value.cpu(), expected[name].cpu())


def test_batches_that_mix_adapters_with_the_base_model() -> None:
    model = adapted()
    base = small_model().to(second_device())
    mixed = outputs(model, adapter_names=["default", "__base__", "default", "__base__"])
    alone, of_base = outputs(model), outputs(base)
    torch.testing.assert_close(mixed, torch.stack([alone[0], of_base[1], alone[2], of_base[3]]))
    check_waiting(model)


def test_meta_and_back_is_as_with_stock_peft() -> None:
    model = adapted().to("meta")
    assert list(dict(model.named_parameters())) == list(dict(twin(adapted()).named_parameters()))
    assert devices(model) == {"meta"}
    check_waiting(model.to_empty(device=second_device()))


@pytest.mark.parametrize("training", ["lora", "full"])
def test_the_saved_adapter_is_that_of_a_model_on_the_cpu_to_the_byte(training: str, tmp_path: Path) -> None:
    model = moved(
        get_peft_model(
            saved_base(tmp_path / "base", small_model()), config(training=training, candidates=("FC1", "LN1"))
        )
    )
    for device in (torch.device("cpu"), second_device()):
        model.to(device)
        model.save_pretrained(tmp_path / device.type, state_dict=on_cpu(model))
    before, after = (
        {path.name: path.read_bytes() for path in (tmp_path / where).iterdir()} for where in ("cpu", "lazy")
    )
    assert before == after
    twin(model).save_pretrained(tmp_path / "stock", state_dict=on_cpu(twin(model)))
    assert (tmp_path / "stock" / "adapter_model.safetensors").read_bytes() == after["adapter_model.safetensors"]


def test_loaded_adapters_wait_as_well(tmp_path: Path) -> None:
    model = adapted()
    model.save_pretrained(tmp_path, state_dict=on_cpu(model))
    for trainable in (False, True):
        loaded = load_adapter(small_model().to(second_device()), tmp_path, is_trainable=trainable)
        check_waiting(loaded)
        assert plain(disabled(loaded)) == plain(disabled(model))
    loaded.load_adapter(tmp_path, "two")
    loaded.set_adapter("two")
    assert torch.equal(outputs(loaded), outputs(model))
    check_waiting(loaded)
    stock = PeftModel.from_pretrained(small_model().to(second_device()), tmp_path)
    assert {type(wrapper) for wrapper in wrappers(stock)} == {ModulesToSaveWrapper}


def test_transformers_own_adapter_methods() -> None:
    model = small_model().to(second_device())
    expected = outputs(model)
    model.add_adapter(config())
    check_waiting(model)
    moved(model.cpu()).to(second_device())
    trained = outputs(model)
    assert not torch.allclose(trained, expected, atol=1e-3)
    model.disable_adapters()
    assert torch.equal(outputs(model), expected)
    model.enable_adapters()
    check_waiting(model)
    assert torch.equal(outputs(model), trained)
    assert torch.equal(outputs(merged_copy(model)), trained)


def test_the_trainer_ends_with_the_best_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    device = second_device()
    save = Trainer._save
    monkeypatch.setattr(TrainingArguments, "device", property(lambda self: (self._setup_devices, device)[1]))
    monkeypatch.setattr(Accelerator, "device", property(lambda self: device))
    monkeypatch.setattr(
        Trainer, "_save", lambda self, folder, state_dict=None: save(self, folder, state_dict=on_cpu(self.model))
    )
    model = get_peft_model(saved_base(tmp_path / "base", small_model()), config())
    options = {"num_train_epochs": 2, "per_device_train_batch_size": 24, "save_only_model": True}
    trainer = trainer_of(model, tmp_path / "out", optim="adamw_torch", **options)
    trainer.train()
    check_waiting(model)
    best = PeftModel.from_pretrained(
        ViTForImageClassification.from_pretrained(tmp_path / "base"), trainer.state.best_model_checkpoint
    )
    torch.testing.assert_close(outputs(model.eval()), outputs(best.eval()))
    expected = outputs(ViTForImageClassification.from_pretrained(tmp_path / "base").to(device))
    assert torch.equal(disabled(model)[0], expected)


def test_hooks_of_accelerate_stay() -> None:
    model = small_model().to(second_device())
    attach_execution_device_hook(model, second_device())
    expected = outputs(model)
    model = get_peft_model(model, config())
    check_waiting(model)
    with model.disable_adapter(), torch.no_grad():
        assert torch.equal(model(pixel_values=IMAGES).logits.cpu(), expected)  # the hooks move the images
    check_waiting(model)


def test_copies_and_pickles() -> None:
    model = adapted()
    copied = copy.deepcopy(model)
    check_waiting(copied)
    assert not {id(wrapper.original_module) for wrapper in wrappers(copied)} & {
        id(wrapper.original_module) for wrapper in wrappers(model)
    }
    unpickled = pickle.loads(pickle.dumps(model.cpu()))
    check_waiting(unpickled.to(second_device()))
    assert plain(disabled(unpickled)) == plain(disabled(copied))


# What this package does.


def test_an_adapted_model_is_measured_and_fitted_as_on_the_cpu() -> None:
    labeled = [{"pixel_values": image, "labels": index % 3} for index, image in enumerate(random_images(8))]
    for options in ({"inputs": "activation", "criterion": "rate_of_change"}, {"criterion": "bound"}, {}):
        found = [measure_plasticity(model, labeled, **options) for model in (adapted(), adapted().cpu())]
        for here, there in zip(*(report.scores for report in found), strict=True):
            assert here.mean == pytest.approx(there.mean, rel=1e-4)
    model, on_the_cpu = adapted(), adapted().cpu()
    fit_head(model, labeled)
    fit_head(on_the_cpu, labeled)
    torch.testing.assert_close(outputs(model), outputs(on_the_cpu), rtol=1e-3, atol=1e-3)
    check_waiting(model)
    assert find_components(model) == find_components(small_model())


def failing(*_: object) -> None:
    raise OSError("fails")


def test_a_further_adapter_is_measured_on_the_base_model_and_a_failure_leaves_the_originals_waiting(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = adapted()
    before = everything(model)
    data = random_images(8)
    with monkeypatch.context() as patched:
        patched.setattr("plasticity_peft.adapters.model._finish", failing)
        with pytest.raises(OSError, match="fails"):
            model.add_adapter("two", config(report=None, target_data=data, max_samples=4))
    check_waiting(model)
    assert everything(model) == before
    model.add_adapter("two", config(report=None, target_data=data, max_samples=4))
    check_waiting(model)
    expected = config(report=None, target_data=data, max_samples=4).choose(small_model()).report.scores
    for here, there in zip(model.peft_config["two"].report.scores, expected, strict=True):
        assert here.mean == pytest.approx(there.mean, rel=1e-4)


class Layers(nn.Module):
    """Layers without a model of transformers around them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(2, 2), nn.Linear(2, 2)
        self.third, self.fourth = nn.Linear(2, 2), nn.BatchNorm1d(2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fourth(self.third(self.second(self.first(x))))


def test_tied_weights_stay_as_in_stock_peft() -> None:
    base = Layers().to(second_device())
    base.second.weight = base.first.weight  # the lazy device unties what moves there
    model = get_peft_model(base, LoraConfig(target_modules=["third"], modules_to_save=["first"]))
    keep_originals_away(model)
    (wrapper,) = wrappers(model)
    assert type(wrapper) is ModulesToSaveWrapper
    assert wrapper.original_module.weight is model.base_model.model.second.weight


def test_a_batch_norm_that_waits_keeps_its_statistics() -> None:
    model = get_peft_model(Layers(), LoraConfig(target_modules=["first"], modules_to_save=["third", "fourth"]))
    keep_originals_away(model)
    model.to(second_device()).train()
    (other, wrapper) = wrappers(model)
    assert isinstance(wrapper, TrainedInFull)
    assert wrapper.modules_to_save["default"].training
    assert not wrapper.original_module.training
    assert other.original_module.training


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
def test_both_compile_as_one_graph() -> None:
    model = moved(get_peft_model(small_model(), config())).eval()
    compiled = torch.compile(model.get_base_model(), backend="eager", fullgraph=True)
    torch.testing.assert_close(outputs(compiled), outputs(model))
    with model.disable_adapter():
        torch.testing.assert_close(outputs(compiled), outputs(model))
