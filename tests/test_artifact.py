"""The exported file: what is written comes back, and whatever is wrong with a file is said."""

from __future__ import annotations

import copy
import json
import os
import pickle

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import learned_opt
from learned_opt import artifact, rules

PROVENANCE = {"families": ["quadratic"], "horizon": 100, "seed": 3, "outer_steps": 7}


def hash_of(rule, theta):
    return artifact.content_hash(rule.kind, rule.settings(), theta)


def theta_of(rule, seed=0):
    return rule.init_theta(torch.Generator().manual_seed(seed))


@pytest.fixture
def saved(tmp_path):
    rule = rules.get("compact", hidden_size=3)
    path = tmp_path / "small.safetensors"
    return path, artifact.save_artifact(path, rule, theta_of(rule), PROVENANCE)


def rewrite(path, *, drop=(), tensors=None, **metadata):
    """Write the file again with other metadata (None deletes an entry) or other tensors."""
    with safe_open(str(path), framework="pt") as file:
        old_metadata, old = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    merged = {k: v for k, v in {**old_metadata, **metadata}.items() if v is not None}
    content = {k: v for k, v in {**old, **(tensors or {})}.items() if k not in drop}
    save_file(content, str(path), merged)


@pytest.mark.parametrize("rule_name", list(rules.RULES))
def test_round_trip(tmp_path, rule_name):
    rule = rules.get(rule_name)
    theta = theta_of(rule, seed=5)
    written = learned_opt.save_artifact(tmp_path / "mine.safetensors", rule, theta, PROVENANCE, name="digits")
    read = learned_opt.load_artifact(tmp_path / "mine.safetensors")
    assert read.rule.kind == rule.kind and read.rule.settings() == rule.settings()
    assert read.name == written.name == "digits"
    assert read.hash == written.hash == hash_of(rule, theta)
    assert read.provenance == {**PROVENANCE, "library_version": learned_opt.__version__}
    assert set(read.theta) == set(theta)
    for name, value in theta.items():
        assert torch.equal(read.theta[name], value) and read.theta[name].dtype == torch.float32


def test_name_defaults_to_the_file(saved):
    path, written = saved
    assert written.name == "small" and artifact.load_artifact(path).identity == f"small@{written.hash[:16]}"


def test_hash_is_of_rule_and_theta_alone(tmp_path, saved):
    path, written = saved
    rule = rules.get("compact", hidden_size=3)
    other = artifact.save_artifact(tmp_path / "other.safetensors", rule, theta_of(rule), {"note": "x"}, name="other")
    assert other.hash == written.hash
    nudged = theta_of(rule)
    nudged["output.bias"] += 1e-7
    assert hash_of(rule, nudged) != written.hash
    assert hash_of(rules.get("compact", hidden_size=3, beta=0.9), theta_of(rule)) != written.hash


def test_hash_does_not_change_between_versions():
    # Optimizer states refer to it: if this fails, FORMAT_VERSION must go up and old hashes must still be known.
    theta = {
        "log_lr": torch.tensor(-7.0),
        "log_one_minus_beta1": torch.tensor(-2.5),
        "log_one_minus_beta2": torch.tensor(-7.5),
    }
    assert artifact.content_hash("adam", {"lr": 0.001}, theta) == (
        "413f6304d8573975f57b857d627e4c4ea63b0d3024c3be320d6e396cc34f2451"
    )


def test_theta_is_copied(saved):
    rule = rules.get("adam")
    theta = theta_of(rule)
    made = artifact.Artifact.of(rule, theta, name="a")
    theta["log_lr"] += 1
    assert not torch.equal(made.theta["log_lr"], theta["log_lr"])


def test_default_dtype_does_not_matter(saved):
    path, written = saved
    torch.set_default_dtype(torch.float64)
    try:
        assert artifact.load_artifact(path).hash == written.hash
    finally:
        torch.set_default_dtype(torch.float32)


def test_copies_and_pickles(saved):
    _, written = saved
    assert copy.deepcopy(written) is written
    again = pickle.loads(pickle.dumps(written))
    assert again.hash == written.hash and torch.equal(again.theta["output.weight"], written.theta["output.weight"])


def test_failed_write_leaves_the_old_file(tmp_path, saved, monkeypatch):
    path, written = saved

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    rule = rules.get("adam")
    with pytest.raises(OSError, match="No space left"):
        artifact.save_artifact(path, rule, theta_of(rule))
    monkeypatch.undo()
    assert artifact.load_artifact(path).hash == written.hash
    assert [p.name for p in tmp_path.iterdir()] == ["small.safetensors"]


