"""Networks are loaded by name, and refused in one line that names them."""

from __future__ import annotations

import io
import json
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_model_identity import network

from zpatch.errors import ModelError
from zpatch.networks.model_files import load_model

JIT_IS_DEPRECATED = "ignore:`torch.jit:DeprecationWarning"


@pytest.fixture
def user_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module in the current folder, as a user's is."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.delitem(sys.modules, "a_users_networks", raising=False)
    (tmp_path / "a_users_networks.py").write_text(
        "import torch\n"
        "def good(): return torch.nn.Identity()\n"
        "def bad(): raise RuntimeError('no weights here')\n"
        "def none(): return 5\n"
    )
    (tmp_path / "broken.pt").write_bytes(b"not a model")
    (tmp_path / "broken.pt2").write_bytes(b"not a model")
    return "a_users_networks"


def test_a_factory_in_the_current_folder_is_found(user_module: str) -> None:
    assert isinstance(load_model(f"{user_module}:good"), torch.nn.Identity)


@pytest.mark.parametrize(
    ("spec", "text"),
    [
        ("missing.pt", "model 'missing.pt' is no file; name one, or a factory as package.module:factory"),
        ("a_users_networks:bad", "cannot be loaded: RuntimeError: no weights here"),
        ("a_users_networks:other", "cannot be loaded: AttributeError: .*other"),
        ("a_users_networks:none", "model 'a_users_networks:none' gave int, which cannot be called"),
        ("no_such_module:make", "cannot be loaded: ModuleNotFoundError: .*no_such_module"),
        (":make", "cannot be loaded: ValueError"),
        ("broken.pt", "model 'broken.pt' cannot be loaded: RuntimeError"),
        ("broken.pt2", "model 'broken.pt2' cannot be loaded"),
    ],
)
@pytest.mark.filterwarnings(JIT_IS_DEPRECATED)
def test_a_model_that_cannot_be_loaded_is_an_error_with_its_name(
    user_module: str, spec: str, text: str
) -> None:
    with pytest.raises(ModelError, match=text):
        load_model(spec)


@pytest.mark.parametrize("name", ["saved.pt", "saved.pt2"])
@pytest.mark.parametrize("what", [network, lambda: network().state_dict()])
@pytest.mark.parametrize("is_zip", [True, False])
def test_a_file_of_torch_save_is_refused_with_advice(
    tmp_path: Path, name: str, what: Callable[[], Any], is_zip: bool
) -> None:
    torch.save(what(), tmp_path / name, _use_new_zipfile_serialization=is_zip)
    text = (
        "saved.pt2?' was written by torch.save and has no code; give a file of torch.export \\(.pt2\\) or "
        "TorchScript, or package.module:factory that loads these weights"
    )
    with pytest.raises(ModelError, match=text):
        load_model(str(tmp_path / name))


class Evil:
    """Runs code when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return Path.touch, (self.file,)


def with_parts(source: Path, target: Path, change: Callable[[str, bytes], bytes]) -> Path:
    """A copy of a zip file with changed parts."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as new:
        for name in old.namelist():
            new.writestr(name, change(name, old.read(name)))
    return target


@pytest.fixture
def exported(tmp_path: Path) -> Path:
    """A file of torch.export."""
    program = torch.export.export(torch.nn.Conv3d(1, 2, 3), (torch.ones(1, 1, 4, 4, 4),))
    torch.export.save(program, tmp_path / "sound.pt2")
    assert callable(load_model(str(tmp_path / "sound.pt2")))
    return tmp_path / "sound.pt2"


@pytest.mark.parametrize("where", ["sample_inputs/", "weights/", "constants/"])
def test_a_pickle_in_an_exported_network_is_refused_and_not_run(
    exported: Path, tmp_path: Path, where: str
) -> None:
    pickled = io.BytesIO()
    torch.save(Evil(tmp_path / "ran"), pickled)

    def change(name: str, part: bytes) -> bytes:
        if where not in name:
            return part
        if not name.endswith("_config.json"):
            return pickled.getvalue()
        config = json.loads(part)
        if where == "constants/":
            config["config"]["evil"] = {"is_param": False, "path_name": "opaque_obj_0"}
        for entry in config["config"].values():
            entry["use_pickle"] = True
        return json.dumps(config).encode()

    bad = with_parts(exported, tmp_path / "bad.pt2", change)
    if where == "constants/":
        with zipfile.ZipFile(bad, "a") as archive:
            archive.writestr("sound/data/constants/opaque_obj_0", pickled.getvalue())
    with pytest.raises(ModelError, match=f"holds a pickle .*{where}.* that could run any code"):
        load_model(str(bad))
    assert not (tmp_path / "ran").exists()


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_an_exported_network_with_two_parts_of_one_name_is_refused(exported: Path) -> None:
    with zipfile.ZipFile(exported, "a") as archive:
        archive.writestr(archive.namelist()[0], b"another")
    with pytest.raises(ModelError, match="two parts of one name"):
        load_model(str(exported))
