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

VERSION = 1


def certificate(result: Result, proofs: Sequence[Proof]) -> bytes:
    """The certificate of a verdict of `sat` or `unsat`, as the bytes of a file. ValueError for another verdict."""
    if result.verdict not in (Verdict.SAT, Verdict.UNSAT):
        raise ValueError(f"no certificate says {result.verdict}")
    header: dict[str, Any] = {"format": "qverify certificate", "version": VERSION, "verdict": result.verdict.value}
    header |= {key: result.details[key] for key in ("model_sha256", "spec_sha256", "semantics", "read_by")}
    header["made_by"] = f"qverify {__version__}"
    arrays: dict[str, npt.NDArray[Any]] = {}
    if result.witness is not None:
        header["inputs"] = list(result.witness.input_text)
    else:
        header["queries"] = [_query(proof, f"q{i}", arrays) for i, proof in enumerate(proofs)]
    return _zip(header, arrays)


def _query(proof: Proof, prefix: str, arrays: dict[str, npt.NDArray[Any]]) -> dict[str, Any]:
    own: dict[str, npt.NDArray[Any]] = {"kind": np.array(proof.kind, np.int8)}
    for name in ("first", "value", "element", "threshold", "data", "regions"):
        own[name] = np.array(getattr(proof, name), np.int64)
    inner = []
    for j, step in enumerate(proof.inner):
        own[f"inner{j}"] = np.asarray(step.elements, np.int64)
        entry: dict[str, Any] = {"node": step.node}
        if step.multipliers is not None:
            entry |= {
                "precision": step.precision,
                "columns": [[k, int(m[0].size)] for k, m in step.multipliers.items()],
            }
            own[f"given{j}"] = np.concatenate([_flat(m) for m in step.multipliers.values()], axis=1)
        inner.append(entry)
    own["mix"], own["multipliers"] = (
        np.stack(rows) if rows else np.zeros((0, 0), np.int64) for rows in (proof.mix, proof.multipliers)
    )
    arrays |= {f"{prefix}.{name}": array for name, array in own.items()}
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
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("header.json", json.dumps(header, indent=1))
        for name, array in arrays.items():
            own = io.BytesIO()
            np.save(own, array, allow_pickle=False)
            archive.writestr(f"{name}.npy", own.getvalue())
    return buffer.getvalue()
