"""Tests on the real kernel, in labs of their own. Where there can be no lab, each is skipped, with the reason."""

from __future__ import annotations

import functools

import pytest

from fourtuple.errors import MissingPrivilege
from fourtuple.lab import Lab


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """All that is in this folder needs namespaces."""
    for item in items:
        if "netns" in item.path.parts:
            item.add_marker(pytest.mark.netns)


@pytest.fixture(autouse=True)
def _namespaces_can_be_had() -> None:
    reason = why_no_lab()
    if reason:
        pytest.skip(reason)


@functools.cache
def why_no_lab() -> str:
    """Empty if a lab can be made here."""
    try:
        with Lab(("probe",)):
            return ""
    except MissingPrivilege as missing:
        return str(missing)
