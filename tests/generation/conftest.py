"""The browser in which pages are tried."""

import pytest
import support.browser as browser_module
from support.browser import Browser


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if browser_module.EXECUTABLE is None:
        pytest.skip("no chromium or google-chrome on the PATH")
    browser = Browser(tmp_path_factory.mktemp("browser"))
    yield browser
    browser.close()