def test_folder_must_exist(tmp_path):
    rule = rules.get("adam")
    with pytest.raises(FileNotFoundError):
        artifact.save_artifact(tmp_path / "nowhere" / "a.safetensors", rule, theta_of(rule))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("output.bias"), "theta lacks 'output.bias', which rule 'lstm' needs"),
        (lambda t: t.update(extra=torch.zeros(1)), "theta has 'extra', which rule 'lstm' does not know"),
        (
            lambda t: t.update({"output.bias": torch.zeros(2)}),
            r"theta\['output.bias'\] must be torch.float32 of shape \(1,\); got torch.float32 of shape \(2,\)",
        ),
        (lambda t: t["output.bias"].fill_(float("nan")), r"theta\['output.bias'\] has non-finite values"),
    ],
)
def test_save_checks_theta(tmp_path, change, message):
    rule = rules.get("compact")
    theta = theta_of(rule)
    change(theta)
    with pytest.raises(ValueError, match=message):
        artifact.save_artifact(tmp_path / "a.safetensors", rule, theta)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("provenance", [{"rule": object()}, {"loss": float("nan")}])
def test_save_checks_provenance(tmp_path, provenance):
    rule = rules.get("adam")
    with pytest.raises(ValueError, match="provenance must be JSON values"):
        artifact.save_artifact(tmp_path / "a.safetensors", rule, theta_of(rule), provenance)


@pytest.mark.parametrize("name", ["", "a b", "a@b", "-a", "a/b"])
def test_save_checks_name(name):
    rule = rules.get("adam")
    with pytest.raises(ValueError, match=r"name must be letters, digits and '_\.\+-', .*; got"):
        artifact.Artifact.of(rule, theta_of(rule), name=name)


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no exported optimizer at .*none\.safetensors; check the path"):
        artifact.load_artifact(tmp_path / "none.safetensors")
    with pytest.raises(ValueError, match=r"is a folder; give the \.safetensors file in it"):
        artifact.load_artifact(tmp_path)


def test_not_safetensors(tmp_path):
    path = tmp_path / "a.safetensors"
    path.write_bytes(b"hello")
    with pytest.raises(
        ValueError, match=r"a\.safetensors is not a readable safetensors file .* copy or export it again"
    ):
        artifact.load_artifact(path)


def test_another_kind_of_safetensors(tmp_path):
    path = tmp_path / "a.safetensors"
    save_file({"x": torch.zeros(2)}, str(path))
    with pytest.raises(
        ValueError, match="is a safetensors file, but no exported optimizer; write one with save_artifact"
    ):
        artifact.load_artifact(path)


def test_truncated_anywhere(saved):
    path, _ = saved
    data = path.read_bytes()
    for length in (0, 4, 8, 50, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:length])
        with pytest.raises(ValueError, match=r"small\.safetensors is not a readable safetensors file"):
            artifact.load_artifact(path)


def test_every_flipped_byte_of_theta_is_noticed(saved):
    path, written = saved
    data = path.read_bytes()
    num_bytes = sum(v.numel() * 4 for v in written.theta.values())
    for position in range(len(data) - num_bytes, len(data), 41):
        path.write_bytes(data[:position] + bytes([data[position] ^ 64]) + data[position + 1 :])
        with pytest.raises(ValueError, match=r"is damaged: (its content has the hash|theta.* has non-finite values)"):
            artifact.load_artifact(path)


def test_newer_format(saved):
    path, _ = saved
    rewrite(path, format_version="3", provenance=json.dumps({"library_version": "9.1"}))
    with pytest.raises(
        ValueError,
        match=r"has format version 3, and this library reads up to 2; .* learned_opt 9\.1: upgrade learned_opt",
    ):
        artifact.load_artifact(path)


@pytest.mark.parametrize("version", ["", "one", "0", None])
def test_no_format_version(saved, version):
    path, _ = saved
    rewrite(path, format_version=version)
    with pytest.raises(ValueError, match="is damaged: its format version is"):
        artifact.load_artifact(path)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        (
            {"rule": "transformer"},
            "cannot be used: unknown update rule 'transformer'.*: upgrade learned_opt, or export",
        ),
        ({"rule": None}, "cannot be used: unknown update rule ''"),
        ({"settings": '{"hidden_size": 3, "heads": 2}'}, "cannot be used: rule 'lstm' has no setting 'heads'"),
        ({"settings": '{"hidden_size": 0}'}, "cannot be used: hidden_size must be at least 1; got 0"),
        ({"settings": '{"hidden_size": "3"}'}, "cannot be used: "),
        ({"settings": '{"hidden_size": 4}'}, r"is damaged: theta\['lstm.0.weight'\] must be"),
        ({"settings": '{"hidden_size": 3, "beta": 0.5}'}, "is damaged: its content has the hash"),
        ({"settings": "{"}, "is damaged: its settings cannot be read"),
        ({"settings": None}, "is damaged: its settings cannot be read"),
        ({"settings": "[]"}, "is damaged: its settings is no table of values"),
        ({"provenance": "{"}, "is damaged: its provenance cannot be read"),
        ({"hash": "0" * 64}, "is damaged: its content has the hash .* but it was written with 000000000000…"),
        ({"hash": None}, "is damaged: its content has the hash"),
        ({"name": "a b"}, "is damaged: its name is 'a b'"),
    ],
)
def test_damaged_metadata(saved, metadata, message):
    path, _ = saved
    rewrite(path, **metadata)
    with pytest.raises(ValueError, match=message) as raised:
        artifact.load_artifact(path)
    assert str(path) in str(raised.value)


