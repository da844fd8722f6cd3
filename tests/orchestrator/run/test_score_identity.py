"""What names scores, and which store serves them."""

import json
import shutil
from dataclasses import replace
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from actors.examples import ExampleFile, write_examples
from actors.model_source import ModelSource
from actors.records import Example
from actors.score_store.identity import StoreMismatch, identity_difference, identity_hash
from actors.score_store.store import FORMAT, ScoreStore
from orchestrator.config.run import RunConfig
from orchestrator.run.score_identity import nearest_store, open_store, pin_revision, store_identity
from tests.fakes import FAKE_VOCAB, expected_scores, fake_examples
from tests.orchestrator.config.test_classes import TEXTS, changed
from tests.orchestrator.scoring_world import ROWS, TOP_K, fill, identity_of, run_config


def test_a_local_teacher_is_named_by_content_and_not_by_path(tmp_path: Path, teacher: ModelSource, examples_path: Path) -> None:
    config, moved = run_config(tmp_path), tmp_path / "moved"
    before = identity_of(config, teacher, examples_path)
    assert str(tmp_path) not in json.dumps(before)
    shutil.copytree(teacher.name, moved)
    settings = json.loads((moved / "config.json").read_text())
    (moved / "config.json").write_text(json.dumps({**settings, "transformers_version": "6.0", "_name_or_path": "x"}))
    assert identity_of(config, ModelSource(str(moved)), examples_path) == before

    save_file({"weight": np.arange(1, 7, dtype=np.float32)}, moved / "model.safetensors")
    (line,) = identity_difference(identity_of(config, ModelSource(str(moved)), examples_path), before)
    assert line.startswith("teacher.weights_sha256: wanted ") and line.endswith("(other weights)")

    shutil.copy(Path(teacher.name) / "model.safetensors", moved)
    (moved / "config.json").write_text(json.dumps({**settings, "rope_theta": 1.0}))
    (line,) = identity_difference(identity_of(config, ModelSource(str(moved)), examples_path), before)
    assert line == "teacher.config.rope_theta: wanted 1.0, the store has None"


def test_whatever_changes_the_scores_changes_the_identity(tmp_path: Path, teacher: ModelSource, examples_path: Path) -> None:
    before = identity_of(run_config(tmp_path), teacher, examples_path)
    assert before["examples"] == {"hash": ExampleFile(examples_path).hash, "rows": ROWS}

    def difference(config: RunConfig) -> list[str]:
        return identity_difference(identity_of(config, teacher, examples_path), before)

    assert difference(run_config(tmp_path, {"dtype": "float32"})) == ["engine.dtype: wanted 'float32', the store has 'bfloat16'"]
    assert difference(run_config(tmp_path, top_mass=0.9)) == ["top_mass: wanted 0.9, the store has None"]
    assert difference(run_config(tmp_path, top_k=4)) == ["top_k: wanted 4, the store has 5"]
    assert difference(run_config(tmp_path, {"replicas": 2, "rows_per_call": 7}, wait_seconds=5)) == []
    other = store_identity(run_config(tmp_path), teacher, "other tokens", ExampleFile(examples_path), FAKE_VOCAB, FAKE_VOCAB)
    (line,) = identity_difference(other, before)
    assert line == "tokenizer: wanted 'other tokens', the store has 'tokens' (other ids for the tokens)"
    other = store_identity(run_config(tmp_path), teacher, "tokens", write_examples_of(tmp_path, 3), FAKE_VOCAB, FAKE_VOCAB)
    assert "another prompt or chat template" in identity_difference(other, before)[0]


