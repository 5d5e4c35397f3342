"""Fixtures of the tests of rules and logs."""

import pytest
import yaml


@pytest.fixture(autouse=True)
def fast_yaml(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the official checker read its files with libyaml, which is 20 times as fast."""
    monkeypatch.setattr(yaml, "BaseLoader", getattr(yaml, "CBaseLoader", yaml.BaseLoader))