def test_a_former_setting_may_stand_in_a_file_where_it_did_nothing(tmp_path):
    rule = rules.get("mixture", hidden_size=2)
    path = tmp_path / "former.safetensors"
    written = artifact.save_artifact(path, rule, rule.init_theta(torch.Generator().manual_seed(0)))
    for value, fits in ((0.0, True), (0.9, False)):
        settings = rule.settings() | {"doubt": value}
        rewrite(
            path,
            settings=json.dumps(settings),
            hash=artifact.content_hash(rule.kind, settings, written.theta),
        )
        if fits:
            read = artifact.load_artifact(path)
            assert read.rule.settings() == rule.settings() and read.hash != written.hash
        else:
            with pytest.raises(ValueError, match="cannot be used: rule 'mixture' has no setting 'doubt'"):
                artifact.load_artifact(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"drop": ["output.bias"]}, "is damaged: theta lacks 'output.bias'"),
        ({"tensors": {"extra": torch.zeros(1)}}, "is damaged: theta has 'extra'"),
        ({"tensors": {"output.bias": torch.zeros(2)}}, r"is damaged: theta\['output.bias'\] must be"),
        ({"tensors": {"output.bias": torch.zeros(1, dtype=torch.float64)}}, "got torch.float64"),
        ({"tensors": {"output.bias": torch.full((1,), float("inf"))}}, "has non-finite values"),
    ],
)
def test_damaged_theta(saved, change, message):
    path, _ = saved
    rewrite(path, **change)
    with pytest.raises(ValueError, match=message):
        artifact.load_artifact(path)


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (torch.zeros(2), r"theta\['output.bias'\] must be torch.float32 of shape \(1,\)"),
        (None, "theta lacks 'output.bias'"),
    ],
)
def test_a_whole_file_of_a_rule_that_had_other_weights(saved, weight, message):
    path, written = saved
    theta = {name: value for name, value in written.theta.items() if name != "output.bias"}
    if weight is not None:
        theta["output.bias"] = weight
    settings = json.loads(json.dumps(written.rule.settings()))
    rewrite(
        path,
        drop=["output.bias"] if weight is None else (),
        tensors={} if weight is None else {"output.bias": weight},
        settings=json.dumps(settings),
        hash=artifact.content_hash(written.rule.kind, settings, theta),
        provenance=json.dumps({"library_version": "0.0.7"}),
    )
    with pytest.raises(ValueError, match=f"does not fit this library's rule 'lstm': {message}.*0.0.7, .*train again"):
        artifact.load_artifact(path)


def test_load_takes_paths_names_artifacts_and_identities(saved, monkeypatch, tmp_path):
    path, written = saved
    assert learned_opt.load(written) is written
    assert learned_opt.load(path).hash == learned_opt.load(str(path)).hash == written.hash
    assert learned_opt.load(written.identity).hash == written.hash
    monkeypatch.setattr(artifact, "SHIPPED", tmp_path)
    assert learned_opt.shipped() == ["small"]
    assert learned_opt.load("small").hash == written.hash


def test_load_adam_is_plain_adam():
    plain = learned_opt.load("adam")
    assert plain.rule.kind == "adam" and plain.name == "adam"
    assert plain.theta["log_lr"].exp().item() == pytest.approx(1e-3)


def test_load_says_what_there_is(saved, monkeypatch, tmp_path):
    monkeypatch.setattr(artifact, "SHIPPED", tmp_path)
    with pytest.raises(
        ValueError, match=r"'smal' are neither a file nor a shipped optimizer; give .* or one of: small, adam"
    ):
        learned_opt.load("smal")
    with pytest.raises(ValueError, match="'gone@0123456789abcdef' are not in use in this process"):
        learned_opt.load("gone@0123456789abcdef")
    with pytest.raises(FileNotFoundError, match="no exported optimizer at"):
        learned_opt.load("missing.safetensors")
    with pytest.raises(FileNotFoundError, match="no exported optimizer at"):
        learned_opt.load("runs/missing")
    with pytest.raises(TypeError, match="weights must be a path, a name or an Artifact; got int"):
        learned_opt.load(3)


def test_file_without_a_setting_of_today_still_loads(tmp_path):
    # As a file of an older version would be: the setting did not exist, and its hash was taken without it.
    rule = rules.get("compact", hidden_size=3)
    path = tmp_path / "old.safetensors"
    artifact.save_artifact(path, rule, theta_of(rule))
    settings = {k: v for k, v in rule.settings().items() if k != "log_range"}
    old_hash = artifact.content_hash(rule.kind, settings, theta_of(rule))
    rewrite(path, settings=json.dumps(settings), hash=old_hash)
    read = artifact.load_artifact(path)
    assert read.hash == old_hash and read.rule.settings() == rule.settings()
