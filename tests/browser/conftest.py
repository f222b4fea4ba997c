"""One browser for all of its tests; where there is none they are skipped, and say what is missing."""

import browser as a_browser
import pytest


@pytest.fixture(scope="session")
def browser():
    with a_browser.chromium() as found:
        if isinstance(found, str):
            pytest.skip(found)
        yield found
