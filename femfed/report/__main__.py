"""Runs side by side: `python -m femfed.report outputs/DATE/TIME`.

`simulate.py -m` does this at its end; this is for runs that were added later. Several folders, of
sweeps or of single runs, are compared together; the comparison is written to the first.
"""

import sys
from pathlib import Path

from femfed import UserError, escape_unencodable, one_line, print_quietly
from femfed.report.comparison import gather, write


def main(arguments: list[str]) -> int:
    """Compare the runs below some folders; return the exit code."""
    escape_unencodable()
    try:
        if not arguments or {"-h", "--help"} & set(arguments):
            print_quietly(__doc__)
            return 0 if arguments else 2
        print_quietly(compared([*map(Path, arguments)]))
    except UserError as error:
        print(f"error: {one_line(str(error))}", file=sys.stderr)
        return 2
    return 0


def compared(folders: list[Path]) -> str:
    """Write the comparison of the runs below some folders; return it and where it stands.

    Raises:
        UserError: there are no folders, no two finished runs, or the files cannot be written.
    """
    for folder in folders:
        if str(folder).startswith("-") and not folder.exists():
            raise UserError(f"unknown option {folder}; expected folders of runs and nothing else")
        if not folder.is_dir():
            is_there = "is no folder" if folder.exists() else "is not there"
            raise UserError(
                f"{folder} {is_there}; expected the folder of a sweep or a run, outputs/DATE/TIME"
            )
    found = gather(folders, {})
    if not found.groups or found.runs + len(found.left_out) < 2:
        held = f"{folders[0]} holds" if len(folders) == 1 else f"these {len(folders)} folders hold"
        left_out = f" ({'; '.join(found.left_out[:3])})" if found.left_out else ""
        raise UserError(
            f"{held} no two finished runs{left_out}; expected the folder of a sweep, "
            "outputs/DATE/TIME, or several folders of runs"
        )
    try:
        written = write(found, folders[0])
    except OSError as error:
        raise UserError(
            f"{error}; expected a first folder to write comparison.md and comparison.png to"
        ) from None
    return "\n".join([written[0].read_text(encoding="utf-8"), *map(str, written)])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
