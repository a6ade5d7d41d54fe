"""`torch.compile` with a solution of the whole model: the same numbers as `qfx.quantize`, on a float model."""

import copy
import functools
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qfx
from qfx import calibrated
from qfx.calibrated import CalibratedBackend
from qfx.core.errors import CalibrationError, CaptureError, PackageError, QfxError, RecipeError
from tests.test_backend import Branching, Feeds, Stack, same, unfused
from tests.zoo import ZOO
from tests.zoo.captured import floats
from tests.zoo.decoders import token_ids

MODELS = ("llama", "opt", "bert", "gpt2")
SOLVED_HERE = (("opt", "static-osplus"), ("gpt2", "gptq"))
"""Of which the backend finds the solution itself, with the data; to the others it is given."""
GPTQ = qfx.Recipe.load("w4a16-gptq").with_group(32)
RECIPES: dict[str, Any] = {
    "smoothquant": "w8a8-smoothquant",
    "static-osplus": "w8a8-static-osplus",
    "gptq": GPTQ,
}
SMOOTH = "w8a8-smoothquant"


pytestmark = pytest.mark.usefixtures("dynamo")


def quantized(model: nn.Module, recipe: Any, feeds: Feeds) -> nn.Module:
    return qfx.quantize(model, recipe, [feeds], progress=False)


@functools.cache
def solved(name: str, recipe: str) -> nn.Module:
    model, feeds = ZOO[name].load()
    return quantized(model, RECIPES[recipe], feeds)


@functools.cache
def small() -> nn.Module:
    return Branching(asks=False).eval()


def small_model() -> tuple[nn.Module, Feeds]:
    generator = torch.Generator().manual_seed(1)
    return copy.deepcopy(small()), {"x": torch.randn(2, 64, generator=generator)}


