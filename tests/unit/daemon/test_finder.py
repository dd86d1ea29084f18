"""Where QEMUs' sockets are looked for."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from refault.daemon.finder import _directories


def test_a_directory_that_may_not_be_looked_at_counts_as_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    stat = os.stat

    def refused(path: object, *args: object, **kwargs: object) -> os.stat_result:
        if str(path).endswith("/b"):
            raise PermissionError("not here")
        return stat(path, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "stat", refused)
    assert list(_directories(f"{tmp_path}/*/x.real")) == [str(tmp_path), f"{tmp_path}/a"]
