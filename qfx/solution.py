"""A quantized model as a solution for a float model of its class: what graphs of the float model read instead."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from qfx.modules.linear import QLinear
from qfx.modules.parameter import Slot
from qfx.modules.state import BUFFERS
from qfx.passes.discover.dynamo import Traced
from qfx.passes.discover.linears import find_linears
from qfx.passes.lower._rewrite import Rewritten
from qfx.passes.lower.additions import put_bias, put_map, put_shift
from qfx.passes.lower.graph import Dequantize, fit_kernel, join, plain_bias, put_module
from qfx.passes.lower.merge import merge_linears

from ._tree import slots_of
from .core.errors import CaptureError, QfxError
from .core.graph import Graph, layer_path
from .core.linear import Linear
from .core.online import GAIN, OFFSET, Online
from .core.shifted import NAME, Shifted
from .core.spec import Scheme

VALUES = "qfx_values"
"""Below which a graph reads float tensors of the solution."""
_ADVICE = "give the model that was quantized, as it was before, or quantize this one"


@dataclass(eq=False)
class Solution:
    """What a quantized model has that the float model has not, by the float model's names.

    Attributes:
        model: the float model, weakly.
        layers: the quantized linears, by path and without their biases.
        parameters: what is stored of quantized parameters of modules that are no linears, by name.
        values: the float tensors that differ from the float model's own, and those that it does not have.
        shifts: paths of norms that were given a shift, which is in `values` below that path.
        maps: paths of linears that map their input first.
        names: of the float model's parameters that the solution replaces; a graph must read them all.
        seen: the float model's parameters as they were, by name: a weak reference, version and address.
        joined: linears of `layers` that are computed as one, by the paths of those.
    """

    model: weakref.ref[nn.Module]
    layers: dict[str, QLinear] = field(default_factory=dict)
    parameters: dict[str, Dequantize] = field(default_factory=dict)
    values: dict[str, Tensor] = field(default_factory=dict)
    shifts: list[str] = field(default_factory=list)
    maps: list[str] = field(default_factory=list)
    names: set[str] = field(default_factory=set)
    seen: dict[str, tuple[Any, int, int]] = field(default_factory=dict)
    joined: dict[tuple[str, ...], QLinear] = field(default_factory=dict)

    @classmethod
    @torch.no_grad()
    def of(cls, solved: nn.Module, model: nn.Module) -> Solution:
        """Reads off a quantized model what it has instead of a float model's parameters.

        Args:
            solved: from `quantize` or `load`; it is not changed.
            model: of its class, with parameters of the same names, shapes and dtypes; it is not changed.

        Raises:
            QfxError: it is another model.
        """
        found = cls(weakref.ref(model))
        _check_class(solved, model)
        modules = dict(solved.named_modules(remove_duplicate=False))
        theirs = dict(solved.named_parameters(remove_duplicate=False))
        for name, parameter in model.named_parameters(remove_duplicate=False):
            found.seen[name] = (weakref.ref(parameter), parameter._version, parameter.data_ptr())
            path, _, leaf = name.rpartition(".")
            module, device = modules.get(path), parameter.device
            if isinstance(module, QLinear):
                value = module.bias if leaf == "bias" else None
                if leaf == "weight" and parameter.shape in (sizes := _sizes(module), sizes[::-1]):
                    found.names.add(name)
                    continue
            elif module is not None and leaf in (slots := slots_of(module)):
                found.parameters[name] = made = _dequantize(module, leaf, slots[leaf], device)
                if _shape(made, module, leaf) == list(parameter.shape):
                    found.names.add(name)
                    continue
                value = None
            else:
                value = theirs.get(name)
            if value is None or value.shape != parameter.shape or value.dtype != parameter.dtype:
                got = "a part of another form" if value is None else f"{tuple(value.shape)} in {value.dtype}"
                raise QfxError(
                    f"backend: the parameter {name} is {tuple(parameter.shape)} in {parameter.dtype} in the model that "
                    f"is compiled, and {got} in the quantized one; {_ADVICE}"
                )
            if not torch.equal(value.to(device), parameter):
                found.values[name] = value.detach().to(device)
                found.names.add(name)
        found._add_modules(solved, model)
        _check_buffers(solved, model)
        return found

    def _add_modules(self, solved: nn.Module, model: nn.Module) -> None:
        """Takes over what folds have added, and the quantized linears."""
        own = dict(model.named_modules(remove_duplicate=False))
        for path, module in solved.named_modules(remove_duplicate=False):
            if path not in own:
                if next(module.parameters(), None) is None and not isinstance(module, QLinear):
                    continue  # such as the linear that lowering puts beside those it has merged
                raise QfxError(f"backend: the model that is compiled has no module {path}; {_ADVICE}")
            weight = getattr(own[path], "weight", None)
            device = weight.device if isinstance(weight, Tensor) else torch.device("cpu")
            added: list[tuple[str, Tensor | None]] = []
            if isinstance(module, QLinear):
                self.layers[path] = _plain(module, device)
                added.append(("bias", module.bias))
            elif isinstance(module, nn.Linear):
                added.append(("bias", module.bias))
            if isinstance(module, Shifted):
                self.shifts.append(path)
                added.append((NAME, module.shift))
            if isinstance(module, Online):
                self.maps.append(path)
                added += [(GAIN, module.online_gain), (OFFSET, module.online_offset)]
            for leaf, value in added:
                if value is not None and (name := f"{path}.{leaf}".lstrip(".")) not in self.seen:
                    self.values[name] = value.detach().to(device)

    @property
    def schemes(self) -> dict[str, Scheme]:
        """Of the quantized layers, by name."""
        inner = {name.removesuffix(".weight"): made.scheme for name, made in self.parameters.items()}
        return {path: module.scheme for path, module in self.layers.items()} | inner

    def fits(self, name: str, parameter: Tensor) -> bool:
        """Whether a parameter is the one that was seen under a name, and nothing was written to it since."""
        reference, version, address = self.seen[name]
        same = reference() is parameter and version == parameter._version
        return bool(same and address == parameter.data_ptr())

    def is_current(self) -> bool:
        """Whether the float model's parameters are those that were seen."""
        model = self.model()
        return model is not None and all(
            name in self.seen and self.fits(name, p) for name, p in model.named_parameters(remove_duplicate=False)
        )

    def rewrite(self, traced: Traced, merge: bool = False) -> tuple[dict[str, Tensor], list[Rewritten]]:
        """Lets a graph of the float model compute what the quantized model computes.

        Args:
            traced: the graph, which is changed, with parameters under their names in the float model.
            merge: whether linears that read one value become one.

        Returns:
            The tensors that it reads now beside its inputs, by the names below which it reads them; what was merged.

        Raises:
            CaptureError: the graph is not of the whole model, or reads a parameter in another way than the capture did.
        """
        graph = traced.graph
        linears, _ = find_linears(graph)
        self._check_whole(set(traced.positions))
        extra = {f"{VALUES}.{i}": value for i, value in enumerate(self.values.values())}
        target = dict(zip(self.values, extra, strict=True))
        holder = nn.Module()
        for i, value in enumerate(self.values.values()):
            holder.register_buffer(str(i), value)
        graph.module.add_module(VALUES, holder)
        for path in self.shifts:
            name = f"{path}.{NAME}"
            put_shift(graph, linears, path, target[name], self.values[name])
        paths = {linear: self._prepare(graph, linear, target) for linear in linears}
        done: list[Rewritten] = []
        groups = self._groups(linears, paths, done) if merge else [[linear] for linear in linears]
        for i, group in enumerate(groups):
            if (module := self._module(graph, group, paths)) is not None:
                put_module(graph, linears, group, module, f"qfx_{i}")
                extra |= {f"qfx_{i}.{leaf}": buffer for leaf, buffer in module.named_buffers()}
        graph.fx.eliminate_dead_code()
        for node in list(graph.fx.find_nodes(op="get_attr")):
            if (name := str(node.target)) in self.values and name in self.seen:
                node.target = target[name]
                node.meta["val"] = self.values[name]
            elif name in self.names:
                who = ", ".join(sorted({str(user.target) for user in node.users}))
                raise CaptureError(f"backend: {name} is quantized, and {who} in Dynamo's graph reads it in float")
        read = {str(node.target) for node in graph.fx.find_nodes(op="get_attr")}
        return {name: value for name, value in extra.items() if name in read}, done

    def _check_whole(self, read: set[str]) -> None:
        model = self.model()
        assert model is not None
        others = dict(model.named_parameters(remove_duplicate=False))
        ids = {id(others[name]) for name in read}
        if missing := sorted(name for name in self.names if id(others[name]) not in ids):
            some = ", ".join(missing[:3]) + (" ..." if len(missing) > 3 else "")
            raise CaptureError(
                f"backend: this graph of Dynamo's reads only a part of what the solution changes, not {some}; a "
                "solution holds for the whole model: compile with fullgraph=True to see where the graph breaks, or "
                "use qfx.quantize and compile what it returns"
            )

    def _prepare(self, graph: Graph, linear: Linear, target: Mapping[str, str]) -> str:
        """Adds to one product of the graph what folds have added to its module; returns the module's path."""
        path = layer_path(linear.node)
        if path not in self.layers and linear.name in self.layers:
            path = linear.name
        if path in self.maps:
            gain, offset = f"{path}.{GAIN}", f"{path}.{OFFSET}"
            put_map(graph, linear, (target[gain], target[offset]), (self.values[gain], self.values[offset]))
        bias = f"{path}.bias"
        if bias in self.values and bias not in self.seen:
            put_bias(graph, linear, target[bias], self.values[bias])
        elif path in self.layers and linear.y is not linear.node and bias not in self.seen:
            linear.y = linear.node  # what is added outside of the module stays an addition
        return path

    def _groups(self, linears: list[Linear], paths: Mapping[Linear, str], done: list[Rewritten]) -> list[list[Linear]]:
        """Linears in groups that become one, or alone; what was merged is added to `done`."""
        known = [x for x in linears if paths[x] in self.layers or x.weight in self.parameters]
        fit = {x: self.layers[paths[x]] for x in known if paths[x] in self.layers and plain_bias(x) is not None}
        groups, merged = merge_linears(known, fit, {x for x in fit if plain_bias(x)})
        done.append(merged)
        of = {linear: group for group in groups for linear in group}
        return [of.get(x, [x]) for x in linears if of.get(x, [x])[0] is x]

    def _module(self, graph: Graph, group: list[Linear], paths: Mapping[Linear, str]) -> QLinear | Dequantize | None:
        """What computes a linear, or several as one; None for one that is not quantized."""
        names = tuple(paths[linear] for linear in group)
        for name in names if names not in self.joined else ():
            if name in self.layers and self.layers[name].part is not None:  # of others, in another graph
                self.layers[name] = _plain(self.layers[name], self.layers[name].device)
        if len(group) == 1:
            module = self.layers.get(names[0])
            if module is not None and not module.kernel:
                fit_kernel(module, module.device)
            return module or self.parameters.get(group[0].weight)
        if names not in self.joined:
            biases = [plain_bias(linear) for linear in group]
            given = [self.values.get(b, graph.attr(b)) for b in biases if b]
            self.joined[names] = join([self.layers[name] for name in names], given)
        return self.joined[names]