class Counting:
    """A backend that counts what it compiles."""

    def __init__(self) -> None:
        self.compiled = 0

    def __call__(self, gm: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        self.compiled += 1
        return gm.forward


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("recipe", RECIPES)
def test_it_computes_what_quantize_computes(name: str, recipe: str) -> None:
    model, feeds = ZOO[name].load()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    q = solved(name, recipe)
    want, plain = floats(q(**feeds)), floats(model(**feeds))
    assert not same(want, plain)
    given = unfused(q, then="eager")
    assert same(floats(torch.compile(model, backend=given)(**feeds)), want)
    layers = {layer.name for layer in q.qfx.report.layers if layer.scheme}
    assert set(given.layers) == layers
    if (name, recipe) in SOLVED_HERE:
        torch._dynamo.reset()
        chosen = unfused(RECIPES[recipe], calibration=[feeds], then="eager")
        assert same(floats(torch.compile(model, backend=chosen)(**feeds)), want)
        assert set(chosen.layers) == layers
        assert chosen.report.to_dict()["layers"] == q.qfx.report.to_dict()["layers"]
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


STEPS: dict[str, tuple[str, Any, Callable[[CalibratedBackend], bool]]] = {
    "norms without bias are shifted": (
        "llama",
        {"schemes": {"*": "W8A8_STATIC"}, "steps": [{"outlier_suppression_plus": {"shift_rmsnorm": True, "steps": 4}}]},
        lambda chosen: bool(chosen.solution.shifts),
    ),
    "maps at run time": (
        "opt",
        {"schemes": {"*": "W8A8_STATIC"}, "steps": [{"smoothquant": {"online": True}}], "ignore": ["@head"]},
        lambda chosen: len(chosen.solution.maps) == 4,
    ),
    "maps and shifts at run time, in float": (
        "opt",
        {"steps": [{"outlier_suppression_plus": {"online": True}}]},
        lambda chosen: bool(chosen.solution.maps) and not chosen.layers,
    ),
    "static inputs of experts": (
        "mixtral",
        "w8a8-static",
        lambda chosen: any(m.scheme.input and hasattr(m, "input_scale") for m in chosen.solution.parameters.values()),
    ),
    "a tied head": (
        "llama_tied",
        {"schemes": {"*": "W8A8"}, "steps": ["smoothquant"]},
        lambda chosen: "lm_head" in chosen.layers,
    ),
}


@pytest.mark.parametrize("case", STEPS)
def test_what_folds_add(case: str) -> None:
    name, recipe, applies = STEPS[case]
    model, feeds = ZOO[name].load()
    q = quantized(model, recipe, feeds)
    chosen = unfused(q, then="eager")
    got = floats(torch.compile(model, backend=chosen)(**feeds))
    assert isinstance(chosen, CalibratedBackend) and applies(chosen)
    assert same(got, floats(q(**feeds)))


@pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor needs a C++ compiler")
def test_inductor() -> None:
    model, feeds = ZOO["gpt2"].load()
    fast = torch.compile(model, backend=unfused(RECIPES["static-osplus"], calibrate=1))
    got = [floats(fast(**feeds)) for _ in range(2)][-1]
    want = torch.compile(solved("gpt2", "static-osplus"))
    assert same(got, floats(want(**feeds)))


@pytest.mark.parametrize("by_name", [False, True])
def test_a_folder(tmp_path: Path, by_name: bool) -> None:
    model, feeds = ZOO["llama"].load()
    qfx.save(solved("llama", "static-osplus"), tmp_path / "q")
    for p in model.parameters():
        p.mul_(0.5)  # the folder has its own weights
    options = {"recipe": str(tmp_path / "q"), "then": "eager", "fuse": False}
    how = {"backend": "qfx", "options": options} if by_name else {"backend": unfused(tmp_path / "q", then="eager")}
    fast = torch.compile(model, **how)
    assert same(floats(fast(**feeds)), floats(qfx.load(tmp_path / "q")(**feeds)))


@pytest.mark.parametrize("how", [{"calibrate": 2}, {"calibration": True}], ids=["calls", "batches"])
def test_options_by_name(how: dict[str, Any]) -> None:
    model, feeds = small_model()
    how = {"calibration": [feeds, feeds]} if "calibration" in how else how
    fast = torch.compile(model, backend="qfx", options={"recipe": SMOOTH, "then": "eager", "fuse": False, **how})
    got = [fast(**feeds) for _ in range(3)][-1]
    assert torch.equal(got, qfx.quantize(model, SMOOTH, [feeds, feeds], progress=False)(**feeds))


def test_the_first_calls_calibrate() -> None:
    model, feeds = ZOO["bert"].load()  # of two inputs
    second = {**feeds, "input_ids": feeds["input_ids"].flip(1)}
    then = Counting()
    chosen = unfused(SMOOTH, calibrate=2, then=then)
    assert isinstance(chosen, CalibratedBackend)
    fast = torch.compile(model, backend=chosen)
    for left, batch in ((1, feeds), (0, second)):
        assert same(floats(fast(**batch)), floats(model(**batch)))
        assert chosen.pending == left and then.compiled == 0
        with pytest.raises(CalibrationError, match=f"{2 - left} of 2 calls"):
            _ = chosen.report
    want = qfx.quantize(model, SMOOTH, [feeds, second], progress=False)
    for batch in (feeds, second):
        assert same(floats(fast(**batch)), floats(want(**batch)))
    assert (chosen.graphs, then.compiled, chosen.pending) == (1, 1, 0)
    assert chosen.recorded == [] and chosen.report.layers


def test_recorded_inputs_are_copies() -> None:
    model, feeds = small_model()
    x = feeds["x"].clone()
    fast = torch.compile(model, backend=unfused(SMOOTH, calibrate=1, then="eager"))
    fast(x)
    x.fill_(9)
    assert torch.equal(fast(feeds["x"]), quantized(model, SMOOTH, feeds)(**feeds))


def test_inputs_by_position() -> None:
    model, feeds = ZOO["llama"].load()  # transformers wraps its forward into a function of *args
    fast = torch.compile(model, backend=unfused(SMOOTH, calibrate=1, then="eager"))
    fast(feeds["input_ids"])
    assert same(floats(fast(feeds["input_ids"])), floats(solved("llama", "smoothquant")(**feeds)))


def test_other_sizes_share_the_solution() -> None:
    model, q, then = ZOO["llama"].load()[0], solved("llama", "static-osplus"), Counting()
    chosen = unfused(q, then=then)
    fast, solutions = torch.compile(model, backend=chosen), set()
    for batch, length in ((2, 12), (3, 12), (3, 7), (2, 9), (4, 5)):
        ids = token_ids(length=length).repeat(2, 1)[:batch]
        assert same(floats(fast(input_ids=ids)), floats(q(input_ids=ids))), (batch, length)
        solutions.add(id(chosen.solution))
    assert (chosen.graphs, then.compiled, len(solutions)) == (3, 3, 1)  # one, its batch open, its length as well


@pytest.mark.parametrize("calls", [0, 2])
def test_other_sizes_are_not_solved_anew(calls: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model, then = small_model()[0], Counting()
    batches = [{"x": torch.randn(2, 5, 64)} for _ in range(2)]
    q, runs = qfx.quantize(model, SMOOTH, batches, progress=False), []

    def counted(*args: Any, **kwargs: Any) -> nn.Module:
        runs.append(args)
        return qfx.quantize(*args, **kwargs)

    monkeypatch.setattr(calibrated, "quantize", counted)
    given: dict[str, Any] = {"calibrate": calls} if calls else {"calibration": batches}
    chosen = unfused(SMOOTH, then=then, **given)
    fast = torch.compile(model, backend=chosen)
    for batch in batches[:calls]:
        assert torch.equal(fast(**batch), model(**batch))
    for b, n in ((2, 5), (3, 5), (3, 7), (2, 9), (4, 6)):
        x = torch.randn(b, n, 64)
        assert torch.equal(fast(x=x), q(x=x)), (b, n)
    assert len(runs) == 1
    assert chosen.graphs == then.compiled <= 3


def test_generate() -> None:
    model, feeds = ZOO["llama"].load()
    q = copy.deepcopy(solved("llama", "smoothquant"))
    settings: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "use_cache": True, "disable_compile": True}
    settings |= {"output_logits": True, "return_dict_in_generate": True}
    want = q.generate(**feeds, **settings)
    chosen = unfused(solved("llama", "smoothquant"), then="eager")
    model.compile(backend=chosen)
    got = model.generate(**feeds, **settings)
    assert torch.equal(got.sequences, want.sequences)
    assert same(list(got.logits), list(want.logits))
    assert chosen.graphs <= 3


@pytest.mark.parametrize("calls", [0, 1])
def test_changed_weights_are_an_error_and_never_stale(calls: int) -> None:
    model, feeds = small_model()
    given: dict[str, Any] = {"calibrate": calls} if calls else {"calibration": [feeds]}
    chosen = unfused(SMOOTH, then="eager", **given)
    fast = torch.compile(model, backend=chosen)
    for _ in range(calls + 1):
        fast(**feeds)
    changes = [
        lambda: model.second.weight.mul_(2),
        lambda: model.load_state_dict({k: v.roll(1, 0) for k, v in model.state_dict().items()}),
        lambda: setattr(model.first, "bias", nn.Parameter(torch.zeros(96))),
    ]
    for change in changes:
        change()
        with pytest.raises(QfxError, match=r"torch.compiler.reset"):
            fast(**feeds)
        torch.compiler.reset()
        for _ in range(calls + 1):
            got = fast(**feeds)
        assert torch.equal(got, quantized(model, SMOOTH, feeds)(**feeds))


def test_a_solution_that_was_given_does_not_follow_the_weights() -> None:
    model, feeds = small_model()
    fast = torch.compile(model, backend=unfused(quantized(model, SMOOTH, feeds), then="eager"))
    fast(**feeds)
    model.first.weight.zero_()
    with pytest.raises(QfxError, match="not those any more"):
        fast(**feeds)
    torch.compiler.reset()
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match="not those any more"):
        fast(**feeds)


