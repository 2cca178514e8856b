"""Write certificates: what a verdict rests on, in the format of `specs/certificate.md`."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from qverify import __version__
from qverify.result import Result, Verdict
from qverify.search.proof import Proof

VERSION = 2
# What a file may hold ("Limits" in specs/certificate.md).
CONTENT, RATIO, HEADER_COST = 2**19, 16, 8


def certificate(result: Result, proofs: Sequence[Proof]) -> bytes:
    """The certificate of a verdict of `sat` or `unsat`, as the bytes of a file. ValueError for
    another verdict."""
    if result.verdict not in (Verdict.SAT, Verdict.UNSAT):
        raise ValueError(f"no certificate says {result.verdict}")
    header: dict[str, Any] = {
        "format": "qverify certificate",
        "version": VERSION,
        "verdict": result.verdict.value,
    }
    header |= {
        key: result.details[key]
        for key in ("model_sha256", "spec_sha256", "reading", "semantics", "read_by")
    }
    if shapes := result.details.get("shapes"):
        header["shapes"] = shapes
    header["made_by"] = f"qverify {__version__}"
    arrays: dict[str, npt.NDArray[Any]] = {}
    if result.witness is not None:
        header["inputs"] = list(result.witness.input_text)
    else:
        header["queries"] = [_query(proof, f"q{i}", arrays) for i, proof in enumerate(proofs)]
    return _zip(header, arrays)


def _query(proof: Proof, prefix: str, arrays: dict[str, npt.NDArray[Any]]) -> dict[str, Any]:
    found: dict[str, npt.NDArray[Any]] = {"kind": np.array(proof.kind, np.int8)}
    for name in ("first", "value", "element", "threshold", "data", "regions"):
        found[name] = np.array(getattr(proof, name), np.int64)
    walked = proof.walked()  # their rows are read in this order
    rows = [proof.data[entry] for entry in walked]
    found["data"][walked] = np.arange(len(walked))
    inner = []
    for j, step in enumerate(proof.intermediate):
        found[f"inner{j}"] = np.asarray(step.elements, np.int64)
        entry: dict[str, Any] = {"node": step.node}
        if step.multipliers is not None:
            entry |= {
                "precision": step.precision,
                "columns": [[k, int(m[0].size)] for k, m in step.multipliers.items()],
            }
            found[f"given{j}"] = np.concatenate(
                [_flat(m) for m in step.multipliers.values()], axis=1
            )
        inner.append(entry)
    found["mix"], found["multipliers"] = (
        np.stack([given[row] for row in rows]) if rows else np.zeros((0, 0), np.int64)
        for given in (proof.mu, proof.multipliers)
    )
    arrays |= {f"{prefix}.{name}": array for name, array in found.items()}
    return {
        "inner": inner,
        "columns": [list(pair) for pair in proof.columns],
        "rules": {str(node): rule for node, rule in proof.rules.items()},
        "slopes": {str(node): list(pair) for node, pair in proof.slopes.items()},
    }


def _flat(multipliers: Any) -> npt.NDArray[np.int64]:
    """[N, ...] of any machine as int64 [N, size] on the host."""
    host = multipliers.get() if hasattr(multipliers, "get") else multipliers
    return np.asarray(host, np.int64).reshape(len(host), -1)


def _zip(header: Mapping[str, Any], arrays: Mapping[str, npt.NDArray[Any]]) -> bytes:
    """Packed, unless the file would hold more than one of its size may. No times: the same proof
    gives the same bytes."""
    text = json.dumps(header, indent=1).encode()
    content = HEADER_COST * len(text) + sum(8 * array.size + 128 for array in arrays.values())
    data = b""
    for method in (zipfile.ZIP_DEFLATED, zipfile.ZIP_STORED):
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w", method) as archive:
            archive.writestr(zipfile.ZipInfo("header.json"), text, method)
            for name, array in arrays.items():
                file = io.BytesIO()
                np.save(file, array, allow_pickle=False)
                archive.writestr(zipfile.ZipInfo(f"{name}.npy"), file.getvalue(), method)
        data = buffer.getvalue()
        if content <= CONTENT + RATIO * len(data):
            break
    return data
