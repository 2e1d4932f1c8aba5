"""Recipes: what they accept, what they refuse and how, and that a dump is the recipe."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from mambacompress.errors import UserError
from mambacompress.recipe import (
    LINEARS,
    PASS_NAMES,
    TENSORS,
    QuantizeConfig,
    Recipe,
    SmoothConfig,
    load_recipe,
    recipe_names,
)

PACKAGED = ("quarot-w8a8", "rtn-w8a8", "w4a16", "w4a4", "w4a8", "w8a16", "w8a8", "w8a8-scan8", "w8a8-static")


def refused(source: Any, overrides: Any = ()) -> UserError:
    with pytest.raises(UserError) as caught:
        load_recipe(source, overrides)
    assert caught.value.next_step
    assert "\n" not in caught.value.message
    return caught.value


def quantize(**config: Any) -> dict[str, Any]:
    return {"passes": [{"quantize": config}]}


def test_the_packaged_recipes_are_these():
    assert set(recipe_names()) >= set(PACKAGED)


@pytest.mark.parametrize("name", PACKAGED)
def test_a_packaged_recipe_survives_its_own_yaml(name: str, tmp_path: Path):
    recipe = load_recipe(name)
    assert recipe.name == name
    assert recipe.description
    (tmp_path / "again.yaml").write_text(recipe.to_yaml())
    again = load_recipe(tmp_path / "again.yaml")
    assert again == recipe
    assert again.canonical_json() == recipe.canonical_json()
    assert again.to_yaml() == recipe.to_yaml()


@pytest.mark.parametrize("name", PACKAGED)
def test_a_packaged_recipe_keeps_the_one_legal_order(name: str):
    places = [PASS_NAMES.index(step) for step, _ in load_recipe(name).steps()]
    assert places == sorted(places)


@pytest.mark.parametrize(("name", "bits", "activations", "gptq", "online"), [
    ("w8a8", 8, "int8-token", False, True), ("w8a8-static", 8, "int8-tensor", False, True),
    ("w4a8", 4, "int8-token", True, True), ("w4a16", 4, "none", True, False), ("w8a16", 8, "none", False, False),
    ("w4a4", 4, "int4-token", True, True), ("rtn-w8a8", 8, "int8-token", False, False),
    ("quarot-w8a8", 8, "int8-token", False, True), ("w8a8-scan8", 8, "int8-token", False, True),
])
def test_recipes_do_what_their_names_say(name: str, bits: int, activations: str, gptq: bool, online: bool):
    steps = dict(load_recipe(name).steps())
    for tensor in ("in_proj", "x_proj", "out_proj"):
        form = steps["quantize"].of(tensor)
        assert (form.bits, form.activations) == (bits, activations)
    assert ("gptq" in steps) == gptq
    assert ("rotate" in steps and "hadamard" in (steps["rotate"].out, steps["rotate"].x)) == online
    assert (steps["quantize"].scan == "int8") == (name == "w8a8-scan8")
    if name == "rtn-w8a8":
        assert list(steps) == ["quantize"]


# -- refusals --------------------------------------------------------------------------------------------------------


def test_an_unknown_recipe_names_the_nearest_and_lists_all():
    error = refused("w8a9")
    assert "did you mean 'w8a8'" in error.message
    assert all(name in (error.next_step or "") for name in PACKAGED)


@pytest.mark.parametrize(("document", "said"), [
    ({"passes": [{"quantise": {}}]}, "unknown pass 'passes.quantise'; did you mean 'quantize'"),
    (quantize(groupsize=64), "unknown key 'passes.quantize.groupsize'; did you mean 'group_size'"),
    ({"pases": []}, "unknown key 'pases'; did you mean 'passes'"),
    (quantize() | {"checks": {"covrage": 1}}, "unknown key 'checks.covrage'; did you mean 'coverage'"),
    (quantize(overrides={"dt_proj": {"weight": "int8"}}), "'passes.quantize.overrides.dt_proj.weight'; did you mean"),
    (quantize(overrides={"dtproj": {}}), "did you mean 'dt_proj'"),
    (quantize(maps=["inproj"]), "passes.quantize.maps.0 cannot be 'inproj'; did you mean 'in_proj'"),
    (quantize(weights="int6"), "passes.quantize.weights cannot be 'int6'"),
    (quantize(activations="int8-tokn"), "did you mean 'int8-token'"),
    (quantize(overrides={"dt_proj": {"weights": "int9"}}), "overrides.dt_proj.weights cannot be 'int9'"),
    ({"passes": [{"smooth": {"gate": "maybe"}}]}, "passes.smooth.gate cannot be 'maybe'"),
])
def test_a_typo_names_the_place_and_the_nearest(document: dict[str, Any], said: str):
    assert said in refused(document).message


@pytest.mark.parametrize(("document", "said"), [
    ({}, "passes is missing or empty"),
    ({"passes": []}, "passes is missing or empty"),
    ({"passes": 3}, "passes is 3"),
    ({"passes": [3]}, "passes is 3"),
    ({"passes": [{"rotate": {}, "smooth": {}}]}, "names one pass, this one names rotate, smooth"),
    ({"passes": [{}]}, "names one pass, this one names none"),
    ({"passes": [{"rotate": {}}, {"rotate": {}}]}, "pass rotate stands there 2 times"),
    ({"passes": ["fuse_norms"], "calibration": {"sequences": 0}}, "calibration.sequences is 0"),
    ({"passes": ["fuse_norms"], "calibration": {"text": 3}}, "calibration.text is 3"),
    ({"passes": ["fuse_norms"], "calibration": []}, "calibration is []"),
    ({"passes": ["fuse_norms"], "name": "a/b"}, "name is 'a/b'"),
    ({"passes": ["fuse_norms"], "checks": {"coverage": 1.5}}, "checks.coverage is 1.5"),
    (quantize(weights="int8", group_size=64), "int8 weights have one scale a row"),
    (quantize(weights="int4", group_size=0), "passes.quantize.group_size is 0"),
    (quantize(weights="int4", group_size=33), "group_size 33 is odd"),
    (quantize(percentile="most"), "percentile 'most' is neither auto"),
    (quantize(percentile=[99.0, 101.0]), "passes.quantize.percentile.1 is 101.0"),
    (quantize(maps=[]), "passes.quantize.maps"),
    (quantize(maps=["head"], overrides={"x_proj": {}}), "overrides name x_proj, which maps leaves in float"),
    ({"passes": [{"gptq": {}}]}, "gptq rounds weights that no quantize pass packs"),
    ({"passes": [{"gptq": {"group_size": 32}}, {"quantize": {"weights": "int4", "group_size": 64}}]},
     "gptq rounds in_proj to int4, group size 32, but quantize packs it as int4, group size 64"),
    ({"passes": [{"gptq": {"maps": ["embedding"]}}, {"quantize": {"weights": "int4"}}]}, "an embedding is looked up"),
    ({"passes": [{"gptq": {}}, {"quantize": {"weights": "int4", "maps": ["in_proj"]}}]}, "quantize leaves it float"),
    ({"passes": [{"smooth": {"alphas": [2]}}]}, "passes.smooth.alphas.0 is 2"),
    ({"passes": [{"smooth": {"alphas": []}}]}, "passes.smooth.alphas"),
])
def test_what_cannot_work_is_refused(document: dict[str, Any], said: str):
    assert said in refused(document).message


@pytest.mark.parametrize(("text", "said"), [
    ("", "is not a mapping"),
    ("- a\n", "is not a mapping"),
    ("name: [\n", "is not valid YAML"),
    ("name: a\nname: b\npasses: [fuse_norms]\n", "key 'name' stands there twice"),
    ("passes:\n  - quantize: {weights: int8, weights: int4}\n", "key 'weights' stands there twice"),
    ("passes: !!python/object/apply:os.system [ls]\n", "is not valid YAML"),
])
def test_a_file_that_is_no_recipe(tmp_path: Path, text: str, said: str):
    path = tmp_path / "r.yaml"
    path.write_text(text)
    assert said in refused(path).message


def test_a_missing_or_binary_file(tmp_path: Path):
    assert "there is no recipe file" in refused(tmp_path / "none.yaml").message
    (tmp_path / "b.yaml").write_bytes(b"\xff\xfe\x00")
    assert "cannot be read" in refused(str(tmp_path / "b.yaml")).message


def test_a_file_without_a_name_takes_the_file_s(tmp_path: Path):
    (tmp_path / "mine.yaml").write_text("passes: [fuse_norms]\n")
    assert load_recipe(tmp_path / "mine.yaml").name == "mine"


# -- meaning ---------------------------------------------------------------------------------------------------------


def test_formats_of_tensors():
    config = QuantizeConfig.model_validate({
        "weights": "int4", "group_size": 64, "activations": "int8-token", "maps": [*LINEARS, "embedding", "head"],
        "overrides": {"dt_proj": {"weights": "int8"}, "x_proj": {"group_size": 32}, "out_proj": {"group_size": None},
                      "head": {"activations": "none"}}})
    forms = {tensor: config.of(tensor) for tensor in TENSORS}
    assert {name: (form.weights, form.group_size, form.activations) for name, form in forms.items() if form} == {
        "in_proj": ("int4", 64, "int8-token"), "x_proj": ("int4", 32, "int8-token"),
        "dt_proj": ("int8", None, "int8-token"), "out_proj": ("int4", None, "int8-token"),
        "embedding": ("int4", 64, "none"), "head": ("int4", 64, "none")}
    assert QuantizeConfig(maps=("in_proj",)).of("head") is None


def test_percentiles_are_always_candidates():
    assert QuantizeConfig().percentile == (100.0,)
    assert QuantizeConfig(percentile=99.9).percentile == (99.9,)
    assert QuantizeConfig(percentile="auto").percentile == (99.9, 99.99, 99.999, 100.0)


def test_yaml_s_bare_on_and_off_are_words(tmp_path: Path):
    path = tmp_path / "r.yaml"
    path.write_text("passes:\n  - smooth: {gate: on, conv: off, states: auto}\n")
    [(_, config)] = load_recipe(path).steps()
    assert (config.gate, config.conv, config.states) == ("on", "off", "auto")
    assert config.folds == {"gate": "on", "states": "auto"}
    assert SmoothConfig().folds == {}


def test_a_pass_without_configuration():
    bare = load_recipe({"passes": ["fuse_norms", {"rotate": None}]})
    assert [name for name, _ in bare.steps()] == ["fuse_norms", "rotate"]
    assert bare == load_recipe({"passes": [{"fuse_norms": {}}, {"rotate": {}}]})


def test_gptq_takes_its_format_from_quantize():
    recipe = load_recipe({"passes": [{"gptq": {}}, {"quantize": {"weights": "int4", "group_size": 32}}]})
    gptq = dict(recipe.steps())["gptq"]
    assert (gptq.weights, gptq.group_size) == ("int4", 32)
    eight = load_recipe({"passes": ["gptq", "quantize"]})
    assert dict(eight.steps())["gptq"].weights == "int8"


def test_recipes_are_frozen():
    with pytest.raises(Exception, match="frozen"):
        load_recipe("w8a8").name = "x"  # type: ignore[misc]


# -- overrides -------------------------------------------------------------------------------------------------------


def test_overrides_in_either_form():
    by_text = load_recipe("w4a16", ["passes.quantize.group_size=32", "calibration.sequences=4", "checks.coverage=null"])
    by_mapping = load_recipe("w4a16", {"passes.quantize.group_size": 32, "calibration.sequences": 4,
                                       "checks.coverage": None})
    assert by_text == by_mapping
    steps = dict(by_text.steps())
    assert steps["quantize"].group_size == steps["gptq"].group_size == 32
    assert by_text.calibration.sequences == 4
    assert by_text.checks.coverage is None


def test_an_override_can_open_a_new_mapping():
    recipe = load_recipe("w8a8", ["passes.quantize.overrides.head.activations=none"])
    assert dict(recipe.steps())["quantize"].of("head").activations == "none"


def test_passes_can_be_taken_out_and_put_in_at_their_place():
    recipe = load_recipe("w8a8", ["passes.rotate=null", "passes.quantize.weights=int4", "passes.quantize.group_size=32",
                                  "passes.gptq={damp: 0.02}"])
    assert [name for name, _ in recipe.steps()] == ["fuse_norms", "smooth", "gptq", "quantize"]
    assert dict(recipe.steps())["gptq"].damp == 0.02


def test_the_same_pass_twice_is_addressed_by_place():
    document = {"passes": [{"smooth": {"gate": "auto"}}, {"rotate": {"dt": "hadamard"}}, {"smooth": {"dt": "auto"}}]}
    assert "passes.0 or passes.2" in (refused(document, ["passes.smooth.gate=off"]).next_step or "")
    assert load_recipe(document, ["passes.2.norm=on"]).steps()[2][1].norm == "on"
    assert document["passes"][2] == {"smooth": {"dt": "auto"}}, "the caller's mapping was changed"


@pytest.mark.parametrize(("override", "said"), [
    ("passes.quantize.wieghts=int4", "did you mean 'weights'"),
    ("passes.rotat.x=none", "there is no pass 'rotat'; did you mean 'rotate'"),
    ("passes.gptq.damp=1", "the recipe has no pass 'gptq'"),
    ("passes.9.x=1", "has 4 passes, counted from 0"),
    ("calibration.text.x=1", "text is a value"),
    ("passes", "not of the form key=value"),
    ("=3", "not of the form key=value"),
    ("calibration.seed=[", "not valid YAML"),
    ("calibration.sequences=many", "calibration.sequences is 'many'"),
    ("passes=3", "passes is 3"),
])
def test_a_bad_override(override: str, said: str):
    assert said in refused("w8a8", [override]).message


# -- properties ------------------------------------------------------------------------------------------------------

folds = st.sampled_from(["auto", "on", "off"])
rotations = st.sampled_from(["klt-hadamard", "hadamard", "random", "none"])
smooths = st.fixed_dictionaries({}, optional={name: folds for name in SmoothConfig.model_fields if name != "alphas"})
rotates = st.fixed_dictionaries({}, optional={"residual": rotations, "dt": rotations, "seed": st.integers(0, 9),
                                              "out": st.sampled_from(["hadamard", "none"]), "untie": st.booleans()})
quantizes = st.fixed_dictionaries(
    {"weights": st.sampled_from(["int8", "int4"])},
    optional={"activations": st.sampled_from(["none", "int8-token", "int4-tensor"]), "bias_correction": st.booleans(),
              "percentile": st.sampled_from(["auto", 99.9, [99.99, 100.0]]),
              "overrides": st.sampled_from([{}, {"dt_proj": {"weights": "int8"}}, {"head": {"group_size": None}}])})
recipes = st.fixed_dictionaries(
    {"passes": st.tuples(smooths.map(lambda c: {"smooth": c}), rotates.map(lambda c: {"rotate": c}),
                         quantizes.map(lambda c: {"quantize": c})).map(list)},
    optional={"calibration": st.fixed_dictionaries({"sequences": st.integers(1, 9)}),
              "checks": st.fixed_dictionaries({"coverage": st.floats(0, 1)})})


@settings(max_examples=60, deadline=None)
@given(recipes)
def test_every_recipe_is_its_own_dump(document: dict[str, Any]):
    recipe = load_recipe(document)
    assert Recipe.model_validate(yaml.safe_load(recipe.to_yaml())) == recipe
    assert load_recipe(recipe).canonical_json() == recipe.canonical_json()
    assert load_recipe(recipe, {"calibration.seed": 7}).canonical_json() != recipe.canonical_json()


def test_recipes_need_no_torch():
    code = "import sys, mambacompress.recipe as r; r.load_recipe('w4a8'); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
