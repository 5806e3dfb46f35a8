"""A model's folder: what its configuration says, and one sentence for each way in which it can be wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from plexor.checkpoint.folder import open_folder
from plexor.errors import CheckpointError

CONFIG = {"architectures": ["SomeForCausalLM"], "model_type": "some", "eos_token_id": 2}


def model_folder(path: Path, config: Any = None, generation: Any = None) -> Path:
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(CONFIG if config is None else config))
    if generation is not None:
        (path / "generation_config.json").write_text(json.dumps(generation))
    return path


def refusal(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        open_folder(path)
    message = str(caught.value)
    assert "\n" not in message
    assert str(path) in message
    return message


def test_what_a_folder_says(tmp_path: Path) -> None:
    folder = open_folder(model_folder(tmp_path))
    assert folder.path == tmp_path
    assert folder.config == CONFIG
    assert folder.generation == {}
    assert folder.architecture == "SomeForCausalLM"
    assert folder.end_ids == (2,)
    assert folder.default_sampling == {}
    assert folder.quantization is None


def test_missing_folder_with_a_near_name(tmp_path: Path) -> None:
    model_folder(tmp_path / "small-model")
    assert f"did you mean {tmp_path / 'small-model'}?" in refusal(tmp_path / "smal-model")


def test_missing_folder_without_a_near_name(tmp_path: Path) -> None:
    assert "did you mean" not in refusal(tmp_path / "zzzz")
    assert str(tmp_path / "nowhere") in refusal(tmp_path / "nowhere" / "model")


def test_file_instead_of_a_folder(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"")
    assert f"is a file; give the folder that holds config.json and the weights, perhaps {tmp_path}" in refusal(file)


def test_folder_without_a_configuration(tmp_path: Path) -> None:
    assert "has no config.json" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b'{\n  "a": 1,\n  "b" 2\n}', "not valid JSON: Expecting ':' delimiter at line 3, column 7"),
        (b"", "not valid JSON"),
        (b"[1]", "JSON list where an object is expected"),
        (b'{"a": 1, "a": 2}', "names 'a' twice"),
        (b"\xff\xfe{}", "not UTF-8"),
        (b"[" * 100_000, "nested too deeply"),
    ],
)
@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
def test_damaged_json(tmp_path: Path, file: str, content: bytes, reason: str) -> None:
    model_folder(tmp_path)
    (tmp_path / file).write_bytes(content)
    message = refusal(tmp_path)
    assert str(tmp_path / file) in message
    assert reason in message


@pytest.mark.parametrize(
    ("config", "key"),
    [
        (CONFIG | {"auto_map": {"AutoConfig": "configuration_x.X"}}, '"auto_map"'),
        (CONFIG | {"trust_remote_code": True}, '"trust_remote_code"'),
        (CONFIG | {"text_config": {"auto_map": {"AutoModel": "x.Y"}}}, '"text_config.auto_map"'),
        (CONFIG | {"parts": [{}, {"auto_map": "other/repository--x.Y"}]}, '"parts[1].auto_map"'),
    ],
)
def test_code_in_a_checkpoint_is_refused(tmp_path: Path, config: dict[str, Any], key: str) -> None:
    message = refusal(model_folder(tmp_path, config))
    assert "config.json" in message
    assert key in message


@pytest.mark.parametrize("harmless", [{"auto_map": {}}, {"auto_map": None}, {"trust_remote_code": False}])
def test_empty_code_keys_ask_for_nothing(tmp_path: Path, harmless: dict[str, Any]) -> None:
    assert open_folder(model_folder(tmp_path, CONFIG | harmless)).architecture == "SomeForCausalLM"


@pytest.mark.parametrize(
    ("architectures", "reason"),
    [
        (None, "names no model class"),
        ([], "names no model class"),
        ("SomeForCausalLM", "names no model class"),
        ([None], "names no model class"),
        (["AForCausalLM", "BForCausalLM"], "names 2 model classes"),
    ],
)
def test_architecture_must_be_one_name(tmp_path: Path, architectures: Any, reason: str) -> None:
    folder = open_folder(model_folder(tmp_path, {"architectures": architectures}))
    with pytest.raises(CheckpointError, match=reason) as caught:
        _ = folder.architecture
    assert str(tmp_path / "config.json") in str(caught.value)


@pytest.mark.parametrize(
    ("config", "generation", "expected"),
    [
        ({"eos_token_id": 2}, {"eos_token_id": [5, 6]}, (5, 6)),
        ({"eos_token_id": [2, 3]}, {}, (2, 3)),
        ({"eos_token_id": 0}, {"eos_token_id": None}, (0,)),
        ({"text_config": {"eos_token_id": 7}}, None, (7,)),
        ({"eos_token_id": None, "text_config": {"eos_token_id": 7}}, None, (7,)),
        ({"text_config": None}, None, ()),
    ],
)
def test_end_ids(tmp_path: Path, config: Any, generation: Any, expected: tuple[int, ...]) -> None:
    assert open_folder(model_folder(tmp_path, config, generation)).end_ids == expected


@pytest.mark.parametrize("wrong", ["</s>", [1, "2"], 2.0, True, -1])
def test_end_id_that_is_no_token(tmp_path: Path, wrong: Any) -> None:
    folder = open_folder(model_folder(tmp_path, CONFIG, {"eos_token_id": wrong}))
    with pytest.raises(CheckpointError, match=r"generation_config\.json sets eos_token_id"):
        _ = folder.end_ids


def test_default_sampling(tmp_path: Path) -> None:
    advice = {"temperature": 0.6, "top_k": 20, "top_p": 0.95, "repetition_penalty": 1.05}
    generation = {"do_sample": True, "min_p": None, "max_length": 4096} | advice
    assert open_folder(model_folder(tmp_path, CONFIG, generation)).default_sampling == advice
    greedy = generation | {"do_sample": False}
    assert open_folder(model_folder(tmp_path, CONFIG, greedy)).default_sampling == {}


def test_default_sampling_that_is_no_number(tmp_path: Path) -> None:
    folder = open_folder(model_folder(tmp_path, CONFIG, {"do_sample": True, "temperature": "hot"}))
    with pytest.raises(CheckpointError, match=r"generation_config\.json sets temperature to 'hot'"):
        _ = folder.default_sampling


def test_quantization(tmp_path: Path) -> None:
    stored = {"quant_method": "something", "bits": 4}
    assert open_folder(model_folder(tmp_path, CONFIG | {"quantization_config": stored})).quantization == stored
    folder = open_folder(model_folder(tmp_path, CONFIG | {"quantization_config": "something"}))
    with pytest.raises(CheckpointError, match=r"config\.json has a \"quantization_config\" that is no object"):
        _ = folder.quantization
