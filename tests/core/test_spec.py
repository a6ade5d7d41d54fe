"""Schemes: what each name of the grammar stands for, and that names and JSON come back."""

import itertools
import json
from dataclasses import replace

import pytest

from qfx.core.errors import RecipeError
from qfx.core.grid import E4M3, E5M2, Codebook, Int
from qfx.core.spec import MULTIPLES, PRESETS, QSpec, Scheme, parse_scheme, scheme_from, scheme_label

TOKEN = QSpec(Int(8, narrow=True), (1, -1), dynamic=True)
STATIC = QSpec(Int(8, narrow=True), (-1, -1))
STATIC_ASYM = QSpec(Int(8, signed=False), (-1, -1), symmetric=False)
INT8 = QSpec(Int(8, narrow=True))
NF4 = Codebook("nf4")
SCALES = QSpec(Int(8, signed=False), (1, 256), symmetric=False)
SCHEMES = {
    "W8A8": Scheme(INT8, TOKEN),
    "INT8": Scheme(INT8, TOKEN),
    "w8a8": Scheme(INT8, TOKEN),
    "W8A8_STATIC": Scheme(INT8, STATIC),
    "W8A8_STATIC_ASYM": Scheme(INT8, STATIC_ASYM),
    "W8A8_ASYM": Scheme(QSpec(Int(8, signed=False), symmetric=False), TOKEN),
    "W8A8_ASYM_STATIC": Scheme(QSpec(Int(8, signed=False), symmetric=False), STATIC),
    "W8A8_ASYM_STATIC_ASYM": Scheme(QSpec(Int(8, signed=False), symmetric=False), STATIC_ASYM),
    "W8A8_STATIC_ASYM_ASYM": Scheme(QSpec(Int(8, signed=False), symmetric=False), STATIC_ASYM),
    "W8A8_TENSOR_STATIC": Scheme(QSpec(Int(8, narrow=True), (-1, -1)), STATIC),
    "W8A16": Scheme(INT8),
    "W8A16_G32": Scheme(QSpec(Int(8, narrow=True), (1, 32))),
    "W8A6": Scheme(INT8, QSpec(Int(6, narrow=True), (1, -1), dynamic=True)),
    "W4A16": Scheme(QSpec(Int(4), (1, 128))),
    "W4A16_ASYM": Scheme(QSpec(Int(4, signed=False), (1, 128), symmetric=False)),
    "w4a16_asym_g64": Scheme(QSpec(Int(4, signed=False), (1, 64), symmetric=False)),
    "W3A16_G64": Scheme(QSpec(Int(3), (1, 64))),
    "W2A16_CHANNEL": Scheme(QSpec(Int(2))),
    "W4A16_TENSOR": Scheme(QSpec(Int(4), (-1, -1))),
    "W1A16_ASYM": Scheme(QSpec(Int(1, signed=False), (1, 128), symmetric=False)),
    "W4A8": Scheme(QSpec(Int(4), (1, 128)), TOKEN),
    "W4A4_STATIC": Scheme(QSpec(Int(4), (1, 128)), QSpec(Int(4, narrow=True), (-1, -1))),
    "FP8": Scheme(QSpec(E4M3, (-1, -1)), QSpec(E4M3, (-1, -1))),
    "fp8_dynamic": Scheme(QSpec(E4M3), QSpec(E4M3, dynamic=True)),
    "FP8_E5M2": Scheme(QSpec(E5M2, (-1, -1)), QSpec(E5M2, (-1, -1))),
    "FP8_E5M2_DYNAMIC": Scheme(QSpec(E5M2), QSpec(E5M2, dynamic=True)),
    "W4AFP8": Scheme(QSpec(Int(4), (1, 128)), QSpec(E4M3, dynamic=True)),
    "W4A8_DQ": Scheme(QSpec(Int(4), (1, 128), scale=MULTIPLES), TOKEN),
    "w4a8_dq_g64": Scheme(QSpec(Int(4), (1, 64), scale=MULTIPLES), TOKEN),
    "W4A8_G64_DQ": Scheme(QSpec(Int(4), (1, 64), scale=MULTIPLES), TOKEN),
    "W4A8_DQ_STATIC_ASYM": Scheme(QSpec(Int(4), (1, 128), scale=MULTIPLES), STATIC_ASYM),
    "W4A16_DQ": Scheme(QSpec(Int(4), (1, 128), scale=MULTIPLES)),
    "W8A8_DQ_G32": Scheme(QSpec(Int(8, narrow=True), (1, 32), scale=MULTIPLES), TOKEN),
    "NF4": Scheme(QSpec(NF4, (1, 64))),
    "nf4_g32": Scheme(QSpec(NF4, (1, 32))),
    "NF4_DQ": Scheme(QSpec(NF4, (1, 64), scale=SCALES)),
    "NF4_DQ_G128": Scheme(QSpec(NF4, (1, 128), scale=SCALES)),
    "FP4": Scheme(QSpec(Codebook("e2m1"), (1, 64))),
    "FP4_CHANNEL": Scheme(QSpec(Codebook("e2m1"))),
    "FP4_BNB": Scheme(QSpec(Codebook("fp4_bnb"), (1, 64))),
    "FP4_BNB_DQ_CHANNEL": Scheme(QSpec(Codebook("fp4_bnb"), scale=SCALES)),
}
ALL = [
    f"W{w}A{a}{asym}{block}{x}"
    for w, a, asym, block, x in itertools.product(
        range(1, 9),
        (2, 8, 16),
        ("", "_ASYM", "_DQ"),
        ("", "_CHANNEL", "_TENSOR", "_G16"),
        ("", "_STATIC", "_STATIC_ASYM"),
    )
    if not (a == 16 and x) and not (w == 1 and asym != "_ASYM")
    if asym != "_DQ" or block == "_G16" or (not block and w < 8)
]
"""Every kind of name that the grammar has."""
GROUPED = QSpec(Int(4), (1, 32))


