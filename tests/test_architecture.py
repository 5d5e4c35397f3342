"""Import boundaries: the modules that may import a package, read the environment or name a device type."""

import ast
import re
import tomllib
from pathlib import Path

import pytest
import yaml

from paths import ROOT

MODULES = sorted(
    path
    for package in ("ssd", "maskrcnn", "retinanet", "detection", "mlperf")
    for path in (ROOT / package).rglob("*.py")
)

ONLY_IN = {
    "torch.distributed": {"detection/runtime/distributed.py", "detection/runtime/launch.py"},
    "mlperf_logging": {f"mlperf/{n}.py" for n in ("compliance", "log", "rcp", "reference_points", "requirements")},
    "pycocotools": {"detection/data/rle.py", "detection/evaluation/coco_metric.py"},
}


def imports(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("package", ONLY_IN)
def test_a_restricted_package_has_few_importers(package):
    users = {
        str(path.relative_to(ROOT))
        for path in MODULES
        if any(name == package or name.startswith(package + ".") for name in imports(path))
    }
    assert users <= ONLY_IN[package]


def test_only_settings_reads_the_environment():
    users = {str(p.relative_to(ROOT)) for p in MODULES if re.search(r"\bos\.(environ|getenv)\b", p.read_text())}
    assert users == {"detection/config/settings.py"}


def test_only_the_device_module_names_device_types():
    users = {str(p.relative_to(ROOT)) for p in MODULES if re.search("cuda|cudnn", p.read_text(), re.IGNORECASE)}
    users -= {"detection/config/device_names.py"}  # only a list of names
    assert users == {"detection/runtime/device.py"}


def test_device_names_contains_only_data():
    (module,) = (path for path in MODULES if path.name == "device_names.py")
    tree = ast.parse(module.read_text())
    assert not [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom | ast.FunctionDef)]


def test_only_main_blocks_exit():
    for path in MODULES:
        text = path.read_text()
        for match in re.finditer(r"sys\.exit\(|raise SystemExit", text):
            assert '__name__ == "__main__"' in text[: match.start()], path


def test_version_and_license_are_consistent():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    version, citation = project["version"], yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert (citation["cff-version"], citation["version"], citation["license"]) == ("1.2.0", version, "Apache-2.0")
    assert {"title", "message", "authors", "abstract"} <= citation.keys()
    assert f"image.version={version} " in (ROOT / "Dockerfile").read_text()
    assert "image.licenses=Apache-2.0 " in (ROOT / "Dockerfile").read_text()
    assert "Apache License" in (ROOT / "LICENSE").read_text().splitlines()[1]
    changelog = (ROOT / "CHANGELOG.md").read_text()
    assert re.findall(r"^## (\S+)", changelog, re.MULTILINE)[0] == version
    kinds = set(re.findall(r"^### (.+)", changelog, re.MULTILINE))
    assert kinds <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}
