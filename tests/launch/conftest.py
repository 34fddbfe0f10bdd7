from tests.cli.conftest import bench  # noqa: F401 - a fixture
