"""`AutoModelForCausalLM.from_pretrained(folder)` for what `qfx.save` wrote: the model that `qfx.load` gives, exactly.

transformers builds a float model on the meta device, lets the quantizer that config.json names change it, reads the
checkpoint by its own rules of names, dtypes, ties and missing weights, and lets the quantizer finish. For a folder of
qfx those rules are in qfx.json, and the buffers that a class computes need more than the meta device. So the quantizer
leaves transformers nothing to read: the model that it is given is emptied, and when transformers is done, it is made
again in place and filled as `qfx.load` does it. What the caller asked of transformers is kept: settings of the config,
implementations of attention and experts, the device, the generation config.

The weights have names that transformers does not look for (no `model.safetensors`), so that without `import qfx`, where
it would skip a quantization that it does not know and draw weights at random, it finds none and says so. With it, the
config gets `transformers_weights` for the time of loading.

Importing this module registers it; `qfx._registration` does so. What loading needs is imported when a folder is loaded,
since this module may be imported from the middle of an import of transformers.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

if TYPE_CHECKING:
    from ._manifest import Implementation, Manifest

_METHOD = "qfx"  # as `qfx._build.METHOD`
_UNSAID = torch.float32
_KEPT = ("generation_config", "hf_quantizer", "is_quantized", "quantization_method")
"""What transformers has put on the model before it is made again."""


class QfxConfig(QuantizationConfigMixin):  # type: ignore[misc,no-untyped-call]
    """The `quantization_config` of config.json. All else is in qfx.json.

    Attributes:
        quant_method: "qfx".
        weights: the first file of tensors: transformers wants to open one before it says which folder it is.
    """

    def __init__(self, weights: str = "", **_: Any) -> None:
        self.quant_method = _METHOD
        self.weights = weights


class QfxQuantizer(HfQuantizer):  # type: ignore[misc]
    """What transformers calls while it loads a folder of qfx; every refusal is a `PackageError` of one line."""

    def __init__(self, quantization_config: QfxConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.folder = Path()
        self.asked: dict[str, Implementation] = {}

    def validate_environment(self, *_: Any, **__: Any) -> None:
        """Refuses a float folder with a config of ours."""
        with self._errors():
            if not self.pre_quantized:
                _refuse("this quantization_config only loads what qfx.save wrote; quantize with qfx.quantize")

    def update_device_map(self, device_map: Any) -> dict[str, Any] | None:
        """One device for all: the one given, or for "auto" and its like the accelerator if there is one."""
        if device_map is None:
            return None
        if isinstance(device_map, str):
            return {"": torch.accelerator.current_accelerator() or "cpu"}
        places = {str(place) for place in device_map.values()}
        with self._errors():
            if len(places) != 1 or places & {"disk", "meta"}:
                some = ", ".join(sorted(places)) or "none"
                _refuse(f"device_map names the devices {some}, a model of qfx is loaded to one; name one")
        return {"": next(iter(device_map.values()))}

    def update_tp_plan(self, config: Any) -> Any:
        """The first that transformers 5.0 to 5.18 lets see the config."""
        return self._announce(config)

    def update_attn_implementation(self, config: Any) -> Any:
        """The first that later ones let see it."""
        return self._announce(config)

    def _announce(self, config: Any) -> Any:
        """Notes what was asked for, and says which file to open, before transformers looks for files."""
        from ._build import implementation
        from ._folder import open_folder

        self.folder = Path(config.name_or_path or "")
        with self._errors():
            if self.folder.is_dir() and self.folder.parts:  # a model's class, other than an Auto class, does not say it
                open_folder(self.folder, verify=False)
            elif len(self.folder.parts) == 2 and not self.folder.is_absolute():
                _refuse(f"there is no such folder here; hf download {self.folder} --local-dir FOLDER, and load that")
        if config.dtype is None:  # or transformers would open the weights for one, and take that of some codes
            config.dtype = _UNSAID
        config.transformers_weights = Path(self.quantization_config.weights).name
        attributes = ("_attn_implementation", "_experts_implementation")
        self.asked = self.asked or {name: implementation(config, name) for name in attributes}
        return config

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        from ._folder import open_folder
        from .package import find_device

        files = kwargs.get("checkpoint_files") or [""]
        self.folder = Path(files[0]).parent
        with self._errors():
            manifest = open_folder(self.folder, verify=True)
            _check_class(model, manifest)
            if kwargs.get("use_kernels"):
                _refuse("use_kernels=True would replace modules; qfx.lower does what it is for, leave it out")
            if getattr(model.config, "distributed_config", None) is not None:
                _refuse("it is loaded to one device, not distributed; leave out distributed_config and tp_plan")
            place = find_device((kwargs.get("device_map") or {"": "cpu"})[""])
        self._pending = manifest, place, set(model.state_dict())
        _empty(model)

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
        manifest, place, names = self.__dict__.pop("_pending")
        with self._errors():
            if vars(model).get("_tp_size") is not None:
                _refuse("it is loaded to one device, not distributed; leave out tp_plan")
            _fill(model, self.folder, manifest, place, names, self.asked)
        model.config.quantization_config = self.quantization_config
        return model

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        from ._manifest import one_line
        from .core.errors import PackageError

        where = f"from_pretrained: {self.folder}" if self.folder.parts else "from_pretrained"
        try:
            yield
        except PackageError as e:
            raise PackageError(f"{where}: {e}") from e.__cause__
        except OSError as e:
            raise PackageError(f"{where}: {one_line(e)}; check that it can be read") from e

    def is_serializable(self, *_: Any, **__: Any) -> bool:
        """`qfx.save` saves it."""
        return False

    @property
    def is_trainable(self) -> bool:
        """Codes have no gradients."""
        return False


def _refuse(why: str) -> None:
    from .core.errors import PackageError

    raise PackageError(why)


def _check_class(model: Any, manifest: Manifest) -> None:
    cls, saved = type(model), manifest.model
    if (cls.__module__, cls.__qualname__) != (saved.module, saved.qualname):
        _refuse(
            f"the saved model is a {saved.qualname}, not a {cls.__qualname__}; use {saved.qualname}.from_pretrained or "
            "qfx.load"
        )


def _restore_dtype(config: Any, stored: Any, folder: Path, manifest: Manifest) -> None:
    """Lets a config and those in it say what they said when they were saved; the dtypes of tensors are in qfx.json."""
    if config.dtype not in {stored.dtype or _UNSAID, *(tensor.dtype for tensor in manifest.tensors.values())}:
        warnings.warn(
            f"from_pretrained: {folder}: dtype={config.dtype} is not used, a quantized model keeps the dtypes that it "
            "was saved with; cast the float model before qfx.quantize",
            stacklevel=7,
        )
    config.dtype = stored.dtype
    for key in getattr(config, "sub_configs", {}):
        inner, saved = getattr(config, key, None), getattr(stored, key, None)
        if inner is not None and saved is not None:
            inner.dtype = saved.dtype


def _empty(model: Any) -> None:
    """Leaves nothing that transformers could load, initialize, tie or warn of. All of it is undone with `_fill`."""
    for table in (model._modules, model._parameters, model._buffers):
        table.clear()
    ignored = model._keys_to_ignore_on_load_unexpected  # a set, or with older ones a list
    model._keys_to_ignore_on_load_unexpected = {".*"} if isinstance(ignored, set) else [".*"]
    model._tp_plan = {}
    model.all_tied_weights_keys = {}
    model.tie_weights = lambda *_, **__: None
    model._is_hf_initialized = True


def _fill(model: Any, folder: Path, manifest: Manifest, place: Any, names: set[str], asked: dict[str, Any]) -> None:
    """Makes a model again in place, from its config, and loads the folder into it."""
    from ._build import building, failures, read_config, set_implementation
    from ._tree import stored_names
    from .package import attach, fill

    hub = manifest.model.transformers
    assert hub is not None  # only folders of transformers' classes have our mark
    kept = {name: value for name, value in vars(model).items() if name in _KEPT}
    config = model.config
    for name in ("quantization_config", "transformers_weights"):
        if name in vars(config):
            delattr(config, name)
    with failures(manifest.model):
        stored = read_config(folder, manifest.model)
    _restore_dtype(config, stored, folder, manifest)
    with failures(manifest.model):
        for name, saved in (
            ("_attn_implementation", hub.attn_implementation),
            ("_experts_implementation", hub.experts_implementation),
        ):
            said = {path: value for path, value in (asked.get(name) or {}).items() if value}
            set_implementation(config, name, (saved or {}) | said)
        vars(model).clear()
        with building(hub.dtype):
            type(model).__init__(model, config)
    if names != (float_names := stored_names(model)):
        _refuse("the arguments given change the model that the class builds; leave them out")
    vars(model).update(kept)
    attach(model, fill(model, folder, manifest, place), float_names)
    model.eval()
    if place.type == "cuda":
        from .lowering import lower  # as qfx.load does

        lower(model)


with contextlib.suppress(ValueError):  # it is there already: this module was dropped and imported again
    register_quantization_config(_METHOD)(QfxConfig)
    register_quantizer(_METHOD)(QfxQuantizer)
