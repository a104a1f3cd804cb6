"""`surefoot verify` is `python -m surefoot.check` by another name."""

from pathlib import Path

import pytest

from surefoot.cli.main import main


def test_verify_says_what_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(tmp_path / "nothing")]) == 2
    assert capsys.readouterr().err.startswith("surefoot verify: ")
    assert main(["verify", str(tmp_path)]) == 2
    assert "holds neither certificate.json nor tensors.safetensors" in capsys.readouterr().err
    (tmp_path / "certificate.json").write_text("{")
    assert main(["verify", str(tmp_path)]) == 1
    out = capsys.readouterr().out
    assert "certificate.json cannot be read" in out
    assert "NOT VERIFIED" in out


def test_verify_is_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    assert "check a certificate file" in capsys.readouterr().out