def _check_class(solved: nn.Module, model: nn.Module) -> None:
    got, want = ((type(m).__module__, type(m).__qualname__) for m in (model, solved))
    if got[1] != want[1] or (got[0] != want[0] and "__main__" not in (got[0], want[0])):
        raise QfxError(
            f"backend: the quantized model is a {'.'.join(want)}, and a {'.'.join(got)} is compiled; {_ADVICE}"
        )


def _check_buffers(solved: nn.Module, model: nn.Module) -> None:
    """Buffers are read from the float model: what is saved of them must be the same."""
    theirs, saved = dict(solved.named_buffers()), set(model.state_dict())
    for name, buffer in model.named_buffers():
        other = theirs.get(name)
        same = other is not None and other.shape == buffer.shape and torch.equal(other.to(buffer), buffer)
        if name in saved and not same:
            raise QfxError(f"backend: the buffer {name} has other values than in the quantized model; {_ADVICE}")


def _sizes(module: QLinear) -> tuple[int, int]:
    return module.out_features, module.in_features


def _plain(module: QLinear, device: torch.device) -> QLinear:
    """The same weight as it is stored, without a bias and a map; tensors are shared where they are on the device."""
    form: dict[str, Any] = {"g_idx": module.has_g_idx, "dtype": module.dtype, "device": "meta"}
    plain = QLinear.empty(module.in_features, module.out_features, module.scheme, bias=False, **form)
    plain.take_weight()
    plain.put_weight({key: None if t is None else t.to(device) for key, t in module.stored().items()})
    for name in ("input_scale", "input_zero"):
        if (value := getattr(module, name)) is not None:
            setattr(plain, name, value.to(device))
    plain.train(False)
    return plain


def _dequantize(module: nn.Module, name: str, slot: Slot, device: torch.device) -> Dequantize:
    keys = (*BUFFERS, "input_scale", "input_zero")
    stored = {key: module._buffers.get(f"{name}_{key}") for key in keys}
    moved: Mapping[str, Tensor | None] = {key: None if t is None else t.to(device) for key, t in stored.items()}
    return Dequantize(moved, slot.scheme, slot.columns, slot.layout, slot.dtype)


def _shape(made: Dequantize, module: nn.Module, name: str) -> list[int]:
    canonical = [*module.get_buffer(f"{name}_codes").shape[:-1], made.call.columns]
    return [canonical[i] for i in made.call.layout]
