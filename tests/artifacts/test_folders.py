"""Files that belong together appear together."""

import contextlib
from pathlib import Path

import pytest

from jaxlm.artifacts.folders import exchange


def write(folder: Path, **files: str) -> Path:
    folder.mkdir()
    for name, text in files.items():
        (folder / name).write_text(text)
    return folder


def test_a_stop_at_any_moment_leaves_no_mixture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Every call that changes the disk is the last one once; then the folder is read."""
    steps = {"count": 0, "most": 0}

    def counted(function):
        def call(*args, **options):
            steps["count"] += 1
            if steps["count"] > steps["most"]:
                raise KeyboardInterrupt
            return function(*args, **options)

        return call

    for name in ("replace", "unlink"):
        monkeypatch.setattr(Path, name, counted(getattr(Path, name)))
    seen = set()
    for most in range(20):
        old = {"config": "old", "a": "old", "b": "old", "mine": "mine"}
        target = write(tmp_path / f"target{most}", **old)
        new = {"config": "new", "a": "new", "c": "new"}
        source = write(tmp_path / f"source{most}", **new)
        steps |= {"count": 0, "most": most}
        with contextlib.suppress(KeyboardInterrupt):
            exchange(source, target, last="config", stale=lambda path: path.name in "abc")
        found = {path.name: path.read_text() for path in target.iterdir()}
        assert found["mine"] == "mine"
        if "config" in found:
            assert found in (old, new | {"mine": "mine"})
        seen.add(found.get("config"))
    assert seen == {"old", None, "new"}
