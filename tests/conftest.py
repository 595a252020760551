"""What every test gets: a home of its own, and the real images where they lie beside the checkout."""

import os
import tempfile
from pathlib import Path

import pytest
from hypothesis import settings

__all__ = ["pytest_collection_modifyitems", "pytest_configure", "shared_data"]


def pytest_configure(config: pytest.Config) -> None:
    """Move home away before any test module is imported: Flower and matplotlib write there on import."""
    settings.register_profile("ours", deadline=None)  # how busy this machine is is no property of the code
    settings.load_profile("ours")
    home = tempfile.TemporaryDirectory(prefix="wardround-tests-", ignore_cleanup_errors=True)
    config.add_cleanup(home.cleanup)
    environment = pytest.MonkeyPatch()
    config.add_cleanup(environment.undo)
    environment.setenv("HOME", home.name)
    environment.setenv("WARDROUND_HOME", str(Path(home.name) / "wardround"))
    for name in ("FLWR_HOME", "MPLCONFIGDIR", "XDG_CACHE_HOME", "XDG_CONFIG_HOME", "XDG_DATA_HOME"):
        environment.delenv(name, raising=False)
    # As `make test` has it, for whoever calls pytest by hand.
    environment.setenv("FLWR_TELEMETRY_ENABLED", "0")
    environment.setenv("FLWR_DISABLE_UPDATE_CHECK", "1")
    environment.setenv("FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let tests that mostly wait begin at once, in two of pytest-xdist's processes, which get equal parts of the list.

    The others compute in the meantime, and take over what those two do not come to.
    """
    waiting = [item for item in items if item.get_closest_marker("waits")]
    half, second = (len(waiting) + 1) // 2, len(items) // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    rest = waiting[:half] + [item for item in items if item not in waiting]
    items[:] = rest[:second] + waiting[half:] + rest[second:]


@pytest.fixture(scope="session")
def shared_data(pytestconfig: pytest.Config) -> Path:
    """The folder of real images; tests that ask for it skip where it is missing."""
    folder = pytestconfig.rootpath.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("the real images are not here: shared/data is missing beside the checkout")
    return folder
