"""Files that are no JSONL at all, told by their first lines."""

from collections.abc import Iterable, Iterator

from jobs.input_paths import InputError, printable
from jobs.refusal import BadRowCode
from jobs.rows import BadRow, InputRow

NUM_FIRST_LINES = 10
"""A file none of whose first non-empty lines, as many as these, is an attempt at a JSON object is no JSONL at all."""

_MAGIC_BYTES = {
    b"\x1f\x8b": "compressed with gzip: decompress it first, or pipe it in: zcat {path} | ... input=-",
    b"\x28\xb5\x2f\xfd": "compressed with zstd: decompress it first, or pipe it in: zstdcat {path} | ... input=-",
    b"\xfd7zXZ": "compressed with xz: decompress it first, or pipe it in: xzcat {path} | ... input=-",
    b"BZh": "compressed with bzip2: decompress it first, or pipe it in: bzcat {path} | ... input=-",
    b"PK\x03\x04": "a zip archive: unpack it first",
    b"PAR1": "Parquet: give it a name that ends in .parquet",
    b"\xff\xfe": "UTF-16: save it as UTF-8",
    b"\xfe\xff": "UTF-16: save it as UTF-8",
    b"[": "a JSON array: write one object per line, for instance with jq -c '.[]' {path}",
}


def refuse_other_formats(path: str, parsed: Iterable[tuple[bytes, InputRow | BadRow]]) -> Iterator[InputRow | BadRow]:
    """The rows, unless the first NUM_FIRST_LINES of them (or all, in a shorter file) show another format: InputError.

    As long as no line has been an attempt at a JSON object, rows are held back; so a file is refused before any of
    its rows is seen, or never. A first line that betrays its format (see _MAGIC_BYTES) is enough.
    """
    held: list[BadRow] = []
    first_line = b""
    rows = iter(parsed)
    for data, item in rows:
        first_line = first_line or data
        if not isinstance(item, BadRow) or _attempts_an_object(data, item.code):
            yield from held
            held.clear()
            yield item
            break
        held.append(item)
        if len(held) == NUM_FIRST_LINES or (item.code != BadRowCode.NOT_OBJECT and _known_format(first_line)):
            break
    if held:
        raise _other_format(path, first_line, held[0].reason)
    for _, item in rows:
        yield item


def _attempts_an_object(data: bytes, code: str) -> bool:
    if code in (BadRowCode.NOT_UTF8, BadRowCode.LINE_TOO_LONG):
        return data.lstrip().startswith(b"{")
    return code not in (BadRowCode.NOT_JSON, BadRowCode.NOT_OBJECT)


def _known_format(first_line: bytes) -> str | None:
    """What the file is instead, and the cure."""
    return next((cure for magic, cure in _MAGIC_BYTES.items() if first_line.startswith(magic)), None)


def _other_format(path: str, first_line: bytes, reason: str) -> InputError:
    cure = _known_format(first_line)
    if cure is not None:
        return InputError(f"input={printable(path)}: is not JSONL but {cure.format(path=printable(path))}")
    return InputError(
        f'input={printable(path)}: is not JSONL: each line must be an object such as {{"prompt": "..."}}, '
        f"but none of the first lines is one ({reason})"
    )