def test_a_language_model_is_named_by_these_fields_and_classes_by_one_more(
    tmp_path: Path, teacher: ModelSource, examples_path: Path
) -> None:
    before = identity_of(run_config(tmp_path), teacher, examples_path)
    assert json.dumps(before) == json.dumps({  # in this order, so that the hash, and the folder's name, stay what they are
        "teacher": {
            "weights_sha256": sha256(sha256((Path(teacher.name) / "model.safetensors").read_bytes()).digest()).hexdigest(),
            "config": {"vocab_size": FAKE_VOCAB},
        },
        "tokenizer": "tokens", "examples": {"hash": ExampleFile(examples_path).hash, "rows": ROWS},
        "top_k": TOP_K, "top_mass": None, "vocab_size": FAKE_VOCAB, "ids_below": FAKE_VOCAB, "rows_per_shard": 4,
        "engine": {
            "kind": "transformers", "version": version("transformers"), "dtype": "bfloat16", "logprobs": "raw",
            "quantization": None,
        },
    })  # fmt: skip
    graded = changed(TEXTS, f"output={tmp_path / 'runs'}", "scores.rows_per_shard=4", "teacher.engine.dtype=bfloat16")
    rounded = {**before, "top_k": 2, "vocab_size": 3, "ids_below": 3}
    exact = store_identity(graded, teacher, "tokens", ExampleFile(examples_path), 3, 3)
    assert exact == {**rounded, "exact": True} and identity_hash(exact) != identity_hash(rounded)
    old = open_store(graded, rounded)
    fill_classes(old)
    new = open_store(graded, exact)
    assert new.missing_shards() and nearest_store(graded.score_root, new) == (old.place, identity_difference(exact, rounded))


def fill_classes(store: ScoreStore) -> None:
    examples = [replace(one, token_ids=one.token_ids % 3) for one in fake_examples(ROWS)]
    for shard in store.missing_shards():
        rows = [examples[position] for position in store.positions(shard)]
        store.write_shard(shard, rows, [expected_scores(row, 2, vocab_size=3) for row in rows])


def write_examples_of(folder: Path, rows: int) -> ExampleFile:
    write_examples(folder / "other.arrow", fake_examples(rows, seed=9))
    return ExampleFile(folder / "other.arrow")


def test_a_quantized_teacher_says_so(tmp_path: Path, teacher: ModelSource, examples_path: Path) -> None:
    before = identity_of(run_config(tmp_path), teacher, examples_path)
    shutil.copytree(teacher.name, tmp_path / "quantized")
    settings = json.loads((tmp_path / "quantized" / "config.json").read_text())
    quantized = {**settings, "quantization_config": {"quant_method": "awq", "bits": 4}}
    (tmp_path / "quantized" / "config.json").write_text(json.dumps(quantized))
    quantized_teacher = ModelSource(str(tmp_path / "quantized"))
    lines = identity_difference(identity_of(run_config(tmp_path), quantized_teacher, examples_path), before)
    assert lines[0] == "engine.quantization: wanted 'awq', the store has None"
    assert lines[1].startswith("teacher.config.quantization_config: wanted {")


@pytest.mark.parametrize("nested", [False, True])
def test_scores_of_before_a_soft_cap_was_heeded_are_others(
    tmp_path: Path, teacher: ModelSource, examples_path: Path, nested: bool
) -> None:
    plain = identity_of(run_config(tmp_path), teacher, examples_path)
    assert "attention" not in plain["engine"]
    cap = {"attn_logit_softcapping": 50.0}
    settings = {**json.loads((Path(teacher.name) / "config.json").read_text()), **({"text_config": cap} if nested else cap)}
    (Path(teacher.name) / "config.json").write_text(json.dumps(settings))
    assert identity_of(run_config(tmp_path), teacher, examples_path)["engine"]["attention"] == "eager"
    chosen = ModelSource(teacher.name, attention="flex_attention")
    assert identity_of(run_config(tmp_path), chosen, examples_path)["engine"]["attention"] == "flex_attention"
    served = identity_of(run_config(tmp_path, {"kind": "vllm"}), teacher, examples_path)
    assert "attention" not in served["engine"], "vLLM heeds it, and always did"


def test_the_nearest_store_of_the_same_rows_is_found(tmp_path: Path, teacher: ModelSource, examples_path: Path) -> None:
    def store_of(engine: dict[str, object] | None = None, **scores: object) -> ScoreStore:
        config = run_config(tmp_path, engine or {}, **scores)
        return open_store(config, identity_of(config, teacher, examples_path))

    first = store_of()
    root = run_config(tmp_path).score_root
    assert nearest_store(root, first) is None
    near, far = store_of({"dtype": "float32"}), store_of({"dtype": "float32"}, top_mass=0.9, rows_per_shard=5)
    (Path(root) / "broken").mkdir()
    (Path(root) / "broken" / "manifest.json").write_text("{")
    (Path(root) / "no_store").mkdir()
    assert nearest_store(root, first) == (near.place, ["engine.dtype: wanted 'bfloat16', the store has 'float32'"])
    found = nearest_store(root, far)
    assert found is not None and found[0] == near.place
    others = identity_of(run_config(tmp_path), teacher, examples_path) | {"examples": {"hash": "others", "rows": 4}}
    assert nearest_store(root, open_store(run_config(tmp_path), others)) is None


