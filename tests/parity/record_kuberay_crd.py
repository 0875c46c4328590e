"""Record the fields of KubeRay's RayJob in `../cases/kuberay_rayjob.json`.

    curl -LO https://raw.githubusercontent.com/ray-project/kuberay/v1.7.0/ray-operator/config/crd/bases/ray.io_rayjobs.yaml
    python tests/parity/record_kuberay_crd.py ray.io_rayjobs.yaml

A field is its type ("string", "integer", "boolean", "number", "quantity" of int-or-string, "any"), a list of
the values it may have, {"list": FIELD}, {"map": FIELD}, or {"fields": NAME -> FIELD, "required": names}. A
number is the place of a field in `shared`: what occurs more than once, such as the parts of a pod.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from pathlib import Path
from typing import Any

import yaml

KUBERAY = "1.7.0"
RECORD = Path(__file__).parents[1] / "cases" / "kuberay_rayjob.json"


def reduced(schema: dict[str, Any]) -> Any:
    if schema.get("x-kubernetes-int-or-string"):
        return "quantity"
    if "enum" in schema:
        return schema["enum"]
    kind = schema.get("type", "any")
    if kind == "array":
        return {"list": reduced(schema["items"])}
    if kind != "object":
        return kind
    if "properties" in schema:
        fields = {name: reduced(part) for name, part in sorted(schema["properties"].items())}
        return {"fields": fields, "required": sorted(schema.get("required", []))}
    rest = schema.get("additionalProperties")
    return {"map": reduced(rest)} if isinstance(rest, dict) else "any"


def shared(tree: Any) -> tuple[Any, list[Any]]:
    """The tree with what occurs more than once replaced by its place in a list."""
    counts: Counter[str] = Counter()

    def count(node: Any) -> None:
        if isinstance(node, dict):
            text = json.dumps(node)
            counts[text] += 1
            if counts[text] == 1:
                for part in [*node.get("fields", {}).values(), node.get("list"), node.get("map")]:
                    count(part)

    places: dict[str, int] = {}
    parts: list[Any] = []

    def replace(node: Any) -> Any:
        if not isinstance(node, dict):
            return node
        text = json.dumps(node)
        if text in places:
            return places[text]
        made = {
            key: {name: replace(part) for name, part in value.items()} if key == "fields" else replace(value)
            for key, value in node.items()
        }
        if counts[text] > 1 and len(text) > 40:
            places[text] = len(parts)
            parts.append(made)
            return places[text]
        return made

    count(tree)
    return replace(tree), parts


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("crd", type=Path, help="ray.io_rayjobs.yaml of the release")
    crd = yaml.load(parser.parse_args().crd.read_text(encoding="utf-8"), yaml.CSafeLoader)
    [version] = [version for version in crd["spec"]["versions"] if version["name"] == "v1"]
    tree, parts = shared(reduced(version["schema"]["openAPIV3Schema"]["properties"]["spec"]))
    record = {"kuberay": KUBERAY, "spec": tree, "shared": parts}
    RECORD.write_text(json.dumps(record, separators=(",", ":")) + "\n", encoding="utf-8")
    print(f"{RECORD}: {RECORD.stat().st_size / 1024:.0f} KiB")


if __name__ == "__main__":
    main()
