"""Changes of certificates: of proofs (trees, multipliers, intermediate bounds, rules), of arrays as
files, of the header, of the ZIP archive. A function takes a certificate and changes it, or returns
the bytes of a file."""

from __future__ import annotations

import io
import json
import struct
import zipfile
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks.hostile.mutation_bases import Array, Rng, Taken, packed

CUT, CLOSED, REGIONS, DUAL = range(4)
TREE = ("kind", "first", "value", "element", "threshold", "data")
ODD = (
    *(
        "\naccepted unsat\n",
        "\ud800",
        "\x00",
        "\u202e",
        "\x1b[31m",
        "e\u0301",
        "１２",
        "-0",
        "+1",
        "1e400",
        "1e-400",
        "0x10",
    ),
    *(
        "1_0",
        " 1",
        "nan",
        "inf",
        "1/3",
        "",
        ".",
        "1e",
        "9" * 400,
        "0." + "0" * 400 + "1",
        "1e999999999",
        "unsat",
    ),
)
NUMBERS = (0, -1, 1, 2**31 - 1, 2**31, 2**40, 2**53, 2**62, 2**63 - 1, -(2**63))


def q(own: Taken, rng: Rng) -> str:
    """The prefix of one of its queries."""
    names = sorted({name.split(".")[0] for name in own.arrays})
    return f"{rng.choice(names)}." if names else "q0."


def query(own: Taken, rng: Rng) -> dict[str, Any]:
    found: dict[str, Any] = own.header["queries"][int(rng.integers(len(own.header["queries"])))]
    return found


def some(rng: Rng, values: Any) -> int:
    return int(rng.choice(np.asarray(values, np.int64)))


# -- trees -----------------------------------------------------------------------------------------


def swap_entries(own: Taken, rng: Rng) -> None:
    prefix = q(own, rng)
    a, b = rng.integers(len(own.arrays[prefix + "kind"]), size=2)
    for name in TREE:
        own.arrays[prefix + name][[a, b]] = own.arrays[prefix + name][[b, a]]


def change_tree(own: Taken, rng: Rng) -> None:
    array = own.arrays[q(own, rng) + str(rng.choice(TREE))]
    at = rng.integers(len(array))
    array[at] = some(rng, np.r_[array[at] + [-1, 1, 2], rng.integers(0, 9), array]) % 100


