"""The compose file says what the page for operators says; neither is built here."""

from pathlib import Path

import yaml

HERE = Path(__file__).parents[1]


def test_compose():
    service = yaml.safe_load((HERE / "compose.yaml").read_text())["services"]["heedful"]
    assert service["environment"]["HEEDFUL_API_KEY"].startswith("${HEEDFUL_API_KEY:?")
    assert service["ports"] == ["127.0.0.1:8000:8000"] and service["read_only"] is True
    assert service["volumes"] == ["${MODEL:?set MODEL to a folder}:/model:ro"]
    dockerfile = (HERE / "Dockerfile").read_text()
    assert (
        HERE / service["build"]["context"] / service["build"]["dockerfile"]
    ).resolve() == HERE / "Dockerfile"
    for copied in ("pyproject.toml", "README.md", "LICENSE", "src", "plugins/vllm"):
        assert (HERE.parents[1] / copied).exists() and copied in dockerfile
    assert dockerfile.index("USER 1000") < dockerfile.index("ENTRYPOINT")