def test_a_function_around_the_model() -> None:
    model, feeds = small_model()
    want = quantized(model, SMOOTH, feeds)(**feeds)

    def call(x: Tensor) -> Tensor:
        return model(x)

    chosen = unfused(SMOOTH, calibration=[feeds], model=model, then="eager")
    assert torch.equal(torch.compile(call, backend=chosen)(feeds["x"]), want)
    torch._dynamo.reset()
    options = {"recipe": SMOOTH, "then": "eager", "fuse": False, "calibration": [feeds]}
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match="model=model"):
        torch.compile(call, backend="qfx", options=options)(feeds["x"])


def test_graphs_of_parts_are_refused() -> None:
    model, feeds = Stack().eval(), {"x": torch.randn(2, 5, 64)}
    q = quantized(model, SMOOTH, feeds)
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match="only a part") as e:
        torch.compile(model, backend=unfused(q, then="eager"))(**feeds)
    assert isinstance(e.value.inner_exception, CaptureError)
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match=r"calibrate=N") as e:
        torch.compile(model, backend=unfused(SMOOTH, calibrate=1, then="eager"))(**feeds)
    assert isinstance(e.value.inner_exception, CaptureError)


def _refused(model: nn.Module, feeds: Feeds, chosen: Any, what: str, kind: type[QfxError] = QfxError) -> None:
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match=what) as e:
        torch.compile(model, backend=chosen)(**feeds)
    assert isinstance(e.value.inner_exception, kind)