def move_cuts(own: Taken, rng: Rng) -> None:
    array = own.arrays[q(own, rng) + "threshold"]
    at = rng.integers(len(array), size=max(1, len(array) // int(rng.integers(1, 20))))
    array[at] += (
        rng.integers(-3, 4, len(at))
        if rng.random() < 0.7
        else rng.integers(-(2**41), 2**41, len(at))
    )


def close_early(own: Taken, rng: Rng) -> None:
    """A subtree is taken out, and its root is said to be closed, or by other multipliers."""
    prefix = q(own, rng)
    kind, first = own.arrays[prefix + "kind"], own.arrays[prefix + "first"]
    cuts = np.flatnonzero(kind == CUT)
    if not len(cuts):
        return
    root, gone = some(rng, cuts), set[int]()
    left = [int(first[root]), int(first[root]) + 1]
    while left:
        entry = left.pop()
        if 0 <= entry < len(kind) and entry not in gone:
            gone.add(entry)
            left += [int(first[entry]), int(first[entry]) + 1] if kind[entry] == CUT else []
    kind[root] = rng.choice([CLOSED, CLOSED, DUAL])
    keep(own, prefix, [e for e in range(len(kind)) if e not in gone])


def keep(own: Taken, prefix: str, entries: list[int]) -> None:
    """Only some entries of the tree, numbered anew, and their rows of multipliers."""
    new = {old: k for k, old in enumerate(entries)}
    arrays = own.arrays
    rows = [int(arrays[prefix + "data"][e]) for e in entries if arrays[prefix + "kind"][e] == DUAL]
    for name in TREE:
        arrays[prefix + name] = arrays[prefix + name][entries]
    for entry in np.flatnonzero(np.isin(arrays[prefix + "kind"], (CUT, REGIONS))):
        arrays[prefix + "first"][entry] = new.get(int(arrays[prefix + "first"][entry]), 0)
    order = sorted(set(rows))
    for entry in np.flatnonzero(arrays[prefix + "kind"] == DUAL):
        arrays[prefix + "data"][entry] = order.index(int(arrays[prefix + "data"][entry]))
    if rows and max(order) < len(arrays[prefix + "mix"]):
        for name in ("mix", "multipliers"):
            arrays[prefix + name] = arrays[prefix + name][order]


def drop_child(own: Taken, rng: Rng) -> None:
    """An entry goes, and whatever came behind it moves up."""
    prefix = q(own, rng)
    count = len(own.arrays[prefix + "kind"])
    gone = int(rng.integers(count))
    keep(own, prefix, [e for e in range(count) if e != gone])


def turn_leaves(own: Taken, rng: Rng) -> None:
    kind = own.arrays[q(own, rng) + "kind"]
    kind[rng.integers(len(kind), size=int(rng.integers(1, 4)))] = rng.choice(
        [CUT, CLOSED, REGIONS, DUAL, -1, 4, 127]
    )


def swap_children(own: Taken, rng: Rng) -> None:
    """Two cuts take each other's children; or a cut's two sides change places."""
    prefix = q(own, rng)
    first, cuts = own.arrays[prefix + "first"], np.flatnonzero(own.arrays[prefix + "kind"] == CUT)
    if len(cuts) and rng.random() < 0.5:
        child = int(first[some(rng, cuts)])
        if child + 1 < len(first):
            for name in TREE:
                own.arrays[prefix + name][[child, child + 1]] = own.arrays[prefix + name][
                    [child + 1, child]
                ]
    elif len(cuts) > 1:
        a, b = rng.choice(cuts, 2, replace=False)
        first[[a, b]] = first[[b, a]]


def change_regions(own: Taken, rng: Rng) -> None:
    prefix = q(own, rng)
    regions = own.arrays[prefix + "regions"]
    match int(rng.integers(4)):
        case 0:
            own.arrays[prefix + "regions"] = regions[:-1]
        case 1:
            own.arrays[prefix + "regions"] = np.r_[regions, regions[:1], 0]
        case 2:
            own.arrays[prefix + "regions"] = rng.permutation(regions)
        case _:
            own.arrays[prefix + "regions"] = np.full(len(regions), some(rng, np.r_[0, 1, 99, -1]))


def grow(own: Taken, rng: Rng) -> None:
    """A leaf is cut once more, and both children are said to be closed."""
    prefix = q(own, rng)
    kind = own.arrays[prefix + "kind"]
    leaf, count = some(rng, np.flatnonzero(kind != CUT)), len(kind)
    for name in TREE:
        own.arrays[prefix + name] = np.r_[own.arrays[prefix + name], np.zeros(2, np.int64)].astype(
            np.int64
        )
    own.arrays[prefix + "kind"][[count, count + 1]] = CLOSED
    own.arrays[prefix + "kind"][leaf], own.arrays[prefix + "first"][leaf] = CUT, count
    own.arrays[prefix + "threshold"][leaf] = some(rng, np.r_[-1000, 1000, 4:9])


# -- numbers ---------------------------------------------------------------------------------------


def change_multipliers(own: Taken, rng: Rng) -> None:
    names = [n for n in own.arrays if n.endswith(("multipliers", "mix")) or ".given" in n]
    array = own.arrays[str(rng.choice(names))] if names else np.zeros((0, 0))
    if not array.size:
        return
    rows = rng.integers(len(array), size=int(rng.integers(1, 5)))
    match int(rng.integers(7)):
        case 0:
            array[rows] *= some(rng, np.r_[0, -1, 2, 2**20])
        case 1:
            array[rows] //= 2
        case 2:
            array[rows, rng.integers(array.shape[1])] = rng.choice(np.array(NUMBERS))
        case 3:
            array[:] = array[rng.permutation(len(array))]
        case 4:
            array[:] = array[:, rng.permutation(array.shape[1])]
        case 5:
            array[rows] += rng.integers(-999, 1000, (len(rows), array.shape[1]))
        case _:
            array[rows] = array[rows[::-1]]


def change_any(own: Taken, rng: Rng) -> None:
    """Some numbers of any array."""
    names = [n for n, a in own.arrays.items() if a.size]
    array = own.arrays[str(rng.choice(names))].reshape(-1)
    at = rng.integers(array.size, size=max(1, int(array.size * rng.choice([0.0, 0.3]))))
    change = (
        rng.integers(-3, 4, len(at))
        if rng.random() < 0.5
        else rng.choice(np.array(NUMBERS), len(at))
    )
    with np.errstate(over="ignore"):
        array[at] = (array[at] + change).astype(array.dtype)


def change_inner(own: Taken, rng: Rng) -> None:
    header = query(own, rng)
    steps: list[Any] = header["inner"]
    node = int(rng.choice([int(k) for k in header["rules"]])) if header["rules"] else 1
    match int(rng.integers(6)):
        case 0:
            del steps[int(rng.integers(len(steps) + 1)) :]
        case 1:
            steps.reverse()
        case 2 if steps:
            steps[int(rng.integers(len(steps)))]["node"] = some(rng, np.r_[0:9, -1])
        case 3 if steps:
            steps[-1]["precision"] = some(rng, np.r_[0, 1, 15, 32, 33, 63, -1])
        case 4 if steps:
            steps.append(dict(steps[0]))
        case _:
            steps.append({"node": node})
            count = int(rng.integers(0, 9))
            own.arrays[f"q0.inner{len(steps) - 1}"] = rng.integers(-1, 9, count)


def change_rules(own: Taken, rng: Rng) -> None:
    header = query(own, rng)
    keys = [*header["rules"], str(int(rng.integers(0, 12))), "0", "-1", "1.0", "١"]
    header["rules"][str(rng.choice(keys))] = str(
        rng.choice(["staircase", "scan", "sum", "max", "none", ""])
    )


def change_slopes(own: Taken, rng: Rng) -> None:
    header = query(own, rng)
    for node, rule in header["rules"].items():
        if rule == "sum":
            choices: list[Any] = [
                [0, 0],
                [1, 1],
                [-1, 5],
                [2**16, 1],
                [2**17, 1],
                [1],
                None,
                [1.0, 2],
                "12",
                [1, 2, 3],
            ]
            header["slopes"][node] = choices[int(rng.integers(len(choices)))]


def change_columns(own: Taken, rng: Rng) -> None:
    header = query(own, rng)
    columns: list[Any] = header["columns"]
    match int(rng.integers(4)):
        case 0:
            columns.reverse()
        case 1:
            del columns[-1:]
        case 2:
            columns.append([some(rng, np.r_[0:9]), some(rng, np.r_[0:9])])
        case _:
            columns[:] = [[k, n + 1] for k, n in columns]


def swap_queries(own: Taken, rng: Rng) -> None:
    queries: list[Any] = own.header["queries"]
    if len(queries) > 1 and rng.random() < 0.5:
        queries.reverse()
    elif rng.random() < 0.5:
        queries.append(queries[0])
    else:
        del queries[-1]


# -- the header ------------------------------------------------------------------------------------


def odd_header(own: Taken, rng: Rng) -> None:
    """Something in the header is of another type, or odd."""
    place: Any = own.header
    for _ in range(int(rng.integers(1, 6))):
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        if not keys:
            return
        key = keys[int(rng.integers(len(keys)))]
        if isinstance(place[key], dict | list) and place[key] and rng.random() < 0.8:
            place = place[key]
            continue
        odd: list[Any] = [None, True, 0, -1, 1.0, 2**70, [], {}, [[]], {"a": []}, *ODD, *NUMBERS]
        place[key] = odd[int(rng.integers(len(odd)))]
        if isinstance(place, dict) and rng.random() < 0.2:
            place[str(odd[int(rng.integers(len(odd)))])] = place.pop(key)
        return


def odd_decimals(own: Taken, rng: Rng) -> None:
    """The counterexample's decimals."""
    inputs: list[Any] = own.header.get("inputs", [])
    if not inputs:
        return
    at = int(rng.integers(len(inputs)))
    match int(rng.integers(4)):
        case 0:
            inputs[at] = ODD[int(rng.integers(len(ODD)))]
        case 1:
            inputs[at] = str(
                float(inputs[at]) + float(rng.choice([1e-9, -1e-9, 0.01, -0.01, 0.2, 1]))
            )
        case 2:
            inputs.reverse()
        case _:
            inputs.append(inputs.pop(0))


def text_of_header(own: Taken, rng: Rng) -> bytes:
    """The text itself: keys twice, NaN, comments, other encodings, much nesting."""
    text, entries = json.dumps(own.header), own.entries()
    options: list[bytes] = [
        text.replace('"verdict": "', '"verdict": "sat", "verdict": "', 1).encode(),
        text.replace('"version": 2', '"version": 2.0').encode(),
        text.replace('"version": 2', '"version": true').encode(),
        text.replace("[]", "[NaN]", 1).encode(),
        text.replace("[]", "[Infinity]", 1).encode(),
        text.replace("{", "{/* */", 1).encode(),
        text.encode("utf-16"),
        text.encode("utf-8-sig"),
        text[: int(rng.integers(len(text)))].encode(),
        text.encode() + b"{}",
        (text[:-1] + ', "x": ' + "[" * 5000 + "]" * 5000 + "}").encode(),
        (text[:-1] + ', "x": ' + "9" * 5000 + "}").encode(),
        text.replace('"unsat"', '"unsat\\u0000"').encode(),
        text.encode().replace(b'"', b"\xff", 1),
    ]
    entries["header.json"] = options[int(rng.integers(len(options)))]
    return packed(entries)


# -- arrays as files -------------------------------------------------------------------------------


def other_array(own: Taken, rng: Rng) -> None:
    """An array of another type, order, or shape."""
    if not own.arrays:
        return odd_decimals(own, rng)
    name = str(rng.choice(list(own.arrays)))
    array = own.arrays[name]
    with np.errstate(all="ignore"):
        options: list[Callable[[], Array]] = [
            *(
                lambda kind=kind: array.astype(kind)
                for kind in ("i1", "i2", "i4", ">i8", ">i4", "u8", "u1", "f8", "f4", "?")
            ),
            *(
                lambda kind=kind: array.astype(kind)
                for kind in ("c16", "S8", "U8", "O", "M8[s]", "m8[s]")
            ),
            lambda: np.where(array > 0, np.nan, np.inf),
            lambda: array[None],
            lambda: array[..., None],
            lambda: np.asfortranarray(np.stack([array, array])),
            lambda: array.reshape(-1),
            lambda: array.T,
            lambda: array[:-1],
            lambda: np.concatenate([array, array]),
            lambda: array[:0],
            lambda: np.zeros((0, 7), np.int64),
            lambda: np.asarray(5),
            lambda: array.astype([("a", "i8")]),
        ]
        own.arrays[name] = options[int(rng.integers(len(options)))]()


def raw_array(own: Taken, rng: Rng) -> bytes:
    """The text in front of an array, and its bytes."""
    entries = own.entries()
    if not own.arrays:
        return text_of_header(own, rng)
    name = str(rng.choice([n for n in entries if n.endswith(".npy")]))
    data = entries[name]
    length = int.from_bytes(data[8:10], "little")
    text, body = data[10 : 10 + length].decode("latin-1"), data[10 + length :]
    start = text.index("(")
    shape = text[start : text.index(")") + 1]
    shapes = [
        "(-1,)",
        "(1, -1)",
        f"({2**62},)",
        f"({2**31}, {2**31})",
        "(99,)",
        "()",
        "(1.0,)",
        "(True,)",
        "(0,)",
        "( 1,)",
    ]
    texts = [
        *(text.replace(shape, other) for other in shapes),
        *(
            text.replace("'<i8'", other)
            for other in ("'<i9'", "'|O'", "'<f8'", "'>i8'", "'<u8'", "[('a', '<i8')]", "'i8'")
        ),
        *(
            text.replace("False", other)
            for other in ("True", "0", "None", "__import__('os').getpid()")
        ),
        text.replace("{", "{'x': 1, "),
        text.rstrip() + " " * 60_000 + "\n",
        "",
    ]
    match int(rng.integers(4)):
        case 0:
            body = body[: int(rng.integers(len(body) + 1))]
        case 1:
            body += bytes(int(rng.integers(1, 99)))
        case _:
            text = texts[int(rng.integers(len(texts)))]
    raw = text.encode("latin-1")
    version = data[:8] if rng.random() < 0.9 else data[:6] + bytes([int(rng.integers(5)), 0])
    entries[name] = version + len(raw).to_bytes(2, "little") + raw + body
    return packed(entries)


# -- the archive -----------------------------------------------------------------------------------


def cut_file(own: Taken, rng: Rng) -> bytes:
    data = own.joined()
    return data[: int(rng.integers(len(data)))]


def junk_around(own: Taken, rng: Rng) -> bytes:
    data, junk = own.joined(), rng.bytes(int(rng.integers(1, 300)))
    return data + junk if rng.random() < 0.5 else junk + data


def flip_bytes(own: Taken, rng: Rng) -> bytes:
    data = bytearray(own.joined())
    for at in rng.integers(len(data), size=int(rng.choice([1, 1, 2, 8, 40]))):
        data[at] = int(rng.integers(256))
    return bytes(data)


def flip_directory(own: Taken, rng: Rng) -> bytes:
    """Fields of the directory's entries: sizes, methods, flags, offsets, lengths."""
    data = bytearray(own.joined())
    starts = [
        i
        for i in range(len(data) - 4)
        if data[i : i + 4] in (b"PK\x01\x02", b"PK\x03\x04", b"PK\x05\x06")
    ]
    at = int(rng.choice(starts)) + int(rng.integers(4, 46))
    width = int(rng.choice([2, 4]))
    value = (
        int(rng.choice([0, 1, 8, 0xFFFF, 0x7FFF, 99, 12, 14, 2**31 - 1, 2**32 - 1])) % 256**width
    )
    data[at : at + width] = value.to_bytes(width, "little")
    return bytes(data)


def entries_twice(own: Taken, rng: Rng) -> bytes:
    """Entries of one name, of names that look alike, and of no use."""
    buffer, entries = io.BytesIO(), own.entries()
    name = str(rng.choice(list(entries)))
    other = [
        name,
        "../" + name,
        "/" + name,
        name.upper(),
        name + "/",
        "q9.kind.npy",
        "\u202e" + name,
        "",
    ][int(rng.integers(8))]
    import warnings

    with warnings.catch_warnings(), zipfile.ZipFile(buffer, "w") as archive:
        warnings.simplefilter("ignore")
        for own_name, data in entries.items():
            archive.writestr(own_name, data)
        archive.writestr(other, rng.bytes(50) if rng.random() < 0.5 else entries[name])
        if rng.random() < 0.2:
            for k in range(2000):
                archive.writestr(f"x{k}", b"")
    return buffer.getvalue()


def missing_entry(own: Taken, rng: Rng) -> bytes:
    entries = own.entries()
    del entries[str(rng.choice(list(entries)))]
    return packed(entries)


def other_packing(own: Taken, rng: Rng) -> bytes:
    method = (zipfile.ZIP_STORED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA, zipfile.ZIP_DEFLATED)[
        int(rng.integers(4))
    ]
    return packed(own.entries(), method)


def bomb(own: Taken, rng: Rng) -> bytes:
    """Much in little: long arrays, long headers, and sizes in the directory that say otherwise."""
    entries = own.entries()
    name = str(rng.choice(list(entries)))
    size = int(rng.choice([2**22, 2**25]))
    if name == "header.json":
        entries[name] = (
            json.dumps(own.header)[:-1].encode() + b', "x": [' + b"[]," * (size // 3) + b"[]]}"
        )
    else:
        array = io.BytesIO()
        np.save(array, np.zeros((size, 1)[: own.arrays[name[:-4]].ndim], np.int8))
        entries[name] = array.getvalue()
    data = bytearray(packed(entries))
    if rng.random() < 0.5:
        at = data.rindex(b"PK\x01\x02", 0, data.rindex(name.encode()))
        data[at + 24 : at + 28] = struct.pack("<I", int(rng.choice([0, 100, 2**32 - 2])))
    return bytes(data)


Change = Callable[[Taken, Rng], "bytes | None"]
PROOF: tuple[Change, ...] = (
    *(
        swap_entries,
        change_tree,
        move_cuts,
        close_early,
        drop_child,
        turn_leaves,
        swap_children,
        change_regions,
        grow,
    ),
    *(
        change_multipliers,
        change_any,
        change_inner,
        change_rules,
        change_slopes,
        change_columns,
        swap_queries,
    ),
)
WITNESS: tuple[Change, ...] = (odd_decimals,)
FILE: tuple[Change, ...] = (
    *(
        odd_header,
        text_of_header,
        other_array,
        raw_array,
        cut_file,
        junk_around,
        flip_bytes,
        flip_directory,
    ),
    *(entries_twice, missing_entry, other_packing, bomb),
)
