"""`python helm/values_table.py`: the comments of values.yaml as the table of the chart's README; --check compares."""

import re
import sys
from dataclasses import dataclass
from pathlib import Path

CHART = Path(__file__).parent / "shoal"
BETWEEN = re.compile(r"(?<=<!-- values:start -->\n).*?(?=<!-- values:end -->)", re.DOTALL)
ENTRY = re.compile(r"^(?P<indent> *)(?P<key>[A-Za-z]+):(?: (?P<value>.*))?$")


@dataclass(frozen=True, slots=True)
class Row:
    """One value: its dotted name, its default as it is written, and the comment above it."""

    name: str
    default: str
    text: str


def read_rows(values: str) -> list[Row]:
    """Every value that stands alone on its line; raises ValueError for one without a comment above it."""
    rows: list[Row] = []
    path: list[str] = []
    comment: list[str] = []
    for line in values.splitlines():
        if line.lstrip().startswith("#"):
            comment.append(line.strip().removeprefix("#").strip())
            continue
        if entry := ENTRY.match(line):
            del path[len(entry["indent"]) // 2 :]
            path.append(entry["key"])
            if entry["value"] is not None:
                if not comment:
                    raise ValueError(f"{'.'.join(path)} has no comment in values.yaml; say above it what it is for")
                rows.append(Row(".".join(path), entry["value"], " ".join(comment)))
        comment = []
    return rows


def table(rows: list[Row]) -> str:
    lines = ["| value | default | |", "|---|---|---|"]
    lines += [f"| `{row.name}` | `{row.default}` | {row.text.replace('|', '&#124;')} |" for row in rows]
    return "\n".join(lines) + "\n"


def main(arguments: list[str]) -> int:
    """Write the table; with --check, exit with 1 when the README has another one."""
    readme = CHART / "README.md"
    written = readme.read_text()
    wanted = BETWEEN.sub(lambda _: table(read_rows((CHART / "values.yaml").read_text())), written)
    if arguments == ["--check"]:
        if written != wanted:
            print(f"{readme} is not what values.yaml says: run `python helm/values_table.py`", file=sys.stderr)
        return int(written != wanted)
    readme.write_text(wanted)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