@pytest.mark.parametrize("name", SCHEMES)
def test_a_name_stands_for_its_scheme(name: str) -> None:
    assert parse_scheme(name) == SCHEMES[name]


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("W9A8", "weights of 9 bits"),
        ("W0A8", "weights of 0 bits"),
        ("W8A1", "activations of 1 bits"),
        ("W8A9", "activations of 9 bits"),
        ("W8A32", "activations of 32 bits"),
        ("W4A16_STATIC", "static but keeps float"),
        ("W4A16_STATIC_ASYM", "static but keeps float"),
        ("W4A16_G0", "group of 0"),
        ("W4A8_ASYM_DQ", "'W4A8_ASYM_DQ' has zero points; '_DQ' is for groups without zero points: 'W4A8_DQ_G128'"),
        ("W8A8_DQ", "has no groups; '_DQ' is for groups"),
        ("W4A8_CHANNEL_DQ", "has no groups; '_DQ' is for groups"),
        ("W4A8_DQ_TENSOR", "has no groups; '_DQ' is for groups"),
        ("W4A8_DQ_DQ", "DQ and DQ; use one"),
        ("W1A16", "round every weight to 0; use 'W1A16_ASYM'"),
        ("W4A16_G64_G32", "G64 and G32; use one"),
        ("W4A16_G64_CHANNEL", "G64 and CHANNEL; use one"),
        ("W8A8_STATIC_TENSOR_STATIC_ASYM", "STATIC and TENSOR and STATIC; use one"),
        ("W4A16_ASYM_ASYM", "ASYM and ASYM; use one"),
        ("W4A16_G", "unknown scheme"),
        ("W4A16_FAST", "unknown scheme 'W4A16_FAST'; use W<bits>A<bits>.*FP8_DYNAMIC"),
        ("W4A16 ", "unknown scheme"),
        ("XW4A16", "unknown scheme"),
        ("NF4_G0", "unknown scheme"),
        ("NF4_G64_DQ", "unknown scheme"),
        ("NF3", "unknown scheme 'NF3'; .*NF4"),
        ("", "unknown scheme"),
    ],
)
def test_what_is_no_scheme_is_refused(name: str, why: str) -> None:
    with pytest.raises(RecipeError, match=why):
        parse_scheme(name)


