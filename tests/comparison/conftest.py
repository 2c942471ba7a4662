"""All comparisons of these tests take their processes from one fork server."""

from collections.abc import Iterator

import pytest
from tests.warm_python import WarmPython

from loraplex.comparison.workers import Workers


@pytest.fixture(scope="session", autouse=True)
def shared_workers(warm_python: WarmPython) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("loraplex.comparison.compare.make_workers", lambda at_once: Workers(server=warm_python.server))
        yield
