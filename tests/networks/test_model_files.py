"""Networks are loaded by name, and refused in one line that names them."""

from __future__ import annotations

import sys
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