def test_labels_are_names_of_the_scheme() -> None:
    assert len({parse_scheme(name) for name in ALL}) > 400  # many names, and not all of them one scheme
    for name in [*ALL, *SCHEMES, *PRESETS]:
        scheme = parse_scheme(name)
        label = scheme_label(scheme)
        assert parse_scheme(label) == scheme
        assert len(label) <= max(len(name), 4)


@pytest.mark.parametrize(
    ("scheme", "label"),
    [
        (parse_scheme("W4A16_G128"), "W4A16"),
        (parse_scheme("W8A8_CHANNEL"), "W8A8"),
        (parse_scheme("FP8"), "FP8"),
        (Scheme(QSpec(E4M3, (1, 64)), TOKEN), "e4m3 per 1 x 64 x int8 per row, dynamic"),
        (
            Scheme(QSpec(Int(4, signed=False), (-1, -1), symmetric=False), QSpec(E5M2)),
            "uint4 per tensor x e5m2 per row",
        ),
        (Scheme(QSpec(E4M3)), "e4m3 per row x float"),
        (Scheme(INT8, QSpec(Int(1), dynamic=True)), "int8 per row x int1 per row, dynamic"),
        (parse_scheme("NF4_G64"), "NF4"),
        (parse_scheme("W4A8_G128_DQ"), "W4A8_DQ"),
        (parse_scheme("W4A8_STATIC_G64_DQ"), "W4A8_DQ_G64_STATIC"),
        (
            Scheme(QSpec(NF4, (1, 64), scale=MULTIPLES), TOKEN),
            "nf4 per 1 x 64, scales uint4 per row x int8 per row, dynamic",
        ),
        (Scheme(QSpec(NF4, (1, 64)), TOKEN), "nf4 per 1 x 64 x int8 per row, dynamic"),
        (
            Scheme(QSpec(Codebook("e2m1"), (1, 16), scale=QSpec(E4M3, (-1, -1)))),
            "e2m1 per 1 x 16, scales e4m3 per tensor x float",
        ),
    ],
)
def test_labels(scheme: Scheme, label: str) -> None:
    assert scheme_label(scheme) == label


@pytest.mark.parametrize("name", SCHEMES)
def test_schemes_come_back_from_json(name: str) -> None:
    scheme = SCHEMES[name]
    text = json.dumps(scheme.to_dict())
    assert Scheme.from_dict(json.loads(text)) == scheme == scheme_from(json.loads(text))
    for spec in (scheme.weight, scheme.input):
        assert spec is None or QSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec


def test_forms_of_a_scheme() -> None:
    scheme = Scheme(GROUPED)
    assert scheme_from(None) is None and scheme_from(scheme) is scheme
    assert scheme_from("W4A16_G32") == scheme
    assert scheme_from({"preset": "W4A16", "group_size": 32}) == scheme
    assert scheme_from({"preset": "W4A16"}) == scheme_from({"preset": "W4A16", "group_size": None})
    assert scheme_from({"preset": "W4A8", "group_size": -1}) == parse_scheme("W4A8_CHANNEL")
    assert scheme_from({"preset": "NF4_DQ", "group_size": 32}) == parse_scheme("NF4_DQ_G32")
    assert scheme.with_group(-1) == parse_scheme("W4A16_CHANNEL")
    assert scheme_from({"preset": "W4A8_DQ", "group_size": 64}) == parse_scheme("W4A8_DQ_G64")