def test_another_model_is_refused(tmp_path: Path) -> None:
    model, feeds = small_model()
    q = quantized(model, SMOOTH, feeds)
    qfx.save(q, tmp_path / "q")
    other = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)).eval()
    _refused(other, {"input": feeds["x"]}, qfx.backend(q), "a torch.nn.modules.container.Sequential is compiled")
    _refused(other, {"input": feeds["x"]}, qfx.backend(tmp_path / "q"), "not a .*Sequential", PackageError)
    wide, half = small_model()[0], small_model()[0].bfloat16()
    wide.second = nn.Linear(96, 72)
    wide.head = nn.Linear(72, 16)
    _refused(wide, feeds, qfx.backend(q), r"second.weight is \(72, 96\)")
    _refused(wide, feeds, qfx.backend(tmp_path / "q"), "second", PackageError)
    _refused(half, {"x": feeds["x"].bfloat16()}, qfx.backend(q), "bfloat16 in the model")
    chosen = qfx.backend(q, then="eager")
    torch.compile(model, backend=chosen)(**feeds)
    _refused(small_model()[0], feeds, chosen, "another model")


class Scaled(Branching):
    """Has a buffer that is saved."""

    def __init__(self) -> None:
        super().__init__(asks=False)
        self.register_buffer("factor", torch.ones(64))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x * self.get_buffer("factor"))


def test_a_buffer_of_other_values_is_refused() -> None:
    model, feeds = Scaled().eval(), small_model()[1]
    q = quantized(model, SMOOTH, feeds)
    assert torch.equal(torch.compile(model, backend=qfx.backend(q, then="eager"))(**feeds), q(**feeds))
    model.get_buffer("factor").mul_(2)
    _refused(model, feeds, qfx.backend(q, then="eager"), "the buffer factor")


def test_calls_that_cannot_be_quantized() -> None:
    model, feeds = small_model()
    given: list[dict[str, Any]] = [{"calibrate": 1}, {"calibration": [feeds]}]
    for how in given:
        _refused(small_model()[0].train(), feeds, qfx.backend(SMOOTH, **how), "model.eval")
        double = {"x": feeds["x"].double()}
        _refused(small_model()[0].double(), double, qfx.backend(SMOOTH, **how), "float64")
        with torch.enable_grad():
            _refused(model, feeds, qfx.backend(SMOOTH, **how), "torch.no_grad")
    _refused(model, feeds, qfx.backend(SMOOTH, calibration=[{"y": feeds["x"]}]), "does not take", CalibrationError)
    llama, ids = ZOO["llama"].load()
    past = llama(**ids, use_cache=True).past_key_values
    _refused(
        llama,
        {"input_ids": ids["input_ids"][:, :1], "past_key_values": past},
        qfx.backend(SMOOTH, calibrate=1),
        "no input of its own",
        CalibrationError,
    )


REFUSED: list[tuple[Callable[[], Any], str, type[QfxError]]] = [
    (lambda: qfx.backend(SMOOTH, calibrate=0), "1 or more", CalibrationError),
    (lambda: qfx.backend(SMOOTH, calibrate=True), "1 or more", CalibrationError),
    (lambda: qfx.backend(SMOOTH, calibrate="many"), "1 or more", CalibrationError),  # type: ignore[arg-type]
    (lambda: qfx.backend(SMOOTH, calibrate=1, calibration=[]), "choose one", RecipeError),
    (lambda: qfx.backend(nn.Linear(8, 8)), "no .qfx", RecipeError),
    (lambda: qfx.backend("no-such-recipe", calibrate=1), "preset", RecipeError),
    (lambda: qfx.backend(SMOOTH, calibrate=1, then="qfx"), "cannot be qfx", RecipeError),
]


@pytest.mark.parametrize(("call", "what", "kind"), REFUSED, ids=[str(i) for i in range(len(REFUSED))])
def test_refused_at_once(call: Callable[[], Any], what: str, kind: type[QfxError]) -> None:
    with pytest.raises(kind, match=what):
        call()


def test_refused_by_name() -> None:
    for options, what in (
        ({"recipe": SMOOTH, "calibrate": 0}, "1 or more"),
        ({"recipe": SMOOTH, "calibrated": 3}, "unknown options"),
    ):
        torch._dynamo.reset()
        with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match=what):
            torch.compile(nn.Linear(64, 64), backend="qfx", options=options)(torch.randn(2, 64))
