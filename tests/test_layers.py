"""Imports go CORE <- SHELL <- TOP only, and CORE touches nothing outside its arguments: read from the syntax trees.

What a core module may import is listed, not what it may not: a new way to reach a file or a clock is refused unseen.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "enforcer"

CORE = {
    *("kernel_abi", "toml_lines", "policy", "dns_answer", "learned", "ruleset", "advice", "topology", "attribution"),
    *("denial", "audit_record", "revocation", "nfnetlink", "ladder", "overhearing", "trusted_files", "catalogue"),
    *("other_marks", "completion", "bounds", "redirects"),
}
SHELL = {
    *("bpf", "nft", "netlink", "procfs", "metrics", "control", "resolver", "state"),
    *("audit", "conntrack", "containers", "nflog", "responder", "authority", "packet_socket", "notify", "nft_events"),
}
TOP = {
    "daemon",
    "baseline",
    "enforcement",
    "asking",
    "auditing",
    "drift",
    "faults",
    "guarding",
    "without_bpf",
    "doctor",
    "cli",
    "bpf_loader",
}  # bpf_loader: a program of its own, the child process that may import bcc

CORE_IMPORTS = {
    *(
        "__future__",
        "bisect",
        "collections",
        "collections.abc",
        "contextlib",
        "copy",
        "dataclasses",
        "difflib",
        "enum",
        "functools",
    ),
    *("hashlib", "heapq", "hmac", "ipaddress", "itertools", "json", "math", "operator", "re", "string", "struct"),
    *("datetime", "textwrap", "tomllib", "types", "typing", "unicodedata"),
}
# Package -> the modules that alone may import it.
OWNED_IMPORTS = {
    "dns": {"dns_answer"},
    "idna": {"policy"},
    "importlib.resources": {"policy", "catalogue"},  # the presets and the catalogue, parts of the program
    "bcc": {"bpf_loader"},  # 76 MB: only in the child process that ends
    "nftables": {"nft"},
    "prometheus_client": {"metrics"},
    "cryptography": {"authority"},
}
PRINTERS = {"cli", "bpf_loader", "kernel_abi"}  # to the operator; to the parent process; bpf/shared.h
CORE_CALLS_REFUSED = {"open", "input", "exec", "eval", "__import__", "now", "today", "utcnow"}
# Files that the caller names, whose errors name them: opened in one place, where who could have written them is judged.
READS_ITS_INPUT = {"policy": {"pathlib"}, "trusted_files": {"pathlib", "os", "stat", "errno", "open"}}


def imported_names(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of all imports at any depth; `from enforcer import x` counts as enforcer.x."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = "enforcer" + (f".{node.module}" if node.module else "") if node.level else node.module or ""
            if package in {"enforcer", "importlib"}:
                yield from ((node.lineno, f"{package}.{alias.name}") for alias in node.names)
            else:
                yield node.lineno, package


def called_names(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, name) of all calls; of a method its last name."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name | ast.Attribute):
            yield node.lineno, node.func.id if isinstance(node.func, ast.Name) else node.func.attr


def may_import(module: str, imported: str) -> bool:
    """Whether module of enforcer/ may import a name."""
    if imported == "enforcer.__version__":
        return True
    if imported.startswith("enforcer."):
        other = imported.split(".")[1]
        if module in CORE:
            return other in CORE
        if module in SHELL:
            return other in CORE
        return other in CORE | SHELL | TOP
    for package, owners in OWNED_IMPORTS.items():
        if imported == package or imported.startswith(f"{package}."):
            return module in owners
    return module not in CORE or imported in CORE_IMPORTS | READS_ITS_INPUT.get(module, set())


def violations(module: str, source: str) -> list[str]:
    """What a module does that its layer may not, as `module:line: what`."""
    tree = ast.parse(source)
    found = [
        f"{module}:{line}: imports {imported}"
        for line, imported in imported_names(tree)
        if not may_import(module, imported)
    ]
    for line, name in called_names(tree):
        refused = CORE_CALLS_REFUSED - READS_ITS_INPUT.get(module, set()) if module in CORE else set()
        if name in refused or (name == "print" and module not in PRINTERS):
            found.append(f"{module}:{line}: calls {name}()")
    return found


def test_every_module_has_a_layer() -> None:
    modules = {path.stem for path in PACKAGE.glob("*.py")} - {"__init__"}
    assert modules <= CORE | SHELL | TOP


@pytest.mark.parametrize("path", sorted(PACKAGE.glob("*.py")), ids=lambda path: path.stem)
def test_module_keeps_to_its_layer(path: Path) -> None:
    assert violations(path.stem, path.read_text()) == []


@pytest.mark.parametrize(
    ("module", "source", "expected"),
    [
        ("learned", "import time", "learned:1: imports time"),
        ("learned", "def f():\n    from os import environ", "learned:2: imports os"),
        ("learned", "from . import nft", "learned:1: imports enforcer.nft"),
        ("learned", "from .nft import apply", "learned:1: imports enforcer.nft"),
        ("learned", "open('x')", "learned:1: calls open()"),
        ("learned", "import datetime\ndatetime.datetime.now()", "learned:2: calls now()"),
        ("learned", "from pathlib import Path", "learned:1: imports pathlib"),
        ("learned", "import dns.message", "learned:1: imports dns.message"),
        ("policy", "from importlib import import_module", "policy:1: imports importlib.import_module"),
        ("nft", "from enforcer.netlink import Link", "nft:1: imports enforcer.netlink"),
        ("nft", "from enforcer import daemon", "nft:1: imports enforcer.daemon"),
        ("daemon", "from bcc import BPF", "daemon:1: imports bcc"),
        ("daemon", "print('x')", "daemon:1: calls print()"),
    ],
)
def test_violation_is_found(module: str, source: str, expected: str) -> None:
    assert violations(module, source) == [expected]


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("learned", "from enforcer.policy import Policy\nimport ipaddress"),
        ("dns_answer", "import dns.message"),
        ("policy", "from importlib import resources\nimport tomllib"),
        ("nft", "import os\nfrom . import kernel_abi"),
        ("daemon", "import time\nfrom enforcer import nft, netlink, doctor"),
        ("cli", "print('x')"),
    ],
)
def test_what_the_layers_allow_passes(module: str, source: str) -> None:
    assert violations(module, source) == []