@pytest.mark.parametrize(
    ("value", "why"),
    [
        (4, "a name, a mapping, or null, not 4"),
        ({}, "lacks 'weight'"),
        ({"preset": "W4A16", "group": 32}, r"unknown scheme keys \['group'\]"),
        ({"preset": "W4A16", "group_size": 0}, "group_size is 0"),
        ({"preset": "W4A16", "group_size": -2}, "group_size is -2"),
        ({"preset": "W4A16", "group_size": True}, "group_size is True"),
        ({"preset": "W4A16", "group_size": "32"}, "group_size is '32'"),
        ({"preset": "W4A8_DQ", "group_size": -1}, "'_DQ' quantizes the scales of groups; drop '_DQ'"),
        ({"preset": "W5"}, "unknown scheme 'W5'"),
        ({"weight": GROUPED.to_dict(), "bias": None}, r"unknown keys \['bias'\]"),
        ({"weight": 3}, "bad scheme"),
        ({"weight": {**GROUPED.to_dict(), "zero": 1}}, "'zero'"),
        ({"weight": {**GROUPED.to_dict(), "block": [1, "a"]}}, "block .1, 'a'. must be two sizes"),
        ({"weight": {"grid": {"type": "int", "bits": 8}}}, "lacks 'block'"),
        ({"weight": {**GROUPED.to_dict(), "grid": {"type": "nf4"}}}, "unknown type 'nf4'"),
        ({"weight": {**GROUPED.to_dict(), "grid": {"type": "codebook", "name": "nf3"}}}, "no codebook 'nf3'"),
        ({"weight": {**GROUPED.to_dict(), "scale": {"grid": {"type": "int", "bits": 8}}}}, "lacks 'block'"),
        ({"weight": {**GROUPED.to_dict(), "scale": 8}}, "bad scheme"),
    ],
)
def test_what_is_no_form_of_a_scheme_is_refused(value: object, why: str) -> None:
    with pytest.raises(RecipeError, match=why):
        scheme_from(value)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda: QSpec(Int(8), (0, -1)), "must be two sizes"),
        (lambda: QSpec(Int(8), (1, -2)), "must be two sizes"),
        (lambda: QSpec(Int(8), (1, 16, 3)), "must be two sizes"),
        (lambda: QSpec(Int(8), (1, 2.5)), "must be two sizes"),
        (lambda: QSpec(Int(8), symmetric=False), "asymmetric spec needs an unsigned"),
        (lambda: QSpec(E4M3, symmetric=False), "asymmetric spec needs an unsigned"),
        (lambda: QSpec(Int(8, signed=False)), "symmetric spec needs a signed"),
        (lambda: QSpec(NF4, symmetric=False), "asymmetric spec needs an unsigned integer"),
        (lambda: QSpec(NF4, (1, 64), dynamic=True, scale=SCALES), "scales of dynamic and of asymmetric"),
        (lambda: QSpec(Int(4, signed=False), symmetric=False, scale=SCALES), "scales of dynamic and of asymmetric"),
        (lambda: QSpec(NF4, scale=QSpec(Int(8), (1, 256))), "asymmetric grid of integers or on a float8 grid"),
        (lambda: QSpec(NF4, scale=QSpec(NF4, (1, 256))), "asymmetric grid of integers or on a float8 grid"),
        (lambda: QSpec(NF4, scale=QSpec(E4M3, dynamic=True)), "asymmetric grid of integers or on a float8 grid"),
        (lambda: QSpec(NF4, scale=QSpec(E4M3, scale=SCALES)), "asymmetric grid of integers or on a float8 grid"),
        (
            lambda: QSpec(NF4, scale=QSpec(E4M3, (-1, 256))),
            r"scales in blocks of \(-1, 256\); use .* \(1, -1\) for rows",
        ),
        (lambda: QSpec(Int(4), (1, 64), scale=replace(MULTIPLES, block=(2, -1))), r"scales in blocks of \(2, -1\)"),
    ],
)
def test_what_no_quantizer_computes_is_refused(make: object, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        make()  # type: ignore[operator]


def test_groups_divide_the_columns() -> None:
    assert (INT8.groups(100), GROUPED.groups(96), QSpec(Int(4), (-1, 32)).groups(64)) == (1, 3, 2)
    with pytest.raises(ValueError, match="group_size 32 does not divide 100 input channels"):
        GROUPED.groups(100)