def test_a_hub_teacher_is_named_by_its_commit(tmp_path: Path, examples_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    cache = tmp_path / "models--some--teacher"
    (cache / "refs").mkdir(parents=True)
    (cache / "refs" / "main").write_text(commit)
    (cache / "snapshots" / commit).mkdir(parents=True)
    (cache / "snapshots" / commit / "config.json").write_text("{}")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert pin_revision(ModelSource("some/teacher")) == ModelSource("some/teacher", commit)
    identity = identity_of(run_config(tmp_path), ModelSource("some/teacher", "main"), examples_path)
    assert identity["teacher"] == {"name": "some/teacher", "revision": commit}


def test_a_folder_without_weights_is_refused(tmp_path: Path, examples_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no \*.safetensors, and weights of other kinds are not read; a copy made by"):
        identity_of(run_config(tmp_path), ModelSource(str(tmp_path)), examples_path)


def test_a_k_beyond_the_vocabulary_is_refused_before_anything_starts(
    tmp_path: Path, teacher: ModelSource, examples_path: Path
) -> None:
    with pytest.raises(ValueError, match="scores.top_k 64 is too large.* scores.top_k 63 would do"):
        identity_of(run_config(tmp_path, top_k=64), teacher, examples_path)


def test_an_engine_that_is_not_installed_is_named(
    tmp_path: Path, teacher: ModelSource, examples_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("orchestrator.run.score_identity.ENGINE_DISTRIBUTIONS", {"transformers": ("no-such-distribution",)})
    with pytest.raises(ValueError, match="teacher.engine.kind is transformers, but transformers is not installed"):
        identity_of(run_config(tmp_path), teacher, examples_path)


# ---- where stores stand


def test_a_store_stands_under_its_identity(tmp_path: Path, teacher: ModelSource, examples_path: Path) -> None:
    config, elsewhere = run_config(tmp_path), run_config(tmp_path, root=str(tmp_path / "shared"))
    identity = identity_of(config, teacher, examples_path)
    store = open_store(config, identity)
    assert Path(store.place) == tmp_path / "runs" / "scores" / f"v{FORMAT}-{identity_hash(identity)[:16]}"
    assert (store.rows, store.rows_per_shard, store.top_k) == (ROWS, 4, TOP_K)
    assert Path(open_store(elsewhere, identity, "heldout").place).parent == tmp_path / "shared"


def test_a_complete_store_with_a_larger_k_serves(
    tmp_path: Path, teacher: ModelSource, examples_path: Path, examples: list[Example]
) -> None:
    identities = {top_k: identity_of(run_config(tmp_path, top_k=top_k), teacher, examples_path) for top_k in (3, 5, 7, 9)}
    larger, largest = (open_store(run_config(tmp_path), identities[top_k]) for top_k in (7, 9))
    fill(largest, examples)
    assert open_store(run_config(tmp_path), identities[5]).place == largest.place
    fill(larger, examples)
    found = open_store(run_config(tmp_path), identities[3])
    assert found.place == larger.place
    np.testing.assert_array_equal(found.scores_at(4, 3).topk_ids, expected_scores(examples[4], 3).topk_ids)


def test_a_named_store_is_read_if_it_is_the_right_one_and_complete(
    tmp_path: Path, teacher: ModelSource, examples_path: Path, examples: list[Example]
) -> None:
    identity = identity_of(run_config(tmp_path), teacher, examples_path)
    store = open_store(run_config(tmp_path), identity)
    config = run_config(tmp_path, path=str(Path(store.place)))
    with pytest.raises(ValueError, match="named by scores.path, lacks 3 of 3 shards, the first is shard 0; .*scores.root"):
        open_store(config, identity)
    fill(store, examples)
    assert open_store(config, identity).place == store.place
    with pytest.raises(StoreMismatch, match="tokenizer: wanted 'x', the store has 'tokens'"):
        open_store(config, {**identity, "tokenizer": "x"})
    heldout = {**identity, "examples": {"hash": "other", "rows": 2}}
    assert Path(open_store(config, heldout, "heldout").place).parent == tmp_path / "runs" / "scores"
