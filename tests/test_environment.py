"""Keys to services: which of them `.env` gives, and texts without them."""

import os
from pathlib import Path

import pytest

from core.environment import read_dotenv, redacted

# tokens -------------------------------------------------------------------------------------------


def test_only_two_keys_of_dotenv_are_taken_and_never_over_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / ".env"
    for line, taken in [
        ("HF_TOKEN=hf_a", "hf_a"),
        ("\ufeffexport HF_TOKEN = 'hf_a b'  # mine", "hf_a b"),
        ('HF_TOKEN="hf_a#b"#mine', "hf_a#b"),
        ("HF_TOKEN=hf_a # mine\r\nPATH=/nowhere", "hf_a"),
        ("HF_TOKEN=\n# HF_TOKEN=hf_a", None),
    ]:
        monkeypatch.setattr(os, "environ", {"PATH": "/bin"})
        path.write_text(line, encoding="utf-8")
        assert read_dotenv(path) == []
        assert os.environ == ({"PATH": "/bin", "HF_TOKEN": taken} if taken else {"PATH": "/bin"}), (
            line
        )
    monkeypatch.setattr(os, "environ", {"HF_TOKEN": "hf_mine", "WANDB_API_KEY": ""})
    path.write_text("HF_TOKEN=hf_other\nhf_secret\nHF_TOKEN='hf_open\nA=b c\nWANDB_API_KEY=key\n")
    (note,) = read_dotenv(path)
    assert note == f"{path}: lines 2, 3, 4 are passed over; a line is KEY=VALUE"
    assert os.environ == {"HF_TOKEN": "hf_mine", "WANDB_API_KEY": ""}
    path.write_bytes(b"HF_TOKEN=\xff\xfe")
    assert read_dotenv(path) == [
        f"{path} is no UTF-8 text; save it as UTF-8. The keys in it are not used"
    ]
    # a folder .env is a virtual environment
    assert read_dotenv(tmp_path) == read_dotenv(tmp_path / "absent") == []


def test_texts_are_told_without_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "strange token")
    text = (
        "Bearer strange token, 'hf_0123456789abcdefXYZ' and "
        "https://x:hf_jwt_aaaaaaaa.bbb-c@host/hf_internal/x by hf_hub_download"
    )
    assert (
        redacted(text)
        == "Bearer <HF_TOKEN>, '<HF_TOKEN>' and https://x:<HF_TOKEN>@host/hf_internal/x by "
        "hf_hub_download"
    )
